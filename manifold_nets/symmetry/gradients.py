"""Float64 gradients at the given weights and at a second point, and their sums over groups.

One forward and backward pass with a random cotangent on all outputs, in training mode, with the eps of every
normalization made negligible and with dropout off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from manifold_nets.errors import AnalysisError, DoublePrecisionError, ExampleInputsError, ManifoldNetsError
from manifold_nets.float64 import map_tensors
from manifold_nets.groups import Partition
from manifold_nets.models import is_continuous
from manifold_nets.running import Inputs, run
from manifold_nets.symmetry.exact_mode import exact_mode
from manifold_nets.symmetry.group_sums import GroupSums, coarsened, group_sums

__all__ = [
    "MOST_PASSES",
    "GradientPass",
    "differentiable_outputs",
    "differentiating",
    "gradient_pass",
    "is_vector",
    "move_vectors",
    "pass_without_values",
    "random_projection",
    "real_fields",
    "replace_zeros",
    "second_pass",
]

# Passes forward and backward that an analysis takes at most.
MOST_PASSES = 4
# How much longer scales and biases are at the second point.
_FARTHER = 10.0
# Size of what takes the place of zeros, beside the mean modulus of the other entries.
_SMALL = 0.1
# Entries of a parameter among which zeros are looked for at once.
_PART = 1 << 16


@dataclass(frozen=True)
class GradientPass:
    """Weights and gradients of one float64 pass, by parameter name.

    Args:
        weights: the parameters at which the gradients were taken.
        gradients: ∂L/∂w for a random cotangent; zero where the output does not depend on it, and for integers.
        without_values: whether there are none, as on the meta device.
        passes: how many passes forward and backward it took to get there.
        loss: what was differentiated: the sum of the outputs with random weights.
        required: for some weights the partitions whose sums the certificates read, so that one reading takes them all.
        searched: likewise those that the numerical search reads.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    without_values: bool = False
    passes: int = 1
    loss: float = 0.0
    required: Mapping[str, Sequence[Partition]] = field(default_factory=dict, repr=False, compare=False)
    searched: Mapping[str, Sequence[Partition]] = field(default_factory=dict, repr=False, compare=False)
    _sums: dict[str, dict[Partition, GroupSums]] = field(default_factory=dict, repr=False, compare=False)
    _sizes: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)
    _slopes: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    @cached_property
    def largest_slope(self) -> float:
        """The largest modulus of an entry of a gradient."""
        return max(filter(math.isfinite, map(self.slope, self.gradients)), default=0.0)

    def slope(self, name: str) -> float:
        """The largest modulus of an entry of the gradient of a parameter."""
        if self.without_values:
            return 0.0
        if name not in self._slopes:
            gradient = self.gradients[name]
            self._slopes[name] = float(torch.stack(gradient.aminmax()).abs().max()) if gradient.numel() else 0.0
        return self._slopes[name]

    def sums(self, name: str, partition: Partition) -> GroupSums:
        """Sums of ``w ⊙ g``, ``w²``, ``g²`` and ``g`` over the groups of a partition, kept for whoever asks again."""
        if self.without_values:
            return GroupSums(*np.zeros((4, partition.n_groups)))
        known = self._sums.setdefault(name, {})
        if partition not in known:
            finer = (coarsened(sums, fine, partition) for fine, sums in known.items())
            found = next((sums for sums in finer if sums is not None), None)
            known.update({partition: found} if found is not None else self._taken(name, partition))
        return known[partition]

    def size(self, name: str) -> float:
        """``Σ_g ‖w_g‖ ‖∂L/∂w_g‖`` over the groups of a parameter, of the partition in which it is smallest.

        No ``|Σ_G w ⊙ ∂L/∂w|`` is larger, and no scale of a filter changes it. ``‖w‖ ‖∂L/∂w‖`` has the first property
        alone: the gradient of a tiny filter in front of a normalization is huge, and multiplies the others' norm there.
        """
        return self._group_sizes(name)[0]

    def largest_group(self, name: str) -> float:
        """The largest ``‖w_g‖ ‖∂L/∂w_g‖`` of these groups."""
        return self._group_sizes(name)[1]

    def _group_sizes(self, name: str) -> tuple[float, float]:
        """The sum of the sizes of the groups of a parameter, and the largest of them, of the smallest partition."""
        if name not in self._sizes:
            partitions = self.required.get(name) or (Partition.filters(self.shapes[name] or (1,)),)
            sums = (self.sums(name, partition) for partition in partitions)
            sizes = (np.sqrt(each.weights) * np.sqrt(each.gradients) for each in sums)
            self._sizes[name] = min((float(size.sum()), float(size.max())) for size in sizes)
        return self._sizes[name]

    def forget(self, name: str, partition: Partition) -> None:
        """Give the memory of some sums back."""
        self._sums.get(name, {}).pop(partition, None)

    def _taken(self, name: str, partition: Partition) -> dict[Partition, GroupSums]:
        """The sums of a partition, and of those that will be asked for."""
        partitions = list(dict.fromkeys([partition, *self.required.get(name, ()), *self.searched.get(name, ())]))
        taken = group_sums(self.weights[name], self.gradients[name], partitions)
        return dict(zip(partitions, taken, strict=True))


