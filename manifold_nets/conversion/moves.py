"""Which values change together: the record by which a model is converted, converted again and projected.

A conversion moves parameters along symmetries of the network. `ScaledWeight` is a move along ``c ⊙ w``: the groups of a
weight are multiplied by factors, and biases and running statistics change with them. `RemovedBias` is a move along a
constant d: a bias becomes zero, and running means change with it. `convert` applies the moves; `Moves` keeps them on
the model and in its checkpoint, so that `load_state_dict`, `load` and `project` can apply them to other values of the
plain network.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.gathered import whole
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.manifold import SphereProduct
from manifold_nets.symmetry.report import Absorber, ScaledAlong, WeightFinding

# The attribute of a converted model that holds its `Moves`. It follows deep copies and pickles.
MOVES = "_manifold_nets_moves"
# A running variance whose rounding is magnified by more than this is no longer exact in evaluation mode.
_LARGEST_CANCELLATION = 8.0


class Values(dict[str, Tensor]):
    """New float64 values of parameters and buffers by name; missing ones are looked up among the present values.

    Args:
        present: the present values.

    Example:
        >>> values = Values({"weight": torch.ones(2), "bias": torch.zeros(2)})
        >>> values["weight"] = 3 * values["weight"]
        >>> values["weight"].tolist(), values["bias"].dtype, list(values)
        ([3.0, 3.0], torch.float64, ['weight'])
    """

    def __init__(self, present: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.present = present

    def __missing__(self, name: str) -> Tensor:
        return whole(self.present[name]).double()


@dataclass(frozen=True)
class ScaledWeight:
    """A weight that goes on its spheres by one factor for each group, and what is rescaled with it.

    Args:
        name: the weight.
        radius: the radius of unit filters, √k for k filters in a group; None if the groups keep their norms.
        biases: the biases that are rescaled with the weight.
        absorbers: the normalizations behind the weight, whose running statistics are rescaled too.
    """

    name: str
    radius: float | None = None
    biases: tuple[ScaledAlong, ...] = ()
    absorbers: tuple[Absorber, ...] = ()

    @classmethod
    def of(cls, finding: WeightFinding, radius: float | None) -> ScaledWeight:
        """Make the move of a weight from its finding."""
        return cls(finding.name, radius, finding.scaled_along, finding.absorbers)

    @property
    def along(self) -> tuple[str, ...]:
        """Names of the biases and running statistics that are rescaled with the weight."""
        buffers = [n for a in self.absorbers for n in (a.running_mean, a.running_var) if n is not None]
        return tuple(dict.fromkeys([*(bias.name for bias in self.biases), *buffers]))

    def without(self, names: Container[str]) -> ScaledWeight:
        """Leave out biases that the model no longer has."""
        return replace(self, biases=tuple(bias for bias in self.biases if bias.name not in names))

    def without_data(self) -> ScaledWeight:
        """Leave out values that were measured on the example inputs."""
        return replace(self, absorbers=tuple(replace(a, variances=()) for a in self.absorbers))

    def with_running_variances(self, state: Mapping[str, Tensor]) -> ScaledWeight:
        """Take the running variance for that of a batch, and only the affine parameters that are given."""
        absorbers = []
        for a in self.absorbers:
            variance = None if a.running_var is None else state.get(a.running_var)
            weight, bias = (name if name in state else None for name in (a.weight, a.bias))
            variances = () if variance is None else tuple(variance.tolist())
            absorbers.append(replace(a, variances=variances, weight=weight, bias=bias))
        return replace(self, absorbers=tuple(absorbers))

    def factors(self, partition: Partition, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of each group and its factor to the radius, float64.

        Raises:
            DegenerateGroupError: a group is zero or not finite.
        """
        norms = partition.norms(weight.detach().to(torch.float64)).flatten()
        refuse_degenerate(norms, self.name)
        return norms, torch.ones_like(norms) if self.radius is None else self.radius / norms

    def onto_spheres(self, partition: Partition, values: Values) -> SphereProduct:
        """Rescale the weight and what depends on its scale, unless the norms are kept; return the manifold."""
        weight = values[self.name]
        norms, factors = self.factors(partition, weight)
        if self.radius is None:
            return SphereProduct(partition, radius=norms)
        values.update(rescaled_along(self, factors, values))
        values[self.name] = partition.multiply(weight, partition.spread(factors))
        return SphereProduct(partition, radius=self.radius)

    def why_norms_stay(
        self, dtype: torch.dtype, state: Mapping[str, Tensor], factors: Tensor, tolerance: float
    ) -> tuple[str | None, float | None]:
        """Return why the weight cannot be rescaled, or None, and how much rescaling changes training mode.

        Args:
            dtype: dtype of the weight.
            state: parameters and buffers by name.
            factors: the factor of each group.
            tolerance: largest relative change of a layer's normalized training output.
        """
        why = _obstacle(self.absorbers, dtype, state, factors)
        if why is not None:
            return why, None
        deviation = max((_deviation(absorber, state, factors) for absorber in self.absorbers), default=0.0)
        if not deviation <= tolerance:
            why = (
                f"unit radius would change its training-mode output by {deviation:.1e} through eps, more than "
                f"train_tolerance={tolerance:g}"
            )
        return why, deviation


