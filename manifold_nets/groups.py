"""The one place that views a weight as its groups.

A *group* is a set of weight entries that share one scale: a filter, a block of filters, or the whole tensor. A
`Partition` names all groups of a weight by a view of its shape and the axes of that view which are kept; entries
that differ only along the other axes belong to the same group. Groups are numbered row-major over the kept axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.errors import PartitionError

__all__ = ["Partition", "accumulation_dtype", "filter_partition"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which reductions over a weight of `dtype` are taken: float32 or better."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class Partition:
    """A partition of a weight tensor into groups: a view shape and the axes of the view that are kept.

    The entries of group ``(i_1, …, i_m)`` are ``w.reshape(view)`` with the kept axes fixed at ``i_1, …, i_m``.

    Args:
        shape: natural shape of the weight.
        view: a shape with the same number of entries; the weight is reshaped to it.
        kept: increasing axes of ``view`` that number the groups; none for one group that is the whole tensor.

    Raises:
        PartitionError: the view does not fit the shape, or the kept axes are not axes of the view.

    Example:
        >>> Partition.filters((8, 3, 5, 5)).n_groups
        8
        >>> Partition.transposed_filters((4, 6, 3, 3), groups=2).n_groups
        12
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("shape", "view", "kept"):
            object.__setattr__(self, field, tuple(int(n) for n in getattr(self, field)))
        if math.prod(self.view) != math.prod(self.shape) or math.prod(self.shape) == 0:
            raise PartitionError(
                f"view {self.view} of shape {self.shape}",
                "a view with as many entries as the shape, and at least one entry",
                "Choose a view whose sizes multiply to the number of weight entries.",
            )
        if any(axis not in range(len(self.view)) for axis in self.kept) or list(self.kept) != sorted(set(self.kept)):
            raise PartitionError(
                f"kept axes {self.kept} of view {self.view}",
                f"increasing axes among 0 … {len(self.view) - 1}",
                "List every kept axis once, in increasing order, counted from 0.",
            )

    @classmethod
    def filters(cls, shape: Sequence[int]) -> Partition:
        """One group per entry of axis 0: the filters of a linear or (grouped) convolution weight."""
        return cls(tuple(shape), tuple(shape), (0,))

    @classmethod
    def transposed_filters(cls, shape: Sequence[int], groups: int = 1) -> Partition:
        """One group per output channel of a transposed convolution weight ``(C_in, C_out/groups, k…)``.

        The filter of output channel ``c`` is the block of its group's input channels at index ``c mod (C_out/groups)``.
        """
        channels_in, per_group, *kernel = shape
        if groups < 1 or channels_in % groups:
            raise PartitionError(
                f"groups={groups} for a transposed convolution weight of shape {tuple(shape)}",
                f"a positive divisor of the {channels_in} input channels",
                "Pass the groups of the convolution that owns this weight.",
            )
        return cls(tuple(shape), (groups, channels_in // groups, per_group, *kernel), (0, 2))

    @classmethod
    def blocks(cls, shape: Sequence[int], count: int) -> Partition:
        """`count` groups of equally many consecutive filters: GroupNorm groups, attention heads."""
        if count < 1 or shape[0] % count:
            raise PartitionError(
                f"{count} blocks of the {shape[0]} filters of shape {tuple(shape)}",
                f"a positive divisor of {shape[0]}",
                "Choose a number of blocks that divides axis 0.",
            )
        return cls(tuple(shape), (count, shape[0] // count, *shape[1:]), (0,))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Partition:
        """One group that is the whole tensor."""
        return cls(tuple(shape), tuple(shape), ())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Partition:
        """Rebuild a partition from `to_dict`."""
        return cls(tuple(data["shape"]), tuple(data["view"]), tuple(data["kept"]))

    def to_dict(self) -> dict[str, list[int]]:
        """Return the partition as plain lists for JSON."""
        return {"shape": list(self.shape), "view": list(self.view), "kept": list(self.kept)}

    @cached_property
    def reduced(self) -> tuple[int, ...]:
        """Axes of the view inside a group."""
        return tuple(axis for axis in range(len(self.view)) if axis not in self.kept)

    @cached_property
    def group_shape(self) -> tuple[int, ...]:
        """Sizes of the kept axes; their product is the number of groups."""
        return tuple(self.view[axis] for axis in self.kept)

    @cached_property
    def spread_shape(self) -> tuple[int, ...]:
        """The view with the axes inside a group set to 1, which broadcasts one value a group over the view."""
        return tuple(n if axis in self.kept else 1 for axis, n in enumerate(self.view))

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return math.prod(self.group_shape)

    @property
    def group_size(self) -> int:
        """Number of weight entries in each group."""
        return math.prod(self.view) // self.n_groups

    def sum(self, entries: Tensor) -> Tensor:
        """Sum the entries of each group: natural shape in, ``spread_shape`` out, in float32 or better."""
        dtype = accumulation_dtype(entries.dtype)
        if not self.reduced:
            return entries.reshape(self.view).to(dtype)
        return entries.reshape(self.view).sum(self.reduced, keepdim=True, dtype=dtype)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Euclidean inner product ⟨x, y⟩ of each group, shape ``spread_shape``, in float32 or better."""
        dtype = accumulation_dtype(x.dtype)
        return self.sum(x.to(dtype) * y.to(dtype))

    def norms(self, x: Tensor) -> Tensor:
        """Euclidean norm of each group, shape ``spread_shape``, without overflow or underflow of the squares.

        The squares are added by torch's cascade summation: `torch.linalg.vector_norm` adds float32 squares in
        sequence and is off by hundreds of machine epsilons on groups of a million entries.
        """
        viewed = x.reshape(self.view).to(accumulation_dtype(x.dtype))
        if not self.reduced:
            return viewed.abs()
        largest = viewed.detach().abs().amax(self.reduced, keepdim=True)
        scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
        scaled = viewed / scale
        return scale * (scaled * scaled).sum(self.reduced, keepdim=True).sqrt()

    def multiply(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply each group of ``x`` by its factor (``spread_shape``); natural shape out, dtype of the product."""
        return (x.reshape(self.view) * factors).reshape(x.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Arrange one value a group, of shape ``(n_groups,)``, so that it broadcasts over the view."""
        return values.reshape(self.spread_shape)

    def group_ids(self) -> Tensor:
        """Number of the group that each weight entry belongs to: int64, natural shape."""
        ids = torch.arange(self.n_groups).reshape(self.spread_shape)
        return ids.expand(self.view).reshape(self.shape)

    def __str__(self) -> str:
        if not self.kept:
            return f"whole tensor {self.shape}"
        if self.view == self.shape and self.kept == (0,):
            return f"{self.n_groups} filters of {self.group_size}"
        return f"{self.n_groups} groups of {self.group_size} (view {self.view}, kept {self.kept})"


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_partition(module: nn.Module) -> Partition:
    """Return the partition of ``module.weight`` into the filters of its output channels.

    Example:
        >>> filter_partition(torch.nn.ConvTranspose2d(4, 6, 3, groups=2)).n_groups
        6
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise PartitionError(f"a weight of type {type(weight).__name__}", "a tensor", "Pass a torch layer.")
    if isinstance(module, _TRANSPOSED):
        return Partition.transposed_filters(weight.shape, module.groups)
    return Partition.filters(weight.shape)
