"""Convert a model back to an ordinary torch model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights, copy_attributes, detach, everywhere
from manifold_nets.conversion.moves import MOVES, Values, moves_of, rescaled_along
from manifold_nets.conversion.projection import leave_as_loaded
from manifold_nets.conversion.remedies.dead_biases import put_back_bias, removed_biases
from manifold_nets.errors import OptionError
from manifold_nets.groups import refuse_degenerate
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.layers import UNIT_NORM_LAYERS
from manifold_nets.models import duplicate, holders, named_tensors

__all__ = ["CONVERSION_RECORD", "copy_of", "revert"]

CONVERSION_RECORD = "_manifold_nets_conversion"
_PLAIN_LAYERS = {unit_norm: plain for plain, unit_norm in UNIT_NORM_LAYERS.items()}


def revert(model: nn.Module, *, norms: Mapping[str, Tensor] | None = None, inplace: bool = False) -> nn.Module:
    """Convert a model back to plain parameters, with the same values and bit for bit the same function.

    Every weight on a `SphereProduct` becomes a `torch.nn.Parameter`, and the ``UnitNorm*`` layers become the torch
    layers of the same name. Biases that conversion removed come back as zeros, so that the keys are those of the
    original architecture. No value changes: a weight that has drifted off its sphere stays as it is. Tied weights,
    ``requires_grad``, gradients, the training mode, buffers, attributes of parameters, and the hooks of modules and
    parameters are kept.

    Parameters on other geoopt manifolds and subclasses of ``UnitNorm*`` layers are not changed. An existing optimizer
    still holds the old parameter objects, so build optimizers after reverting.

    With ``norms``, converted weights are rescaled to these norms, for instance to those of training without conversion
    (`manifold_nets.optim.plain_norms`). Biases and running statistics are rescaled with them, so that the function
    stays the same up to rounding in evaluation mode, and up to the effect of eps in training mode.

    Args:
        model: a converted model, or one with ``UnitNorm*`` layers; a model without constraints is just copied.
        norms: the norm of each group, by the names of converted weights.
        inplace: change the model itself instead of a copy.

    Returns:
        The copy, or the model itself if ``inplace``.

    Raises:
        OptionError: ``norms`` names a weight whose biases and statistics are unknown, or has the wrong number of norms.

    Example:
        >>> import torch, manifold_nets as mn
        >>> plain = mn.revert(torch.nn.Sequential(mn.layers.UnitNormLinear(4, 3), torch.nn.BatchNorm1d(3)))
        >>> type(plain[0]).__name__, type(plain[0].weight).__name__
        ('Linear', 'Parameter')
    """
    plain = model if inplace else copy_of(model, gradients=True)
    if norms:
        _rescale(plain, norms)
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


@torch.no_grad()
def _rescale(model: nn.Module, norms: Mapping[str, Tensor]) -> None:
    """Scale weights to other norms, together with their biases and running statistics."""
    record, tensors = moves_of(model), named_tensors(model)
    values = Values(tensors)
    known = {} if record is None else record.present(removed_biases(model))
    manifolds = {weight.name: weight.manifold for weight in constrained_weights(model)}

    for name, wanted in norms.items():
        if name not in known or name not in manifolds:
            raise OptionError("norms", name, "names of converted weights with known biases and statistics to rescale")
        unknown = [absorber for absorber in known[name].absorbers if -2 in absorber.groups]
        if unknown:
            found = f"{name}, whose scale {unknown[0].module} absorbs in a product with others"
            raise OptionError("norms", found, "names of converted weights with known biases and statistics to rescale")
        manifold, partition = manifolds[name], manifolds[name].partition
        if wanted.numel() != partition.n_groups:
            raise OptionError("norms", f"{wanted.numel()} for {name}", f"one for each of {partition}")
        own = manifold.radii if isinstance(manifold, JointSphereMember) else partition.norms(values[name])
        factors = wanted.detach().double().flatten() / own.flatten().to(wanted.device)
        refuse_degenerate(factors, name)
        values.update(rescaled_along(known[name], factors, values))
        values[name] = partition.multiply(values[name], partition.spread(factors))
    for name, value in values.items():
        tensors[name].copy_(value)


def copy_of(model: nn.Module, *, gradients: bool = False) -> nn.Module:
    """Deep copy, with the attributes and hooks of parameters that copying drops, and optionally with gradients."""
    copied = duplicate(model)
    for old, new in zip(nn.Module.parameters(model), nn.Module.parameters(copied), strict=True):
        copy_attributes(old, new, share=False)
        if gradients and old.grad is not None:
            new.grad = old.grad.detach().clone()
    return copied
