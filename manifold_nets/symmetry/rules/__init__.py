"""What each aten operation does to a scale and to a shift: passes it, absorbs it, or refuses it.

Each file begins with its table of operations. `RULES` and `SHIFT_RULES` hold all of them by the exact overload of an
operation: ``max`` and ``max.dim`` reduce, ``max.other`` compares two tensors. An overload that is not in the tables is
unknown: it refuses the scale and is reported as unknown, never guessed.
"""

from manifold_nets.symmetry.rules import (
    arithmetic,
    elementwise,
    linear,
    movement,
    normalization,
    products,
    reduction,
)
from manifold_nets.symmetry.rules.arithmetic import LARGEST_EPS
from manifold_nets.symmetry.rules.movement import VIEWS
from manifold_nets.symmetry.rules.table import RULES, SHIFT_RULES, apply_rule, guarded, register
from manifold_nets.symmetry.rules.use import (
    LARGEST_LINK,
    Absorption,
    Coscaled,
    Link,
    Result,
    Use,
    Walk,
    aligned,
    as_list,
    shape_of,
)

__all__ = [
    "LARGEST_EPS",
    "LARGEST_LINK",
    "RULES",
    "SHIFT_RULES",
    "VIEWS",
    "Absorption",
    "Coscaled",
    "Link",
    "Result",
    "Use",
    "Walk",
    "aligned",
    "apply_rule",
    "arithmetic",
    "as_list",
    "elementwise",
    "guarded",
    "movement",
    "normalization",
    "shape_of",
]

for _file in (elementwise, arithmetic, reduction, linear, products, movement, normalization):
    register(_file.table())
