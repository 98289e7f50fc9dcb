"""What a step reads and writes, checked before anything is changed: a kernel believes every pointer that it gets.

A `StepPlan` remembers what was checked, so that the next step only compares where tensors lie.
`check` covers what every backend needs: shapes, memory, layout, and the dtype and device of the state. The rest of what
the kernel in C needs (strides, lazy negation, weights that share memory) is in `manifold_nets.optim.backends.native`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import geoopt
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from manifold_nets.errors import StepInputError
from manifold_nets.gathered import is_sharded
from manifold_nets.groups import Partition, accumulation_dtype
from manifold_nets.optim.backends.rule import StepInput

__all__ = ["PER_SPHERE", "WIDE", "Batch", "StepPlan", "check", "mark_written"]

# Moments of one value per sphere; every other tensor in a weight's state but the step count has the weight's shape.
PER_SPHERE = ("exp_avg_sq", "max_exp_avg_sq", "norm")
# Tensors that stay in float32 beside half-precision weights.
WIDE = ("exp_avg_sq", "max_exp_avg_sq", "entry_sq", "max_entry_sq", "master_weight")
# The norms of a plain run, always in float64: a step often changes them by less than the last digit of float32.
NORM = "norm"
_MOMENTS = ("momentum_buffer", "exp_avg")
# Half precision cannot count beyond a few hundred steps.
_COUNTS = (torch.float32, torch.float64)

_DENSE = "Build its layer with sparse=False, or pass a dense gradient: weight.grad = weight.grad.to_dense()."
_RENEW = "Compute the gradient again with backward(), or set it to None."
_REFILL = "Allocate it again before the step, for instance with `parameter.data = values.clone()`."
_RESTART = "Load a state that fits, or reset it with `optimizer.state.pop(parameter)`."
_RESHAPED = "Make the weight a geoopt.ManifoldParameter on a SphereProduct of its new shape, and build a new optimizer."


def check(
    weight: Tensor, gradient: Tensor | None, partition: Partition, state: dict[str, Any], name: Callable[[], str]
) -> None:
    """Raise where a step would read or write memory that is not there; bring the state to its dtype and device.

    Args:
        weight: the parameter.
        gradient: its gradient; None where only the others of a joint sphere have one.
        partition: the groups of the weight.
        state: the state of the weight, empty before the first step. Tensors of another dtype or device than the step
            needs, or whose entries share memory, are replaced by copies.
        name: returns the name of the parameter, for messages.

    Raises:
        StepInputError: the gradient is sparse.
        StepInputError: a shape is not that of the spheres, or a tensor has no memory for its entries.
    """
    shape = partition.shape
    if weight.shape != shape:
        raise StepInputError(name(), f"shape {tuple(weight.shape)}", f"the shape of its spheres, {shape}", _RESHAPED)
    fault = _fault(weight, written=True)
    if fault:
        if _is_abstract(weight):
            return
        raise StepInputError(name(), fault, "memory for every entry", _REFILL)
    if gradient is not None:
        _check_gradient(weight, gradient, partition, name)
    if state:
        _check_state(weight, partition, state, name)


class Batch(list[StepInput]):
    """Weights that one backend steps, and what it keeps of them from step to step.

    Attributes:
        jobs: what the kernel in C is called with, for each of those that are alike.
    """

    jobs: Sequence[Any] = ()
    _alike: list[tuple[Any, list[StepInput]]] | None = None

    def alike(self, key: Callable[[StepInput], Any]) -> list[tuple[Any, list[StepInput]]]:
        """Return the weights by what a backend, always with the same function, finds that they have in common."""
        if self._alike is None:
            found: dict[Any, list[StepInput]] = defaultdict(list)
            for member in self:
                found[key(member)].append(member)
            self._alike = list(found.items())
        return self._alike


def mark_written(members: Sequence[StepInput]) -> None:
    """Tell autograd what a kernel has written behind torch's back."""
    torch.autograd.graph.increment_version(
        [x for m in members for x in (m.weight, m.moment, m.second, m.largest, m.norms) if x is not None]
    )


