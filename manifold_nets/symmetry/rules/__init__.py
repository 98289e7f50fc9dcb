"""What each aten operation does to a scale and to a shift: passes it, absorbs it, or refuses it.

The tables `RULES` and `SHIFT_RULES` map the exact overload of an operation to its rule: ``max`` and ``max.dim`` reduce,
``max.other`` compares two tensors. An overload that is not in the tables is unknown: it refuses the scale and is
reported as unknown, never guessed.
"""

from manifold_nets.symmetry.rules import (
    contraction,
    elementwise,
    movement,
    normalization,
    reduction,
    scattering,
    shift_absorbing,
    shifting,
)
from manifold_nets.symmetry.rules.elementwise import LARGEST_EPS
from manifold_nets.symmetry.rules.movement import VIEWS, reshape_ids
from manifold_nets.symmetry.rules.shift_use import LARGEST_LINK, SHIFT_RULES, Link, ShiftUse, apply_rule
from manifold_nets.symmetry.rules.use import (
    RULES,
    Absorption,
    Adoption,
    Result,
    Use,
    aligned,
    as_list,
    guarded,
    of_real_numbers,
    shape_of,
)

__all__ = [
    "LARGEST_EPS",
    "LARGEST_LINK",
    "RULES",
    "SHIFT_RULES",
    "VIEWS",
    "Absorption",
    "Adoption",
    "Link",
    "Result",
    "ShiftUse",
    "Use",
    "aligned",
    "apply_rule",
    "as_list",
    "contraction",
    "elementwise",
    "guarded",
    "movement",
    "normalization",
    "of_real_numbers",
    "reduction",
    "reshape_ids",
    "scattering",
    "shape_of",
    "shift_absorbing",
    "shifting",
]
