"""One operation of the graph as a rule sees it: its arguments, their labels, and what it may demand of the scales.

Labels are those of `manifold_nets.symmetry.equations`; of shifts they are read additively: each entry is shifted
by its form ``Σ c_k s_k``. What a linear map makes of a shift depends on data or on other weights; each of its results
gets a new unknown, and a `Link` that says where it comes from. An unknown that the network does not leave free refuses
its sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Break, Certainty, Ids, Label, Scales
from manifold_nets.symmetry.graph import bound_arguments, is_linear_map, op_name, operation_key, weight_uses
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["LARGEST_LINK", "Absorption", "Coscaled", "Link", "Result", "Use", "Walk"]

# Up to this many zeros get a scale each.
_MOST_ZEROS = 16_384
# Beyond this many entries a linear image has fewer unknowns than entries, `_COLOURS`, strewn over them at random:
# operations that tie entries tie many, hardly all of one colour. Beyond `_LARGEST_IMAGE` entries it is not followed.
LARGEST_LINK = 2_048
_COLOURS = 64
_LARGEST_IMAGE = 2**20

# Why a scale ends at an operation that only compares, counts or orders.
UNSEEN = "does not see its scale, and hands on no gradient"

Result = Label | list[Label | None] | None


@dataclass(frozen=True)
class Absorption:
    """A normalization that absorbs scales: the form of each of its statistics.

    ``ids`` broadcasts to the statistics of the operation, kept with their axes: (1, C, 1, …) for batch normalization.
    """

    node: Node
    kind: str
    op: str
    module: str
    ids: Ids
    running_mean: str | None = None
    running_var: str | None = None


@dataclass(frozen=True)
class Coscaled:
    """A bias that has to be scaled along with the weight: its parameter and the form of each of its entries."""

    parameter: str
    ids: Ids


@dataclass(frozen=True)
class Link:
    """New unknowns that a linear map makes of shifts: free only together with their sources."""

    sources: Ids
    results: Ids
    unknowns: range
    because: Break


@dataclass
class Walk:
    """A walk over a graph: what is followed, and what has been found so far.

    Args:
        graph: the graph.
        scales: takes the conditions that the operations put on the unknowns.
        live: the nodes that are visited.
        columns: where given, a weight may be scaled column by column against its input, as rescaling symmetries do; it
            takes down by which form each input channel of each weight is divided.
        shifts: whether the unknowns are added to the entries, and do not multiply them.
        rows: maps a weight to the number of blocks of output channels that share one unknown row, ``W → W + 1vᵀ``.
        inactive: whether a module drops nothing at random.
    """

    graph: TracedGraph
    scales: Scales
    live: Collection[Node]
    columns: dict[str, Ids] | None = None
    shifts: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    inactive: Callable[[str], bool] = lambda module: False
    labels: dict[Node, Result] = field(default_factory=dict)
    absorptions: list[Absorption] = field(default_factory=list)
    coscaled: list[Coscaled] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first_link = self.scales.count  # the first unknown that is no parameter's


class Use:
    """An operation at which a scale, or a shift, arrives."""

    def __init__(self, node: Node, walk: Walk) -> None:
        self.node, self.walk, self.args = node, walk, bound_arguments(node)
        self.op, self.key = op_name(node), operation_key(node)
        self.graph, self.scales, self.labels, self.shifts = walk.graph, walk.scales, walk.labels, walk.shifts

    # ---- arguments -------------------------------------------------------------------------------------------------

    def label(self, name: str) -> Label | None:
        """Label of an argument; None where it is not scaled."""
        return self.label_of(self.args.get(name))

    def label_of(self, value: Any) -> Label | None:
        """Label of a node; None where it is not scaled or no node."""
        found = self.labels.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, Label) else None

    def ids(self, name: str, rank: int | None = None) -> Ids:
        """Ids of an argument with as many axes as the result, or as given; unscaled where it has no label."""
        label, rank = self.label(name), len(self.out_shape) if rank is None else rank
        return unscaled(rank) if label is None else aligned(label, rank)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor argument."""
        return shape_of(self.args[name])

    def axes(self, rank: int) -> list[int]:
        """The axes over which the operation runs: all where none are given."""
        given = self.args.get("dim")
        if given is None or given == []:
            return list(range(rank))
        return [axis % rank for axis in (given if isinstance(given, (list, tuple)) else [given])] if rank else []

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return shape_of(self.node)

    def is_zero(self, value: Any) -> bool:
        """Whether an argument is the number zero, or a tensor of zeros."""
        if isinstance(value, Node):
            return self.graph.is_zero(value, self.node)
        return isinstance(value, (int, float)) and value == 0

    def any_scale(self, shape: Sequence[int]) -> Ids | None:
        """Ids of a tensor of zeros, which any scale leaves alone: an unknown for each entry.

        None where these are too many, and of shifts, as zeros have none.
        """
        few = math.prod(shape) <= _MOST_ZEROS and not self.shifts
        return self.scales.add(math.prod(shape)).reshape(tuple(shape)) if few else None

    @property
    def blocks(self) -> int | None:
        """The number of blocks of filters of the weight that share one unknown row; None where it gets no rows."""
        return self.walk.rows.get(self.graph.parameter_of(self.args["weight"]) or "")

    # ---- conditions ------------------------------------------------------------------------------------------------

    def why(self, reason: str, *, unknown: bool = False, certainty: Certainty = "cautious") -> Break:
        """Build the reason for a condition that this operation puts on the scales."""
        return Break(self.op, self.graph.module_of(self.node), reason, unknown, certainty)

    def refuse(
        self, reason: str, *labels: Label | None, unknown: bool = False, certainty: Certainty = "cautious"
    ) -> Result:
        """Refuse the scales of these labels (of all arguments when none is given); the result then has no label."""
        given: Sequence[Label | None] = labels or [
            label for node in self.node.all_input_nodes for label in as_list(self.labels.get(node))
        ]
        for label in given:
            if label is not None:
                self.scales.pin(label.ids, self.why(reason, unknown=unknown, certainty=certainty))
        return None

    def end(self, *labels: Label | None, reason: str = UNSEEN) -> Result:
        """Note that the result does not depend on the scales of these labels (of all arguments when none is given)."""
        for label in labels or [self.label_of(node) for node in self.node.all_input_nodes]:
            if label is not None:
                self.scales.end(label.ids, self.why(reason))
        return None

    def merge(self, ids: Ids, axes: Sequence[int], reason: str = "sums entries that have different scales") -> Ids:
        """Demand one scale along the axes; return the ids with these axes reduced to 1."""
        return self.scales.merge(ids, [axis % ids.ndim for axis in axes], self.why(reason))

    def join(self, left: Ids, right: Ids, reason: str, certainty: Certainty = "cautious") -> Ids:
        """Demand the same scale entry by entry; return the ids, which broadcast to both."""
        left, right = np.broadcast_arrays(left, right)
        self.scales.join(left, right, self.why(reason, certainty=certainty))
        return self.scales.roots(left)

    def reduced(self, label: Label, reason: str = "sums entries that have different scales") -> Ids:
        """Demand one scale along the axes that the operation reduces; return the ids of what is left."""
        axes = self.axes(label.ids.ndim)
        return self.without(self.merge(label.ids, axes, reason), axes)

    def without(self, ids: Ids, axes: Sequence[int]) -> Ids:
        """Ids without the axes that the operation reduces, unless it keeps them."""
        return ids if self.args.get("keepdim") else np.squeeze(ids, tuple(axes))

    def absorb(self, kind: str, ids: Ids, *, running_mean: Any = None, running_var: Any = None) -> Result:
        """Record that the operation removes these scales from its result, which has no label."""
        module, name = self.graph.module_of(self.node), self.graph.buffer_of
        found = Absorption(self.node, kind, self.op, module, ids, name(running_mean), name(running_var))
        self.walk.absorptions.append(found)
        return None

    # ---- parameters that are scaled along --------------------------------------------------------------------------

    def is_shared(self, weight: Any) -> bool:
        """Whether a weight whose columns may undo scales is used by several operations, which then have to agree."""
        name = self.graph.parameter_of(weight)
        if name is None or self.walk.columns is None:
            return False
        return sum(len(node.users) for node in self.graph.placeholders_of(name)) > 1

    def compensate(self, weight: Any, ids: Ids) -> Ids | None:
        """Let the columns of a weight undo the scales of its input channels; None where they are not free to.

        Args:
            weight: the argument that holds the weight.
            ids: form of each input channel, one-dimensional.

        Returns:
            The form that is left of the input, one for all channels.
        """
        name = self.graph.parameter_of(weight)
        if name is None or self.walk.columns is None:
            return None
        if not all(map(is_linear_map, weight_uses(self.graph.placeholders_of(name)))):
            return None  # the columns of a tied embedding would be seen to change
        known = self.walk.columns.setdefault(name, ids)
        because = self.why("uses one weight on inputs that have different scales")
        return self.scales.merge(self.scales.sum(ids, known, -1.0), [0], because)

    def coscale(self, value: Any, ids: Ids) -> bool:
        """Ask that a parameter which is added to a scaled tensor be scaled along; False where it cannot be."""
        parameter = self.graph.parameter_of(value)
        if parameter is None or (self.scales.roots(ids) < UNSCALED).any():  # products, or powers
            return False
        self.walk.coscaled.append(Coscaled(parameter, ids))
        return True

    # ---- images of shifts under linear maps ------------------------------------------------------------------------

    def fresh(self, sources: Ids, shape: Sequence[int], reason: str, mask: Ids | None = None) -> Result:
        """Label of a linear image of the sources: one unknown per entry, none where the mask is unscaled."""
        size = int(np.prod(shape))
        if size > _LARGEST_IMAGE:
            self.scales.pin(sources, self.why("makes too many different shifts to follow", unknown=True))
            return None
        first = self.scales.count
        if size <= LARGEST_LINK:
            ids = self.scales.add(size).reshape(tuple(shape))
        else:
            # Images of one size are coloured alike, so that sums of them have no more colours.
            ids = np.random.default_rng(size).choice(self.scales.add(_COLOURS), tuple(shape))
        unknowns = range(first, self.scales.count)
        if mask is not None:
            ids = np.where(np.broadcast_to(self.scales.roots(mask), ids.shape) == UNSCALED, UNSCALED, ids)
        self.walk.links.append(Link(sources, ids, unknowns, self.why(reason)))
        return Label(ids)

    def image(self, sources: Ids, shape: Sequence[int], reason: str) -> Ids:
        """Ids of a linear image of the sources; unscaled where it is not followed."""
        made = self.fresh(sources, shape, reason)
        return made.ids if isinstance(made, Label) else np.full([1] * len(shape), UNSCALED)

    def is_linked(self, ids: Ids) -> bool:
        """Whether unknowns of links occur in the forms."""
        numbers = np.unique(self.scales.roots(ids)).tolist()
        return any(k >= self.walk.first_link for n in numbers for k in self.scales.form(n))


# ---- labels and ids --------------------------------------------------------------------------------------------------


def as_list(result: Result) -> list[Label | None]:
    """Return the labels of one result or of several."""
    return result if isinstance(result, list) else [result]


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of the tensor that a node stands for; of the first one where it stands for several."""
    fake = value.meta["val"] if isinstance(value, Node) else value
    while isinstance(fake, (list, tuple)):
        fake = fake[0]
    return tuple(int(n) for n in fake.shape) if isinstance(fake, Tensor) else ()


def aligned(label: Label, ndim: int) -> Ids:
    """Ids of a label with axes of size 1 in front, as broadcasting does it."""
    return label.ids.reshape((1,) * (ndim - label.ids.ndim) + label.ids.shape)


def unscaled(ndim: int) -> Ids:
    """Ids of a tensor that no scale reaches."""
    return np.full((1,) * ndim, UNSCALED, dtype=np.int64)


def varies(label: Label, axes: Sequence[int]) -> bool:
    """Whether the scale differs along one of the axes."""
    return any(label.ids.shape[axis] > 1 for axis in axes)
