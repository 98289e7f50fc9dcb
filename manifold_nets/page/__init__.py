"""Self-contained HTML pages: no network access, no scripts, light or dark, of any width. Shared by all reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from manifold_nets.page.markup import escape, plural, table

__all__ = ["Section", "document", "fragment"]

# A notebook is light or dark by its own choice: its colours are inherited, and lines are drawn in that of its text.
_NOTEBOOK = """
.manifold-nets{color:inherit;font-size:.875rem;max-width:60rem}
.manifold-nets p{margin:.25rem 0}
.manifold-nets summary{cursor:pointer}
.manifold-nets table{border-collapse:collapse;margin:.25rem 0;color:inherit;background:transparent}
.manifold-nets tr{background:transparent}
.manifold-nets th,.manifold-nets td{padding:.2rem .75rem;text-align:left;vertical-align:top;color:inherit;
border:solid currentColor;border-width:1px 0 0}
.manifold-nets thead th{border-width:0}
.manifold-nets .unseen{display:none}
"""
_OPEN_ROWS = 12


@dataclass(frozen=True)
class Section:
    """One section of a page, with a heading that the list of sections links to.

    Args:
        name: its anchor.
        title: its heading.
        body: markup; a section with an empty body is left out.
    """

    name: str
    title: str
    body: str


def document(title: str, subtitle: str, sections: Sequence[Section], *, style: str = "", before: str = "") -> str:
    """Return a complete HTML document with the common style sheet; its security policy blocks external content.

    Args:
        title: the subject of the page, as plain text.
        subtitle: the kind of page, as plain text.
        sections: its sections; the first has no link in the list.
        style: further style sheet; colours belong into ``:root``, once for light and once for dark.
        before: markup before everything else, such as symbols that drawings use.

    Example:
        >>> page = document("digits", "a test", [Section("summary", "Summary", "<p>All is well.</p>")])
        >>> page.startswith("<!DOCTYPE html>"), "://" in page
        (True, False)
    """
    shown = [section for section in sections if section.body]
    common = resources.files("manifold_nets.page").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in shown[1:])
    body = "".join(
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{escape(section.title)}</h2>{section.body}</section>'
        for section in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: {escape(subtitle)}</title><style>{common}{style}</style></head><body>{before}"
        f"<header><h1>{escape(title)}<span>{escape(subtitle)}</span></h1>"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main></body></html>\n'
    )


def fragment(title: str, sentence: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return HTML for a notebook: a sentence and a table, which is folded if it is long.

    Args:
        title: the subject, as plain text.
        sentence: a summary, as plain text.
        head: names of the columns, as plain text; the first one names the rows, such as ``"Weight"``.
        rows: cells, as plain text.

    Example:
        >>> piece = fragment("Net", "1 of 1 weights <= 2", ("Weight", "Status"), [("layer.weight", "invariant")])
        >>> piece.startswith('<div class="manifold-nets">'), "&lt;= 2" in piece
        (True, True)
    """
    cells = [[escape(cell) for cell in row] for row in rows]
    shown = table(escape(title), [escape(name) for name in head], cells) if cells else ""
    if len(cells) > _OPEN_ROWS:
        shown = f"<details><summary>{escape(plural(len(cells), head[0].lower()))}</summary>{shown}</details>"
    return (
        f'<div class="manifold-nets"><style>{_NOTEBOOK}</style>'
        f"<p><strong>{escape(title)}</strong>: {escape(sentence)}</p>{shown}</div>"
    )
