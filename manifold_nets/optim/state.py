"""Optimizer states: exact saving and loading, and float32 copies of half-precision weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from manifold_nets.errors import OptimizerStateError, listed
from manifold_nets.gathered import local_part
from manifold_nets.groups import accumulation_dtype
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.inputs import PER_SPHERE, WIDE
from manifold_nets.optim.param_groups import constrained_of, name_of
from manifold_nets.optim.plain_run import NORM

__all__ = [
    "check_loaded",
    "describe_manifolds",
    "keep_precision",
    "master_weight_of",
    "ordered_by_name",
    "write_master_weights",
]

StateDict = dict[str, Any]

# Where a step follows a plain run, second moments are those of the plain optimizer.
_BY_ENTRIES = {"exp_avg_sq": "entry_sq"}


def describe_manifolds(_: torch.optim.Optimizer, state_dict: StateDict) -> None:
    """Replace the manifolds in a state dict by their `SphereProduct.to_dict`, which every tool can store."""
    for group in state_dict["param_groups"]:
        group["manifolds"] = [manifold and manifold.to_dict() for manifold in group["manifolds"]]


# What wrappers put into the names of parameters.
_WRAPPERS = re.compile(r"^(module\.)+|(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_wrappers(name: str) -> str:
    """The name of a parameter without the parts that wrappers of its modules add."""
    return _WRAPPERS.sub("", name)


def _names(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None if they are not known.

    Tools that reshard a state replace parameters by names, perhaps in another order than ``"param_names"``.
    """
    params = group["params"]
    names = params if params and all(isinstance(p, str) for p in params) else group.get("param_names")
    return None if names is None or len(names) != len(params) else [_WRAPPERS.sub("", str(name)) for name in names]


