"""Sharded tensors seen as whole ones, for what is done now and then: looking at a weight, moving it, clipping it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_sharded", "local_part", "whole", "write_whole_"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory: the tensor itself where it is not sharded.

    Example:
        >>> scalars = torch.zeros(3)
        >>> local_part(scalars) is scalars
        True
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor without their graph, gathered from all processes where it is sharded.

    Example:
        >>> whole(torch.nn.Parameter(torch.ones(2))).requires_grad
        False
    """
    detached = tensor.detach()
    return detached.full_tensor() if is_sharded(detached) else detached  # type: ignore[attr-defined]


@torch.no_grad()
def write_whole_(tensor: Tensor, values: Tensor, *, from_first: bool = False) -> None:
    """Write whole values into a tensor; where it is sharded, each process takes its part.

    Args:
        tensor: what to write into.
        values: the same on all processes, and nothing is communicated.
        from_first: the values of each mesh's first process count, and are sent to the others.

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
