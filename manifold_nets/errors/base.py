"""What every error of the package is, how it lists things, and what it says of names that are not known."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

__all__ = ["ArgumentTypeError", "ManifoldNetsError", "MissingExtraError", "OptionError", "listed", "near_matches"]


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


def near_matches(name: str, known: Iterable[str]) -> str:
    """Say in a sentence which known names look like one that is not known; nothing where none does.

    Example:
        >>> near_matches("rsdg", ["adam", "radam", "rsgd"])
        'Near matches: rsgd.'
    """
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    return f"Near matches: {', '.join(near)}." if near else ""


class ArgumentTypeError(ManifoldNetsError, TypeError):
    """An argument is of another kind than the function takes."""

    def __init__(self, argument: str, found: object, expected: str, remedy: str) -> None:
        what = f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"
        what = reprlib.repr(found) if isinstance(found, (str, int, float, list, tuple)) else what
        super().__init__(f"{argument}: found {what}; expected {expected}. {remedy}")


class OptionError(ManifoldNetsError, ValueError):
    """An option has a value that has no meaning."""

    def __init__(self, option: str, found: object, expected: str, near: str = "") -> None:
        remedy = f"{near} Pass such a value or leave the option out.".strip()
        super().__init__(f"{option}: found {found!r}; expected {expected}. {remedy}")


class MissingExtraError(ManifoldNetsError, ImportError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; {feature} need it. Install the extra: pip install 'manifold_nets[{extra}]'."
        )
