"""Building blocks of pages: escaped text, numbers, lists and tables."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

__all__ = ["dotted", "escape", "facts", "listed", "number", "plural", "table"]


def escape(text: object) -> str:
    """Escape text for use in an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def dotted(name: object) -> str:
    """A qualified name that a narrow page may break after its dots."""
    return escape(name).replace(".", ".<wbr>")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Three significant digits, or two and a power of ten.

    Example:
        >>> number(0.123456), number(3.2e-17), number(1e-8)
        ('0.123', '3.2×10⁻¹⁷', '10⁻⁸')
    """
    if not value or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    raised = f"10{str(int(power)).translate(_RAISED)}"
    return raised if digits == "1.0" else f"{digits}×{raised}"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    Example:
        >>> plural(1, "weight"), plural(2, "weight"), plural(2, "symmetry")
        ('1 weight', '2 weights', '2 symmetries')
    """
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count} {noun}"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and descriptions; the latter are markup."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in pairs) + "</dl>"


def listed(items: Iterable[str]) -> str:
    """Markup of distinct items: a list, or a single item without one."""
    texts = list(dict.fromkeys(items))
    if len(texts) == 1:
        return texts[0]
    return f"<ul>{''.join(f'<li>{text}</li>' for text in texts)}</ul>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells hold markup. Its roles keep it a table for screen readers on narrow pages."""
    columns = "".join(f'<th scope="col" role="columnheader">{text}</th>' for text in head)
    lines = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        + "".join(f'<td role="cell" data-label="{name}">{text}</td>' for name, text in zip(head[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<table role="table"><caption class="unseen">{caption}</caption>'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead><tbody role="rowgroup">{lines}</tbody></table>'
    )
