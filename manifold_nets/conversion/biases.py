"""Biases that were removed from their layers, recorded so that they can be put back as zeros.

The record is no parameter, buffer or hook: the layer has ``bias = None``, as if it had been built with ``bias=False``,
and its key leaves the `state_dict`. The record follows deep copies and pickles of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["absent_bias", "put_back_bias", "remove_bias", "removed_biases"]

_RECORD = "_manifold_nets_removed_biases"


@dataclass(frozen=True)
class _Removed:
    """What is needed to make the bias anew."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def remove_bias(module: nn.Module, leaf: str) -> Callable[[], None]:
    """Replace a bias by None, and return a function that undoes it.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = remove_bias(layer, "bias")
        >>> list(layer.state_dict()), list(removed_biases(layer))
        (['weight'], ['bias'])
    """
    bias = module.get_parameter(leaf)
    module.register_parameter(leaf, None)
    record = module.__dict__.setdefault(_RECORD, {})
    record[leaf] = _Removed(tuple(bias.shape), bias.dtype, bias.requires_grad)

    def undo() -> None:
        setattr(module, leaf, bias)
        _forget(module, leaf)

    return undo


def put_back_bias(module: nn.Module, leaf: str) -> None:
    """Make a removed bias again, of zeros, on the device and in the dtype of the layer's weight.

    A bias that is there again, as that of a module with two names after the first of them, is left as it is.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = remove_bias(layer, "bias")
        >>> put_back_bias(layer, "bias")
        >>> layer.bias.tolist(), list(removed_biases(layer))
        ([0.0, 0.0], [])
    """
    if leaf in module.__dict__.get(_RECORD, {}):
        setattr(module, leaf, absent_bias(module, leaf))
        _forget(module, leaf)


def absent_bias(module: nn.Module, leaf: str) -> nn.Parameter:
    """Return what `put_back_bias` would set; the module is not changed."""
    removed: _Removed = module.__dict__[_RECORD][leaf]
    weight = module._parameters.get("weight")
    device, dtype = (None, removed.dtype) if weight is None else (weight.device, weight.dtype)
    zeros = torch.zeros(removed.shape, dtype=dtype, device=device)
    return nn.Parameter(zeros, requires_grad=removed.requires_grad)


def removed_biases(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules and attributes of all removed biases, by the names that they had.

    A module that stands in several places had its bias under as many names, and all of them left the `state_dict`.
    """
    return {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for leaf in module.__dict__.get(_RECORD, {})
        if module._parameters.get(leaf) is None
    }


def _forget(module: nn.Module, leaf: str) -> None:
    module.__dict__[_RECORD].pop(leaf)
    if not module.__dict__[_RECORD]:
        del module.__dict__[_RECORD]
