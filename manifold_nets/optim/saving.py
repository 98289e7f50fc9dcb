"""States of the optimizers on disk: manifolds as plain data, checked when they come back, and no digits lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from manifold_nets.errors import OptimizerStateError
from manifold_nets.groups import accumulation_dtype
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.executions.inputs import PER_SPHERE, WIDE
from manifold_nets.optim.membership import constrained_of, name_of

__all__ = ["check_loaded", "describe_manifolds", "keep_precision"]

StateDict = dict[str, Any]


def describe_manifolds(_: torch.optim.Optimizer, state_dict: StateDict) -> None:
    """Replace the manifolds in a state dict by what `SphereProduct.to_dict` says, which every tool can store."""
    for group in state_dict["param_groups"]:
        group["manifolds"] = [manifold and manifold.to_dict() for manifold in group["manifolds"]]


def check_loaded(optimizer: torch.optim.Optimizer, state_dict: StateDict, moments: Collection[str]) -> None:
    """Raise `OptimizerStateError` where a state was saved for other spheres, or by another kind of optimizer.

    Args:
        optimizer: the live optimizer.
        state_dict: what is to be loaded.
        moments: what the state of every constrained weight holds, once it has one.
    """
    saved_groups = state_dict["param_groups"]
    if [len(g["params"]) for g in optimizer.param_groups] != [len(g["params"]) for g in saved_groups]:
        return  # torch refuses this, in its own words
    for number, saved in enumerate(saved_groups):
        _check_group(optimizer, number, saved)
    for name, weight, manifold, state in _constrained_states(optimizer, state_dict):
        if not set(moments) <= state.keys():
            expected = f"the state of {type(optimizer).__name__}: {', '.join(moments)}"
            raise OptimizerStateError(name, f"only {', '.join(state)}", expected)
        for key, value in state.items():
            wanted = manifold.partition.spread_shape if key in PER_SPHERE else tuple(weight.shape)
            if isinstance(value, Tensor) and key != "step" and tuple(value.shape) != wanted:
                raise OptimizerStateError(name, f"{key} of shape {tuple(value.shape)}", f"shape {wanted}")


def _check_group(optimizer: torch.optim.Optimizer, number: int, saved: dict[str, Any]) -> None:
    """Raise where a saved group lacks options of this kind, or was saved for other spheres."""
    group = optimizer.param_groups[number]
    missing = [name for name in ("momentum", "betas") if name in group and name not in saved]
    if missing:
        expected = f"the options of {type(optimizer).__name__}"
        raise OptimizerStateError(f"group {number}", f"no option {missing[0]}", expected)
    for index, found in _saved_manifolds(group, saved):
        live = group["manifolds"][index]
        if found != (live and live.to_dict()):
            expected = f"{live}" if live is not None else "no manifold"
            raise OptimizerStateError(name_of(group, number, index), _summary(found), expected)


def keep_precision(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> None:
    """Take the states of constrained weights from the state dict again: torch has cast them to the weights' dtype.

    Second moments stay in float32 or better, and step counts on the CPU, where a rule on spheres reads them.
    """
    for _, weight, _, state in _constrained_states(optimizer, state_dict):
        live = optimizer.state[weight]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if key == "step":
                live[key] = value.detach().to("cpu", copy=True)
            else:
                wide = key in WIDE or "master_weight" in state
                dtype = accumulation_dtype(weight.dtype) if wide else weight.dtype
                live[key] = value.detach().to(device=weight.device, dtype=dtype, copy=True)


def _saved_manifolds(group: dict[str, Any], saved: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield the position of each live parameter whose manifold a saved group describes, and the description.

    Parameters are matched by name where both sides have names, as tools that reshard a state may reorder them.
    """
    described = saved.get("manifolds")
    if described is None:
        return
    if "param_names" in group and "param_names" in saved:
        by_name = dict(zip(saved["param_names"], described, strict=False))
        yield from ((index, by_name[name]) for index, name in enumerate(group["param_names"]) if name in by_name)
    elif len(described) == len(group["params"]):
        yield from enumerate(described)


def _constrained_states(
    optimizer: torch.optim.Optimizer, state_dict: StateDict
) -> Iterator[tuple[str, Tensor, SphereProduct, dict[str, Any]]]:
    """Yield name, weight, manifold and saved state of each constrained weight that has a saved state."""
    saved_ids = iter(list(chain.from_iterable(group["params"] for group in state_dict["param_groups"])))
    for number, group in enumerate(optimizer.param_groups):
        ids = [next(saved_ids) for _ in group["params"]]
        for index, weight, manifold in constrained_of(group):
            state = state_dict["state"].get(ids[index])
            if state:
                yield name_of(group, number, index), weight, manifold, state


def _summary(described: Any) -> str:
    return f"{SphereProduct.from_dict(described)}" if described else "no manifold"
