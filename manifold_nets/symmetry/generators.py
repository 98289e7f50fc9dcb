"""Generators: what one symmetry moves, as a vector field on the weights.

A symmetry is a one-parameter group of changes of the parameters that leaves the function alone. It is given by its
generator ξ(w): ``c ⊙ w`` for scales, joint scales and rescalings (``exp(t) ↦ α``, each group is multiplied by
``α ** c``), and a constant ``d`` for shifts. Symmetries of the same make-up, as those of the filters of one weight, are
kept together in arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifold_nets.groups import Partition

__all__ = ["Generators", "Part"]


@dataclass(frozen=True)
class Part:
    """How some generators move one parameter.

    Args:
        parameter: its name.
        partition: a partition of it.
        groups: the groups that move.
        numbers: for each of them the number of the generator that moves it.
        coefficients: for each of them the entries of c or d, the same for all entries of the group.
    """

    parameter: str
    partition: Partition
    groups: NDArray[np.int64]
    numbers: NDArray[np.int64]
    coefficients: NDArray[np.float64]


@dataclass(frozen=True)
class Generators:
    """Independent symmetries of the same make-up.

    Args:
        parts: what moves.
        count: how many there are.
        adds: whether they are shifts, ``ξ = d``; otherwise ``ξ = c ⊙ w``.
        far: whether the finite move makes only its largest moves, in both directions: for what the numbers alone
            suggest.
    """

    parts: tuple[Part, ...]
    count: int
    adds: bool = False
    far: bool = False
