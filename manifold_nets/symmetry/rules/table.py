"""The tables of the rules, and how a rule of them is applied.

Each file of rules begins with its table: operations, what they do to a scale, and what they do to a shift. A rule takes
a `Use`, and returns the label of the result: what is left of the scales, or shifts, of the arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from manifold_nets.symmetry.equations import Label
from manifold_nets.symmetry.rules.use import Result, Use, as_list

__all__ = ["RULES", "SHIFT_RULES", "Rule", "Table", "apply_rule", "both", "guarded", "of_first", "register"]

Rule = Callable[[Any], Result]
# Operations, their exact overloads separated by spaces, with the rules of a scale and of a shift; where the latter is
# None, no shift passes.
Table = Mapping[str, tuple[Rule, Rule | None]]

RULES: dict[str, Rule] = {}
SHIFT_RULES: dict[str, Rule] = {}

# What a rule raises that meets arguments which it does not foresee.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)


def register(table: Table) -> None:
    """Enter the rules of a table under the exact overloads of their operations."""
    for keys, (scale, shift) in table.items():
        for key in keys.split():
            RULES[key] = guarded(scale)
            if shift is not None:
                SHIFT_RULES[key] = guarded(shift)


def both(rule: Rule) -> tuple[Rule, Rule]:
    """One rule for scales and for shifts."""
    return rule, rule


def guarded(function: Rule) -> Rule:
    """Let a rule that meets arguments it does not foresee refuse the scale instead of ending the analysis."""

    @functools.wraps(function)
    def careful(use: Use) -> Result:
        try:
            result = function(use)
        except _UNFORESEEN as error:
            why = f"{type(error).__name__}: {error}"
            return use.refuse(f"its rule does not cover these arguments ({why})", unknown=True)
        values = use.node.meta.get("val")
        if isinstance(values, (tuple, list)) and isinstance(result, Label):
            return [result, *[None] * (len(values) - 1)]  # the other results are numbers of entries
        return result

    return careful


def of_first(function: Callable[[Any, Label], Result]) -> Rule:
    """A rule that only says what becomes of the label of the first argument, whatever its name."""

    @functools.wraps(function)
    def rule(use: Use) -> Result:
        label = use.label_of(next(iter(use.args.values())))
        return None if label is None else function(use, label)

    return rule


def apply_rule(use: Use) -> Result:
    """Label of the result of an operation at which a scale, or a shift, arrives; refuses it where no rule is known."""
    known = (SHIFT_RULES if use.shifts else RULES).get(use.key)
    if known is not None:
        return _of_real_numbers(use, known(use))
    if use.key in RULES:
        return use.refuse("does not let a shift pass")
    return use.refuse(f"has no rule: what it does to a {'shift' if use.shifts else 'scale'} is unknown", unknown=True)


def _of_real_numbers(use: Use, result: Result) -> Result:
    """Refuse the label of a result that is no real or complex number: it was rounded."""
    values = use.node.meta.get("val")
    several = values if isinstance(values, (tuple, list)) else [values]
    for label, value in zip(as_list(result), several, strict=False):
        if label is not None and isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            return use.refuse("rounds to integers", label, certainty="jump")
    return result
