"""Giving a model back as an ordinary torch model."""

from __future__ import annotations

import copy

from torch import nn

from manifold_nets.constraints import constrained_weights, detach
from manifold_nets.conversion.ties import replace_everywhere

__all__ = ["revert"]


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give a model back with plain parameters: the same keys, the same values, the same function bit for bit.

    Every weight on a `SphereProduct` becomes a `torch.nn.Parameter`, and the ``UnitNorm*`` layers become the torch
    layers they derive from. Nothing is computed: a weight that drifted off its sphere is given back as it is. Tied
    weights, ``requires_grad``, gradients, the training mode, buffers, and the hooks of modules are kept. Parameters on
    other manifolds of geoopt are left alone, and so are hooks and optimizers that hold a replaced parameter object:
    build optimizers after reverting.

    Args:
        model: a converted model, or one with ``UnitNorm*`` layers; one with nothing constrained is merely copied.
        inplace: change the model itself instead of a copy.

    Returns:
        The copy, or the model itself.

    Example:
        >>> import torch, manifold_nets as mn
        >>> plain = mn.revert(torch.nn.Sequential(mn.layers.UnitNormLinear(4, 3), torch.nn.BatchNorm1d(3)))
        >>> type(plain[0]).__name__, type(plain[0].weight).__name__
        ('Linear', 'Parameter')
    """
    plain = model if inplace else _copy(model)
    replaced = []
    for weight in list(constrained_weights(plain)):
        old = weight.parameter
        detach(weight.module, weight.leaf)
        new = weight.module.get_parameter(weight.leaf)
        new.grad = old.grad
        replaced.append((old, new))
    replace_everywhere(plain, replaced)
    return plain


def _copy(model: nn.Module) -> nn.Module:
    """Deep copy, with the gradients, which copying a parameter drops."""
    duplicate = copy.deepcopy(model)
    for old, new in zip(model.parameters(), duplicate.parameters(), strict=True):
        if old.grad is not None:
            new.grad = old.grad.detach().clone()
    return duplicate
