"""Partitions of a weight into groups; all views of a weight by groups are in this module.

A *group* is a set of weight entries that share one scale: a filter, a block of filters, or the whole tensor. A
`Partition` describes all groups of a weight by a view of its shape and the axes of that view that are kept; entries
that differ only along the other axes belong to the same group. Groups are numbered in row-major order over the kept
axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.errors import DegenerateGroupError, PartitionError

__all__ = ["Partition"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which reductions over a weight of `dtype` are taken: float32 or better.

    Example:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(x: Tensor) -> Tensor:
    """Cast half precision to float32 and leave everything else as it is."""
    return x.to(accumulation_dtype(x.dtype))


def has_values(x: Tensor) -> bool:
    """Whether Python code may branch on the values of ``x``: not if it is meta, fake, traced or under vmap."""
    traced = torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta"
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def sum_over(x: Tensor, runs: tuple[tuple[int, ...], ...], dtype: torch.dtype | None = None) -> Tensor:
    """Sum over runs of neighbouring axes, one run at a time; the summed axes are kept with size 1.

    torch sums one run in a cascade, but several at once partly in sequence. For the squares of the 1024 × 4 × 4 entries
    of a transposed convolution's filter in float32, that has an error of 9 instead of 1.4 machine epsilons, and is no
    faster.

    Example:
        >>> sum_over(torch.ones(2, 3, 4), ((2,), (0,))).flatten()
        tensor([8., 8., 8.])
    """
    for run in runs:
        x = x.sum(run, keepdim=True, dtype=dtype)
    return x


def root_sum_squares(x: Tensor, runs: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return ``(Σ x²)^½`` over runs of axes as in `sum_over`, at full accuracy and with a gradient everywhere.

    `torch.linalg.vector_norm` adds squares in sequence and is off by hundreds of machine epsilons on a million float32
    entries. Entries whose squares leave the range of the dtype are rescaled first. The gradient at zero is zero, as in
    `torch.linalg.vector_norm`.

    Example:
        >>> root_sum_squares(torch.tensor([3e25, 4e25]), ((0,),))
        tensor([5.0000e+25])
    """
    squares = sum_over(x * x, runs)
    # Checking whether the squares are in range costs a synchronization on other devices than the CPU.
    if squares.device.type == "cpu" and has_values(squares):
        limits, (least, most) = torch.finfo(x.dtype), squares.detach().aminmax()
        if limits.tiny / limits.eps**2 < float(least) and float(most) < limits.max:
            return squares.sqrt()
    largest = x.detach().abs().amax([axis for run in runs for axis in run], keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    scaled = x / scale
    squares = sum_over(scaled * scaled, runs)
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt() * scale)


