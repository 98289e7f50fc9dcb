"""The report of `diagnose`: frozen data with a readable text and a JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from manifold_nets.documents import JsonForm
from manifold_nets.errors import ParameterNameError
from manifold_nets.groups import Partition
from manifold_nets.page import fragment
from manifold_nets.symmetry.generators import Direction, Generators
from manifold_nets.symmetry.module_graph import GraphNode

__all__ = [
    "Absorber",
    "Certificate",
    "FamilyMember",
    "ScaledAlong",
    "ShiftSymmetry",
    "SymmetryFamily",
    "SymmetryReport",
    "UnexplainedSymmetry",
    "WeightFinding",
    "joined",
]

# Described in report.schema.json. It grows when a key is removed or changes its meaning, not when one is added.
REPORT_FORMAT = 1
_NO_INFLUENCE = "the network's output does not depend on this weight"


@dataclass(frozen=True)
class Certificate(JsonForm):
    """The result of the gradient test of one weight.

    Args:
        value: largest |Σ_G w ⊙ ∂L/∂w| / (‖w_G‖ ‖∂L/∂w_G‖) over the groups with evidence; None if no group has any.
        verdict: ``"invariant"``, ``"not invariant"`` or ``"no evidence"``.
        groups_certified: number of groups whose value is below the tolerance.
        groups_refuted: number of groups whose value is above the tolerance.
        groups_without_evidence: number of groups whose weight or gradient is (nearly) zero.
        taken_at: the normalization at whose output the gradient was taken because the network's output provably does
            not depend on the weight; empty if the gradient was taken at the network's output.
        because: why groups have no evidence, if there is another reason than a vanishing gradient; else empty.
        moved: the largest relative change of an output in training mode under the finite move of all claims, or, for a
            claim that the move refutes, of that claim; None without a finite move.
        no_evidence: the numbers of the groups without evidence; not part of the JSON form.
    """

    value: float | None
    verdict: str
    groups_certified: int
    groups_refuted: int
    groups_without_evidence: int
    taken_at: str = ""
    because: str = ""
    moved: float | None = None
    no_evidence: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        value = "" if self.value is None else f" ({self.value:.1e})"
        return f"{self.verdict}{value}{self.contradiction}{self.place}{self.reason}"

    @property
    def contradiction(self) -> str:
        """How much a finite move changes the outputs, if that refutes the claim; else empty."""
        if self.verdict != "not invariant" or self.moved is None:
            return ""
        return f", a finite move changes the outputs by {self.moved:.2g}"

    @property
    def place(self) -> str:
        """Where the gradient was taken and why, if not at the network's output; else empty."""
        return f", taken at {self.taken_at}: {_NO_INFLUENCE}" if self.taken_at else ""

    @property
    def reason(self) -> str:
        """How many groups have no evidence and why, if known; else empty."""
        count = f", {self.groups_without_evidence} without evidence" if self.verdict != "no evidence" else ""
        return f"{count}: {self.because}" if self.because else ""


