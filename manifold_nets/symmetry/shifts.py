"""Shift symmetries: constants that can be added to biases, rows and logits without a change of the function.

Every entry of every added parameter gets an unknown shift, and so does every block of filters (``W → W + 1vᵀ``). They
are followed through the graph by the rules of `manifold_nets.symmetry.rules`; what its equations
leave free are symmetries. A direction d is one exactly where ``⟨∂L/∂w, d⟩ = 0`` on the whole orbit: the certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.propagate import follow_shifts
from manifold_nets.symmetry.report import ShiftSymmetry
from manifold_nets.symmetry.rules import LARGEST_LINK, Absorption
from manifold_nets.symmetry.shift_findings import Direction, ShiftFindings
from manifold_nets.symmetry.structure.partitions import only_looked_up
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Scales
from manifold_nets.symmetry.trace import TracedGraph

__all__ = [
    "RowShift",
    "drops_samples",
    "inactive_modules",
    "only_multiplies",
    "row_shift",
    "row_shifts",
    "shape_of_source",
    "shift_symmetries",
    "shifts_of",
]

# Larger parameters that are no biases get one shift a filter or a row instead of one an entry.
_LARGEST_BY_ENTRY = 1024
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p")


@dataclass(frozen=True)
class RowShift:
    """A row that the structure allows to be added to blocks of a weight's filters.

    Args:
        name: the weight.
        partition: the entries that are shifted together.
        free: the blocks whose row is free.
        absorptions: the operations that do not see it.
    """

    name: str
    partition: Partition
    free: list[int]
    absorptions: list[Absorption]


def row_shifts(graph: TracedGraph, model: nn.Module, *, loss: bool = False) -> list[RowShift]:
    """What the structure of a network allows to be added to its weights, row by row; see `shift_symmetries`."""
    inactive = inactive_modules(model)
    found = (row_shift(graph, name, inactive, loss) for name in dict.fromkeys(graph.parameters.values()))
    return [row for row in found if row is not None]


def shift_symmetries(
    graph: TracedGraph,
    model: nn.Module,
    rows: Sequence[RowShift],
    test: InvarianceTest,
    *,
    loss: bool = False,
) -> tuple[ShiftSymmetry, ...]:
    """Find the shift symmetries of a network, each with its certificate.

    Args:
        graph: the graph of the model in training mode.
        model: the model as the user has it: its probabilities of dropout count.
        rows: what `row_shifts` found for them.
        test: tests them, by gradients for cotangents that sum to zero along axis 1 where ``loss`` is given.
        loss: whether the outputs are logits of a loss that compares them along axis 1.

    Returns:
        The symmetries of single parameters and of several, parameter by parameter.
    """
    judge = ShiftFindings(test, drops_samples(model))
    found = _added_parameters(graph, judge, inactive_modules(model), loss)
    found += [judge.rows(row.name, row.partition, row.free, row.absorptions) for row in rows]
    return tuple(found)


def inactive_modules(model: nn.Module) -> Callable[[str], bool]:
    """Tell of the name of a module whether it drops nothing at random."""
    modules = dict(model.named_modules())

    def inactive(name: str) -> bool:
        return not any(_drops(modules.get(name), attribute) for attribute in _DROPOUT_ATTRIBUTES)

    return inactive


def _drops(module: nn.Module | None, attribute: str) -> bool:
    value = getattr(module, attribute, 0.0)
    return isinstance(value, float) and value > 0


def drops_samples(model: nn.Module) -> bool:
    """Whether branches are dropped at random, sample by sample, which leaves no trace in the graph."""
    names = ("StochasticDepth", "DropPath")
    return any(
        type(m).__name__ in names and any(_drops(m, a) for a in _DROPOUT_ATTRIBUTES) for m in model.modules()
    )  # fmt: skip


# ---- added parameters ------------------------------------------------------------------------------------------------


def _added_parameters(
    graph: TracedGraph, judge: ShiftFindings, inactive: Callable[[str], bool], loss: bool
) -> list[ShiftSymmetry]:
    """Shifts of biases, all at once, and of larger parameters that are added, one after the other."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(graph.parameters.values()):
        sources = [node for node in graph.placeholders_of(name) if node.users]
        if sources and (shape := shape_of_source(sources[0])) and not only_multiplies(sources):
            shapes[name] = shape
    together: list[dict[str, tuple[int, ...]]] = [{name: shape for name, shape in shapes.items() if len(shape) == 1}]
    # Positions times channels would be too many different sums.
    together += [{name: shape} for name, shape in shapes.items() if len(shape) > 1]
    return [found for part in together for found in shifts_of(graph, part, judge, inactive, loss)]


