"""Symmetries that the certificate finds and the structure does not explain, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manifold_nets.groups import Partition

__all__ = ["UnexplainedSymmetry"]


@dataclass(frozen=True)
class UnexplainedSymmetry:
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

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "kind": self.kind,
            "parameters": list(self.parameters),
            "partition": self.partition.to_dict(),
            "count": self.count,
            "groups": list(self.groups),
            "value": self.value,
        }

    def __str__(self) -> str:
        names = " with ".join(self.parameters)
        return f"{self.count} × {self.kind}: {names}, of {self.partition} · invariant ({self.value:.1e})"
