"""What a conversion did, kept on the model so that values of the plain network can be converted the same way later.

The record follows deep copies and pickles. It names tensors as the converted model does, and holds one number for each
channel of a normalization, but no values of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from manifold_nets.conversion.actions import ConversionPlan
from manifold_nets.conversion.algebra import gather, rescaled_variance
from manifold_nets.conversion.biases import removed_biases
from manifold_nets.symmetry import Absorber, SymmetryFamily
from manifold_nets.symmetry.report import ScaledAlong, WeightFinding

__all__ = [
    "ConvertedWeight",
    "Moves",
    "forget_moves",
    "known_weights",
    "moves_of",
    "moves_within",
    "record_moves",
    "rescaled_along",
]

_RECORD = "_manifold_nets_moves"


@dataclass(frozen=True)
class ConvertedWeight:
    """How a weight was put on its spheres, and what changes with its scale.

    Args:
        radius: the radius of unit filters, √k for k filters in a group; None where the groups keep their norms.
        biases: the biases that are scaled along.
        absorbers: the normalizations behind, whose running statistics are scaled along.
    """

    radius: float | None
    biases: tuple[ScaledAlong, ...] = ()
    absorbers: tuple[Absorber, ...] = ()

    @classmethod
    def of(cls, finding: WeightFinding, radius: float | None) -> ConvertedWeight:
        """Keep of a finding what is needed to scale it again."""
        return cls(radius, finding.scaled_along, tuple(replace(a, variances=()) for a in finding.absorbers))

    def without(self, names: Container[str]) -> ConvertedWeight:
        """Leave biases out that the model does not have any more."""
        return replace(self, biases=tuple(bias for bias in self.biases if bias.name not in names))

    @property
    def along(self) -> tuple[str, ...]:
        """Names of the biases and running statistics that are scaled along."""
        buffers = [n for a in self.absorbers for n in (a.running_mean, a.running_var) if n is not None]
        return tuple(dict.fromkeys([*(bias.name for bias in self.biases), *buffers]))


@dataclass
class Moves:
    """What a conversion did to a model.

    Args:
        weights: the weights that it put on spheres, by name.
        biases: the running means that hold a removed bias itself; None where they hold something that was measured.
        tolerance: largest relative change of a layer's normalized training output that unit radius may cause.
    """

    weights: dict[str, ConvertedWeight] = field(default_factory=dict)
    biases: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    tolerance: float = 1e-4


def moves_of(model: nn.Module) -> Moves | None:
    """Return the record on a model, None where it was not converted in this process."""
    record = model.__dict__.get(_RECORD)
    return record if isinstance(record, Moves) else None


def moves_within(model: nn.Module) -> Iterator[tuple[str, nn.Module, Moves]]:
    """Yield the converted models that a model is or holds, with the prefix of their names and their records."""
    for name, module in model.named_modules():
        record = moves_of(module)
        if record is not None:
            yield f"{name}." if name else "", module, record


def record_moves(model: nn.Module, chosen: ConversionPlan, tolerance: float) -> None:
    """Note what a plan did to a model, in addition to what earlier conversions did."""
    record = moves_of(model) or Moves()
    weights, biases = dict(record.weights), dict(record.biases)
    for action in chosen.spheres:
        if action.finding is not None:
            unit = float(action.finding.filters_per_group) ** 0.5
            weights[action.name] = ConvertedWeight.of(action.finding, unit if action.radius == "unit" else None)
    for action in chosen.of("joint sphere"):
        if isinstance(action.symmetry, SymmetryFamily):
            weights.update(dict.fromkeys(action.symmetry.parameters, ConvertedWeight(None)))
    for action in chosen.of("remove"):
        biases[action.name] = tuple(action.shifts) if action.direct else None
    model.__dict__[_RECORD] = Moves(weights, biases, tolerance)


def known_weights(model: nn.Module, record: Moves) -> dict[str, ConvertedWeight]:
    """What changes with each converted weight, as the model is now: removed biases do not."""
    removed = removed_biases(model)
    return {name: weight.without(removed) for name, weight in record.weights.items()}


def forget_moves(model: nn.Module) -> None:
    """Take the record off a model."""
    model.__dict__.pop(_RECORD, None)


def rescaled_along(weight: ConvertedWeight, factors: Tensor, current: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
    """New float64 values of the biases and running statistics that change when a weight's groups are multiplied.

    Args:
        weight: what changes with it.
        factors: the factor of each group, float64.
        current: gives the present values of a tensor, in float64.
    """
    changed: dict[str, Tensor] = {}
    for bias in weight.biases:
        old = current(bias.name)
        changed[bias.name] = old * gather(factors, bias.groups).reshape(old.shape)
    seen: set[str] = set()
    for absorber in weight.absorbers:
        if absorber.running_mean is None or absorber.running_var is None or absorber.running_var in seen:
            continue
        seen.add(absorber.running_var)
        changed.update(_rescaled_statistics(absorber, factors, current))
    return changed


def _rescaled_statistics(absorber: Absorber, factors: Tensor, current: Callable[[str], Tensor]) -> dict[str, Tensor]:
    mean, variance = str(absorber.running_mean), str(absorber.running_var)
    factor = gather(factors, absorber.groups)
    reached = torch.tensor(absorber.groups, device=factor.device) >= 0
    new_variance = rescaled_variance(current(variance), absorber.eps or 0.0, factor)
    return {
        mean: current(mean) * factor,
        variance: torch.where(reached, new_variance, current(variance)),
    }