def shifts_of(
    graph: TracedGraph,
    shapes: dict[str, tuple[int, ...]],
    judge: ShiftFindings,
    inactive: Callable[[str], bool],
    loss: bool,
) -> list[ShiftSymmetry]:
    """The shifts of some parameters that are added, which may cancel each other; ``shapes`` names them."""
    scales, seeds = Scales(), {}
    for name, shape in shapes.items():
        where = _seed_shape(shape)
        seeds[name] = scales.add(int(np.prod(where))).reshape(where)
    count = scales.count
    absorbed = follow_shifts(graph, seeds, scales, inactive=inactive, loss=loss)
    directions: dict[int, Direction] = {}
    for name, ids in seeds.items():
        _collect(directions, name, np.broadcast_to(scales.roots(ids), shapes[name]).reshape(-1), scales)
    families: dict[Any, list[int]] = {}
    for k in (k for k in directions if k < count):
        absorbers = tuple(dict.fromkeys(a.node for a in absorbed.get(k, [])))
        if absorbers or len(directions[k]) > 1:
            single = sum(len(entries) for entries in directions[k].values()) == 1
            families.setdefault((tuple(directions[k]), single, absorbers), []).append(k)
    return [
        judge.added([directions[k] for k in members], absorbed.get(members[0], []), len(shapes[names[0]]))
        for (names, _, _), members in families.items()
    ]


def _collect(directions: dict[int, Direction], name: str, numbers: Ids, scales: Scales) -> None:
    """Add the coefficients of a parameter's entries to the directions of the free shifts."""
    for index in np.flatnonzero(numbers != UNSCALED).tolist():
        for k, c in scales.form(int(numbers[index])).items():
            directions.setdefault(k, {}).setdefault(name, {})[index] = c


def shape_of_source(node: Node) -> tuple[int, ...]:
    """The shape of the parameter behind a placeholder."""
    return tuple(int(n) for n in node.meta["val"].shape)


