"""What `diagnose` found: frozen data with a readable text and a JSON form."""

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
    """What the Euler certificate says of one weight.

    Args:
        value: largest |Σ_G w ⊙ ∂L/∂w| / (‖w_G‖ ‖∂L/∂w_G‖) over the groups with evidence; None where none has any.
        verdict: ``"invariant"``, ``"not invariant"`` or ``"no evidence"``.
        groups_certified: groups whose value is below the tolerance.
        groups_refuted: groups whose value is above it.
        groups_without_evidence: groups whose weight or gradient is (nearly) zero.
        taken_at: the normalization at whose output it was taken, as the network's output provably does not depend on
            the weight; empty where it was taken at the network's output.
        because: why groups are without evidence, where it is not only that their gradient vanishes; else empty.
        moved: the largest relative change of an output, in training mode, when all that is claimed of the network is
            moved by finite amounts at once; of what that refutes, when it is moved. None where nothing was moved.
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
        """By how much the outputs change when it is moved, where that refutes it; else empty."""
        if self.verdict != "not invariant" or self.moved is None:
            return ""
        return f", moving it by finite amounts changes the outputs by {self.moved:.2g}"

    @property
    def place(self) -> str:
        """Where it was taken and why, where that is not the network's output; else empty."""
        return f", taken at {self.taken_at}: {_NO_INFLUENCE}" if self.taken_at else ""

    @property
    def reason(self) -> str:
        """How many groups are without evidence and why, where that is known; else empty."""
        count = f", {self.groups_without_evidence} without evidence" if self.verdict != "no evidence" else ""
        return f"{count}: {self.because}" if self.because else ""


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
class Absorber(JsonForm):
    """A normalization that removes the scale of a weight's groups.

    Args:
        op: the aten operation.
        module: qualified name of the module that runs it.
        kind: ``"batch"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"weight"``, ``"quotient"``, or
            ``"buffer"``: statistics kept by hand for evaluation, which follow the scale only as training goes on.
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
    json_without = ("groups", "variances")

    def __str__(self) -> str:
        return f"{self.module or 'model'} ({self.op})"


@dataclass(frozen=True)
class WeightFinding(JsonForm):
    """What is known of one weight.

    Args:
        name: the parameter; tied ones go by their first name.
        shape: its shape.
        layer: class of the module that owns it.
        status: ``"invariant"`` (structure found and certified), ``"not invariant"``, ``"unknown"`` (an operation has
            no rule, or one that covers sufficient conditions only), ``"no evidence"`` (the gradient vanishes),
            ``"disagreement"`` (structure and certificate contradict each other, or moving it contradicts both) or
            ``"constrained"`` (invariant and already on spheres).
        partition: the finest partition into invariant groups; None where there is none.
        filters_per_group: how many filters one group joins.
        absorbers: the normalizations that remove the scale.
        scaled_along: the biases that must be scaled with the weight.
        certificate: what the numbers say.
        broken_by: why a weight has no such groups: operation, module, reason.
        remedy: what to do about it.
        free_filters: how many filters are free by themselves in a weight of which others are not.
        free_groups: how many groups of filters these are, each explained and certified by a family of the report.
        finer_groups: how many invariant groups the weight has where no view of its shape expresses them, so that
            ``partition`` joins some; 0 where ``partition`` is the finest one.
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
        """How many groups ``partition`` has; None where there is none."""
        return None if self.partition is None else self.partition.n_groups

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
class SymmetryFamily(JsonForm):
    """Symmetries of the same make-up: one for each channel, head or matrix.

    Args:
        kind: ``"scale"``: all members grow together and a normalization absorbs it; ``"rescaling"``: some shrink as
            others grow.
        members: what one symmetry moves.
        count: how many independent symmetries the family has.
        certificate: what the numbers say of them.
        remedy: what to do about it.
        absorbed: whether a normalization absorbs some of it, so that its statistics would have to follow.
        generators: the symmetries, with a part for each member; not part of the JSON form.
        partial: whether it moves filters of a weight of which other filters are not invariant.
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
        """For each symmetry and each member the exponents by index."""
        found: list[dict[tuple[str, str], dict[int, float]]] = [{} for _ in range(self.count)]
        for place, part in zip(self.partitions, self.generators.parts, strict=True):
            columns = (values.tolist() for values in (part.numbers, part.groups, part.coefficients))
            for number, index, exponent in zip(*columns, strict=True):
                found[number].setdefault(place, {})[index] = exponent
        return tuple(found)

    @property
    def partitions(self) -> dict[tuple[str, str], Partition]:
        """For each member the partition of its parameter into rows, columns or entries."""
        pairs = zip(self.members, self.generators.parts, strict=True)
        return {(member.parameter, member.part): part.partition for member, part in pairs}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that take part."""
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
    """Constants that can be added to parameters without a change in what the network computes in training mode.

    Args:
        kind: ``"dead bias"``: each entry by itself; ``"bias shift"``: entries together; ``"redundant biases"``: one
            parameter takes up what another loses; ``"row shift"``: ``W → W + 1vᵀ``, one row added to all filters of a
            block, or one constant to all entries of a looked-up row; ``"filter shift"``: a constant added to all
            entries of a filter; ``"logit shift"``: a constant added to everything that a softmax or a loss compares.
        parameters: what is shifted.
        count: how many independent shifts there are.
        absorbers: the operations that do not see them; empty where the parameters cancel each other.
        certificate: what the numbers say: ``|⟨∂L/∂w, d⟩| / (‖∂L/∂w‖ ‖d‖)`` for a direction d, and the gradient over
            the largest one of the network for single entries.
        remedy: what to do about it.
        condition: when it holds, where that is not always.
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
        """For the other kinds, the coefficient of each entry that moves, by parameter and flat index."""
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
    """Groups of entries of a parameter that the numbers call invariant without a reason in the graph.

    Args:
        kind: ``"scale"``: each group can be multiplied; ``"shift"``: a constant can be added to each group.
        parameters: the parameter that ``partition`` partitions, and a vector whose entries move with its groups.
        partition: the groups.
        groups: the numbers of the groups that are invariant, each independent of the others and of what is explained.
        value: the largest certificate value among them.
    """

    kind: str
    parameters: tuple[str, ...]
    partition: Partition
    groups: tuple[int, ...] = field(repr=False)
    value: float

    json_also = ("count",)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.groups)

    def __str__(self) -> str:
        names = " with ".join(self.parameters)
        return f"{self.count} × {self.kind}: {names}, of {self.partition} · invariant ({self.value:.1e})"


@dataclass(frozen=True)
class SymmetryReport(JsonForm):
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
        not_searched: what was left out of a model that could not be traced, in words; empty otherwise.

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
        """How many independent groups the certificate calls scale-invariant without an explanation by structure."""
        return sum(found.count for found in self.unexplained if found.kind == "scale")

    @property
    def unexplained_shifts(self) -> int:
        """How many shifts the certificate finds without an explanation by structure."""
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
            lines.append("Symmetries that move several parameters at once, or some filters of a weight:")
            lines.extend(f"  {family}" for family in spanning)
        if self.shifts:
            lines.append("Shifts that the function does not see:")
            lines.extend(f"  {shift}" for shift in self.shifts)
        if self.unexplained:
            lines.append("Invariant groups that the structure does not explain:")
            lines.extend(f"  {found}" for found in self.unexplained)
        if self.not_searched:
            lines.append(f"Left out: {self.not_searched}.")
        return "\n".join(lines)