States = Mapping[Tensor, dict[str, Any]]
_EMPTY: dict[str, Any] = {}
_NO_GRADIENT = torch.empty(0, device="cpu")


class StepPlan:
    """The checked inputs of a group's step, which serve again as long as all tensors lie where they did.

    It holds weights and states, so that no other memory can have their addresses; gradients it lets go after the step.
    It cannot last where tensors are of other classes, or have no memory: these are checked in every step.

    Args:
        options: what of the group decides which inputs and backends a step has, with the manifolds.
        places: where the weights that are stepped stand in the group.
        idle: where weights stand that have no gradient.
        inputs: the weights that are stepped.
        state: the state of the optimizer.
        batches: the backends, and what they step.
    """

    def __init__(
        self,
        options: Sequence[Any],
        places: Sequence[int],
        idle: Sequence[int],
        inputs: Sequence[StepInput],
        state: States,
        batches: Sequence[tuple[Any, Batch]],
    ) -> None:
        self.options, self.places, self.idle, self.inputs, self.batches = options, places, idle, inputs, batches
        self.weights = [member.weight for member in inputs]
        self.held = self._states_in(state)
        gradients = [member.gradient for member in inputs]
        self.can_last = all(type(x) in _ORDINARY for x in (*self.weights, *gradients, *self.held))
        if not self.can_last:
            return
        try:
            with torch._C.DisableTorchFunctionSubclass():
                self._memory = _memory([*self.weights, *self.held])
                self._layouts, self._pointers = _layouts(gradients), _pointers(gradients)
        except (RuntimeError, NotImplementedError):  # inside a transform
            self.can_last = False

    def _states_in(self, state: States) -> list[Any]:
        return [value for weight in self.weights for value in state.get(weight, _EMPTY).values()]

    def holds(
        self, options: Sequence[Any], params: Sequence[Tensor], gradients: Sequence[Tensor | None], state: States
    ) -> bool:
        """Whether a step with these parameters and gradients reads and writes what the last one did.

        If so, the inputs are given the gradients. Ask while `torch._C.DisableTorchFunctionSubclass`.
        """
        if options != self.options or any(gradients[place] is not None for place in self.idle):
            return False
        tensors = [params[place] for place in self.places] + self._states_in(state)
        given: list[Any] = [gradients[place] for place in self.places]
        if list(map(id, tensors)) != list(map(id, (*self.weights, *self.held))) or {*map(type, given)} != {Tensor}:
            return False
        try:
            if _memory(tensors) != self._memory or _layouts(given) != self._layouts:
                return False
            pointers = _pointers(given)
        except (RuntimeError, NotImplementedError):  # sparse, or inside a transform
            return False
        if pointers != self._pointers:
            pairs = zip(given, pointers, self._pointers, strict=True)
            # Zeros that have no memory are nothing that a kernel can read.
            if 0 in pointers or any(_fault(gradient, written=False) for gradient, new, old in pairs if new != old):
                return False
            self._pointers = pointers
        for member, gradient in zip(self.inputs, given, strict=True):
            member.gradient = gradient
        return True

    def let_go(self) -> None:
        """Forget the gradients, whose memory may be wanted before the next step."""
        for member in self.inputs:
            member.gradient = _NO_GRADIENT


_LAYOUT = Tensor.size, Tensor.stride, attrgetter("dtype"), Tensor.is_neg, attrgetter("is_cpu")


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """How tensors lie in memory, wherever that is."""
    return [list(map(ask, tensors)) for ask in _LAYOUT]


def _memory(tensors: Sequence[Tensor]) -> list[Any]:
    return [_pointers(tensors), *_layouts(tensors)]


