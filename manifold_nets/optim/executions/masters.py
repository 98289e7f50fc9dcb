"""Float32 copies of half-precision weights, which take the steps, while the model computes with the rounded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from manifold_nets.gathered import local_part
from manifold_nets.groups import accumulation_dtype

__all__ = ["MasterWeights"]


class MasterWeights:
    """The float32 copies that an optimizer steps, kept in its state as ``"master_weight"``.

    A copy is taken anew where somebody else has changed the weight, such as by loading a checkpoint into the model.
    """

    def __init__(self) -> None:
        # The version of each weight when it was last written here: while it stays, nobody else has changed the weight.
        self._versions: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the copy of a weight."""
        master: Tensor | None = state.get("master_weight")
        if master is None:
            master = state["master_weight"] = weight.detach().to(accumulation_dtype(weight.dtype))
        unseen = weight not in self._versions or self._versions[weight] != weight._version
        # Sharded ones part by part: what another process holds, it looks at itself.
        copy, held = local_part(master), local_part(weight.detach())
        if unseen and not torch.equal(copy.to(held.dtype), held):
            copy.copy_(held)
        return master

    def write(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Round copies into their weights."""
        if masters:
            held = [local_part(weight.detach()) for weight in masters]
            torch._foreach_copy_(held, [local_part(master) for master in masters.values()])
        for weight in masters:
            self._versions[weight] = weight._version
