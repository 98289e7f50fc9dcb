"""The points at which the Euler certificate is asked again: an independent one, and those far along a ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.symmetry.certificate.euler import EulerField, euler_field, is_vector
from manifold_nets.symmetry.network.graph import Inputs
from manifold_nets.symmetry.network.precision import map_tensors
from manifold_nets.symmetry.network.twin import is_continuous

__all__ = ["farther_field", "second_field"]

# How much longer scales and biases are at the second point.
_FARTHER = 10.0


def second_field(twin: nn.Module, inputs: Inputs, seed: int, *, logits: bool = False) -> EulerField:
    """Run another pass at an independent point: weights and floating-point inputs moved, another cotangent.

    What vanishes at both points does not vanish by accident. Scales and biases are longer there, so that a bound that
    no activation reaches at the first point, as that of ReLU6, is reached. Where the model refuses inputs that are
    moved, or answers them with what is not finite, it gets those of the first pass.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def moved(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        return leaf + 0.5 * leaf.abs().mean() * noise

    with torch.no_grad():
        for parameter in twin.parameters():
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


def farther_field(
    twin: nn.Module, inputs: Inputs, seed: int, factors: Mapping[str, Tensor], *, logits: bool = False
) -> EulerField | None:
    """Run a pass with some parameters multiplied by factors, for the gradients of these alone.

    The copy is left as it was. None where the model refuses, or answers with what is not finite: that tells nothing.

    Args:
        twin: the copy, at any point.
        inputs: the example inputs.
        seed: seed of the cotangent.
        factors: for each parameter whose gradient is wanted a factor for each entry, in its shape.
        logits: whether the outputs are logits along axis 1.
    """
    saved = {name: parameter.data for name, parameter in twin.named_parameters()}
    try:
        for name, parameter in twin.named_parameters():
            if name in factors:
                parameter.data = parameter.data * factors[name].to(parameter.device)
        found = euler_field(twin, inputs, seed, logits=logits, only=factors)
    except (ExampleInputsError, DoublePrecisionError):
        return None
    finally:
        for name, parameter in twin.named_parameters():
            parameter.data = saved[name]
    return found if all(bool(gradient.isfinite().all()) for gradient in found.gradients.values()) else None