def ordered_by_name(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    """Return a state with groups and parameters in the optimizer's order, if both sides have all names.

    torch matches by order alone; if the orders differ, each weight gets the state of another one.

    Raises:
        OptimizerStateError: the names differ, or are in other groups.
    """
    groups = state_dict["param_groups"]
    live, saved = [_names(g) for g in optimizer.param_groups], [_names(g) for g in groups]
    known = [names for names in live if names is not None], [names for names in saved if names is not None]
    if len(known[0]) < len(live) or len(known[1]) < len(saved) or known[0] == known[1]:
        return state_dict
    first, second = (list(chain.from_iterable(names)) for names in known)
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return state_dict
    missing, extra = [n for n in first if n not in set(second)], [n for n in second if n not in set(first)]
    if missing or extra:
        found = f"{listed(extra)}, which this optimizer does not have" if extra else "no such parameters"
        raise OptimizerStateError(listed(missing or extra), found, "the names of the optimizer's parameters")
    by_members = {frozenset(names): group for names, group in zip(known[1], groups, strict=True)}
    ordered = []
    for number, names in enumerate(known[0]):
        source = by_members.get(frozenset(names))
        if source is None:
            together = next(other for other in known[1] if names[0] in other)
            raise OptimizerStateError(f"group {number}", f"{names[0]} in a group of {listed(together)}", listed(names))
        ordered.append(_reordered(source, names))
    return {**state_dict, "param_groups": ordered}


def _reordered(group: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A saved group with its parameters in the order of the given names."""
    new, places = dict(group), {name: place for place, name in enumerate(_names(group) or ())}
    new["params"] = [group["params"][places[name]] for name in names]
    own = [_WRAPPERS.sub("", str(name)) for name in group.get("param_names", ())]
    for key in ("param_names", "manifolds"):
        if sorted(own) == sorted(names) and len(group.get(key, ())) == len(own):
            new[key] = [group[key][own.index(name)] for name in names]
    return new


def check_loaded(optimizer: torch.optim.Optimizer, state_dict: StateDict, moments: Collection[str]) -> None:
    """Raise `OptimizerStateError` if a state was saved for other spheres, or by another kind of optimizer.

    Args:
        optimizer: the live optimizer.
        state_dict: the state to load.
        moments: the keys in the state of every constrained weight that has one.
    """
    saved_groups = state_dict["param_groups"]
    _check_sizes(optimizer, saved_groups)
    for number, saved in enumerate(saved_groups):
        _check_group(optimizer, number, saved)
    for name, weight, manifold, state in _constrained_states(optimizer, state_dict):
        needed = {_BY_ENTRIES.get(name, name) if NORM in state else name for name in moments}
        if not needed <= state.keys() and state.keys() != {NORM}:
            expected = f"the state of {type(optimizer).__name__}: {', '.join(moments)}"
            raise OptimizerStateError(name, f"only {', '.join(state)}", expected)
        for key, value in state.items():
            wanted = manifold.partition.spread_shape if key in PER_SPHERE else tuple(weight.shape)
            if isinstance(value, Tensor) and key != "step" and tuple(value.shape) != wanted:
                raise OptimizerStateError(name, f"{key} of shape {tuple(value.shape)}", f"shape {wanted}")


def _check_sizes(optimizer: torch.optim.Optimizer, saved_groups: list[dict[str, Any]]) -> None:
    """Raise an error if the groups of a state have other sizes, like those of a plain optimizer."""
    live, saved = ([len(g["params"]) for g in groups] for groups in (optimizer.param_groups, saved_groups))
    if live == saved:
        return
    remedy = ""
    if not any("manifolds" in group for group in saved_groups):
        remedy = (
            "This is the state of a plain optimizer. Load it into an optimizer of the plain network, then transfer its "
            "moments with manifold_nets.optim.carry_momentum(plain, its_optimizer, model, optimizer)."
        )
    found, expected = (f"{len(n)} group{'s' * (len(n) != 1)} of {listed(n)} parameters" for n in (saved, live))
    raise OptimizerStateError("the parameter groups", found, expected, remedy)


def _check_group(optimizer: torch.optim.Optimizer, number: int, saved: dict[str, Any]) -> None:
    """Raise an error if a saved group lacks options of this optimizer, or was saved for other spheres."""
    group = optimizer.param_groups[number]
    missing = [name for name in ("momentum", "betas") if name in group and name not in saved]
    if missing:
        expected = f"the options of {type(optimizer).__name__}"
        raise OptimizerStateError(f"group {number}", f"no option {missing[0]}", expected)
    for index, found in _saved_manifolds(group, saved):
        live = group["manifolds"][index]
        if found != (live and live.to_dict()):
            saved_for = f"{SphereProduct.from_dict(found)}" if found else "no manifold"
            raise OptimizerStateError(name_of(group, number, index), saved_for, f"{live or 'no manifold'}")


def keep_precision(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> None:
    """Copy the states of constrained weights from the state dict again, because torch casts them to the weights' dtype.

    Second moments stay in float32 or better, and step counts on the CPU, where steps on spheres read them.
    """
    for _, weight, _, state in _constrained_states(optimizer, state_dict):
        live = optimizer.state[weight]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if key == "step":
                live[key] = value.detach().to("cpu", copy=True)
            elif key == NORM:
                live[key] = value.detach().to(device=weight.device, dtype=torch.float64, copy=True)
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


# ---- float32 copies of half-precision weights, which take the steps ------------------------------------------------


def master_weight_of(weight: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the float32 copy of a weight that the optimizer steps, stored in its state as ``"master_weight"``.

    It is made anew if other code has changed the weight, for instance by loading a checkpoint into the model. Values
    are compared in every step, because writes through ``.data`` leave no other trace.
    """
    master: Tensor | None = state.get("master_weight")
    if master is None:
        master = state["master_weight"] = weight.detach().to(accumulation_dtype(weight.dtype))
        return master
    # Each process compares its own part of a sharded weight.
    copy, held = local_part(master), local_part(weight.detach())
    rounded = copy.to(held.dtype)
    if not held.is_cpu:  # without waiting for the answer
        torch.where((rounded != held).any(), held.to(copy.dtype), copy, out=copy)
    elif not torch.equal(rounded, held):
        copy.copy_(held)
    return master


def write_master_weights(master_weights: Mapping[Tensor, Tensor]) -> None:
    """Round the float32 copies into their weights."""
    if master_weights:
        held = [local_part(weight.detach()) for weight in master_weights]
        torch._foreach_copy_(held, [local_part(master) for master in master_weights.values()])
