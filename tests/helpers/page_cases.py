"""What every page must be: well-formed, self-contained, accessible, of enough contrast, and drawn by a browser."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

from helpers.browser import Picture

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
# Elements of SVG that are closed at once.
CLOSED = {"circle", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """A parsed page; refuses what is not closed or not opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert tag in CLOSED

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def having(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(wanted[k] in (a.get(k) or "").split() for k in wanted)]


def check_self_contained(text: str) -> None:
    """Nothing is fetched from anywhere, nothing runs, and every link leads to a place on the page."""
    page = Page(text)
    assert "://" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            assert (attributes["href"] or "").removeprefix("#") in ids


def check_accessible(text: str) -> None:
    """Language, title, headings without a gap, cells with their headers, pictures with a text or hidden."""
    page = Page(text)
    assert page.having("html", lang="en")
    assert page.having("meta", name="viewport")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for a in page.having("th"))
    inside_svg = 0
    for tag in re.findall(r"<(/?svg[^>]*)>", text):
        if tag.startswith("/"):
            inside_svg -= 1
            continue
        assert inside_svg or 'aria-hidden="true"' in tag or ('role="img"' in tag and "aria-label=" in tag)
        inside_svg += 1


def luminance(colour: str) -> float:
    """Relative luminance of a colour: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    digits = colour if len(colour) == 6 else "".join(c * 2 for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def check_contrast(text: str) -> None:
    """Text has a contrast of at least 4.5 and marks of at least 3 on all grounds, in both schemes."""
    dark = r"@media \(prefers-color-scheme:dark\)\{:root\{([^}]*)\}\}"
    schemes = re.findall(r":root\{([^}]*)\}", re.sub(dark, "", text)), re.findall(dark, text)
    light_names, dark_names = (set(re.findall(r"--([\w-]+):", "".join(blocks))) for blocks in schemes)
    assert light_names == dark_names
    for blocks in schemes:
        colours = dict(re.findall(r"--([\w-]+):#(\w+)", "".join(blocks)))
        for ground in ("page", "panel", "band"):
            for name in colours.keys() - {"page", "panel", "band", "line"}:
                darker, lighter = sorted((luminance(colours[name]), luminance(colours[ground])))
                limit = 3.0 if name == "edge" or name.startswith("series-") else 4.5
                assert (lighter + 0.05) / (darker + 0.05) >= limit, (name, ground)


LIGHT, DARK = (251, 251, 249), (20, 22, 26)


def check_picture(picture: Picture, size: tuple[int, int], scheme: str) -> None:
    assert picture.size == size
    assert picture.corner == (LIGHT if scheme == "light" else DARK)
    assert picture.rows > size[1] // 4
