"""Parameter groups of a model: constrained weights, decayed weights, and the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import OptionError

__all__ = ["param_groups"]

_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalization
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, sphere_lr: float | Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the parameter groups of a model: constrained, decayed, undecayed.

    The manifold of a constrained weight is found through the model, so that the weight stays constrained where its
    parameter object was replaced by a plain one (``load_state_dict(assign=True)``, ``to("meta")`` and ``to_empty``,
    sharding). Undecayed are biases, the parameters of normalizations, and all others of less than two dimensions.
    Frozen parameters are left out; a shared parameter stands in one group once. A group without parameters is left
    out too, so that a model without constraints gives groups for any torch optimizer.

    Args:
        model: any module.
        weight_decay: weight decay of the decayed group; the others get 0.
        sphere_lr: learning rate of the constrained group, in radians; that of the optimizer when left out. Or one for
            each weight by its name, as `manifold_nets.LearningRates.by_weight` gives them: each then is a group of its
            own, constrained weights without one stay in a group at the rate of the optimizer, and names of weights
            that are not constrained are passed over.

    Returns:
        Groups with ``"params"``, ``"param_names"`` and ``"weight_decay"``; constrained ones with ``"manifolds"``.

    Raises:
        OptionError: ``sphere_lr`` names no parameter of the model, or a rate or the weight decay is negative or not
            finite.

    Example:
        >>> import torch, manifold_nets as mn
        >>> model = torch.nn.Sequential(mn.layers.UnitNormLinear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> for group in mn.param_groups(model, weight_decay=5e-4):
        ...     print(group["weight_decay"], group["param_names"])
        0.0 ['0.weight']
        0.0005 ['2.weight']
        0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
    """
    _require_rate("weight_decay", weight_decay)
    for name, rate in sphere_lr.items() if isinstance(sphere_lr, Mapping) else [("", sphere_lr)]:
        if rate is not None:
            _require_rate(f"sphere_lr[{name!r}]" if name else "sphere_lr", rate)
    manifolds = {id(weight.parameter): weight.manifold for weight in constrained_weights(model)}
    normalization = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMALIZATIONS)
        for parameter in module.parameters(recurse=False)
    }
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"constrained": [], "decayed": [], "undecayed": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in manifolds:
            kind = "constrained"
        elif parameter.ndim < 2 or id(parameter) in normalization or name.rpartition(".")[2].endswith("bias"):
            kind = "undecayed"
        else:
            kind = "decayed"
        members[kind].append((name, parameter))
    options: dict[str, dict[str, Any]] = {
        "constrained": {"weight_decay": 0.0, "manifolds": [manifolds[id(p)] for _, p in members["constrained"]]},
        "decayed": {"weight_decay": weight_decay},
        "undecayed": {"weight_decay": 0.0},
    }
    if sphere_lr is not None and not isinstance(sphere_lr, Mapping):
        options["constrained"]["lr"] = sphere_lr
    groups = [
        {"params": [p for _, p in named], "param_names": [name for name, _ in named], **options[kind]}
        for kind, named in members.items()
        if named
    ]
    if not isinstance(sphere_lr, Mapping):
        return groups
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sphere_lr:
        if name not in names:
            raise OptionError("sphere_lr", name, f"names of parameters of {type(model).__name__}")
    return [part for group in groups for part in (_apart(group, sphere_lr) if "manifolds" in group else [group])]


def _require_rate(option: str, rate: Any) -> None:
    try:
        holds = 0 <= float(rate) < math.inf
    except (TypeError, ValueError):
        holds = False
    if not holds:
        raise OptionError(option, rate, "a finite number ≥ 0")


def _apart(group: dict[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A constrained group with one group for each weight that has a learning rate of its own."""
    rows = list(zip(group["params"], group["param_names"], group["manifolds"], strict=True))
    rest = [row for row in rows if row[1] not in rates]
    parts = [([row], {"lr": rates[row[1]]}) for row in rows if row[1] in rates]
    return [
        {**group, "params": [p for p, _, _ in own], "param_names": [n for _, n, _ in own],
         "manifolds": [m for _, _, m in own], **lr}
        for own, lr in [*parts, *([(rest, {})] if rest else [])]
    ]  # fmt: skip
