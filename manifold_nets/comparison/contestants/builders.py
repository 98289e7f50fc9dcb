"""How each contestant is made for a model: which library, which parameter groups, which options.

Every contestant gets the parameter groups of `manifold_nets.param_groups`: weight decay acts on weights of two or more
dimensions that are not on spheres, never on biases and normalizations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manifold_nets.comparison.contestants.steppers import PymanoptStepper, TorchStepper
from manifold_nets.comparison.protocols import Stepper
from manifold_nets.comparison.records import Settings
from manifold_nets.errors import MissingExtraError
from manifold_nets.groups import Partition, filter_partition
from manifold_nets.optim import OPTIMIZERS, param_groups, scaled_metric_groups
from manifold_nets.sources import import_torchvision

__all__ = ["Make", "from_geoopt", "from_pymanopt", "from_table", "from_timm", "from_torch", "with_weight_norm"]

Make = Callable[[nn.Module, float, Settings], Stepper]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def from_torch(kind: Callable[..., torch.optim.Optimizer], *, momentum: bool = False, **options: Any) -> Make:
    """Make an optimizer of torch.

    Args:
        kind: its class.
        momentum: whether it takes the momentum of the settings.
        options: further options.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        extra = {"momentum": settings.momentum} if momentum else {}
        return TorchStepper(kind(_groups(model, settings), lr=rate, **extra, **options))

    return make


def with_weight_norm(make: Make) -> Make:
    """Put `torch.nn.utils.parametrizations.weight_norm` on every linear and convolution layer first.

    Each output channel keeps a direction and a length, also those of transposed convolutions, and the lengths are
    trained too.
    """

    def parametrized(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        for module in list(model.modules()):
            if isinstance(module, _LAYERS):
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                nn.utils.parametrizations.weight_norm(module, dim=1 if transposed else 0)
        return make(model, rate, settings)

    return parametrized


def from_table(name: str) -> Make:
    """Make an optimizer of `manifold_nets.optim.OPTIMIZERS`.

    The scaled metric is that of the paper: every linear and convolution weight, the classifier's too, by its filters.
    """
    row = OPTIMIZERS[name]

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        if row.weights == "spheres":
            # The rate is the one that is tuned, for spheres and all else.
            groups = param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rate)
        else:
            groups = scaled_metric_groups(model, _filters(model), weight_decay=settings.weight_decay)
        options = dict(row.options) if row.adaptive else {"momentum": settings.momentum, **row.options}
        kind: Callable[..., torch.optim.Optimizer] = row.kind
        return TorchStepper(kind(groups, lr=rate, **options))

    return make


def from_geoopt(name: str, *, momentum: bool = False, **options: Any) -> Make:
    """Make an optimizer of `geoopt.optim`, on the same manifold parameters."""

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        import geoopt

        extra = {"momentum": settings.momentum} if momentum else {}
        kind = getattr(geoopt.optim, name)
        return TorchStepper(kind(_groups(model, settings), lr=rate, **extra, **options))

    return make


def from_timm(name: str, *, momentum: bool = False, **options: Any) -> Make:
    """Make an optimizer of `timm.optim`.

    Raises:
        MissingExtraError: when it is made and timm is not installed.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        try:
            import_torchvision()  # timm imports it, and it may need help
            from timm import optim
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", f"{name} and others", "compare") from error
        extra = {"momentum": settings.momentum} if momentum else {}
        return TorchStepper(getattr(optim, name)(_groups(model, settings), lr=rate, **extra, **options))

    return make


def from_pymanopt(name: str) -> Make:
    """Make an optimizer of `pymanopt.optimizers` for the full batch.

    Its learning rate is the length of the first step that it tries, of a line search, or the first radius of a trust
    region: what follows it chooses itself.

    Raises:
        MissingExtraError: when it is made and pymanopt is not installed.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        from manifold_nets import pymanopt_bridge  # noqa: F401  says what to install where pymanopt is absent

        optimizers = importlib.import_module("pymanopt.optimizers")
        line_search = importlib.import_module("pymanopt.optimizers.line_search")
        common: dict[str, Any] = {"verbosity": 0, "max_iterations": 10**9, "max_cost_evaluations": 10**9}
        common["max_time"] = float("inf")
        options: dict[str, Any] = {}
        if name == "TrustRegions":
            options["Delta0"] = rate
        elif name == "ConjugateGradient":
            common["line_searcher"] = line_search.AdaptiveLineSearcher(initial_step_size=rate)
        else:
            common["line_searcher"] = line_search.BackTrackingLineSearcher(initial_step_size=rate)
        optimizer = getattr(optimizers, name)(**common)
        return PymanoptStepper(model, optimizer, weight_decay=settings.weight_decay, options=options)

    return make


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameter groups with what every optimizer knows."""
    groups = param_groups(model, weight_decay=settings.weight_decay)
    return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]


def _filters(model: nn.Module) -> dict[str, Partition | None]:
    return {
        f"{name}.weight" if name else "weight": filter_partition(module)
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    }
