"""The conditions of the gradient test: float64, negligible eps, no dropout, wherever they are set in the model.

They must also hold in the backward pass: a model that checkpoints its activations runs forward again there, and must
compute the same values. A function mode is not active inside `torch.autograd.grad` if that is called with tensors,
which it intercepts; it is active if that is called with gradient edges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manifold_nets.float64 import in_float64
from manifold_nets.symmetry.rules import LARGEST_EPS

__all__ = ["NEGLIGIBLE_EPS", "exact_mode"]

# torch refuses eps = 0 in training; this one is lost in any float64 variance that is not zero.
NEGLIGIBLE_EPS = 1e-30
# Position of the eps argument. Both storeys are listed: what a functional calls inside is not intercepted again.
_POSITIONS = {"batch_norm": 7, "instance_norm": 7, "group_norm": 4, "layer_norm": 4, "rms_norm": 3}
_EPS_POSITION = {getattr(storey, name): n for name, n in _POSITIONS.items() for storey in (torch, F)} | {F.normalize: 3}
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps")
_STEMS = "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout".split()
_DROPOUTS = {
    getattr(storey, name)
    for storey in (torch, F)
    for stem in _STEMS
    for name in (stem, f"{stem}_")
    if hasattr(storey, name)
}
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_LOWER_BOUNDS = (torch.clamp_min, Tensor.clamp_min, torch.clamp, Tensor.clamp)


class _ExactMode(TorchFunctionMode):
    """Makes every eps negligible and dropout inactive, even if no module attribute holds them."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        position = _EPS_POSITION.get(func)
        if position is not None:
            args, kwargs = _replaced(args, kwargs, position, "eps", self.eps)
        elif func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        elif func is F.scaled_dot_product_attention:
            args, kwargs = _replaced(args, kwargs, 4, "dropout_p", 0.0)
        elif func in _ADDITIONS and len(args) == 2 and _is_eps(args[1]):
            args = (args[0], self.eps)
        elif func in _LOWER_BOUNDS and len(args) == 2 and _is_eps(args[1]):
            args = (args[0], self.eps)
        elif func in _LOWER_BOUNDS and _is_eps(kwargs.get("min")):
            kwargs["min"] = self.eps
        return func(*args, **kwargs)


def _is_eps(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= LARGEST_EPS


def _replaced(args: Any, kwargs: dict[str, Any], position: int, name: str, value: float) -> tuple[Any, dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


@contextlib.contextmanager
def exact_mode(
    model_copy: nn.Module, mode: TorchFunctionMode | None = None, *, eps: float | None = None
) -> Iterator[None]:
    """Run a copy, forward and backward, under the conditions of the gradient test and a further mode if given."""
    eps = NEGLIGIBLE_EPS if eps is None else eps
    with _negligible_eps(model_copy, eps), in_float64(), _ExactMode(eps), mode or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _negligible_eps(model: nn.Module, eps: float) -> Iterator[None]:
    """Set the eps attributes of all modules to a negligible value and back."""
    saved: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for attribute in _EPS_NAMES:
            value = module.__dict__.get(attribute)
            if isinstance(value, float):
                saved.append((module, attribute, value))
                setattr(module, attribute, eps)
    try:
        yield
    finally:
        for module, attribute, value in saved:
            setattr(module, attribute, value)
