"""One operation of the graph as a rule sees it: its arguments, their labels, and what it may demand of the scales."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from manifold_nets.symmetry.graph import bound_arguments, op_name, operation_key
from manifold_nets.symmetry.structure.scales import UNSCALED, Break, Certainty, Ids, Label, Scales
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["RULES", "Absorption", "Adoption", "Result", "Rule", "Use", "guarded", "of_real_numbers", "rule"]

# Up to this many zeros get a scale each.
_MOST_ZEROS = 16_384

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
class Adoption:
    """A bias that has to be scaled along with the weight: its parameter and the form of each of its entries."""

    parameter: str
    ids: Ids


@dataclass
class Use:
    """An operation at which a scale arrives.

    Where ``columns`` is a dictionary, a weight may be scaled column by column against its input, as rescaling
    symmetries do; it takes down by which form each input channel of each weight is divided.
    """

    node: Node
    graph: TracedGraph
    scales: Scales
    labels: dict[Node, Result]
    absorptions: list[Absorption] = field(default_factory=list)
    adoptions: list[Adoption] = field(default_factory=list)
    columns: dict[str, Ids] | None = None

    def __post_init__(self) -> None:
        self.args = bound_arguments(self.node)
        self.op, self.key = op_name(self.node), operation_key(self.node)

    def label(self, name: str) -> Label | None:
        """Label of an argument; None where it is not scaled."""
        return self.label_of(self.args.get(name))

    def label_of(self, value: Any) -> Label | None:
        """Label of a node; None where it is not scaled or no node."""
        found = self.labels.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, Label) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor argument."""
        return shape_of(self.args[name])

    def any_scale(self, shape: Sequence[int]) -> Ids | None:
        """Ids of a tensor of zeros, which any scale leaves alone: an unknown for each entry; None where too many."""
        count = math.prod(shape)
        return self.scales.add(count).reshape(tuple(shape)) if count <= _MOST_ZEROS else None

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return shape_of(self.node)

    def why(self, reason: str, *, unknown: bool = False, certainty: Certainty = "cautious") -> Break:
        """Build the reason for a condition that this operation puts on the scales."""
        return Break(self.op, self.graph.module_of(self.node), reason, unknown, certainty)

    def is_zero(self, value: Any) -> bool:
        """Whether an argument is the number zero, or a tensor of zeros."""
        if isinstance(value, Node):
            return self.graph.is_zero(value, self.node)
        return isinstance(value, (int, float)) and value == 0

    def pin(self, reason: str, *labels: Label | None, unknown: bool = False, certainty: Certainty = "cautious") -> None:
        """Refuse the scales of these labels (of all arguments when none is given)."""
        given: Sequence[Label | None] = labels or [
            label for node in self.node.all_input_nodes for label in as_list(self.labels.get(node))
        ]
        for label in given:
            if label is not None:
                self.scales.pin(label.ids, self.why(reason, unknown=unknown, certainty=certainty))

    def merge(self, ids: Ids, axes: Sequence[int], reason: str = "sums entries that have different scales") -> Ids:
        """Demand one scale along the axes; return the ids with these axes reduced to 1."""
        return self.scales.merge(ids, [axis % ids.ndim for axis in axes], self.why(reason))

    def absorb(self, kind: str, ids: Ids, *, running_mean: Any = None, running_var: Any = None) -> None:
        """Record that the operation removes these scales from its result."""
        name = self.graph.buffer_of
        self.absorptions.append(
            Absorption(
                self.node, kind, self.op, self.graph.module_of(self.node), ids,
                name(running_mean), name(running_var),
            )
        )  # fmt: skip

    def is_shared(self, weight: Any) -> bool:
        """Whether a weight whose columns may undo scales is used by several operations, which then have to agree."""
        name = self.graph.parameter_of(weight)
        if name is None or self.columns is None:
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
        if name is None or self.columns is None or not self._is_linear_map(name):
            return None
        known = self.columns.setdefault(name, ids)
        because = self.why("uses one weight on inputs that have different scales")
        return self.scales.merge(self.scales.sum(ids, known, -1.0), [0], because)

    def _is_linear_map(self, parameter: str) -> bool:
        """Whether every use of a parameter is that of a linear map; a tied embedding would see its columns change."""
        return all(
            (op_name(user) == "linear" or op_name(user).startswith("conv"))
            and bound_arguments(user).get("weight") is node
            for node in self.graph.placeholders_of(parameter)
            for user in node.users
        )

    def adopt(self, value: Any, ids: Ids) -> bool:
        """Ask that a parameter which is added to a scaled tensor be scaled along; False where it cannot be."""
        parameter = self.graph.parameter_of(value)
        plain = all(list(self.scales.form(n).values()) in ([], [1.0]) for n in np.unique(ids).tolist())
        if parameter is None or not plain:
            return False
        self.adoptions.append(Adoption(parameter, ids))
        return True


# What a rule raises that meets arguments which it does not foresee.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
Rule = Callable[[Use], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the exact overloads of the aten operations that it describes."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = guarded(function)
        return function

    return register


def guarded(function: Rule) -> Rule:
    """Let a rule that meets arguments it does not foresee refuse the scale instead of ending the analysis."""

    @functools.wraps(function)
    def careful(use: Use) -> Result:
        try:
            return function(use)
        except _UNFORESEEN as error:
            use.pin(f"its rule does not cover these arguments ({type(error).__name__}: {error})", unknown=True)
            return None

    return careful


def as_list(result: Result) -> list[Label | None]:
    """Return the labels of one result or of several."""
    return result if isinstance(result, list) else [result]


def of_real_numbers(use: Use, result: Result) -> Result:
    """Refuse the label of a result that is no real or complex number: it was rounded."""
    values = use.node.meta.get("val")
    several = values if isinstance(values, (tuple, list)) else [values]
    for label, value in zip(as_list(result), several, strict=False):
        if label is not None and isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            use.pin("rounds to integers", label, certainty="jump")
            return None
    return result


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
