"""What each aten operation does to a scale: passes it, absorbs it, or refuses it.

The table `RULES` maps the exact overload of an operation to its rule: ``max`` and ``max.dim`` reduce, ``max.other``
compares two tensors. An overload that is not in the table is unknown: it refuses the scale and is reported as unknown,
never guessed.
"""

from manifold_nets.symmetry.structure.rules import (
    contraction,
    elementwise,
    movement,
    normalization,
    reduction,
    scattering,
)
from manifold_nets.symmetry.structure.rules.movement import VIEWS
from manifold_nets.symmetry.structure.rules.use import (
    RULES,
    Absorption,
    Adoption,
    Result,
    Use,
    as_list,
    of_real_numbers,
)

__all__ = [
    "RULES",
    "VIEWS",
    "Absorption",
    "Adoption",
    "Result",
    "Use",
    "as_list",
    "contraction",
    "elementwise",
    "movement",
    "normalization",
    "of_real_numbers",
    "reduction",
    "scattering",
]
