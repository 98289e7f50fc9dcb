"""The certificate with little memory: float64 for one weight at a time, without storing gradients.

The copy under analysis shares its weights with the model, in the model's precision. Each operation gets its weight cast
to float64, and so does its backward pass, which casts again instead of letting autograd keep the cast. As soon as the
gradient of a weight is complete, its sums over the required groups are computed, and it is freed. If a weight is used
several times, its gradient is accumulated in float32: by the Cauchy-Schwarz inequality this changes a certificate by at
most half a machine epsilon of float32, so the tolerance must be at least `ROUNDING`. In addition to the model this
needs some float64 copies of the largest weight, and the memory of the forward pass on the example inputs.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter, UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from manifold_nets.float64 import Reading
from manifold_nets.groups import Partition
from manifold_nets.models import analysis_copy, is_continuous
from manifold_nets.running import Inputs
from manifold_nets.symmetry.exact_mode import exact_mode
from manifold_nets.symmetry.gradients import (
    GradientPass,
    differentiable_outputs,
    differentiating,
    move_vectors,
    random_projection,
)
from manifold_nets.symmetry.group_sums import GroupSums, group_sums

__all__ = ["ROUNDING", "low_memory_copy", "low_memory_pass", "widen_vectors"]

# Gradients rounded to float32 leave values up to half of this where a group is invariant.
ROUNDING = torch.finfo(torch.float32).eps


class _Widened(UserDict[str, Tensor]):
    """Tensors by name, each in float64 for as long as it is in use."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(torch.float64)


def low_memory_copy(model: nn.Module) -> nn.Module:
    """Copy a model for analysis, in its own precision, with parameters of two and more axes shared, not copied.

    Raises:
        AnalysisError: the model cannot be copied.
        UnsupportedModelError: it is a script or quantized, or has parameters without a shape.
    """
    # A parameter that was made in inference mode cannot have a gradient: its copy can.
    weights = [p for p in nn.Module.parameters(model) if p.ndim >= 2]
    own = {id(p): p.detach().clone() if p.is_inference() else p.detach() for p in weights}
    shared = {key: nn.Parameter(values, requires_grad=False) for key, values in own.items()}
    return analysis_copy(model, shared)


def widen_vectors(model_copy: nn.Module) -> None:
    """Cast the buffers and the parameters that are not shared to float64."""
    for module in model_copy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.float64)
    for parameter in nn.Module.parameters(model_copy):
        if parameter.ndim < 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float64)


class _Freed:
    """Hands memory that was freed back to the system, each time that this many bytes have been.

    The allocator of the C library keeps what is freed between tensors that live on: float64 copies of one weight after
    the other would take as much as all of them. Elsewhere than in the C library of GNU nothing is done.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.trim: Callable[[int], int] | None = None
        try:
            self.trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):
            return

    def add(self, count: int) -> None:
        self.bytes += count
        if self.trim is not None and self.bytes > self.limit:
            self.trim(0)
            self.bytes = 0


class _Passes:
    """The casts of one forward and backward pass, and the gradients that it leaves."""

    def __init__(self, model_copy: nn.Module, required: Mapping[str, Sequence[Partition]]) -> None:
        self.narrow = {
            id(p): (name, p)
            for name, p in model_copy.named_parameters()
            if p.is_floating_point() and p.dtype != torch.float64
        }
        self.weights = {name: parameter.detach() for name, parameter in model_copy.named_parameters()}
        self.required = required
        self.open: Counter[str] = Counter()
        self.gradients: dict[str, Tensor] = {}
        self.sums: dict[str, dict[Partition, GroupSums]] = {}
        self.largest = 0.0
        self.freed = _Freed(sum(weight.numel() * weight.element_size() for weight in self.weights.values()) // 8)
        self.casts: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def widened(self, name: str, weight: Tensor) -> Tensor:
        """A weight in float64, of which the gradient will be taken up."""
        self.freed.add(8 * weight.numel())
        wide: Tensor = _Cast.apply(weight, self, name)  # type: ignore[no-untyped-call]
        storage = wide.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.casts[storage.data_ptr()] = reference, weight.detach()
        return wide

    def take(self, name: str, gradient: Tensor) -> None:
        """Take up the gradient of one use of a weight."""
        self.freed.add(8 * gradient.numel())
        self.open[name] -= 1
        waiting = self.gradients.pop(name, None)
        if waiting is not None:
            gradient = waiting + gradient
        if self.open[name] > 0 or name not in self.required:
            self.gradients[name] = gradient.to(torch.float32)
        else:
            self.reduce(name, gradient)

    def reduce(self, name: str, gradient: Tensor) -> None:
        """Take the sums of a gradient that will be asked for."""
        partitions = self.required[name]
        self.sums[name] = dict(zip(partitions, group_sums(self.weights[name], gradient, partitions), strict=True))
        self.largest = max(self.largest, float(torch.stack(gradient.aminmax()).abs().max()))

    def finish(self) -> None:
        """Reduce what still waits for a use that the outputs do not depend on."""
        for name in [name for name in self.gradients if name in self.required]:
            self.reduce(name, self.gradients.pop(name))

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor: of a weight in float64, where to cast it from."""
        if saved.layout != torch.strided:
            return saved  # no weight
        reference, weight = self.casts.get(saved.untyped_storage().data_ptr(), (None, None))
        if reference is None or weight is None or saved.dtype != torch.float64:
            return saved
        if reference.expired():  # type: ignore[no-untyped-call]
            return saved  # another tensor where a cast has been
        return weight, tuple(saved.shape), saved.stride(), saved.storage_offset()

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight, shape, stride, offset = kept
        wide: Tensor = weight.to(torch.float64)
        return wide.as_strided(shape, stride, offset)


