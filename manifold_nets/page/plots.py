"""Figures of matplotlib as files, and as SVG in a page with the page's colours and fonts."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold_nets.errors import MissingExtraError
from manifold_nets.page.markup import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "SERIES", "figure_svg", "plot_settings", "save_figure", "series_style_sheet", "settled"]

# Colours of the page by the names that page.css gives them, as figures are drawn with them.
COLOURS = {"ink": "#1c1f24", "soft": "#555b66", "line": "#dcdcd6", "edge": "#767d88", "panel": "#ffffff"}
# The colours of Okabe and Ito without yellow, made darker or lighter for a contrast of at least 3 on either ground.
SERIES = (
    ("#0072b2", "#5aa9ff"),
    ("#d55e00", "#ff8a3d"),
    ("#00805e", "#2fc495"),
    ("#a8478a", "#e79acb"),
    ("#1c1f24", "#e9eaec"),
    ("#a87400", "#e8b33a"),
    ("#2a86bd", "#8fd4ff"),
)


# Settings of matplotlib beside colors and sizes, and which of its colors are which of the page.
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # long enough for dashes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "manifold_nets",
    "text.parse_math": False,  # names may hold dollars
}
_COLORED = {
    "ink": "axes.titlecolor text.color",
    "soft": "axes.labelcolor xtick.color ytick.color",
    "line": "grid.color",
    "edge": "axes.edgecolor",
    "panel": "figure.facecolor savefig.facecolor",
}


def series_style_sheet() -> str:
    """The colours of the series as custom properties, for light and dark pages."""
    light, dark = (";".join(f"--series-{i}:{pair[k]}" for i, pair in enumerate(SERIES)) for k in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


@contextmanager
def plot_settings(font: float) -> Iterator[None]:
    """Matplotlib settings for drawing and writing figures; the user's own settings are ignored.

    Args:
        font: font size, in points.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "the plots of a report", "monitor") from None
    small = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    colors = {key: COLOURS[name] for name, keys in _COLORED.items() for key in keys.split()}
    sizes = {"font.size": font, "axes.titlesize": font, "axes.labelsize": font, **dict.fromkeys(small, 0.92 * font)}
    # Only what the package draws with; everything else at matplotlib's own defaults.
    chosen: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    chosen.update(**_STYLE, **colors, **sizes)
    with matplotlib.rc_context(chosen):
        yield


def settled(figure: Figure) -> Figure:
    """The same figure with its layout computed once, instead of each time it is written."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save_figure(figure: Figure, path: Path, kind: str, *, dots: int = 200) -> None:
    """Write a figure as PNG or SVG; the same figure gives the same bytes.

    Args:
        figure: the figure, drawn under `plot_settings`.
        path: the file; its folder must exist.
        kind: ``"png"`` or ``"svg"``.
        dots: resolution of a PNG, per inch.
    """
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=dots, metadata=metadata)
    path.write_bytes(buffer.getvalue())


def figure_svg(figure: Figure, *, label: str, prefix: str, titles: Mapping[str, str], css: str = "") -> str:
    """A figure as an element of a page, without a fixed size, with the page's colours and fonts and a text alternative.

    Args:
        figure: the figure, drawn under `plot_settings`.
        label: text alternative for readers who do not see the figure.
        prefix: prefix of its ids; different for each figure of a page.
        titles: tooltips of artists, by the artist's ``gid``.
        css: style classes of the element.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    _without_namespaces(root)
    _title(root, titles)
    _rename(root, prefix)
    _clean(root)
    _prune(root)
    box = root.get("viewBox", "")
    inside = "".join(ET.tostring(child, encoding="unicode", short_empty_elements=True) for child in root)
    return (
        f'<svg class="figure-svg {escape(css)}" role="img" aria-label="{escape(label)}" viewBox="{box}">{inside}</svg>'
    )


def _without_namespaces(root: ET.Element) -> None:
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}


def _title(root: ET.Element, titles: Mapping[str, str]) -> None:
    for element in root.iter("g"):
        if said := titles.get(element.get("id", "")):
            title = ET.Element("title")
            title.text = said
            element.insert(0, title)


def _rename(root: ET.Element, prefix: str) -> None:
    """Remove unreferenced ids and prefix the others."""
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))


def _prune(parent: ET.Element) -> None:
    """Take out groups without content, and what the page says itself."""
    for child in list(parent):
        _prune(child)
        if child.tag in ("metadata", "style") or (child.tag in ("g", "defs") and not len(child)):
            parent.remove(child)


def _clean(root: ET.Element) -> None:
    """Remove white space between elements, and replace colours by those of the page."""
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _recoloured(element.attrib["style"]))
        element.tail = None
        if element.tag not in ("text", "tspan", "title"):
            element.text = None


def _recoloured(text: str) -> str:
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font: (?:bold|700) ([\d.]+)px [^;\"]*", r"font-size: \1px; font-weight: 600", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for i, (light, _) in enumerate(SERIES):
        if light != COLOURS["ink"]:
            text = text.replace(light, f"var(--series-{i})")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
