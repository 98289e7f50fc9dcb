"""Optimizers by name, and optimizers of one's own: classes and functions, given as such or by the place they are in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from manifold_nets.comparison.contestants.builders import from_torch
from manifold_nets.comparison.contestants.table import CONTESTANTS
from manifold_nets.comparison.errors import OptimizerNameError, SettingsError
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.errors import ModelSpecError
from manifold_nets.sources import ModelSpec, load_attribute

__all__ = ["AnyOptimizer", "OptimizerSource", "contestant", "own_contestant"]

OptimizerSource = Callable[..., torch.optim.Optimizer]
AnyOptimizer = str | Contestant | OptimizerSource


def contestant(name: str) -> Contestant:
    """Return the contestant of a name, or the one that a Python file or module has.

    Args:
        name: that of a built-in contestant, or ``file.py:NAME`` or ``package.module:NAME`` of what `own_contestant`
            takes, or of a `Contestant`.

    Raises:
        OptimizerNameError: the text is neither.
        SettingsError: what it names is no optimizer.
        ModelNotFoundError: the file, the module or the attribute does not exist.
        ModelBuildError: importing it raised.

    Example:
        >>> contestant("rsgd").form, contestant("torch.optim:SGD").library
        ('converted', 'own')
    """
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    try:
        spec = ModelSpec.parse(name)
    except ModelSpecError as error:
        raise OptimizerNameError(name, CONTESTANTS) from error
    if spec.kind not in ("file", "module"):
        raise OptimizerNameError(name, CONTESTANTS)
    found = load_attribute(spec)
    return replace(found, name=name) if isinstance(found, Contestant) else own_contestant(found, name)


def own_contestant(source: OptimizerSource, name: str | None = None) -> Contestant:
    """Make a contestant of an optimizer that trains the plain network.

    Args:
        source: a `torch.optim.Optimizer` class, or a function that returns an optimizer. It is called with parameter
            groups, which have the weight decay of the comparison, and the keyword ``lr``; all else are its defaults.
        name: what to call it; by its own name when left out.

    Raises:
        SettingsError: it is no such thing.

    Example:
        >>> own_contestant(torch.optim.Rprop).name
        'Rprop'
    """
    name = getattr(source, "__name__", type(source).__name__) if name is None else name
    if not _takes_rate(source):
        raise SettingsError("optimizers", name, "an optimizer class, or a function of params and lr that returns one")

    def checked(*args: Any, **options: Any) -> torch.optim.Optimizer:
        made: object = source(*args, **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"{name} returned an object of type {type(made).__name__}, not a torch.optim.Optimizer")
        return made

    return Contestant(name, "plain", "own", "own", from_torch(checked), description="an optimizer of one's own")


def _takes_rate(source: object) -> bool:
    if not callable(source):
        return False
    try:
        parameters = inspect.signature(source).parameters.values()
    except (TypeError, ValueError):  # as of some callables written in C
        return True
    return any(p.name == "lr" or p.kind is p.VAR_KEYWORD for p in parameters)