def gradient_pass(model_copy: nn.Module, inputs: Inputs, seed: int, *, logits: bool = False) -> GradientPass:
    """Run the forward and backward pass of the certificate on an analysis copy.

    One-dimensional parameters are moved a little at random, and parameters that are all zero are drawn anew: biases
    and scales at 0 or 1, as they are initialized, would hide gradients or fake invariances. The copy is left with
    these values. Where the outputs are ``logits``, compared along axis 1, so is the cotangent: it sums to zero there.

    Raises:
        ExampleInputsError: the model refuses the inputs or returns no floating-point tensor.
        AnalysisError: the backward pass fails.
    """
    device = next((parameter.device for parameter in nn.Module.parameters(model_copy)), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    parameters = {name: parameter for name, parameter in model_copy.named_parameters() if is_continuous(parameter)}
    move_vectors(parameters.values(), generator)
    with torch.random.fork_rng(), torch.enable_grad(), exact_mode(model_copy):
        torch.manual_seed(seed)
        loss = random_projection(differentiable_outputs(model_copy, inputs), generator, logits=logits)
        edges = [get_gradient_edge(parameter) for parameter in parameters.values()]
        with differentiating(model_copy):
            gradients: Sequence[Tensor | None] = (
                torch.autograd.grad([get_gradient_edge(loss)], edges, allow_unused=True) if edges else ()
            )
    zeros = _zeros(model_copy)
    weights, slopes = real_fields(parameters, gradients)
    return GradientPass({**zeros, **weights}, {**zeros, **slopes}, loss=float(loss.detach().real))


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Raise `AnalysisError` where torch cannot take the gradients of a model in the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, ManifoldNetsError):
            raise
        raise AnalysisError(type(model).__name__, error, differentiating=True) from error


def move_vectors(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """Move parameters with entries along one axis at most a little at random, and draw those anew that are all zero."""
    with torch.no_grad():
        for parameter in parameters:
            if is_vector(parameter) or _is_zero(parameter):
                noise = torch.randn(
                    parameter.shape, generator=generator, dtype=parameter.dtype, device=parameter.device
                )
                # Not in place: the values may be shared with the model.
                parameter.data = torch.add(parameter.data, noise, alpha=0.1)


def _is_zero(parameter: Tensor) -> bool:
    """Whether all entries are zero; most parameters need no look at more than one."""
    return not bool(parameter[(slice(1),) * parameter.ndim].any()) and not bool(parameter.any())


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter has its entries along one axis, as biases and scales have them, whatever their shape."""
    return parameter.numel() == max(parameter.shape, default=1)


def differentiable_outputs(model_copy: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of a copy that depend on a weight; see `exact_mode`, under which it is asked for them.

    Raises:
        ExampleInputsError: the model refuses the inputs or returns no floating-point tensor.
    """
    outputs = [leaf for leaf in run(model_copy, inputs) if leaf.requires_grad]
    if not outputs and any(True for _ in nn.Module.parameters(model_copy)):
        raise ExampleInputsError(f"inputs for which no output of {type(model_copy).__name__} depends on a weight")
    return outputs


def random_projection(outputs: Iterable[Tensor], generator: torch.Generator, *, logits: bool) -> Tensor:
    """Sum of all outputs with random weights, which sum to zero along axis 1 where the outputs are logits."""
    loss = torch.zeros((), dtype=torch.float64, device=generator.device)
    for output in outputs:
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64, device=generator.device)
        if logits and cotangent.ndim >= 2:
            cotangent -= cotangent.mean(1, keepdim=True)
        loss = loss + (output * cotangent.to(output.dtype)).sum()
    return loss


