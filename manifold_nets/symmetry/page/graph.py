"""The network's graph: a strip of steps for each part of it, with edges drawn beside the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from manifold_nets.page.markup import escape, plural
from manifold_nets.symmetry.module_graph import GraphNode
from manifold_nets.symmetry.page.drawings import groups_text, mark, status_style
from manifold_nets.symmetry.report import SymmetryReport, WeightFinding

ROW = 26
# Where the steps stand, and where the lanes of the edges that pass over steps begin.
TRUNK, FIRST_LANE, WIDEST = 12, 26, 120
# Parts are open as long as this many steps are shown; the reader opens the others.
OPEN_STEPS = 36
# A part with more than this share of the steps is split, if it has at most `MOST_CHILDREN` parts.
LARGE_SHARE, MOST_CHILDREN = 0.5, 24
# Neighbouring parts are joined up to this many steps: conv1, bn1, relu, maxpool.
SMALL = 7


@dataclass(frozen=True)
class Part:
    """Consecutive steps of one branch of the module tree.

    Args:
        title: the common part of their names.
        prefix: the beginning of their names that the title already contains.
        nodes: the steps.
    """

    title: str
    prefix: str
    nodes: tuple[GraphNode, ...]


def parts(nodes: Sequence[GraphNode]) -> list[Part]:
    """Cut the steps of a network into parts by the names of their modules."""
    found: list[Part] = []
    for part in _cut(tuple(nodes), 0, len(nodes)):
        if found and len(found[-1].nodes) + len(part.nodes) <= SMALL:
            joined = found.pop()
            first = joined.title.split(" … ")[0]
            part = Part(f"{first} … {part.title}", "", joined.nodes + part.nodes)
        elif found and all(node.kind == "output" for node in part.nodes):
            before = found.pop()
            part = Part(before.title, before.prefix, before.nodes + part.nodes)
        found.append(part)
    return found


def _cut(nodes: tuple[GraphNode, ...], depth: int, total: int) -> list[Part]:
    cut: list[Part] = []
    for prefix, run in groupby(nodes, key=lambda node: _path(node)[: depth + 1]):
        members = tuple(run)
        title = ".".join(prefix) or members[0].name
        children = {_path(node)[: depth + 2] for node in members}
        if len(members) > LARGE_SHARE * total and len(members) > SMALL and 1 < len(children) <= MOST_CHILDREN:
            cut.extend(_cut(members, depth + 1, total))
        else:
            cut.append(Part(title, f"{title}." if prefix else "", members))
    return cut


def _path(node: GraphNode) -> tuple[str, ...]:
    return tuple(node.module.split(".")) if node.module else ()


def network(report: SymmetryReport, anchors: Mapping[str, str]) -> str:
    """Draw the graph of a report, part by part.

    Args:
        report: the report.
        anchors: where on the page each weight is described.
    """
    findings = {finding.name: finding for finding in report.weights}
    absorbing = {absorber.module for finding in report.weights for absorber in finding.absorbers}
    drawn, shown = [], 0
    for part in parts(report.graph):
        shown += len(part.nodes)
        is_open = " open" if shown <= OPEN_STEPS else ""
        known = [findings[name] for node in part.nodes for name in node.weights if name in findings]
        cells = "".join(mark(finding.status, f"{finding.name}: {finding.status}") for finding in known)
        count = plural(len(known), "weight") if known else plural(len(part.nodes), "step")
        rows = "".join(_row(node, part, findings, anchors) for node in part.nodes)
        drawn.append(
            f'<details class="part"{is_open}><summary><span class="title">{escape(part.title)}</span> '
            f'<span class="count">{count}</span> <span class="cells">{cells}</span></summary>'
            f'<div class="strip">{_edges(part, report.graph, findings, absorbing)}<ol>{rows}</ol></div></details>'
        )
    return "".join(drawn)


def _row(node: GraphNode, part: Part, findings: Mapping[str, WeightFinding], anchors: Mapping[str, str]) -> str:
    name = node.name.removeprefix(part.prefix).removeprefix(f"{part.title}:")
    known = [findings[weight] for weight in node.weights if weight in findings]
    text = escape(name)
    if known:
        text = f'<a href="#{anchors[known[0].name]}">{text}</a>'
    said = [node.label] if node.label != name.rpartition(":")[2].partition(" #")[0] else []
    said += [groups_text(finding) or finding.status for finding in known[:2]]
    hidden = f"; reads {', '.join(node.inputs)}" if len(node.inputs) > 1 else ""
    status = "".join(f", {finding.status}" for finding in known if finding.partition is not None)
    return (
        f'<li class="k-{node.kind}" title="{escape(node.name)}"><span class="name">{text}</span> '
        f'<span class="said">{escape(" · ".join(said))}</span>'
        f'<span class="unseen">{escape(status + hidden)}</span></li>'
    )


# ---- edges -----------------------------------------------------------------------------------------------------------


def _edges(part: Part, graph: Sequence[GraphNode], findings: Mapping[str, WeightFinding], absorbing: set[str]) -> str:
    """The steps of a part one below the other, and their edges: straight to the next step, in a lane to later ones."""
    straight, lanes = _routes(part, graph)
    places = _places(lanes)
    count, height = max(places, default=-1) + 1, ROW * len(part.nodes)
    gap = min(10.0, (WIDEST - FIRST_LANE) / max(count, 1))
    width = FIRST_LANE + (count - 1) * gap + 8 if count else TRUNK * 2
    path = "".join(f"M{TRUNK} {_centre(row)}v{ROW}" for row in straight)
    for (start, ends), place in zip(lanes, places, strict=True):
        path += _curve(start, ends, FIRST_LANE + place * gap, height)
    nodes = "".join(_node(node, row, findings, absorbing) for row, node in enumerate(part.nodes))
    return (
        f'<svg class="edges" aria-hidden="true" width="{width:.0f}" height="{height}">'
        f'<path class="edge" style="stroke-width:{min(1.5, gap / 3):.2f}" d="{path}"/>{nodes}</svg>'
    )


def _routes(part: Part, graph: Sequence[GraphNode]) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Rows that are joined to the next one, and lanes: the row where each begins, and those where it ends.

    Row −1 and the row after the last one are other parts.
    """
    rows, count = {node.name: row for row, node in enumerate(part.nodes)}, len(part.nodes)
    first, last = graph.index(part.nodes[0]), graph.index(part.nodes[-1])
    straight: set[int] = set()
    lanes: dict[str, dict[int, None]] = {}
    for row, node in [*enumerate(part.nodes), *((count, later) for later in graph[last + 1 :])]:
        for source in node.inputs:
            start = rows.get(source, -1)
            if row == count and start < 0:
                continue
            if start == row - 1 and (row or source == graph[first - 1].name):
                straight.add(start)
            else:
                lanes.setdefault(source, {})[row] = None
    return sorted(straight), [(rows.get(source, -1), sorted(ends)) for source, ends in lanes.items()]


