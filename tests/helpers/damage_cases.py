"""Damage to documents and to bytes, and how a call on damaged files may end."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from manifold_nets.errors import ManifoldNetsError

# What JSON can hold that Python's own writer refuses stands under a text that is replaced in the end.
DEEP, HUGE, INFINITE = "@deep", "@huge", "@infinite"
RAW = {DEEP: "[" * 2000 + "]" * 2000, HUGE: "9" * 400, INFINITE: "1e999"}
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, -(2**70), 0.5, 8.0, -0.0, 1e308, 5e-324, math.nan, math.inf,
    "", "weight", "0.weight", "1.bias", "9.bias", "\ud800", "ä\u0000\n", "x" * 5000, "spheres", "sphere", "keep",
    [], {}, [[]], [1, [2, [3]]], {"name": "0.weight"}, ["0.weight"], [0], [1.0], DEEP, HUGE, INFINITE,
]  # fmt: skip


def place(document: Any, draw: random.Random) -> tuple[Any, Any] | None:
    """A container of a document and a key in it, as often near the root as far from it."""
    found, node = None, document
    while isinstance(node, (dict, list)) and node and (found is None or draw.random() < 0.7):
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        found, node = (node, key), node[key]
    return found


def changed(document: Any, draw: random.Random) -> Any:
    """A document with one to three entries lost, replaced, renamed, repeated or added."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        found, another = place(document, draw), place(document, draw)
        if found is None or another is None:
            return draw.choice(STRANGE)
        holder, key = found
        what = draw.randrange(7)
        if what == 0:
            del holder[key]
        elif what <= 2:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
        elif what == 3:
            holder[key] = copy.deepcopy(another[0][another[1]])
        elif what == 4 and isinstance(holder[key], (int, float)):
            holder[key] += draw.choice([1, -1, 1e-9, 1e9])
        elif isinstance(holder, dict):
            name = draw.choice(["0.weight", "1.bias", "more", "\ud800", "", str(key)[:-1], f"{key}s"])
            holder[name] = holder.pop(key) if what == 5 else copy.deepcopy(draw.choice(STRANGE))
        else:
            holder.append(copy.deepcopy(holder[key]))
    return document


def text_of(document: Any) -> str:
    text = json.dumps(document)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some flipped, overwritten, lost, or added."""
    found, what = bytearray(data), draw.randrange(6)
    if len(data) < 9:
        return data[1:]
    if what <= 1:
        for _ in range(draw.choice([1, 1, 2, 4])):
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    elif what == 2:
        start = draw.randrange(len(found))
        found[start : start + draw.choice([4, 16, 64])] = draw.randbytes(draw.choice([4, 16, 64]))
    elif what == 3:
        del found[draw.randrange(len(found)) :]
    elif what == 4:
        found[draw.randrange(len(found)) : 0] = draw.randbytes(3)
    else:
        found[:8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**63, struct.unpack("<Q", data[:8])[0] + 1]))
    return bytes(found)


def outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    """How a call ended: what it gave, or the name of an error of ours; any other error goes on."""
    try:
        return "done", action()
    except ManifoldNetsError as error:
        found = error
    str(found).encode()  # it can be printed
    return type(found).__name__, None
