"""Replacing parameters of a model wherever they stand, so that tied weights stay tied."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from manifold_nets.constraints import detach

__all__ = ["replace_everywhere"]


def replace_everywhere(model: nn.Module, replacements: Sequence[tuple[Tensor, nn.Parameter]]) -> None:
    """Put each new parameter where a module still holds the old one, and forget that module's record of it.

    Args:
        model: the model; modules that already hold the new parameters are left alone.
        replacements: pairs of an old and a new parameter.

    Example:
        >>> first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        >>> second.weight = first.weight
        >>> old, first.weight = first.weight, nn.Parameter(first.weight.detach())
        >>> replace_everywhere(nn.Sequential(first, second), [(old, first.weight)])
        >>> second.weight is first.weight
        True
    """
    new = {id(old): parameter for old, parameter in replacements}
    holders = [
        (module, leaf, new[id(parameter)])
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in new
    ]
    for module, leaf, parameter in holders:
        detach(module, leaf)
        setattr(module, leaf, parameter)
