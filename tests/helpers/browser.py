"""A headless Chromium, where there is one: pages opened without a network, measured and photographed."""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--virtual-time-budget=3000",
]
# What the setting preferredColorScheme of the engine means.
SCHEMES = {"dark": 0, "light": 1}


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no chromium on this machine: the page is not opened in a browser")


def _run(page: Path, *options: str) -> str:
    # Chromium holds on to its profile for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@dataclass(frozen=True)
class Picture:
    """What is to be known of a screenshot: its size, the colour of its corner, and how many of its rows differ."""

    size: tuple[int, int]
    corner: tuple[int, int, int]
    rows: int


def photograph(page: Path, file: Path, width: int, height: int, scheme: str) -> Picture:
    """Open a page in a window of some size and colour scheme and take a picture of it."""
    options = f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    _run(page, *options, f"--screenshot={file}")
    return _read_png(file)


_MEASURE = """<script>
document.querySelectorAll("details").forEach(part => part.open = OPEN);
parent.document.documentElement.setAttribute("data-frame-WIDTH",
  [innerWidth, document.documentElement.scrollWidth, matchMedia("(prefers-color-scheme: dark)").matches].join(" "));
</script></body>"""


def measure(text: str, folder: Path, widths: list[int], *, opened: bool) -> dict[int, tuple[int, int]]:
    """Width of the window and of the document laid out in it, for windows of several widths.

    A window of Chromium has at least 500 pixels, so the page is laid out in frames.
    """
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(text), "the page forbids all sources"
    frames = []
    for width in widths:
        script = _MEASURE.replace("WIDTH", str(width)).replace("OPEN", str(opened).lower())
        inside = policy.sub("", text).replace("</body>", script)
        frames.append(f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(inside)}"></iframe>')
    page = folder / "frames.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{''.join(frames)}</body>", encoding="utf-8")
    dumped = _run(page, "--dump-dom")
    found = re.findall(r'data-frame-(\d+)="(\d+) (\d+) \w+"', dumped)
    return {int(width): (int(window), int(document)) for width, window, document in found}


def _read_png(path: Path) -> Picture:
    """Read an 8-bit RGB or RGBA picture as far as it can be done without undoing the filters of its rows."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed = 8, b""
    width = height = channels = 0
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", body)
            assert (depth, colour) in ((8, 2), (8, 6))
            channels = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            packed += body
        place += 12 + length
    raw, stride = zlib.decompress(packed), width * channels + 1
    assert len(raw) == stride * height
    # Nothing stands left of or above the first pixel, so that every filter leaves it as it is.
    red, green, blue = raw[1:4]
    return Picture((width, height), (red, green, blue), len({raw[i : i + stride] for i in range(0, len(raw), stride)}))
