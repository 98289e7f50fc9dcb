"""Float32 copies of half-precision weights, which take the steps, while the model computes with the rounded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manifold_nets.gathered import local_part
from manifold_nets.groups import accumulation_dtype

__all__ = ["master_of", "write_masters"]


def master_of(weight: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the copy of a weight that an optimizer steps, kept in its state as ``"master_weight"``.

    It is taken anew where somebody else has changed the weight, such as by loading a checkpoint into the model. Values
    are compared in every step: what is written through ``.data`` leaves no other trace.
    """
    master: Tensor | None = state.get("master_weight")
    if master is None:
        master = state["master_weight"] = weight.detach().to(accumulation_dtype(weight.dtype))
        return master
    # Sharded ones part by part: what another process holds, it looks at itself.
    copy, held = local_part(master), local_part(weight.detach())
    rounded = copy.to(held.dtype)
    if not held.is_cpu:  # without waiting for the answer
        torch.where((rounded != held).any(), held.to(copy.dtype), copy, out=copy)
    elif not torch.equal(rounded, held):
        copy.copy_(held)
    return master


def write_masters(masters: Mapping[Tensor, Tensor]) -> None:
    """Round copies into their weights."""
    if masters:
        held = [local_part(weight.detach()) for weight in masters]
        torch._foreach_copy_(held, [local_part(master) for master in masters.values()])
