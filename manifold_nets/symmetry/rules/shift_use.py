"""One operation of the graph as a rule of shifts sees it, and the table of these rules.

The labels are those of `manifold_nets.symmetry.structure.scales`, read additively: each entry is shifted by its form
``Σ c_k s_k``. What a linear map makes of a shift depends on data or on other weights; each of its results gets a new
unknown, and a `Link` that says where it comes from. An unknown that the network does not leave free refuses its
sources. The table `SHIFT_RULES` maps the exact overload of an operation to its rule; what is in no table is reported as
unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.rules.use import RULES, Result, Use, of_real_numbers
from manifold_nets.symmetry.structure.scales import UNSCALED, Break, Ids, Label

__all__ = [
    "LARGEST_LINK",
    "SHIFT_RULES",
    "Link",
    "ShiftUse",
    "apply_rule",
    "first_label",
    "reduced_axes",
    "shift_rule",
    "varies",
]

# Beyond this many entries a linear image has fewer unknowns than entries, `_COLOURS`, strewn over them at random:
# operations that tie entries tie many, hardly all of one colour. Beyond so many entries it is not followed any further.
LARGEST_LINK = 2_048
_COLOURS = 64
_LARGEST_IMAGE = 2**20


@dataclass(frozen=True)
class Link:
    """New unknowns that a linear map makes of shifts: free only together with their sources."""

    sources: Ids
    results: Ids
    unknowns: range
    because: Break


def _never(module: str) -> bool:
    """Take every module for active."""
    return False


@dataclass
class ShiftUse(Use):
    """An operation at which a shift arrives.

    ``rows`` maps a weight to the number of blocks of output channels that share one unknown row,
    ``W → W + 1vᵀ`` block by block; ``inactive`` holds the modules whose dropout has probability 0; ``first_link`` is
    the first unknown that is no parameter's.
    """

    links: list[Link] = field(default_factory=list)
    rows: dict[Node, int] = field(default_factory=dict)
    inactive: Callable[[str], bool] = _never
    first_link: int = 0

    def fresh(self, sources: Ids, shape: Sequence[int], reason: str, mask: Ids | None = None) -> Result:
        """Label of a linear image of the sources: one unknown an entry, none where the mask is unscaled."""
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
        self.links.append(Link(sources, ids, unknowns, self.why(reason)))
        return Label(ids)

    def any_scale(self, shape: Sequence[int]) -> Ids | None:
        """Zeros have no shift but none."""
        return None

    def is_linked(self, ids: Ids) -> bool:
        """Whether unknowns of links occur in the forms."""
        numbers = np.unique(self.scales.roots(ids)).tolist()
        return any(k >= self.first_link for n in numbers for k in self.scales.form(n))


Rule = Callable[[ShiftUse], Result]
SHIFT_RULES: dict[str, Rule] = {}
_MOVEMENTS = (
    "view reshape _unsafe_view flatten.using_ints unflatten.int view_as reshape_as permute transpose.int swapaxes "
    "swapdims t movedim.int movedim.intlist moveaxis.int moveaxis.intlist numpy_T mT mH matrix_H adjoint squeeze "
    "squeeze.dim squeeze.dims unsqueeze expand expand_as broadcast_to repeat tile repeat_interleave.self_int "
    "repeat_interleave.self_Tensor slice.Tensor narrow select.int flip roll chunk split split.Tensor split.sizes "
    "split_with_sizes unbind.int tensor_split.sections tensor_split.indices operator.getitem cat concat concatenate "
    "stack index.Tensor index_select gather take_along_dim unfold pixel_shuffle pixel_unshuffle channel_shuffle"
).split()


def _moved(key: str) -> Rule:
    return lambda use: RULES[key](use)


SHIFT_RULES.update({key: _moved(key) for key in _MOVEMENTS})


def shift_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the exact overloads of the aten operations that it describes."""

    def register(function: Rule) -> Rule:
        SHIFT_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(use: ShiftUse) -> Result:
    """Label of the result of an operation at which a shift arrives; refuses it where no rule lets it pass."""
    known = SHIFT_RULES.get(use.key)
    if known is not None:
        return of_real_numbers(use, known(use))
    if use.key in RULES:
        use.pin("does not let a shift pass")
    else:
        use.pin("has no rule: what it does to a shift is unknown", unknown=True)
    return None


def first_label(use: ShiftUse) -> Label | None:
    """Label of the first argument, whatever its name."""
    return use.label_of(next(iter(use.args.values())))


def reduced_axes(use: ShiftUse, rank: int) -> list[int]:
    """The axes over which a reduction runs."""
    given = use.args.get("dim")
    axes = range(rank) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    return [axis % rank for axis in axes]


def varies(label: Label, axes: Sequence[int]) -> bool:
    """Whether the shift differs along one of the axes."""
    return any(label.ids.shape[axis] > 1 for axis in axes)
