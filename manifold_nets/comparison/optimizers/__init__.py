"""The optimizers of a comparison: built-in ones by name, and the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from manifold_nets.comparison.errors import OptimizerNameError, SettingsError
from manifold_nets.comparison.optimizers.builtin import OPTIMIZERS, from_torch
from manifold_nets.comparison.optimizers.spec import Form, Make, Objective, OptimizerSpec, Stepper, TorchStepper
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import ModelSpecError
from manifold_nets.optim import on_spheres
from manifold_nets.sources import ModelSpec, load_attribute

__all__ = [
    "OPTIMIZERS",
    "AnyOptimizer",
    "Form",
    "Make",
    "Objective",
    "OptimizerSpec",
    "Stepper",
    "TorchStepper",
    "optimizer_spec",
    "spec_of",
]

# Before the name of an optimizer for plain networks.
_WRAPPED = "on-spheres:"
# Optimizers that train other parameters instead of the weights, or move the weights themselves.
_OTHER_WEIGHTS = ("sgd-wn", "adam-wn", "sm")

OptimizerSource = Callable[..., torch.optim.Optimizer]
AnyOptimizer = str | OptimizerSpec | OptimizerSource


def optimizer_spec(name: AnyOptimizer) -> OptimizerSpec:
    """Return the built-in optimizer with a name, or one from a Python file or module.

    Args:
        name: name of a built-in optimizer; ``file.py:NAME`` or ``package.module:NAME`` of an `OptimizerSpec` or of
            anything that `spec_of` accepts; or one of these objects. ``on-spheres:NAME`` trains the converted network
            with an optimizer for plain networks; see `manifold_nets.optim.on_spheres`.

    Raises:
        OptimizerNameError: the name is unknown.
        SettingsError: the object is not an optimizer.
        ModelNotFoundError: the file, the module or the attribute does not exist.
        ModelBuildError: importing the module raised an error.

    Example:
        >>> optimizer_spec("rsgd").form, optimizer_spec("torch.optim:SGD").library
        ('converted', 'own')
    """
    if not isinstance(name, str):
        return name if isinstance(name, OptimizerSpec) else spec_of(name)
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name.startswith(_WRAPPED):
        return _on_spheres(optimizer_spec(name.removeprefix(_WRAPPED)), name)
    try:
        spec = ModelSpec.parse(name)
        if spec.kind not in ("file", "module"):
            raise ModelSpecError(name)
    except ModelSpecError as error:
        raise OptimizerNameError(name, OPTIMIZERS) from error
    found = load_attribute(spec)
    return replace(found, name=name) if isinstance(found, OptimizerSpec) else spec_of(found, name)


def spec_of(source: OptimizerSource, name: str | None = None) -> OptimizerSpec:
    """Wrap an optimizer that trains the plain network.

    Args:
        source: a `torch.optim.Optimizer` class, or a function that returns an optimizer. It is called with parameter
            groups, which have the weight decay of the comparison, and the keyword ``lr``; other options have their
            defaults.
        name: its name in tables (default: that of the class or function).

    Raises:
        SettingsError: the source is neither.

    Example:
        >>> spec_of(torch.optim.Rprop).name
        'Rprop'
    """
    name = getattr(source, "__name__", type(source).__name__) if name is None else name
    if not _takes_rate(source):
        expected = "an optimizer class, or a function of params and lr that returns an optimizer"
        raise SettingsError("optimizers", name, expected)

    def checked(*args: Any, **options: Any) -> torch.optim.Optimizer:
        made: object = source(*args, **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"{name} returned an object of type {type(made).__name__}, not a torch.optim.Optimizer")
        return made

    return OptimizerSpec(name, "plain", "own", "own", from_torch(checked), description="the user's own optimizer")


def _on_spheres(plain: OptimizerSpec, name: str) -> OptimizerSpec:
    """A `torch.optim.Optimizer` whose steps are projected to the tangent space."""
    if plain.form != "plain" or plain.full_batch or plain.name in _OTHER_WEIGHTS:
        raise SettingsError(
            "optimizers", name, f"{_WRAPPED} in front of an optimizer that trains the plain network's weights"
        )

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        stepper = plain.make(model, rate, settings)
        if not isinstance(stepper, TorchStepper):
            raise SettingsError("optimizers", name, f"{_WRAPPED} in front of a torch.optim.Optimizer")
        on_spheres(stepper.optimizer, model)
        return stepper

    return OptimizerSpec(
        name, "converted", plain.family, plain.library, make, description=f"{plain.name}, made tangent"
    )


def _takes_rate(source: object) -> bool:
    try:
        parameters = inspect.signature(source).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):  # nothing that can be called, or a callable written in C
        return callable(source)
    return any(p.name == "lr" or p.kind is p.VAR_KEYWORD for p in parameters)
