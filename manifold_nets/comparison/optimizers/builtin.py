"""The built-in optimizers by name: which library, which parameter groups, which options.

Every optimizer gets the parameter groups of `manifold_nets.param_groups`: weight decay acts on weights of two or more
dimensions that are not on spheres, never on biases and normalizations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import nn

from manifold_nets.comparison.optimizers.full_batch import PYMANOPT
from manifold_nets.comparison.optimizers.spec import Form, Make, OptimizerSpec, Stepper, TorchStepper
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import MissingExtraError
from manifold_nets.groups import filter_partition
from manifold_nets.optim import OPTIMIZERS as OWN
from manifold_nets.optim import param_groups, scaled_metric_groups
from manifold_nets.sources import import_torchvision

__all__ = ["OPTIMIZERS", "from_table", "from_torch"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def from_torch(kind: Callable[..., torch.optim.Optimizer], *, momentum: bool = False, **options: Any) -> Make:
    """Make an optimizer with the interface of `torch.optim`.

    Args:
        kind: its class, or a function that returns one.
        momentum: whether it takes the momentum of the settings.
        options: further options.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        groups = param_groups(model, weight_decay=settings.weight_decay)
        # Only what every optimizer knows.
        known = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        extra = {"momentum": settings.momentum} if momentum else {}
        return TorchStepper(kind(known, lr=rate, **extra, **options))

    return make


def with_weight_norm(make: Make) -> Make:
    """Put `torch.nn.utils.parametrizations.weight_norm` on every linear and convolution layer first.

    Each output channel keeps a direction and a length, also in transposed convolutions; the lengths are trained too.
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
    row = OWN[name]

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        if row.weights == "spheres":
            # The learning rate that is tuned is that of spheres and all else.
            groups = param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rate)
        else:
            layers = {f"{n}.weight" if n else "weight": m for n, m in model.named_modules() if isinstance(m, _LAYERS)}
            filters = {name: filter_partition(layer) for name, layer in layers.items()}
            groups = scaled_metric_groups(model, filters, weight_decay=settings.weight_decay)
        options = dict(row.options) if row.adaptive else {"momentum": settings.momentum, **row.options}
        kind: Callable[..., torch.optim.Optimizer] = row.kind
        return TorchStepper(kind(groups, lr=rate, **options))

    return make


def _timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(*args: Any, **options: Any) -> torch.optim.Optimizer:
        try:
            import_torchvision()  # timm imports it, and it may need help
            from timm import optim
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", f"{name} and others", "compare") from error
        made: torch.optim.Optimizer = getattr(optim, name)(*args, **options)
        return made

    return make


_sgd, _adam = from_torch(torch.optim.SGD, momentum=True), from_torch(torch.optim.Adam)
_nesterov = from_torch(torch.optim.SGD, momentum=True, nesterov=True)
_rmsprop = from_torch(torch.optim.RMSprop, momentum=True)
_geoopt_rsgd = from_torch(geoopt.optim.RiemannianSGD, momentum=True, stabilize=10)
_geoopt_radam = from_torch(geoopt.optim.RiemannianAdam, stabilize=10)
_sgdp, _adamp = from_torch(_timm("SGDP"), momentum=True), from_torch(_timm("AdamP"))

_ROWS: tuple[tuple[str, Form, str, str, Make, str], ...] = (
    ("sgd", "plain", "sgd", "torch", _sgd, "SGD with momentum"),
    ("sgd-nesterov", "plain", "sgd", "torch", _nesterov, "SGD with Nesterov's momentum; needs a momentum"),
    ("sgd-wn", "plain", "sgd", "torch", with_weight_norm(_sgd), "SGD on torch's weight normalization"),
    ("adam", "plain", "adam", "torch", _adam, "Adam; weight decay by an L2 penalty"),
    ("adam-wn", "plain", "adam", "torch", with_weight_norm(_adam), "Adam on torch's weight normalization"),
    ("adamw", "plain", "adam", "torch", from_torch(torch.optim.AdamW), "Adam with decoupled weight decay"),
    ("nadam", "plain", "adam", "torch", from_torch(torch.optim.NAdam), "Adam with Nesterov's momentum"),
    ("rmsprop", "plain", "adam", "torch", _rmsprop, "RMSprop with momentum"),
    ("adagrad", "plain", "adam", "torch", from_torch(torch.optim.Adagrad), "AdaGrad"),
    ("geoopt-rsgd", "converted", "sgd", "geoopt", _geoopt_rsgd, "geoopt's Riemannian SGD on the same manifold"),
    ("geoopt-radam", "converted", "adam", "geoopt", _geoopt_radam, "geoopt's Riemannian Adam on the same manifold"),
    ("sgdp", "plain", "sgd", "timm", _sgdp, "SGD without the radial part of its steps"),
    ("adamp", "plain", "adam", "timm", _adamp, "Adam without the radial part of its steps"),
)


def _own(name: str) -> OptimizerSpec:
    row = OWN[name]
    form: Form = "converted" if row.weights == "spheres" else "plain"
    family, description = "adam" if row.adaptive else "sgd", f"{row.kind.__name__}, {row.source}"
    return OptimizerSpec(name, form, family, "manifold_nets", from_table(name), description=description)


#: The built-in optimizers, by the names that the command line gives them.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    found.name: found
    for found in (
        *(OptimizerSpec(*row, description=text) for row, text in ((row[:-1], row[-1]) for row in _ROWS)),
        *map(_own, OWN),
        *PYMANOPT,
    )
}
