"""The points at which the Euler certificate is asked: near the weights as they are, and an independent one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.float64 import map_tensors
from manifold_nets.models import is_continuous
from manifold_nets.running import Inputs
from manifold_nets.symmetry.certificate.euler import EulerField, euler_field, is_vector

__all__ = ["replace_zeros", "second_field"]

# How much longer scales and biases are at the second point.
_FARTHER = 10.0
# Size of what takes the place of zeros, beside the mean modulus of the other entries.
_SMALL = 0.1


def replace_zeros(twin: nn.Module, seed: int) -> None:
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
    tables = {id(module.weight) for module in twin.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in nn.Module.parameters(twin):
            if not is_continuous(parameter) or is_vector(parameter) or id(parameter) in tables:
                continue
            zero = parameter == 0
            if bool(zero.any()) and not bool(zero.all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).to(parameter.device)
                parameter.data = torch.where(zero, _SMALL * parameter.abs().mean() * noise, parameter)


def second_field(twin: nn.Module, inputs: Inputs, seed: int, *, logits: bool = False) -> EulerField:
    """Run another pass at an independent point: weights and floating-point inputs moved, another cotangent.

    What vanishes at both points does not vanish by accident. Scales and biases are longer there, so that a bound that
    no activation reaches at the first point, as that of ReLU6, is reached. Where the model refuses inputs that are
    moved, or answers them with what is not finite, it gets those of the first pass.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def moved(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or leaf.layout != torch.strided:
            return leaf
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        return leaf + 0.5 * leaf.abs().mean() * noise

    with torch.no_grad():
        for parameter in nn.Module.parameters(twin):
            if is_continuous(parameter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
                # In the storage of the noise: the first field goes on holding the weights at its own point.
                factors = noise.mul_(0.2).add_(1).mul_(_FARTHER if is_vector(parameter) else 1.0)
                parameter.data = parameter.data * factors if parameter.is_complex() else factors.mul_(parameter.data)
    try:
        found = euler_field(twin, map_tensors(moved, inputs), seed + 1, logits=logits)
        if all(bool(gradient.isfinite().all()) for gradient in found.gradients.values()):
            return found
    except (ExampleInputsError, DoublePrecisionError):
        pass
    return replace(euler_field(twin, inputs, seed + 1, logits=logits), passes=2)
