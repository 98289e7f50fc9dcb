"""What errors are shown in: percent for shares, and otherwise as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["PERCENT", "PLAIN", "Unit", "unit_of"]


@dataclass(frozen=True)
class Unit:
    """A unit of errors.

    Args:
        scale: what an error is multiplied by.
        sign: written behind it; empty for none.
    """

    scale: float
    sign: str

    def label(self, text: str) -> str:
        """A heading with the unit.

        Example:
            >>> PERCENT.label("test error"), PLAIN.label("test error")
            ('test error (%)', 'test error')
        """
        return f"{text} ({self.sign})" if self.sign else text

    def number(self, value: float) -> str:
        """Two decimals of a percent, or four significant digits."""
        return f"{self.scale * value:.2f}" if self.sign else f"{value:.4g}"

    def signed(self, value: float) -> str:
        """The same of a difference, with its sign; zero has none.

        Example:
            >>> PERCENT.signed(0.0123), PERCENT.signed(-1e-7), PLAIN.signed(-0.5)
            ('+1.23', '0.00', '−0.5')
        """
        text = self.number(abs(value))
        if float(text) == 0:
            return text
        return f"{'−' if value < 0 else '+'}{text}"

    def short(self, value: float) -> str:
        """At most three significant digits, and the sign.

        Example:
            >>> PERCENT.short(0.0312), PERCENT.short(0.25), PLAIN.short(1.5)
            ('3.12 %', '25 %', '1.5')
        """
        return self.behind(f"{self.scale * value:.3g}" if math.isfinite(value) else "∞")

    def behind(self, text: str) -> str:
        """A text with the sign behind it."""
        return f"{text} {self.sign}" if self.sign else text


PERCENT, PLAIN = Unit(100.0, "%"), Unit(1.0, "")


def unit_of(errors: Iterable[float]) -> Unit:
    """Percent where no error exceeds 1, as those that are shares; what is not finite is no error.

    Example:
        >>> unit_of([0.1, 1.0, float("inf")]).sign, unit_of([0.1, 1.5]).sign
        ('%', '')
    """
    return PERCENT if all(error <= 1 for error in errors if math.isfinite(error)) else PLAIN