@dataclass(frozen=True)
class RemovedBias:
    """A removed bias without effect, and the running means that contain it.

    Args:
        name: the bias.
        means: what is subtracted from each running mean behind it, channel by channel.
        direct: whether that is the bias itself for all values; else it was measured.
    """

    name: str
    means: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    direct: bool = True

    def take_out(self, values: Values) -> None:
        """Replace the bias by zeros, and subtract its effect from the running means."""
        bias = values[self.name]
        for mean, shift in self.means.items():
            values[mean] = values[mean] - (bias if self.direct else bias.new_tensor(shift))
        values[self.name] = torch.zeros_like(bias)


@dataclass
class Moves:
    """The moves of a conversion; names are those of the converted model.

    Args:
        weights: the weights that it put on spheres.
        biases: the biases that it removed.
        tolerance: largest relative change of a layer's normalized training output that unit radius may cause.
    """

    weights: dict[str, ScaledWeight] = field(default_factory=dict)
    biases: dict[str, RemovedBias] = field(default_factory=dict)
    tolerance: float = 1e-4

    def present(self, removed: Container[str]) -> dict[str, ScaledWeight]:
        """The weights with what changes with them now, as removed biases do not."""
        return {name: weight.without(removed) for name, weight in self.weights.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        weights = {
            name: {
                "radius": weight.radius,
                "biases": {bias.name: list(bias.groups) for bias in weight.biases},
                "absorbers": [{**a.to_dict(), "groups": list(a.groups)} for a in weight.absorbers],
            }
            for name, weight in self.weights.items()
        }
        biases = {name: list(bias.means) if bias.direct else None for name, bias in self.biases.items()}
        tolerance = self.tolerance if math.isfinite(self.tolerance) else None
        return {"tolerance": tolerance, "weights": weights, "biases": biases}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Moves:
        """Rebuild a record from `to_dict`."""
        weights = {
            name: ScaledWeight(
                name,
                entry["radius"],
                tuple(ScaledAlong(bias, tuple(groups)) for bias, groups in entry["biases"].items()),
                tuple(Absorber(**{**a, "groups": tuple(a["groups"])}) for a in entry["absorbers"]),
            )
            for name, entry in data["weights"].items()
        }
        biases = {
            name: RemovedBias(name, dict.fromkeys(means or (), ()), direct=means is not None)
            for name, means in data["biases"].items()
        }
        return cls(weights, biases, math.inf if data["tolerance"] is None else data["tolerance"])


def moves_of(model: nn.Module) -> Moves | None:
    """Return the moves of a model's conversions; None if unknown."""
    record: Moves | None = model.__dict__.get(MOVES)
    return record


def moves_within(model: nn.Module) -> Iterator[tuple[str, nn.Module, Moves]]:
    """Yield the converted models inside a model, or the model itself, with their name prefix and their moves."""
    for name, module in model.named_modules():
        record = moves_of(module)
        if record is not None:
            yield f"{name}." if name else "", module, record


# ---- a rescaling in front of a batch normalization -------------------------------------------------------------------
# A filter multiplied by f gives the normalization an input with mean f m and variance f² v.


def rescaled_along(weight: ScaledWeight, factors: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New float64 values of the biases and running statistics that change when a weight's groups are multiplied.

    Args:
        weight: what changes with it.
        factors: the factor of each group, float64.
        values: the present values, float64.
    """
    changed: dict[str, Tensor] = {}
    for bias in weight.biases:
        old = values[bias.name]
        changed[bias.name] = old * gather(factors, bias.groups).reshape(old.shape)
    for absorber in weight.absorbers:
        mean, variance = absorber.running_mean, absorber.running_var
        if mean is None or variance is None or variance in changed:
            continue
        factor, reached = gather(factors, absorber.groups), _reached(absorber, factors)
        changed[mean] = values[mean] * factor
        rescaled = rescaled_variance(values[variance], absorber.eps or 0.0, factor)
        changed[variance] = torch.where(reached, rescaled, values[variance])
    return changed


def _reached(absorber: Absorber, like: Tensor) -> Tensor:
    """Whether each channel of a normalization is scaled by a group of the weight."""
    return torch.tensor(absorber.groups, device=like.device) >= 0


def gather(values: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Spread one factor per group over entries by their group numbers; 1 where an entry is in no group."""
    index = torch.tensor(groups, dtype=torch.int64, device=values.device)
    return torch.where(index < 0, torch.ones((), dtype=values.dtype, device=values.device), values[index.clamp_min(0)])


def rescaled_variance(variance: Tensor, eps: float, factor: Tensor) -> Tensor:
    """Running variance that keeps evaluation mode exact: ``v' = (v + eps) f² − eps``.

    Then ``f (z − m)/√(v' + eps) = (z − m)/√(v + eps)``. The result can be negative; ``v' + eps`` never is.

    Args:
        variance: running variance ``v``, shape (C,).
        eps: eps of the normalization.
        factor: factor ``f`` of each channel, shape (C,).
    """
    return (variance + eps) * factor.square() - eps


def train_mode_deviation(variance: Tensor, eps: float, scale: Tensor, shift: Tensor, factor: Tensor) -> float:
    """Relative change of a batch normalization's training output when its input channels are multiplied by ``f``.

    The normalized channel is multiplied by ``ρ = √((v + eps)/(v + eps/f²))``, so with ``a = γ² v/(v + eps)`` the mean
    square of its scaled part the change is ``√(Σ a (ρ − 1)² / Σ (a + β²))``.

    Args:
        variance: batch variance ``v`` on the example inputs, shape (C,).
        eps: eps of the normalization.
        scale: γ, shape (C,).
        shift: β, shape (C,).
        factor: ``f``, shape (C,).
    """
    energy = scale.square() * variance / (variance + eps)
    ratio = ((variance + eps) / (variance + eps / factor.square())).sqrt()
    total = float((energy + shift.square()).sum())
    return math.sqrt(float((energy * (ratio - 1).square()).sum()) / total) if total > 0 else 0.0


def _deviation(absorber: Absorber, state: Mapping[str, Tensor], factors: Tensor) -> float:
    """Relative change of the training-mode output over the channels that a weight scales."""
    factor = gather(factors, absorber.groups)
    reached = _reached(absorber, factors)
    variance = torch.tensor(absorber.variances, dtype=torch.float64, device=factor.device)
    scale = state[absorber.weight].detach().double() if absorber.weight else torch.ones_like(variance)
    shift = state[absorber.bias].detach().double() if absorber.bias else torch.zeros_like(variance)
    kept = [values[reached] for values in (scale, shift, factor)]
    return train_mode_deviation(variance[reached], absorber.eps or 0.0, *kept)


def _obstacle(
    absorbers: Sequence[Absorber], dtype: torch.dtype, state: Mapping[str, Tensor], factors: Tensor
) -> str | None:
    """Return why rescaling to unit radius cannot be exact in evaluation mode, or None."""
    if dtype in (torch.float16, torch.bfloat16):
        return "rescaling half-precision weights would round every entry"
    for absorber in absorbers:
        if absorber.kind != "batch" or absorber.running_var is None or absorber.running_mean is None:
            return f"{absorber} has no running statistics that could compensate for its eps"
        if -2 in absorber.groups:
            return f"{absorber} absorbs a product of several scales"
        if len(absorber.variances) != len(absorber.groups):
            return f"the batch variances in front of {absorber} are not known"
        same = [a for a in absorbers if a.running_var == absorber.running_var]
        if any(a.groups != absorber.groups for a in same) or len(same) != absorber.calls:
            return f"the running statistics of {absorber} are shared with another tensor"
        eps = absorber.eps or 0.0
        rescaled = rescaled_variance(state[absorber.running_var].double(), eps, gather(factors, absorber.groups))
        # By how much rounding v' is magnified in v' + eps.
        if len(rescaled) and float((rescaled.abs() / (rescaled + eps)).max()) > _LARGEST_CANCELLATION:
            return f"running variances of {absorber} are too small compared with its eps"
    return None
