"""What `diagnose` found: frozen data with a readable text and a JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from manifold_nets.groups import Partition
from manifold_nets.symmetry.modules import GraphNode

__all__ = ["Absorber", "Certificate", "ScaledAlong", "SymmetryReport", "WeightFinding"]

REPORT_FORMAT = 1


@dataclass(frozen=True)
class Certificate:
    """What the Euler certificate says of one weight.

    Args:
        value: largest |Σ_G w ⊙ ∂L/∂w| / (‖w_G‖ ‖∂L/∂w_G‖) over the groups with evidence; None where none has any.
        verdict: ``"invariant"``, ``"not invariant"`` or ``"no evidence"``.
        groups_certified: groups whose value is below the tolerance.
        groups_refuted: groups whose value is above it.
        groups_without_evidence: groups whose weight or gradient is (nearly) zero.
    """

    value: float | None
    verdict: str
    groups_certified: int
    groups_refuted: int
    groups_without_evidence: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        value = "" if self.value is None else f" ({self.value:.1e})"
        return f"{self.verdict}{value}"


@dataclass(frozen=True)
class ScaledAlong:
    """A bias that must be multiplied by the scale of the groups that its entries belong to.

    Args:
        name: the parameter.
        groups: for each entry the number of its group, or −1.
    """

    name: str
    groups: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Absorber:
    """A normalization that removes the scale of a weight's groups.

    Args:
        op: the aten operation.
        module: qualified name of the module that runs it.
        kind: ``"batch"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"weight"`` or ``"quotient"``.
        eps: the eps of the operation, None where it has none of its own.
        weight: the parameter that holds its affine scale, if any.
        bias: the parameter that holds its affine shift, if any.
        running_mean: the buffer with the running mean, which is scaled along.
        running_var: the buffer with the running variance, which is scaled along quadratically.
        calls: how many operations of the network use these running statistics.
        groups: for each channel the number of the weight's group that scales it, −1 for none, −2 for a product of
            several (batch and instance only).
        variances: batch variance of each channel on the example inputs, float64 (batch only).
    """

    op: str
    module: str
    kind: str
    eps: float | None = None
    weight: str | None = None
    bias: str | None = None
    running_mean: str | None = None
    running_var: str | None = None
    calls: int = 1
    groups: tuple[int, ...] = field(default=(), repr=False)
    variances: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the values channel by channel."""
        return {name: value for name, value in vars(self).items() if name not in ("groups", "variances")}

    def __str__(self) -> str:
        return f"{self.module or 'model'} ({self.op})"


@dataclass(frozen=True)
class WeightFinding:
    """What is known of one weight.

    Args:
        name: the parameter; tied ones go by their first name.
        shape: its shape.
        layer: class of the module that owns it.
        status: ``"invariant"`` (structure found and certified), ``"not invariant"``, ``"unknown"`` (an operation has
            no rule), ``"no evidence"`` (the gradient vanishes), ``"disagreement"`` (structure and certificate
            contradict each other) or ``"constrained"`` (invariant and already on spheres).
        partition: the finest partition into invariant groups; None where there is none.
        filters_per_group: how many filters one group joins.
        absorbers: the normalizations that remove the scale.
        scaled_along: the biases that must be scaled with the weight.
        certificate: what the numbers say.
        broken_by: why a weight has no such groups: operation, module, reason.
        remedy: what to do about it.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    status: str
    partition: Partition | None
    filters_per_group: int
    absorbers: tuple[Absorber, ...]
    scaled_along: tuple[ScaledAlong, ...]
    certificate: Certificate
    broken_by: str | None
    remedy: str

    @property
    def moves_along(self) -> tuple[str, ...]:
        """Names of the biases and running statistics that change when the weight is rescaled."""
        buffers = [n for a in self.absorbers for n in (a.running_mean, a.running_var) if n is not None]
        return tuple(dict.fromkeys([*(bias.name for bias in self.scaled_along), *buffers]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "layer": self.layer,
            "status": self.status,
            "partition": None if self.partition is None else self.partition.to_dict(),
            "groups": None if self.partition is None else self.partition.n_groups,
            "filters_per_group": self.filters_per_group,
            "absorbers": [absorber.to_dict() for absorber in self.absorbers],
            "moves_along": list(self.moves_along),
            "certificate": self.certificate.to_dict(),
            "broken_by": self.broken_by,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class SymmetryReport:
    """The scale symmetries of a network's weights, each explained by structure and proven by a number.

    Args:
        model: class of the model.
        weights: one finding for each parameter with at least two dimensions, in the order of the model.
        tolerance: the certificate's value below which a group counts as invariant.
        example_inputs: the inputs of the analysis, kept for conversion; not part of the JSON form.
        graph: the network, module by module in the order of execution; empty where it could not be traced.
    """

    model: str
    weights: tuple[WeightFinding, ...]
    tolerance: float
    example_inputs: Any = field(default=None, repr=False, compare=False)
    graph: tuple[GraphNode, ...] = field(default=(), repr=False)

    @property
    def invariant(self) -> tuple[WeightFinding, ...]:
        """The findings with a certified partition."""
        return tuple(w for w in self.weights if w.status in ("invariant", "constrained"))

    @property
    def disagreements(self) -> tuple[WeightFinding, ...]:
        """The findings in which structure and certificate contradict each other."""
        return tuple(w for w in self.weights if w.status == "disagreement")

    def __getitem__(self, name: str) -> WeightFinding:
        for finding in self.weights:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "format": REPORT_FORMAT,
            "model": self.model,
            "tolerance": self.tolerance,
            "summary": self.counts(),
            "weights": [weight.to_dict() for weight in self.weights],
            "graph": [node.to_dict() for node in self.graph],
        }

    def counts(self) -> dict[str, int]:
        """Number of weights by status."""
        found: dict[str, int] = {}
        for weight in self.weights:
            found[weight.status] = found.get(weight.status, 0) + 1
        return found

    def __str__(self) -> str:
        summary = ", ".join(f"{n} {status}" for status, n in self.counts().items())
        lines = [f"{self.model}: {len(self.weights)} weights: {summary or 'none'}"]
        width = max((len(w.name) for w in self.weights), default=0)
        for w in self.weights:
            what = str(w.partition) if w.partition is not None else (w.broken_by or "")
            absorbed = f" · absorbed by {_joined([str(a) for a in w.absorbers])}" if w.partition is not None else ""
            lines.append(f"  {w.name:<{width}}  {w.status:<13}  {what}{absorbed} · certificate {w.certificate}")
        return "\n".join(lines)


def _joined(names: Sequence[str], limit: int = 2) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more
