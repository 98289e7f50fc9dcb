"""What `diagnose` found: frozen data with a readable text and a JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manifold_nets.groups import Partition
from manifold_nets.symmetry.modules import GraphNode
from manifold_nets.symmetry.unexplained import UnexplainedSymmetry

if TYPE_CHECKING:
    from manifold_nets.symmetry.shift_report import ShiftSymmetry

__all__ = [
    "Absorber",
    "Certificate",
    "FamilyMember",
    "ScaledAlong",
    "SymmetryFamily",
    "SymmetryReport",
    "WeightFinding",
]

# Described in report.schema.json. It grows when a key is removed or changes its meaning, not when one is added.
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
        free_filters: how many filters are free by themselves in a weight of which others are not.
        finer_groups: how many invariant groups the weight has where no view of its shape expresses them, so that
            ``partition`` joins some; 0 where ``partition`` is the finest one.
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
    free_filters: int = 0
    finer_groups: int = 0

    @property
    def groups_in_words(self) -> str:
        """The partition, and how many groups it has in truth where no view expresses them; empty where none."""
        if self.partition is None:
            return ""
        finer = f", which joins {self.finer_groups} finer groups that no view expresses" if self.finer_groups else ""
        return f"{self.partition}{finer}"

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
            "finer_groups": self.finer_groups,
            "absorbers": [absorber.to_dict() for absorber in self.absorbers],
            "moves_along": list(self.moves_along),
            "certificate": self.certificate.to_dict(),
            "broken_by": self.broken_by,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class FamilyMember:
    """A part of a parameter that takes part in a family of symmetries.

    Args:
        parameter: its name.
        part: ``"rows"`` (filters), ``"columns"`` (input channels) or ``"entries"``.
        exponent: the part is multiplied by α to this power; None where its indices have different ones.
        size: how many rows, columns or entries one symmetry of the family moves.
    """

    parameter: str
    part: str
    exponent: float | None
    size: int

    def __str__(self) -> str:
        power = "" if self.exponent == 1 else "^mixed" if self.exponent is None else f"^{self.exponent:g}"
        return f"{self.parameter} {self.part}{power}"


@dataclass(frozen=True)
class SymmetryFamily:
    """Symmetries of the same make-up: one for each channel, head or matrix.

    Args:
        kind: ``"scale"``: all members grow together and a normalization absorbs it; ``"rescaling"``: some shrink as
            others grow.
        members: what one symmetry moves.
        count: how many independent symmetries the family has.
        certificate: what the numbers say of them.
        remedy: what to do about it.
        absorbed: whether a normalization absorbs some of it, so that its statistics would have to follow.
        symmetries: for each symmetry and each member the exponents by index; not part of the JSON form.
        partitions: for each member the partition of its parameter into rows, columns or entries; likewise.
    """

    kind: str
    members: tuple[FamilyMember, ...]
    count: int
    certificate: Certificate
    remedy: str
    absorbed: bool = False
    symmetries: tuple[dict[tuple[str, str], dict[int, float]], ...] = field(default=(), repr=False, compare=False)
    partitions: dict[tuple[str, str], Partition] = field(default_factory=dict, repr=False, compare=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that take part."""
        return tuple(dict.fromkeys(member.parameter for member in self.members))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "members": [dict(vars(member)) for member in self.members],
            "count": self.count,
            "absorbed": self.absorbed,
            "certificate": self.certificate.to_dict(),
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        return f"{self.count} × {self.kind}: {_joined([str(m) for m in self.members], 4)} · {self.certificate}"


@dataclass(frozen=True)
class SymmetryReport:
    """The scale symmetries of a network's weights, each explained by structure and proven by a number.

    Args:
        model: class of the model.
        weights: one finding for each parameter with at least two dimensions, in the order of the model.
        tolerance: the certificate's value below which a group counts as invariant.
        families: all scale symmetries of all parameters, also those that span several tensors: joint groups, and
            rescalings from one layer to the next.
        example_inputs: the inputs of the analysis, kept for conversion; not part of the JSON form.
        graph: the network, module by module in the order of execution; empty where it could not be traced.
        shifts: constants that can be added to biases and rows: dead biases, ``W + 1vᵀ``, shifts of logits.
        unexplained: what the certificate, searching the other way, finds invariant beyond all of these.
    """

    model: str
    weights: tuple[WeightFinding, ...]
    tolerance: float
    example_inputs: Any = field(default=None, repr=False, compare=False)
    graph: tuple[GraphNode, ...] = field(default=(), repr=False)
    families: tuple[SymmetryFamily, ...] = ()
    shifts: tuple[ShiftSymmetry, ...] = ()
    unexplained: tuple[UnexplainedSymmetry, ...] = ()

    @property
    def invariant(self) -> tuple[WeightFinding, ...]:
        """The findings with a certified partition."""
        return tuple(w for w in self.weights if w.status in ("invariant", "constrained"))

    @property
    def disagreements(self) -> tuple[WeightFinding, ...]:
        """The findings in which structure and certificate contradict each other."""
        return tuple(w for w in self.weights if w.status == "disagreement")

    @property
    def refuted_families(self) -> tuple[SymmetryFamily, ...]:
        """The families that structure claims and the certificate refutes."""
        return tuple(family for family in self.families if family.certificate.verdict == "not invariant")

    @property
    def refuted_shifts(self) -> tuple[ShiftSymmetry, ...]:
        """The shifts that structure claims and the certificate refutes."""
        return tuple(shift for shift in self.shifts if shift.certificate.verdict == "not invariant")

    @property
    def unexplained_groups(self) -> int:
        """How many independent groups the certificate calls invariant without an explanation by structure."""
        return sum(found.count for found in self.unexplained)

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
            "unexplained_groups": self.unexplained_groups,
            "families": [family.to_dict() for family in self.families],
            "shifts": [shift.to_dict() for shift in self.shifts],
            "unexplained": [found.to_dict() for found in self.unexplained],
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
            what = w.groups_in_words if w.partition is not None else (w.broken_by or "")
            absorbed = f" · absorbed by {_joined([str(a) for a in w.absorbers])}" if w.partition is not None else ""
            lines.append(f"  {w.name:<{width}}  {w.status:<13}  {what}{absorbed} · certificate {w.certificate}")
        spanning = [family for family in self.families if len(family.parameters) > 1]
        if spanning:
            lines.append("Symmetries that move several parameters at once:")
            lines.extend(f"  {family}" for family in spanning)
        if self.shifts:
            lines.append("Shifts that the function does not see:")
            lines.extend(f"  {shift}" for shift in self.shifts)
        if self.unexplained:
            lines.append("Invariant groups that the structure does not explain:")
            lines.extend(f"  {found}" for found in self.unexplained)
        return "\n".join(lines)


def _joined(names: Sequence[str], limit: int = 2) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more