@dataclass(frozen=True)
class ScaledAlong:
    """A bias whose entries must be multiplied by the scales of their groups.

    Args:
        name: the parameter.
        groups: for each entry the number of its group, or −1 if it has none.
    """

    name: str
    groups: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Absorber(JsonForm):
    """A normalization that removes the scale of a weight's groups.

    Args:
        op: the aten operation.
        module: qualified name of the module that runs it.
        kind: ``"batch"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"weight"``, ``"quotient"``, or
            ``"buffer"``: statistics that the model's own code keeps for evaluation, and that follow a new scale only
            in further training.
        eps: the eps of the operation; None if it has none.
        weight: the parameter that holds its affine scale, if any.
        bias: the parameter that holds its affine shift, if any.
        running_mean: the buffer with the running mean, which must be scaled with the weight.
        running_var: the buffer with the running variance, which must be scaled by the square.
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
    json_without = ("groups", "variances")

    def __str__(self) -> str:
        return f"{self.module or 'model'} ({self.op})"


@dataclass(frozen=True)
class WeightFinding(JsonForm):
    """The finding of `diagnose` about one weight.

    Args:
        name: the parameter; tied ones have the first of their names.
        shape: its shape.
        layer: class of the module that owns it.
        status: ``"invariant"`` (explained by the structure and certified), ``"not invariant"``, ``"unknown"`` (an
            operation has no rule, or its rule covers only sufficient conditions), ``"no evidence"`` (the gradient
            vanishes), ``"disagreement"`` (structure, certificate and finite move contradict each other) or
            ``"constrained"`` (invariant and already on spheres).
        partition: the finest partition into invariant groups; None if there is none.
        filters_per_group: number of filters in one group.
        absorbers: the normalizations that remove the scale.
        scaled_along: the biases that must be scaled with the weight.
        certificate: the result of the gradient test.
        broken_by: why the weight has no invariant groups: operation, module, reason.
        remedy: what to do about it.
        free_filters: number of invariant filters in a weight with other filters that are not invariant.
        free_groups: number of groups that these filters form, each explained and certified by a family of the report.
        finer_groups: number of invariant groups if they are finer than any view of the shape can express, so that
            ``partition`` joins some; 0 if ``partition`` is the finest one.
        generators: the scales of the groups of ``partition``, with the biases; not part of the JSON form.
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
    free_groups: int = 0
    generators: Generators = field(default=Generators((), 0), repr=False, compare=False)
    json_also, json_without = ("groups", "moves_along", "convert_remedy"), ("scaled_along",)

    @property
    def groups(self) -> int | None:
        """Number of groups of ``partition``; None without a partition."""
        return None if self.partition is None else self.partition.n_groups

    @property
    def groups_in_words(self) -> str:
        """The partition, with the number of finer groups that no view can express; empty without a partition."""
        if self.partition is None:
            return ""
        finer = f", joined from {self.finer_groups} finer groups that no view can express" if self.finer_groups else ""
        return f"{self.partition}{finer}"

    @property
    def moves_along(self) -> tuple[str, ...]:
        """Names of the biases and running statistics that change when the weight is rescaled."""
        buffers = [n for a in self.absorbers for n in (a.running_mean, a.running_var) if n is not None]
        return tuple(dict.fromkeys([*(bias.name for bias in self.scaled_along), *buffers]))

    @property
    def convert_remedy(self) -> str | None:
        """Name under which `convert` may do something about it; the plan says whether it does."""
        return "spheres" if self.status == "invariant" else None


