"""What `diagnose` found: frozen data with a readable text and a JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manifold_nets.errors import ParameterNameError
from manifold_nets.symmetry.findings.families import FamilyMember, SymmetryFamily, joined
from manifold_nets.symmetry.findings.unexplained import UnexplainedSymmetry
from manifold_nets.symmetry.findings.weights import Absorber, Certificate, ScaledAlong, WeightFinding
from manifold_nets.symmetry.module_graph import GraphNode

if TYPE_CHECKING:
    from manifold_nets.symmetry.findings.shifts import ShiftSymmetry

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
        not_searched: what was left out of a model that could not be traced, in words; empty otherwise.
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
        return {
            "format": REPORT_FORMAT,
            "model": self.model,
            "tolerance": self.tolerance,
            "summary": self.counts(),
            "unexplained_groups": self.unexplained_groups,
            "unexplained_shifts": self.unexplained_shifts,
            "families": [family.to_dict() for family in self.families],
            "shifts": [shift.to_dict() for shift in self.shifts],
            "unexplained": [found.to_dict() for found in self.unexplained],
            "not_searched": self.not_searched,
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
