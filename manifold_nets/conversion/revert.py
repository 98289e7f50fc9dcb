"""Giving a model back as an ordinary torch model."""

from __future__ import annotations

from torch import nn

from manifold_nets.constraints import constrained_weights, copy_attributes, detach, everywhere
from manifold_nets.conversion.moves import MOVES
from manifold_nets.conversion.projection import leave_as_loaded
from manifold_nets.conversion.remedies.dead_biases import put_back_bias, removed_biases
from manifold_nets.layers import UNIT_NORM_LAYERS
from manifold_nets.models import duplicate, holders

__all__ = ["CONVERSION_RECORD", "copy_of", "revert"]

CONVERSION_RECORD = "_manifold_nets_conversion"
_PLAIN_LAYERS = {unit_norm: plain for plain, unit_norm in UNIT_NORM_LAYERS.items()}


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give a model back with plain parameters: the same values, the same function bit for bit.

    Every weight on a `SphereProduct` becomes a `torch.nn.Parameter`, and the ``UnitNorm*`` layers become the torch
    layers of the same name. Biases that conversion removed come back as zeros, so that the keys are those of the
    architecture. Nothing is computed: a weight that drifted off its sphere is given back as it is. Tied
    weights, ``requires_grad``, gradients, the training mode, buffers, attributes of parameters, and the hooks of
    modules and parameters are kept.

    Parameters on other manifolds of geoopt are left alone, and so are classes that were derived from a ``UnitNorm*``
    layer. Optimizers that hold a replaced parameter object stay with it: build optimizers after reverting.

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
    plain = model if inplace else copy_of(model, gradients=True)
    for module, leaf in removed_biases(plain).values():
        put_back_bias(module, leaf)
    places = holders(plain)
    for held in [places[id(weight.parameter)] for weight in constrained_weights(plain)]:
        everywhere(held, detach)
    for module in plain.modules():
        for record in (CONVERSION_RECORD, MOVES):
            module.__dict__.pop(record, None)
        leave_as_loaded(module)
        if type(module) in _PLAIN_LAYERS:
            # The same object with another class: whatever else refers to the layer, or hooks on it, goes on working.
            module.__class__ = _PLAIN_LAYERS[type(module)]
    return plain


def copy_of(model: nn.Module, *, gradients: bool = False) -> nn.Module:
    """Deep copy, with the attributes and hooks of parameters, which copying drops, and gradients where asked for."""
    copied = duplicate(model)
    for old, new in zip(nn.Module.parameters(model), nn.Module.parameters(copied), strict=True):
        copy_attributes(old, new, share=False)
        if gradients and old.grad is not None:
            new.grad = old.grad.detach().clone()
    return copied