def _check_state(weight: Tensor, partition: Partition, state: dict[str, Any], name: Callable[[], str]) -> None:
    wide = accumulation_dtype(weight.dtype)
    dtype = wide if "master_weight" in state else weight.dtype
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if key == "step":
            if value.is_meta:
                raise StepInputError(name(), "a step count on the meta device", "the number of steps so far", _RESTART)
            state[key] = value if value.dtype in _COUNTS else value.to(_COUNTS[0])
        elif key in _MOMENTS or key in WIDE or key == NORM:
            wanted = partition.spread_shape if key in PER_SPHERE else partition.shape
            if value.shape != wanted:
                raise StepInputError(name(), f"{key} of shape {tuple(value.shape)}", f"{wanted}", _RESTART)
            right = torch.float64 if key == NORM else wide if key in WIDE else dtype
            if value.dtype != right or value.is_cpu != weight.is_cpu or _fault(value, written=True):
                state[key] = _repaired(key, value, weight, right, name)


def _check_gradient(weight: Tensor, gradient: Tensor, partition: Partition, name: Callable[[], str]) -> None:
    by_row = partition.view == partition.shape and partition.kept == (0,)
    if gradient.layout != torch.strided and not (by_row and gradient.is_sparse and gradient.sparse_dim() == 1):
        raise StepInputError(name(), f"a gradient of layout {gradient.layout}", "a dense gradient", _DENSE)
    found = None
    if gradient.shape != weight.shape:
        found = f"a gradient of shape {tuple(gradient.shape)}"
    elif gradient.dtype.is_complex:
        found = f"a gradient of dtype {gradient.dtype}"
    elif gradient.is_cpu != weight.is_cpu:
        found = f"a gradient on {gradient.device}"
    elif not gradient.is_sparse and (lacking := _fault(gradient, written=False)):
        found = f"a gradient with {lacking}"
    if found:
        raise StepInputError(name(), found, f"real numbers of shape {tuple(weight.shape)} on {weight.device}", _RENEW)


def _fault(tensor: Tensor, *, written: bool) -> str:
    """Return what is wrong with the memory of a tensor, in words; nothing where all entries are in it.

    A tensor that is written needs a place in memory for every entry by itself. Sharded tensors are left to torch.
    """
    if type(tensor) not in _ORDINARY and is_sharded(tensor):
        return ""
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # inside vmap and other transforms
        return "no memory of its own"
    if tensor.is_contiguous():
        enough = held >= tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        if enough and type(tensor) in _ORDINARY and (tensor.data_ptr() != 0 or not written):
            return ""
        sizes = [(tensor.numel(), 1)]
    else:
        sizes = sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1])
    if _is_abstract(tensor):
        return _NO_VALUES
    if tensor._is_zerotensor():  # zeros without memory; what reads them finds zeros
        return "no memory" if written else ""
    end = tensor.storage_offset() + 1 + sum((size - 1) * step for size, step in sizes)
    if held < end * tensor.itemsize:
        return f"memory of {held} bytes instead of {end * tensor.itemsize}"
    reach = 0
    for size, step in sizes if written else ():
        if size > 1 and step <= reach:
            return "entries that share memory"
        reach += (size - 1) * step
    return ""


_NO_VALUES = "no values (a meta or fake tensor)"
# Their memory is what they say; of other classes more is asked.
_ORDINARY = (Tensor, geoopt.ManifoldParameter, torch.nn.Parameter)


def _is_abstract(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _repaired(key: str, value: Tensor, weight: Tensor, dtype: torch.dtype, name: Callable[[], str]) -> Tensor:
    """Return a tensor of the state with the same values in memory of its own, in another dtype or on another device."""
    lacking = _NO_VALUES if _is_abstract(value) else _fault(value, written=False)
    if lacking:
        raise StepInputError(name(), f"{key} with {lacking}", "the numbers of the last step", _RESTART)
    if is_sharded(value):
        return value.to(dtype)
    if value.shape == weight.shape:
        return torch.empty_like(weight, dtype=dtype, requires_grad=False).copy_(value)
    return torch.empty(value.shape, dtype=dtype, device=weight.device).copy_(value)
