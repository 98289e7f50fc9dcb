r"""Steps for DTensor weights: one all-reduce of a few scalars per sphere.

A sharded weight (`torch.distributed.tensor.DTensor`, as ``fully_shard`` makes it) is stepped by its local part.

- Where each process holds whole groups, as with filters, it steps them by itself.
- Where groups cross the boundary between processes, the inner products of the parts are added up by one all-reduce of
  a few scalars a group, and all processes find the same coefficients. The parts keep the view of their groups where
  it can be cut; elsewhere they are set into zeros of the whole shape, which add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manifold_nets.errors import ParameterGroupError
from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct

__all__ = ["Part", "part_of", "zero_scalars"]

Combine = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """The part of a weight that this process holds: all of it, where it is not sharded.

    Attributes:
        manifold: the spheres of the tensors that a rule works on.
        combine: adds up inner products over the processes; None where each holds whole groups.
        place: where the part stands in zeros of the whole shape; None where it is worked on as it is.
        scalars: placements of one value per sphere.
        elsewhere: adds up over processes that hold other groups, all of them whole.
    """

    manifold: SphereProduct
    combine: Combine | None = None
    place: tuple[slice, ...] | None = None
    scalars: tuple[Any, ...] = ()
    elsewhere: Combine | None = None

    def read(self, tensor: Tensor) -> Tensor:
        """Return the local values of a sharded tensor to work on: its own memory, or a copy set into zeros."""
        local = local_part(tensor.detach())
        if self.place is None:
            return local
        whole = local.new_zeros(self.manifold.partition.shape)
        whole[self.place] = local
        return whole

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Take the values back that `read` has copied."""
        if self.place is not None:
            local_part(tensor.detach()).copy_(values[self.place])


def zero_scalars(weight: Tensor, manifold: SphereProduct, dtype: torch.dtype) -> Tensor:
    """Return zeros, one per sphere, in ``spread_shape``, sharded as the spheres are.

    Example:
        >>> zero_scalars(torch.ones(2, 3), SphereProduct((2, 3)), torch.float32)
        tensor([[0.],
                [0.]])
    """
    shape = manifold.partition.spread_shape
    if not is_sharded(weight):
        return weight.new_zeros(shape, dtype=dtype)
    from torch.distributed.tensor import zeros

    placements = part_of(manifold, weight).scalars
    return zeros(*shape, dtype=dtype, device_mesh=weight.device_mesh, placements=placements)  # type: ignore[attr-defined]


_parts: WeakKeyDictionary[SphereProduct, dict[Any, Part]] = WeakKeyDictionary()


def part_of(manifold: SphereProduct, weight: Tensor) -> Part:
    """Return the part of a sharded weight that this process holds; remembered for each manifold.

    Raises:
        ParameterGroupError: the part is no box of the whole, as with shards that are strided.
    """
    mesh, placements = weight.device_mesh, tuple(weight.placements)  # type: ignore[attr-defined]
    known = _parts.setdefault(manifold, {})
    key = (mesh, placements)
    if key not in known:
        known[key] = _cut(manifold, mesh, placements) or _set_into_zeros(manifold, mesh, placements)
    return known[key]


def _cut(manifold: SphereProduct, mesh: Any, placements: tuple[Any, ...]) -> Part | None:
    """Return the part where the view of the groups can be cut along its first axis as the weight is, else None."""
    from torch.distributed.tensor import Replicate, Shard

    partition = manifold.partition
    cuts = [dimension for dimension, placement in enumerate(placements) if placement == Shard(0)]
    if len(cuts) != 1 or any(placement not in (Shard(0), Replicate()) for placement in placements):
        return None
    world, rank = mesh.size(cuts[0]), mesh.get_local_rank(cuts[0])
    rows, blocks = partition.shape[0], partition.view[0]
    chunk, block_chunk = -(-rows // world), -(-blocks // world)
    if chunk * blocks != block_chunk * rows or -(-rows // chunk) != world:
        return None  # a block crosses the boundary, or a process holds nothing
    first, last = rank * block_chunk, min((rank + 1) * block_chunk, blocks)
    held = min((rank + 1) * chunk, rows) - rank * chunk
    local = Partition((held, *partition.shape[1:]), (last - first, *partition.view[1:]), partition.kept)
    radii, add_up = manifold.radii, _adding_up(mesh, cuts)
    if 0 not in partition.kept:
        return Part(SphereProduct(local, radius=radii), add_up, None, (Replicate(),) * len(placements))
    each = partition.n_groups // blocks
    spheres = SphereProduct(local, radius=radii[first * each : last * each])
    return Part(spheres, None, None, placements, add_up)


def _set_into_zeros(manifold: SphereProduct, mesh: Any, placements: tuple[Any, ...]) -> Part:
    from torch.distributed.tensor import Replicate, distribute_tensor

    shape = manifold.partition.shape
    numbers = torch.arange(math.prod(shape), device=mesh.device_type).reshape(shape)
    held = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local()
    place = tuple(slice(0, size) for size in held.shape)
    if held.numel() > 0:
        corners = zip(*(torch.unravel_index(held.flatten()[end], shape) for end in (0, -1)), strict=True)
        place = tuple(slice(int(low), int(high) + 1) for low, high in corners)
    if not torch.equal(numbers[place], held):
        found = f"placements {placements}"
        raise ParameterGroupError.on_spheres(f"a weight of shape {shape}", found, "shards that are boxes")
    cuts = [dimension for dimension, placement in enumerate(placements) if placement != Replicate()]
    return Part(manifold, _adding_up(mesh, cuts), place, (Replicate(),) * len(placements))


def _adding_up(mesh: Any, dimensions: list[int]) -> Combine:
    groups = [mesh.get_group(dimension) for dimension in dimensions]

    def combine(sums: Tensor) -> Tensor:
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    return combine