def joined(names: Sequence[str], limit: int = 2) -> str:
    """Write the first few distinct names and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more


@dataclass(frozen=True)
class FamilyMember(JsonForm):
    """The part of a parameter that a family of symmetries rescales.

    Args:
        parameter: the name of the parameter.
        part: ``"rows"`` (filters), ``"columns"`` (input channels) or ``"entries"``.
        exponent: the part is multiplied by α to this power; None if its indices have different powers.
        size: number of rows, columns or entries that one symmetry rescales.
    """

    parameter: str
    part: str
    exponent: float | None
    size: int

    def __str__(self) -> str:
        power = "" if self.exponent == 1 else "^mixed" if self.exponent is None else f"^{self.exponent:g}"
        return f"{self.parameter} {self.part}{power}"


@dataclass(frozen=True)
class SymmetryFamily(JsonForm):
    """Symmetries with the same members: one for each channel, head or matrix.

    Args:
        kind: ``"scale"``: all members grow together, and a normalization absorbs this; ``"rescaling"``: some members
            shrink as others grow.
        members: the parts of parameters that one symmetry rescales.
        count: number of independent symmetries.
        certificate: the result of the gradient test.
        remedy: what to do about it.
        absorbed: whether a normalization absorbs part of it, so that its statistics would have to be rescaled too.
        generators: the symmetries, with one part for each member; not part of the JSON form.
        partial: whether it rescales filters of a weight with other filters that are not invariant.
    """

    kind: str
    members: tuple[FamilyMember, ...]
    count: int
    certificate: Certificate
    remedy: str
    absorbed: bool = False
    generators: Generators = field(default=Generators((), 0), repr=False, compare=False)
    partial: bool = False
    json_also = ("convert_remedy",)

    @cached_property
    def symmetries(self) -> tuple[dict[tuple[str, str], dict[int, float]], ...]:
        """The exponents by index, for each symmetry and each member."""
        found: list[dict[tuple[str, str], dict[int, float]]] = [{} for _ in range(self.count)]
        for place, part in zip(self.partitions, self.generators.parts, strict=True):
            columns = (values.tolist() for values in (part.numbers, part.groups, part.coefficients))
            for number, index, exponent in zip(*columns, strict=True):
                found[number].setdefault(place, {})[index] = exponent
        return tuple(found)

    @property
    def partitions(self) -> dict[tuple[str, str], Partition]:
        """The partition of each member's parameter into rows, columns or entries."""
        pairs = zip(self.members, self.generators.parts, strict=True)
        return {(member.parameter, member.part): part.partition for member, part in pairs}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of the members."""
        return tuple(dict.fromkeys(member.parameter for member in self.members))

    @property
    def convert_remedy(self) -> str | None:
        """Name under which `convert` may do something about it; the plan says whether it does."""
        if self.certificate.verdict != "invariant" or self.partial:
            return None
        if self.kind == "rescaling":
            return None if self.absorbed else "balance"
        weights = {name for (name, _), partition in self.partitions.items() if len(partition.shape) > 1}
        return "joint-spheres" if len(weights) > 1 else "spheres" if weights else None

    def __str__(self) -> str:
        return f"{self.count} × {self.kind}: {joined([str(m) for m in self.members], 4)} · {self.certificate}"


@dataclass(frozen=True)
class ShiftSymmetry(JsonForm):
    """Constants that can be added to parameters without changing the network's output in training mode.

    Args:
        kind: ``"dead bias"``: each entry separately; ``"bias shift"``: several entries together;
            ``"redundant biases"``: an amount moves from one parameter to another; ``"row shift"``: ``W → W + 1vᵀ``, one
            row added to all filters of a block, or one constant to all entries of a looked-up row;
            ``"filter shift"``: a constant
            added to all entries of a filter; ``"logit shift"``: a constant added to all logits of a softmax or loss.
        parameters: the parameters that are shifted.
        count: number of independent shifts.
        absorbers: the operations that remove the shift; empty if the parameters cancel each other.
        certificate: the result of the gradient test: ``|⟨∂L/∂w, d⟩| / (‖∂L/∂w‖ ‖d‖)`` for a direction d; for single
            entries, the gradient relative to the largest one of the network.
        remedy: what to do about it.
        condition: when the symmetry holds; None if always.
        generators: the shifts; not part of the JSON form.
    """

    kind: str
    parameters: tuple[str, ...]
    count: int
    absorbers: tuple[Absorber, ...]
    certificate: Certificate
    remedy: str
    condition: str | None = None
    generators: Generators = field(default=Generators((), 0, adds=True), repr=False, compare=False)
    json_also = ("convert_remedy",)

    @property
    def partition(self) -> Partition | None:
        """For row shifts, the groups of entries that are shifted together."""
        return self.generators.parts[0].partition if self.kind == "row shift" else None

    @property
    def groups(self) -> tuple[int, ...]:
        """For row shifts, the numbers of the groups that are free."""
        return tuple(self.generators.parts[0].groups.tolist()) if self.kind == "row shift" else ()

    @cached_property
    def directions(self) -> tuple[Direction, ...]:
        """For the other kinds, the coefficient of each shifted entry, by parameter and flat index."""
        if self.kind == "row shift":
            return ()
        found: list[Direction] = [{} for _ in range(self.count)]
        for part in self.generators.parts:
            columns = (values.tolist() for values in (part.numbers, part.groups, part.coefficients))
            for number, index, coefficient in zip(*columns, strict=True):
                found[number].setdefault(part.parameter, {})[index] = coefficient
        return tuple(found)

    @property
    def convert_remedy(self) -> str | None:
        """Name under which `convert` may do something about it; the plan says whether it does."""
        holds = self.certificate.verdict == "invariant" and self.condition is None
        return "dead-biases" if self.kind == "dead bias" and holds else None

    def __str__(self) -> str:
        names = ", ".join(self.parameters[:3]) + (
            f" and {len(self.parameters) - 3} more" if self.parameters[3:] else ""
        )
        absorbed = ", ".join(dict.fromkeys(str(a) for a in self.absorbers[:2]))
        more = f" and {len(self.absorbers) - 2} more" if len(self.absorbers) > 2 else ""
        by = f" · absorbed by {absorbed}{more}" if absorbed else ""
        when = f" · {self.condition}" if self.condition else ""
        return f"{self.count} × {self.kind}: {names}{by} · {self.certificate}{when}"


@dataclass(frozen=True)
class UnexplainedSymmetry(JsonForm):
    """Groups of entries of a parameter that are invariant by the gradient test, without an explanation in the graph.

    Args:
        kind: ``"scale"``: each group can be multiplied; ``"shift"``: a constant can be added to each group.
        parameters: the partitioned parameter, and a vector whose entries change with its groups, if any.
        partition: the groups.
        groups: the numbers of the invariant groups, independent of each other and of the explained symmetries.
        value: the largest certificate value among these groups.
    """

    kind: str
    parameters: tuple[str, ...]
    partition: Partition
    groups: tuple[int, ...] = field(repr=False)
    value: float

    json_also = ("count",)

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.groups)

    def __str__(self) -> str:
        names = " with ".join(self.parameters)
        return f"{self.count} × {self.kind}: {names}, of {self.partition} · invariant ({self.value:.1e})"


@dataclass(frozen=True)
class SymmetryReport(JsonForm):
    """The scale symmetries of a network's weights, each explained by the graph and certified by a gradient.

    Args:
        model: class of the model.
        weights: one finding for each parameter with at least two dimensions, in the order of the model.
        tolerance: the certificate value below which a group counts as invariant.
        families: all scale symmetries of all parameters, including those of several tensors at once: joint groups, and
            rescalings between layers.
        example_inputs: the inputs of the analysis, kept for conversion; not part of the JSON form.
        graph: the network, module by module in execution order; empty if it could not be traced.
        shifts: constants that can be added to biases and rows: dead biases, ``W + 1vᵀ``, shifts of logits.
        unexplained: further invariant groups, found by a numerical search of the gradients.
        not_searched: a description of what was left out if the model could not be traced; else empty.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> report = mn.diagnose(net, torch.randn(16, 4))
        >>> report["0.weight"].status, str(report["0.weight"].partition)
        ('invariant', '8 filters of 4')
        >>> [shift.parameters for shift in report.shifts]
        [('0.bias',)]
    """

    model: str
    weights: tuple[WeightFinding, ...]
    tolerance: float
    example_inputs: Any = field(default=None, repr=False, compare=False)
    graph: tuple[GraphNode, ...] = field(default=(), repr=False)
    families: tuple[SymmetryFamily, ...] = ()
    shifts: tuple[ShiftSymmetry, ...] = ()
    unexplained: tuple[UnexplainedSymmetry, ...] = ()
    not_searched: str = ""

    json_also = ("unexplained_groups", "unexplained_shifts")

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
        """Number of independent scale-invariant groups that the structure does not explain."""
        return sum(found.count for found in self.unexplained if found.kind == "scale")

    @property
    def unexplained_shifts(self) -> int:
        """Number of shifts that the structure does not explain."""
        return sum(found.count for found in self.unexplained if found.kind == "shift")

    def __getitem__(self, name: str) -> WeightFinding:
        for finding in self.weights:
            if finding.name == name:
                return finding
        raise ParameterNameError("report", name, [weight.name for weight in self.weights])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"format": REPORT_FORMAT, "summary": self.counts(), **super().to_dict()}

    def counts(self) -> dict[str, int]:
        """Number of weights by status."""
        found: dict[str, int] = {}
        for weight in self.weights:
            found[weight.status] = found.get(weight.status, 0) + 1
        return found

    def _summary(self) -> str:
        summary = ", ".join(f"{n} {status}" for status, n in self.counts().items())
        return f"{len(self.weights)} weights: {summary or 'none'}"

    def _repr_html_(self) -> str:
        """What a notebook shows: a row for each weight."""
        rows = [
            (
                w.name,
                w.status,
                w.groups_in_words,
                w.certificate,
                joined([str(a) for a in w.absorbers]) if w.partition is not None else w.broken_by or w.remedy,
            )
            for w in self.weights
        ]
        return fragment(self.model, self._summary(), ("Weight", "Status", "Groups", "Certificate", "Why"), rows)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self._summary()}"]
        width = max((len(w.name) for w in self.weights), default=0)
        for w in self.weights:
            what = w.groups_in_words if w.partition is not None else (w.broken_by or "")
            absorbed = f" · absorbed by {joined([str(a) for a in w.absorbers])}" if w.partition is not None else ""
            lines.append(f"  {w.name:<{width}}  {w.status:<13}  {what}{absorbed} · certificate {w.certificate}")
        spanning = [family for family in self.families if len(family.parameters) > 1 or family.partial]
        if spanning:
            lines.append("Symmetries of several parameters at once, or of some filters of a weight:")
            lines.extend(f"  {family}" for family in spanning)
        if self.shifts:
            lines.append("Shifts without effect on the function:")
            lines.extend(f"  {shift}" for shift in self.shifts)
        if self.unexplained:
            lines.append("Invariant groups that the structure does not explain:")
            lines.extend(f"  {found}" for found in self.unexplained)
        if self.not_searched:
            lines.append(f"Left out: {self.not_searched}.")
        return "\n".join(lines)