def _places(lanes: Sequence[tuple[int, list[int]]]) -> list[int]:
    """For each lane the place nearest to the steps that is free over its length."""
    taken: list[int] = []
    places = [0] * len(lanes)
    for number in sorted(range(len(lanes)), key=lambda number: (lanes[number][0], lanes[number][1][-1])):
        start, ends = lanes[number]
        place = next((place for place, end in enumerate(taken) if end <= start), len(taken))
        taken[place : place + 1] = [ends[-1]]
        places[number] = place
    return places


def _centre(row: int) -> int:
    return ROW * row + ROW // 2


def _curve(start: int, ends: Sequence[int], x: float, height: int) -> str:
    inside = [end for end in ends if _centre(end) < height]
    path = f"M{x:.1f} 0" if start < 0 else f"M{TRUNK} {_centre(start)}H{x - 5:.1f}q5 0 5 5"
    path += f"V{height if len(inside) < len(ends) else _centre(inside[-1]) - 5}"
    return path + "".join(f"M{x:.1f} {_centre(end) - 5}q0 5-5 5H{TRUNK}" for end in inside)


def _node(node: GraphNode, row: int, findings: Mapping[str, WeightFinding], absorbing: set[str]) -> str:
    y = _centre(row)
    known = [findings[name] for name in node.weights if name in findings]
    if known:
        css = status_style(known[0].status).css
        return (
            f'<g class="s-{css}"><circle class="plate" cx="{TRUNK}" cy="{y}" r="8"/>'
            f'<use href="#m-{css}" x="{TRUNK - 6}" y="{y - 6}" width="12" height="12"/></g>'
        )
    if node.kind == "normalization":
        css = "absorbs" if node.module in absorbing else "passes"
        return f'<rect class="{css}" x="{TRUNK - 5.5}" y="{y - 5.5}" width="11" height="11" rx="2"/>'
    if len(node.inputs) > 1:
        return f'<path class="join" d="M{TRUNK - 4} {y}h8M{TRUNK} {y - 4}v8"/>'
    return f'<circle class="step" cx="{TRUNK}" cy="{y}" r="2.5"/>'