def pass_without_values(model_copy: nn.Module) -> GradientPass:
    """The field of a model without values: zeros that take neither memory nor time, so that nothing has evidence."""
    zeros = _zeros(model_copy)
    return GradientPass(zeros, zeros, without_values=True)


def _zeros(model_copy: nn.Module) -> dict[str, Tensor]:
    """Zeros in the shape of each parameter that take no memory."""
    zero = torch.zeros((), dtype=torch.float64)
    return {name: zero.expand(parameter.shape) for name, parameter in model_copy.named_parameters()}


def real_fields(
    parameters: Mapping[str, Tensor], gradients: Iterable[Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients; of a complex weight its modulus and the gradient along it: their products are the same."""
    weights, slopes = {}, {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        weight = weights[name] = parameter.detach()
        if gradient is None:
            slopes[name] = torch.zeros((), dtype=torch.float64, device=weight.device).expand(weight.shape)
        else:
            slopes[name] = gradient.detach().to_dense()  # embeddings may have sparse ones
        if weight.is_complex():
            modulus = weights[name] = weight.abs()
            slopes[name] = torch.where(modulus > 0, (weight.conj() * slopes[name]).real / modulus, 0.0)
    return weights, slopes


def replace_zeros(model_copy: nn.Module, seed: int) -> None:
    """Replace the entries of weights that are exactly zero by small random numbers, in place of a copy's parameters.

    Pruned weights, Dirac initialization and identity matrices: a filter of zeros makes a channel without variance, and
    with one entry a row all rows pass for columns. What the structure claims holds whatever the values are. A row of
    zeros in a table stays: it has no direction, and its finding says so.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(layer.weight)
        >>> replace_zeros(layer, 0)
        >>> bool((layer.weight == 0).any())
        False
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight) for module in model_copy.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in nn.Module.parameters(model_copy):
            if not is_continuous(parameter) or is_vector(parameter) or id(parameter) in tables or _is_zero(parameter):
                continue
            parameter.data, size = parameter.data.contiguous(), None
            for start in range(0, parameter.numel(), _PART):
                part = parameter.data.view(-1)[start : start + _PART]
                zero = part == 0
                if bool(zero.any()):
                    size = _SMALL * torch.linalg.vector_norm(parameter, 1) / parameter.numel() if size is None else size
                    noise = torch.randn(int(zero.sum()), generator=generator, dtype=parameter.dtype)
                    part[zero] = size * noise.to(part.device)


def second_pass(
    model_copy: nn.Module, inputs: Inputs, seed: int, *, logits: bool = False, passes: int = MOST_PASSES
) -> GradientPass:
    """Run another pass at an independent point: weights and floating-point inputs moved, another cotangent.

    What vanishes at both points does not vanish by accident. Scales and biases are longer there, so that a bound that
    no activation reaches at the first point, as that of ReLU6, is reached. Where the model refuses inputs that are
    moved, or answers them with what is not finite, it gets those of the first pass, as it does where but one of the
    ``passes`` is left.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def moved(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or leaf.layout != torch.strided:
            return leaf
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        return leaf + 0.5 * leaf.abs().mean() * noise

    with torch.no_grad():
        for parameter in nn.Module.parameters(model_copy):
            if is_continuous(parameter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
                # In the storage of the noise: the first field goes on holding the weights at its own point.
                factors = noise.mul_(0.2).add_(1).mul_(_FARTHER if is_vector(parameter) else 1.0)
                parameter.data = parameter.data * factors if parameter.is_complex() else factors.mul_(parameter.data)
    try:
        found = gradient_pass(model_copy, map_tensors(moved, inputs) if passes > 1 else inputs, seed + 1, logits=logits)
        if passes < 2 or all(bool(gradient.isfinite().all()) for gradient in found.gradients.values()):
            return found
    except (ExampleInputsError, DoublePrecisionError):
        pass
    return replace(gradient_pass(model_copy, inputs, seed + 1, logits=logits), passes=2)
