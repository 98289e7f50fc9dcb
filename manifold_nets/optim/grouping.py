"""Parameter groups of a model: constrained weights, decayed weights, and the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from manifold_nets.constraints import constrained_weights

__all__ = ["param_groups"]

_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalization
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, sphere_lr: float | None = None
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
        sphere_lr: learning rate of the constrained group, in radians; that of the optimizer when left out.

    Returns:
        Groups with ``"params"``, ``"param_names"`` and ``"weight_decay"``; the constrained one with ``"manifolds"``.

    Example:
        >>> import torch, manifold_nets as mn
        >>> model = torch.nn.Sequential(mn.layers.UnitNormLinear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> for group in mn.param_groups(model, weight_decay=5e-4):
        ...     print(group["weight_decay"], group["param_names"])
        0.0 ['0.weight']
        0.0005 ['2.weight']
        0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
    """
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
    if sphere_lr is not None:
        options["constrained"]["lr"] = sphere_lr
    return [
        {"params": [p for _, p in named], "param_names": [name for name, _ in named], **options[kind]}
        for kind, named in members.items()
        if named
    ]