@dataclass(frozen=True)
class Partition:
    """A partition of a weight tensor into groups: a view of its shape, and the axes of the view that are kept.

    The entries of group ``(i_1, …, i_m)`` are ``w.reshape(view)`` with the kept axes fixed at ``i_1, …, i_m``. Tensors
    with one value per group have the `spread_shape`: the view's, with size 1 along the axes inside a group.

    Args:
        shape: natural shape of the weight.
        view: a shape with the same number of entries; the weight is reshaped to it.
        kept: increasing axes of ``view`` that number the groups; empty for a single group, the whole tensor.

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
        if math.prod(self.view) != math.prod(self.shape) or any(size < 1 for size in self.shape + self.view):
            found = f"view {self.view} of shape {self.shape}"
            remedy = "Choose a view whose sizes multiply to the number of entries of the weight."
            raise PartitionError(found, "positive sizes, and a view with as many entries as the shape", remedy)
        if any(axis not in range(len(self.view)) for axis in self.kept) or list(self.kept) != sorted(set(self.kept)):
            found, expected = (
                f"kept axes {self.kept} of view {self.view}",
                f"increasing axes among 0 … {len(self.view) - 1}",
            )
            raise PartitionError(found, expected, "List every kept axis once, in increasing order, counted from 0.")

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
            found = f"groups={groups} for a transposed convolution weight of shape {tuple(shape)}"
            expected = f"a positive divisor of the {channels_in} input channels"
            raise PartitionError(found, expected, "Pass the groups of the convolution that owns this weight.")
        return cls(tuple(shape), (groups, channels_in // groups, per_group, *kernel), (0, 2))

    @classmethod
    def blocks(cls, shape: Sequence[int], count: int) -> Partition:
        """`count` groups of consecutive filters, equally many in each: attention heads, groups of GroupNorm."""
        if count < 1 or shape[0] % count:
            found = f"{count} blocks of the {shape[0]} filters of shape {tuple(shape)}"
            remedy = "Choose a number of blocks that divides axis 0."
            raise PartitionError(found, f"a positive divisor of {shape[0]}", remedy)
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
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The reduced axes as runs of neighbours, the last run first."""
        runs: list[tuple[int, ...]] = []
        for axis in reversed(self.reduced):
            if runs and runs[-1][0] == axis + 1:
                runs[-1] = (axis, *runs[-1])
            else:
                runs.append((axis,))
        return tuple(runs)

    @cached_property
    def group_shape(self) -> tuple[int, ...]:
        """Sizes of the kept axes; their product is the number of groups."""
        return tuple(self.view[axis] for axis in self.kept)

    @cached_property
    def spread_shape(self) -> tuple[int, ...]:
        """The view with the axes inside a group set to 1, which broadcasts one value per group over the view."""
        return tuple(n if axis in self.kept else 1 for axis, n in enumerate(self.view))

    @cached_property
    def n_groups(self) -> int:
        """Number of groups."""
        return math.prod(self.group_shape)

    @cached_property
    def group_size(self) -> int:
        """Number of weight entries in each group."""
        return math.prod(self.view) // self.n_groups

    def has_rows(self, stride: tuple[int, ...]) -> bool:
        """Whether the groups of a tensor with these strides lie in memory one after the other, each contiguous.

        This is so for filters, blocks of filters and whole tensors, also in channels-last formats, but not for the
        filters of transposed convolutions.

        Example:
            >>> Partition.filters((8, 3, 5, 5)).has_rows((75, 1, 15, 3))
            True
        """
        return _has_rows(self, stride)

    def sum(self, entries: Tensor) -> Tensor:
        """Sum the entries of each group: natural shape in, ``spread_shape`` out, in float32 or better."""
        dtype = accumulation_dtype(entries.dtype)
        viewed = entries.reshape(self.view)
        return sum_over(viewed, self.runs, dtype) if self.runs else viewed.to(dtype)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Euclidean inner product ⟨x, y⟩ of each group, shape ``spread_shape``, in float32 or better."""
        dtype = accumulation_dtype(torch.promote_types(x.dtype, y.dtype))
        return self.sum(x.to(dtype) * y.to(dtype))

    def norms(self, x: Tensor) -> Tensor:
        """Euclidean norm of each group, shape ``spread_shape``, in float32 or better; see `root_sum_squares`."""
        viewed = wide(x.reshape(self.view))
        return root_sum_squares(viewed, self.runs) if self.runs else viewed.abs()

    def multiply(self, x: Tensor, factors: Tensor | float) -> Tensor:
        """Multiply each group of ``x`` by its factor (``spread_shape``); natural shape out, dtype of the product."""
        return (x.reshape(self.view) * factors).reshape(x.shape)

    def divide(self, x: Tensor, divisors: Tensor | float) -> Tensor:
        """Divide each group of ``x`` by its divisor (``spread_shape``), also if the reciprocal is out of range."""
        return (x.reshape(self.view) / divisors).reshape(x.shape)

    def subtract(self, u: Tensor, factors: Tensor, x: Tensor) -> Tensor:
        """Subtract from each group of ``u`` its factor (``spread_shape``) times ``x``, in one pass."""
        return torch.addcmul(u.reshape(self.view), factors, x.reshape(self.view), value=-1).reshape(u.shape)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Take the groups of ``x`` where the condition (``spread_shape``) holds, and those of ``y`` elsewhere."""
        return torch.where(condition, x.reshape(self.view), y.reshape(self.view)).reshape(x.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Arrange one value per group, of shape ``(n_groups,)``, so that it broadcasts over the view."""
        return values.reshape(self.spread_shape)

    def rows(self, x: Tensor) -> Tensor:
        """Return the groups of ``x`` as the rows of a matrix of shape ``(n_groups, group_size)``."""
        return x.reshape(self.view).permute(*self.kept, *self.reduced).reshape(self.n_groups, self.group_size)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return the weight, in natural shape, whose groups are the rows of a matrix; the inverse of `rows`."""
        order = (*self.kept, *self.reduced)
        viewed = rows.reshape([self.view[axis] for axis in order]).permute([order.index(i) for i in range(len(order))])
        return viewed.reshape(self.shape)

    def group_ids(self) -> Tensor:
        """Number of the group that each weight entry belongs to: int64, natural shape, on the CPU."""
        return self.from_rows(torch.arange(self.n_groups, device="cpu")[:, None].expand(-1, self.group_size))

    def __str__(self) -> str:
        if not self.kept:
            return f"whole tensor {self.shape}"
        if self.view == self.shape and self.kept == (0,):
            return f"{self.n_groups} filters of {self.group_size}"
        if self.view == self.shape and self.kept == (1,) and self.shape[0] > 1:
            return f"{self.n_groups} columns of {self.group_size}"
        return f"{self.n_groups} groups of {self.group_size} (view {self.view}, kept {self.kept})"


@lru_cache(maxsize=4096)
def _has_rows(partition: Partition, stride: tuple[int, ...]) -> bool:
    shape = partition.shape
    if partition.kept != tuple(range(len(partition.kept))):
        return False
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != expected:
            return False  # there are gaps, or entries that share memory
        expected *= size
    contiguous = all(
        size == 1 or step == math.prod(shape[axis + 1 :])
        for axis, (step, size) in enumerate(zip(stride, shape, strict=True))
    )
    if contiguous or partition.n_groups == 1:
        return True
    # The order of the entries inside a group does not matter, if groups are made of whole slices of axis 0.
    return stride[0] * shape[0] == expected and shape[0] % partition.n_groups == 0


def refuse_degenerate(norms: Tensor, name: str) -> None:
    """Raise `DegenerateGroupError` with the weight's name if a group norm is zero or not finite."""
    flat = norms.detach().flatten()
    bad = ~(flat.isfinite() & (flat > 0))
    if has_values(bad) and bool(bad.any()):
        groups = bad.nonzero().flatten().tolist()
        raise DegenerateGroupError(name, groups, flat[groups].tolist())


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_partition(module: nn.Module) -> Partition:
    """Return the partition of ``module.weight`` into the filters of its output channels.

    Raises:
        PartitionError: the module has no weight.

    Example:
        >>> filter_partition(torch.nn.ConvTranspose2d(4, 6, 3, groups=2)).n_groups
        6
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        found = f"{type(module).__name__} with a weight of type {type(weight).__name__}"
        raise PartitionError(found, "a layer whose weight is a tensor", "Pass a linear or convolution layer of torch.")
    if isinstance(module, _TRANSPOSED):
        return Partition.transposed_filters(weight.shape, module.groups)
    return Partition.filters(weight.shape)