def _seed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Along which axes a parameter gets shifts of its own."""
    if len(shape) == 1 or np.prod(shape) <= _LARGEST_BY_ENTRY:
        return shape
    return (shape[0], *(1 for _ in shape[1:])) if shape[0] > 1 else (*shape[:-1], 1)


def only_multiplies(sources: list[Node]) -> bool:
    """Whether a parameter is used as the weight of linear maps and normalizations only."""
    return all(bound_arguments(user).get("weight") is node for node in sources for user in node.users)


# ---- rows ------------------------------------------------------------------------------------------------------------


def row_shift(
    graph: TracedGraph, name: str, inactive: Callable[[str], bool], loss: bool, wanted: Iterable[Partition] = ()
) -> RowShift | None:
    """``W → W + 1vᵀ``, one row for each block of filters: the finest blocks that cover the most.

    Args:
        graph: the graph of the model in training mode.
        name: the weight.
        inactive: whether a module drops nothing at random.
        loss: whether the outputs are logits of a loss that compares them along axis 1.
        wanted: blocks to try beside those that normalizations suggest.
    """
    sources = [node for node in graph.placeholders_of(name) if node.users]
    users = [user for node in sources for user in node.users]
    if not sources or len(shape_of_source(sources[0])) < 2:
        return None
    if not only_multiplies(sources) or only_looked_up(sources):
        along = _shift_along_an_axis(graph, name, sources, inactive, loss)
        if along or not only_multiplies(sources):
            return along
    best: tuple[float, Partition, list[int], list[Absorption]] | None = None
    for blocks, partition in _row_partitions(graph, users, shape_of_source(sources[0]), wanted):
        scales = Scales(blocks)
        ids = np.arange(1, blocks + 1).reshape(blocks, *(1 for _ in shape_of_source(sources[0])[1:]))
        absorbed = follow_shifts(graph, {name: ids}, scales, rows={name: blocks}, inactive=inactive, loss=loss)
        free = [k for k in scales.free if k in absorbed]
        if free and (best is None or len(free) / blocks > best[0]):
            reached = list({a.node: a for k in free for a in absorbed[k]}.values())
            best = len(free) / blocks, partition, free, reached
    return None if best is None else RowShift(name, *best[1:])


def _shift_along_an_axis(
    graph: TracedGraph, name: str, sources: list[Node], inactive: Callable[[str], bool], loss: bool
) -> RowShift | None:
    """One constant for each slice of a matrix that is transposed, multiplied as it stands, or looked up."""
    shape = shape_of_source(sources[0])
    for axis in (1,) if only_looked_up(sources) else (1, 0):
        if len(shape) != 2 or shape[axis] > LARGEST_LINK:
            continue
        scales = Scales(shape[axis])
        ids = np.arange(1, shape[axis] + 1).reshape([-1 if k == axis else 1 for k in range(2)])
        absorbed = follow_shifts(graph, {name: ids}, scales, inactive=inactive, loss=loss)
        free = [k for k in scales.free if k in absorbed and k < shape[axis]]
        if len(free) == shape[axis]:
            reached = list({a.node: a for k in free for a in absorbed[k]}.values())
            return RowShift(name, Partition(shape, shape, (axis,)), free, reached)
    return None


def _row_partitions(
    graph: TracedGraph, users: list[Node], shape: tuple[int, ...], wanted: Iterable[Partition] = ()
) -> Iterable[tuple[int, Partition]]:
    """Numbers of blocks to try, finest first, with the entries of the weight that are shifted together."""
    ops = {op_name(user) for user in users}
    if ops == {"embedding"}:
        return [(1, Partition(shape, shape, tuple(range(len(shape) - 1))))]
    if not all(op == "linear" or op.startswith("conv") for op in ops):
        return []
    arguments = bound_arguments(users[0])
    groups = int(arguments.get("groups", 1) or 1)
    transposed = "transpose" in op_name(users[0]) or bool(arguments.get("transposed"))
    channels = shape[1] * groups if transposed else shape[0]
    counts = {1, groups}
    for node in graph.order:
        if op_name(node) == "group_norm":
            counts.add(int(bound_arguments(node)["num_groups"]))
        elif op_name(node) == "layer_norm":
            counts.add(channels // int(np.prod(bound_arguments(node)["normalized_shape"])) or 1)
    counts.update(p.view[0] for p in wanted if p == _row_partition(shape, p.view[0], 0) and not transposed)
    fitting = [n for n in sorted(counts, reverse=True) if n < channels and channels % n == 0 and n % groups == 0]
    return [(n, _row_partition(shape, n, groups if transposed else 0)) for n in fitting]


def _row_partition(shape: tuple[int, ...], blocks: int, transposed_groups: int) -> Partition:
    if not transposed_groups:
        view = (blocks, shape[0] // blocks, *shape[1:])
        return Partition(shape, view, (0, *range(2, len(view))))
    channels_in, per_group, *kernel = shape
    groups, each = transposed_groups, blocks // transposed_groups
    view = (groups, channels_in // groups, each, per_group // each, *kernel)
    return Partition(shape, view, (0, 1, 2, *range(4, len(view))))
