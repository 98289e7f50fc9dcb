"""Access sharded tensors as whole ones, for rare operations: inspecting, moving or clipping a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["held_as", "is_sharded", "local_part", "whole", "write_whole_"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`, of which this process may hold only a part."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory; an unsharded tensor itself.

    Example:
        >>> scalars = torch.zeros(3)
        >>> local_part(scalars) is scalars
        True
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the detached values of a tensor, gathered from all processes if it is sharded.

    Example:
        >>> whole(torch.nn.Parameter(torch.ones(2))).requires_grad
        False
    """
    detached = tensor.detach()
    return detached.full_tensor() if is_sharded(detached) else detached  # type: ignore[attr-defined]


def held_as(values: Tensor, other: Tensor) -> Tensor:
    """Return values, the same on all processes or sharded in any way, sharded as another tensor of their shape is.

    Example:
        >>> held_as(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    layout = _layout(other)
    if _layout(values) == layout:
        return values.detach()
    if layout is None:
        return whole(values)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole(values), *layout, src_data_rank=None)


def _layout(tensor: Tensor) -> tuple[Any, Any] | None:
    """Mesh and placements of a sharded tensor."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # type: ignore[attr-defined]


@torch.no_grad()
def write_whole_(tensor: Tensor, values: Tensor, *, from_first: bool = False) -> None:
    """Write whole values into a tensor; if it is sharded, each process writes its part.

    Args:
        tensor: the tensor to write into.
        values: the same on all processes; nothing is communicated.
        from_first: instead use the values of the first process of each mesh, and broadcast them.

    Example:
        >>> weight = torch.zeros(2, dtype=torch.bfloat16)
        >>> write_whole_(weight, torch.ones(2))
        >>> weight
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values.to(tensor.dtype), mesh, placements, src_data_rank=0 if from_first else None)
    tensor.detach().copy_(values)