class _Cast(torch.autograd.Function):
    """Casts a weight to float64; the gradient is taken up and not passed on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, passes: _Passes, name: str) -> Tensor:
        ctx.passes, ctx.name = passes, name
        passes.open[name] += bool(ctx.needs_input_grad[0])
        return weight.detach().to(torch.float64)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.passes.take(ctx.name, gradient.to_dense())
        return None, None, None


@dataclass(frozen=True)
class LowMemoryPass(GradientPass):
    """Sums of the weights whose gradients are not kept; whole gradients of the other parameters.

    Args:
        again: computes the gradients of all parameters, for sums that nobody had asked for.
        largest: the largest modulus of an entry of the gradients that were not kept.
    """

    again: Callable[[], GradientPass] = field(kw_only=True, repr=False, compare=False)
    largest: float = field(kw_only=True)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        return {name: tuple(weight.shape) for name, weight in cast(_Widened, self.weights).data.items()}

    @cached_property
    def largest_slope(self) -> float:
        """The largest modulus of an entry of a gradient."""
        return max(self.largest, super().largest_slope)

    @cached_property
    def _whole(self) -> GradientPass:
        return self.again()

    def _taken(self, name: str, partition: Partition) -> dict[Partition, GroupSums]:
        if name in self.gradients:
            return super()._taken(name, partition)
        return {partition: self._whole.sums(name, partition)}


def low_memory_pass(
    model_copy: nn.Module,
    inputs: Inputs,
    seed: int,
    required: Mapping[str, Sequence[Partition]] | None = None,
    *,
    logits: bool = False,
    state: Tensor | None = None,
) -> LowMemoryPass:
    """Run the forward and backward pass of the certificate on such a copy; see `gradient_pass`.

    Args:
        model_copy: the copy; its parameters of one axis, and those that are zero, are moved.
        inputs: its inputs, in float64.
        seed: seed of the random cotangent.
        required: for some weights the partitions whose sums will be asked for; the gradients of the others are kept,
            rounded to float32. Should other sums be asked for, the pass is run once more.
        logits: whether the cotangent sums to zero along axis 1.
        state: that of the random numbers, where the parameters have been moved already.

    Raises:
        ExampleInputsError: the model refuses the inputs or returns no floating-point tensor.
        AnalysisError: the backward pass fails.
    """
    device = next((parameter.device for parameter in nn.Module.parameters(model_copy)), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    if state is None:
        move_vectors([p for p in nn.Module.parameters(model_copy) if is_continuous(p)], generator)
        state = generator.get_state()
    generator.set_state(state)
    required = required or {}
    passes = _Passes(model_copy, required)
    for parameter in nn.Module.parameters(model_copy):
        parameter.grad = None
    with torch.random.fork_rng(), torch.enable_grad(), saved_tensors_hooks(passes.pack, passes.unpack):
        torch.manual_seed(seed)
        with exact_mode(model_copy, Reading(passes.narrow, passes.widened)):
            loss = random_projection(differentiable_outputs(model_copy, inputs), generator, logits=logits)
            with differentiating(model_copy):
                torch.autograd.backward([get_gradient_edge(loss)])
    passes.finish()
    passes.freed.add(passes.freed.limit + 1)
    gradients = dict(passes.gradients)
    for name, parameter in model_copy.named_parameters():
        if name not in gradients and name not in passes.sums:
            none = torch.zeros((), device=parameter.device).expand(parameter.shape)
            gradients[name] = none if parameter.grad is None else parameter.grad.to_dense()

    return LowMemoryPass(
        _Widened(passes.weights),
        _Widened(gradients),
        required=required,
        _sums=passes.sums,
        again=functools.partial(low_memory_pass, model_copy, inputs, seed, logits=logits, state=state),
        largest=passes.largest,
        loss=float(loss.detach().real),
    )
