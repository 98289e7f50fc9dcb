"""Symmetries of the same make-up, one for each channel, head or matrix: frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from manifold_nets.groups import Partition
from manifold_nets.symmetry.findings.weights import Certificate

__all__ = ["FamilyMember", "SymmetryFamily", "joined"]


def joined(names: Sequence[str], limit: int = 2) -> str:
    """Write the first few distinct names and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more


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
        partial: whether it moves filters of a weight of which other filters are not invariant.
    """

    kind: str
    members: tuple[FamilyMember, ...]
    count: int
    certificate: Certificate
    remedy: str
    absorbed: bool = False
    symmetries: tuple[dict[tuple[str, str], dict[int, float]], ...] = field(default=(), repr=False, compare=False)
    partitions: dict[tuple[str, str], Partition] = field(default_factory=dict, repr=False, compare=False)
    partial: bool = False

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "members": [dict(vars(member)) for member in self.members],
            "count": self.count,
            "absorbed": self.absorbed,
            "partial": self.partial,
            "certificate": self.certificate.to_dict(),
            "remedy": self.remedy,
            "convert_remedy": self.convert_remedy,
        }

    def __str__(self) -> str:
        return f"{self.count} × {self.kind}: {joined([str(m) for m in self.members], 4)} · {self.certificate}"
