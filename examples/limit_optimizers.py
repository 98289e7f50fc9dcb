"""Optimizers that do what is not advised, and remedies; for `where_it_does_not_help`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from sphere_recipes import by_size
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison import OptimizerSpec, Settings, TorchStepper
from manifold_nets.comparison.tasks import load_task

__all__ = ["LIMIT_OPTIMIZERS", "on_sphere"]

Make = Callable[[nn.Module, float, Settings], TorchStepper]


def on_sphere(layer: nn.Linear, radius: float | None = None) -> None:
    """Put the rows of a layer on spheres, in place, whether a normalization follows or not.

    Args:
        layer: what to constrain.
        radius: of every row; each keeps its own norm when left out, and with it the function.
    """
    weight = layer.weight.detach()
    norms = weight.norm(dim=1)
    radii = norms if radius is None else torch.full_like(norms, radius)
    sphere = mn.SphereProduct(tuple(weight.shape), radius=radii.tolist())
    layer.weight = geoopt.ManifoldParameter(sphere.projx(weight), manifold=sphere)


def rsgd(model: nn.Module, rate: float, settings: Settings, **options: Any) -> TorchStepper:
    """Riemannian SGD with the momentum of the settings."""
    groups = mn.param_groups(model, weight_decay=settings.weight_decay, **{"sphere_lr": rate, **options})
    return TorchStepper(mn.optim.RiemannianSGD(groups, lr=rate, momentum=settings.momentum))


def matched(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
    """Convert, and give every weight the rate that continues SGD's next step; see `matched_learning_rates`."""
    report = mn.diagnose(model, load_task("digits").example_inputs())
    rates = mn.matched_learning_rates(
        model, report, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    mn.convert(model, report, inplace=True)
    return rsgd(model, rate, settings, sphere_lr=rates.by_weight())


def matched_adamw(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
    """Convert, and give every weight the rate that continues AdamW's next step."""
    report = mn.diagnose(model, load_task("digits").example_inputs())
    rates = mn.matched_learning_rates(model, report, optimizer="adamw", lr=rate, weight_decay=settings.weight_decay)
    mn.convert(model, report, inplace=True)
    groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rates.by_weight())
    return TorchStepper(mn.optim.RiemannianAdam(groups, lr=rate, decoupled_weight_decay=True))


def with_last_layer(radius: float | None) -> Make:
    """Put the classifier on spheres too."""

    def make(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
        on_sphere([layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1], radius)
        return rsgd(model, rate, settings)

    return make


def forced(radius: float | None) -> Make:
    """Put every layer but the last on spheres although no normalization takes their scale away."""

    def make(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
        for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]:
            on_sphere(layer, radius)
        groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=by_size(model, rate))
        return TorchStepper(mn.optim.RiemannianAdam(groups, lr=rate, decoupled_weight_decay=True))

    return make


def decayed_gains(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
    """Riemannian SGD whose weight decay acts on all that is not on spheres, the gains of normalizations too."""
    groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rate)
    for group in groups:
        if "manifolds" not in group:
            group["weight_decay"] = settings.weight_decay
    return TorchStepper(mn.optim.RiemannianSGD(groups, lr=rate, momentum=settings.momentum))


#: The optimizers by name.
LIMIT_OPTIMIZERS = {
    found.name: found
    for found in (
        OptimizerSpec("rsgd, matched", "plain", "sgd", "manifold_nets", matched),
        OptimizerSpec("radamw, exactly matched", "plain", "adam", "manifold_nets", matched_adamw),
        OptimizerSpec("rsgd, last layer too", "converted", "sgd", "manifold_nets", with_last_layer(None)),
        OptimizerSpec("rsgd, last layer at radius 10", "converted", "sgd", "manifold_nets", with_last_layer(10.0)),
        OptimizerSpec("radamw, forced", "plain", "adam", "manifold_nets", forced(None)),
        OptimizerSpec("radamw, forced at radius √2", "plain", "adam", "manifold_nets", forced(math.sqrt(2))),
        OptimizerSpec("rsgd, gains decayed", "converted", "sgd", "manifold_nets", decayed_gains),
    )
}
