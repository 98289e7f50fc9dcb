"""What each aten operation does to a scale: passes it, absorbs it, or refuses it.

The table `RULES` maps the name of an operation to its rule. An operation that is not in the table is unknown: it
refuses the scale and is reported as unknown, never guessed.
"""

from manifold_nets.symmetry.structure.rules import contraction, elementwise, movement, normalization
from manifold_nets.symmetry.structure.rules.movement import VIEWS
from manifold_nets.symmetry.structure.rules.use import RULES, Absorption, Adoption, Result, Use, as_list

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
]
