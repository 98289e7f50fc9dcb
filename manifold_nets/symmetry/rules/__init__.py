"""What each aten operation does to a scale and to a shift: passes it, absorbs it, or refuses it.

Each file begins with its table of operations. `RULES` and `SHIFT_RULES` hold all of them by the exact overload of an
operation: ``max`` and ``max.dim`` reduce, ``max.other`` compares two tensors. An overload that is not in the tables is
unknown: it refuses the scale and is reported as unknown, never guessed.
"""

from manifold_nets.symmetry.rules import elementwise, linear, movement, normalization, reduction
from manifold_nets.symmetry.rules.elementwise import LARGEST_EPS
from manifold_nets.symmetry.rules.movement import VIEWS
from manifold_nets.symmetry.rules.use import (
    LARGEST_LINK,
    RULES,
    SHIFT_RULES,
    Absorption,
    Adoption,
    Link,
    Result,
    ShiftUse,
    Use,
    aligned,
    apply_rule,
    as_list,
    guarded,
    of_real_numbers,
    register,
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
    "elementwise",
    "guarded",
    "linear",
    "movement",
    "normalization",
    "of_real_numbers",
    "reduction",
    "shape_of",
]

for _file in (elementwise, reduction, linear, movement, normalization):
    register(_file.table())
