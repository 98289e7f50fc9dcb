"""What every error of the package is, and how it lists things."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ManifoldNetsError", "MissingExtraError", "OptionError", "listed"]


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


class OptionError(ManifoldNetsError, ValueError):
    """An option has a value that has no meaning."""

    def __init__(self, option: str, found: object, expected: str) -> None:
        super().__init__(f"{option}: found {found!r}; expected {expected}. Pass such a value or leave the option out.")


class MissingExtraError(ManifoldNetsError, ImportError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; {feature} need it. Install the extra: pip install 'manifold_nets[{extra}]'."
        )
