"""Shift symmetries: constants that can be added to biases, rows and logits without changing the function.

Every entry of every added parameter gets an unknown shift, and so does every block of filters (``W → W + 1vᵀ``). The
rules of `manifold_nets.symmetry.rules` follow them through the graph; the solutions of its equations are symmetries. A
direction d is a symmetry exactly if ``⟨∂L/∂w, d⟩ = 0`` on the whole orbit, which the certificate tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.equations import UNSCALED, Ids, Scales
from manifold_nets.symmetry.generators import Direction
from manifold_nets.symmetry.graph import bound_arguments, is_linear_map, op_name, weight_uses
from manifold_nets.symmetry.propagate import follow_shifts
from manifold_nets.symmetry.rules import LARGEST_LINK, Absorption
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["AddedShift", "RowShift", "ShiftStructure"]

# Larger parameters that are no biases get one shift a filter or a row instead of one an entry.
_LARGEST_BY_ENTRY = 1024
_NORMALIZATIONS = {"group_norm": "num_groups", "layer_norm": "normalized_shape"}
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p")
_DROPPING_SAMPLES = ("StochasticDepth", "DropPath")


@dataclass(frozen=True)
class RowShift:
    """A row that the structure allows to be added to blocks of a weight's filters.

    Args:
        name: the weight.
        partition: the entries that are shifted together.
        groups: the groups of it in the blocks whose row is free.
        absorptions: the operations that do not see it.
    """

    name: str
    partition: Partition
    groups: list[int]
    absorptions: list[Absorption]


@dataclass(frozen=True)
class AddedShift:
    """Shifts of parameters that are added, of the same make-up.

    Args:
        directions: the entries that each of them moves.
        absorptions: the operations that do not see them.
        rank: how many axes the first of the parameters has.
    """

    directions: list[Direction]
    absorptions: list[Absorption]
    rank: int


class ShiftStructure:
    """What the structure of a network allows to be added to its parameters.

    Args:
        graph: the graph of the model in training mode.
        model: the model as the user has it: its probabilities of dropout count.
        loss: whether the outputs are logits of a loss that compares them along axis 1.
        dropout: False to take all dropout for inactive.
    """

    def __init__(self, graph: TracedGraph, model: nn.Module, *, loss: bool, dropout: bool = True) -> None:
        self.graph, self.model, self.loss, self.dropout = graph, model, loss, dropout
        self.modules = dict(model.named_modules())

    @property
    def drops_samples(self) -> bool:
        """Whether branches are dropped at random, sample by sample, which leaves no trace in the graph."""
        return any(type(m).__name__ in _DROPPING_SAMPLES and _drops(m) for m in self.modules.values())

    def without_dropout(self) -> ShiftStructure:
        """The same for dropout that is off."""
        return ShiftStructure(self.graph, self.model, loss=self.loss, dropout=False)

    def absorbed(
        self, name: str, ids: Ids, scales: Scales, blocks: int | None = None
    ) -> tuple[list[int], list[Absorption]]:
        """Which unknown shifts of a parameter are free and absorbed, and the operations that absorb them.

        Args:
            name: the parameter.
            ids: the number of the unknown of each entry.
            scales: the unknowns; takes the equations that the network puts on them.
            blocks: the number of blocks of filters that share a row ``v`` of ``W → W + 1vᵀ``.
        """
        count = scales.count
        absorbed = self._follow({name: ids}, scales, {} if blocks is None else {name: blocks})
        free = [k for k in scales.free if k < count and k in absorbed]
        return free, list({a.node: a for k in free for a in absorbed[k]}.values())

    def _follow(self, seeds: dict[str, Ids], scales: Scales, rows: dict[str, int]) -> dict[int, list[Absorption]]:
        return follow_shifts(self.graph, seeds, scales, rows=rows, inactive=self._is_inactive, loss=self.loss)

    def _is_inactive(self, module: str) -> bool:
        """Whether a module drops nothing at random."""
        return not (self.dropout and _drops(self.modules.get(module)))

    @cached_property
    def _placeholders(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node, name in self.graph.parameters.items():
            if node.users:
                found.setdefault(name, []).append(node)
        return found

    def sources(self, name: str) -> list[Node]:
        """The placeholders of a parameter that something reads."""
        return self._placeholders.get(name, [])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that the network reads."""
        return {name: tuple(int(n) for n in nodes[0].meta["val"].shape) for name, nodes in self._placeholders.items()}

    def only_multiplies(self, name: str) -> bool:
        """Whether a parameter is used as the weight of linear maps and normalizations only."""
        return "" not in weight_uses(self.sources(name))

    # ---- parameters that are added -----------------------------------------------------------------------------------

    def added(self) -> Iterator[AddedShift]:
        """Shifts of biases, all at once, and of larger parameters that are added, one after the other."""
        shapes = {name: shape for name, shape in self.shapes.items() if shape}
        shapes = {name: shape for name, shape in shapes.items() if not self.only_multiplies(name)}
        yield from self.added_together({name: shape for name, shape in shapes.items() if len(shape) == 1})
        for name, shape in shapes.items():
            if len(shape) > 1:  # positions times channels would be too many different sums
                yield from self.added_together({name: shape})

    def added_together(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[AddedShift]:
        """The shifts of some parameters, which may cancel each other; ``shapes`` names them."""
        scales, seeds = Scales(), {}
        for name, shape in shapes.items():
            where = _seed_shape(shape)
            seeds[name] = scales.add(int(np.prod(where))).reshape(where)
        count = scales.count
        absorbed = self._follow(seeds, scales, {})
        directions: dict[int, Direction] = {}
        for name, ids in seeds.items():
            numbers = np.broadcast_to(scales.roots(ids), shapes[name]).reshape(-1)
            for index in np.flatnonzero(numbers != UNSCALED).tolist():
                for k, c in scales.form(int(numbers[index])).items():
                    directions.setdefault(k, {}).setdefault(name, {})[index] = c
        families: dict[Any, list[int]] = {}
        for k in (k for k in directions if k < count):
            absorbers = tuple(dict.fromkeys(a.node for a in absorbed.get(k, [])))
            if absorbers or len(directions[k]) > 1:
                single = sum(len(entries) for entries in directions[k].values()) == 1
                families.setdefault((tuple(directions[k]), single, absorbers), []).append(k)
        for (names, _, _), members in families.items():
            yield AddedShift([directions[k] for k in members], absorbed.get(members[0], []), len(shapes[names[0]]))

    # ---- rows --------------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> list[RowShift]:
        """What may be added to the weights, row by row."""
        return [row for name in self.shapes if (row := self.row(name)) is not None]

    def row(self, name: str, suggested: Iterable[Partition] = ()) -> RowShift | None:
        """``W → W + 1vᵀ``, one row for each block of filters: the finest blocks that cover the most.

        Args:
            name: the weight.
            suggested: blocks to try beside those of the normalizations.
        """
        shape, uses = self.shapes.get(name, ()), weight_uses(self.sources(name))
        if len(shape) < 2:
            return None
        if "" in uses or uses == {"embedding"}:
            along = self._along_an_axis(name, shape, uses)
            if along or "" in uses:
                return along
        best: RowShift | None = None
        covered = 0.0
        for partition, block_of in self._row_partitions(name, suggested):
            if covered == 1.0:
                break
            blocks = int(block_of.max()) + 1
            ids = np.arange(1, blocks + 1).reshape(blocks, *(1 for _ in shape[1:]))
            free, reached = self.absorbed(name, ids, Scales(blocks), blocks)
            if len(free) / blocks > covered:
                groups = np.flatnonzero(np.isin(block_of, free)).tolist()
                best, covered = RowShift(name, partition, groups, reached), len(free) / blocks
        return best

    def _along_an_axis(self, name: str, shape: tuple[int, ...], uses: set[str]) -> RowShift | None:
        """One constant for each slice of a matrix that is transposed, multiplied as it stands, or looked up."""
        for axis in (1,) if uses == {"embedding"} else (1, 0):
            if len(shape) != 2 or shape[axis] > LARGEST_LINK:
                continue
            ids = np.arange(1, shape[axis] + 1).reshape([-1 if k == axis else 1 for k in range(2)])
            free, reached = self.absorbed(name, ids, Scales(shape[axis]))
            if len(free) == shape[axis]:
                return RowShift(name, Partition(shape, shape, (axis,)), list(range(shape[axis])), reached)
        return None

    def _row_partitions(self, name: str, suggested: Iterable[Partition]) -> Iterable[tuple[Partition, Ids]]:
        """Partitions into entries that are shifted together, finest first, with the block of filters of each group."""
        shape, users = self.shapes[name], [user for node in self.sources(name) for user in node.users]
        ops = {op_name(user) for user in users}
        if ops == {"embedding"}:
            partition = Partition(shape, shape, tuple(range(len(shape) - 1)))
            return [(partition, np.zeros(partition.n_groups, dtype=np.int64))]
        if not all(map(is_linear_map, ops)):
            return []
        arguments = bound_arguments(users[0])
        groups = int(arguments.get("groups", 1) or 1)
        transposed = "transpose" in op_name(users[0]) or bool(arguments.get("transposed"))
        channels = shape[1] * groups if transposed else shape[0]
        counts = {1, groups}
        for op, size in self._normalized:
            counts.add(size if op == "group_norm" else channels // size or 1)
        counts.update(p.view[0] for p in suggested if p == _row_partition(shape, p.view[0], 0)[0] and not transposed)
        fitting = [n for n in sorted(counts, reverse=True) if n < channels and channels % n == 0 and n % groups == 0]
        return [_row_partition(shape, n, groups if transposed else 0) for n in fitting]

    @cached_property
    def _normalized(self) -> frozenset[tuple[str, int]]:
        """The numbers of groups, and of entries with a common statistic, that normalizations of the network have."""
        given = (
            (op_name(node), bound_arguments(node)) for node in self.graph.order if op_name(node) in _NORMALIZATIONS
        )
        return frozenset((op, int(np.prod(arguments[_NORMALIZATIONS[op]]))) for op, arguments in given)


def _drops(module: nn.Module | None) -> bool:
    """Whether a module drops something at random."""
    values = (getattr(module, attribute, 0.0) for attribute in _DROPOUT_ATTRIBUTES)
    return any(isinstance(value, float) and value > 0 for value in values)


def _seed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Along which axes a parameter gets shifts of its own."""
    if len(shape) == 1 or np.prod(shape) <= _LARGEST_BY_ENTRY:
        return shape
    return (shape[0], *(1 for _ in shape[1:])) if shape[0] > 1 else (*shape[:-1], 1)


def _row_partition(shape: tuple[int, ...], blocks: int, transposed_groups: int) -> tuple[Partition, Ids]:
    """The entries that one row adds to each block of filters, and the block of each group of them."""
    first, *rest = shape
    if not transposed_groups:
        view, kept = (blocks, first // blocks, *rest), (0, *range(2, len(shape) + 1))
        block_of = np.arange(blocks).reshape(-1, *(1 for _ in rest))
    else:
        groups, each, (per_group, *kernel) = transposed_groups, blocks // transposed_groups, rest
        view, kept = (groups, first // groups, each, per_group // each, *kernel), (0, 1, 2, *range(4, len(shape) + 2))
        block_of = np.arange(blocks).reshape(groups, 1, each, *(1 for _ in kernel))
    partition = Partition(shape, view, kept)
    return partition, np.broadcast_to(block_of, partition.group_shape).reshape(-1)
