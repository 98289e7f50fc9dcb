"""Pages that need nothing else: no network, no scripts, light or dark, of any width. What all reports share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from manifold_nets.page.markup import escape

__all__ = ["Section", "document"]


@dataclass(frozen=True)
class Section:
    """One part of a page, with a heading that the list of sections links to.

    Args:
        name: its anchor.
        title: its heading.
        body: markup; a section without any is left out.
    """

    name: str
    title: str
    body: str


def document(title: str, subtitle: str, sections: Sequence[Section], *, style: str = "", before: str = "") -> str:
    """Return a whole HTML document with the common style sheet; its policy forbids it to load anything.

    Args:
        title: what the page is about, as plain text.
        subtitle: what it says about that, as plain text.
        sections: its parts; the first needs no link to it.
        style: further style sheet; colours belong into ``:root``, once for light and once for dark.
        before: markup in front of all else, such as symbols that drawings use.

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
