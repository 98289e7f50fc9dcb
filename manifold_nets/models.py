"""Looking up and replacing the tensors of a user's model, whatever its modules share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manifold_nets.constraints import detach

__all__ = ["dtype_of", "holders", "named_tensors", "replace_everywhere"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; float32 where there is none."""
    # Not `model.parameters()`, which some networks give another meaning.
    return next((p.dtype for p in nn.Module.parameters(model) if p.is_floating_point()), torch.float32)


def holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """The modules that hold a parameter, each with its attribute."""
    return [(m, leaf) for m in model.modules() for leaf, p in m._parameters.items() if p is parameter]


def replace_everywhere(model: nn.Module, replacements: Sequence[tuple[Tensor, nn.Parameter]]) -> None:
    """Put each new parameter where a module still holds the old one, so that tied weights stay tied.

    The record that a module has of the old parameter's manifold goes with it.

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
    for old, new in replacements:
        for module, leaf in holders(model, old):
            detach(module, leaf)
            setattr(module, leaf, new)
