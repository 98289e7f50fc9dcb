"""Shift symmetries as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manifold_nets.groups import Partition
from manifold_nets.symmetry.findings.report import Absorber, Certificate

__all__ = ["ShiftSymmetry"]


@dataclass(frozen=True)
class ShiftSymmetry:
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
        partition: for row shifts, the groups of entries that are shifted together.
        groups: for row shifts, the numbers of the groups that are free.
        directions: for the other kinds, the coefficient of each entry that moves, by parameter and flat index.
    """

    kind: str
    parameters: tuple[str, ...]
    count: int
    absorbers: tuple[Absorber, ...]
    certificate: Certificate
    remedy: str
    condition: str | None = None
    partition: Partition | None = field(default=None, repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)
    directions: tuple[dict[str, dict[int, float]], ...] = field(default=(), repr=False, compare=False)

    @property
    def convert_remedy(self) -> str | None:
        """Name under which `convert` may do something about it; the plan says whether it does."""
        holds = self.certificate.verdict == "invariant" and self.condition is None
        return "dead-biases" if self.kind == "dead bias" and holds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "parameters": list(self.parameters),
            "count": self.count,
            "absorbers": [absorber.to_dict() for absorber in self.absorbers],
            "certificate": self.certificate.to_dict(),
            "condition": self.condition,
            "remedy": self.remedy,
            "convert_remedy": self.convert_remedy,
        }

    def __str__(self) -> str:
        names = ", ".join(self.parameters[:3]) + (
            f" and {len(self.parameters) - 3} more" if self.parameters[3:] else ""
        )
        absorbed = ", ".join(dict.fromkeys(str(a) for a in self.absorbers[:2]))
        more = f" and {len(self.absorbers) - 2} more" if len(self.absorbers) > 2 else ""
        by = f" · absorbed by {absorbed}{more}" if absorbed else ""
        when = f" · {self.condition}" if self.condition else ""
        return f"{self.count} × {self.kind}: {names}{by} · {self.certificate}{when}"
