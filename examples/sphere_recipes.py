"""Recipes for spheres: how to set the optimizer, the rates of the spheres and those of the rest, by one number.

Each is an optimizer of `manifold_nets.compare` with one learning rate η, as SGD and AdamW have, so that the same grid
tunes all. d is the number of weights of one filter (a row of a matrix), and η√d the angle by which AdamW with rate η
turns filters of norm 1 in its first step; it depends on shapes alone, so that the recipes stay invariant to scales.

============================  ==============================  =======================================================
``rsgd``                      one rate for all                Riemannian SGD, SGD for the rest
``radam``                     one rate for all                Riemannian Adam, Adam for the rest
``radamw, matched``           spheres η√d, rest η             Riemannian Adam, AdamW for the rest
``rsgd and adamw``            spheres 10 η, rest η            Riemannian SGD, AdamW for the rest
``angular and adamw``         spheres η√(d/19), rest η        every sphere turns by that angle, AdamW for the rest
============================  ==============================  =======================================================

√(1/19) = √((1 − β)/(1 + β)) with β = 0.9: by so much Adam's steps are shorter where gradients are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison import OPTIMIZERS, Objective, OptimizerSpec, Settings
from manifold_nets.comparison.optimizers import optimizer_spec

__all__ = ["EUCLIDEAN", "RECIPES", "SPHERES", "by_size", "entrants"]


class JointStepper:
    """A stepper of several optimizers, each with parameters of its own."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(self, objective: Objective) -> Tensor:
        """One gradient, one step of each optimizer."""
        loss = objective()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def set_learning_rate(self, factor: float) -> None:
        """Scale all rates."""
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate


def by_size(model: nn.Module, rate: float) -> dict[str, float]:
    """The rate η√d for every constrained weight, d the number of weights of one of its filters."""
    return {
        name: rate * math.sqrt(parameter.numel() / parameter.shape[0])
        for group in mn.param_groups(model)
        if "manifolds" in group
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _apart(
    model: nn.Module, settings: Settings, sphere_lr: float | dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=sphere_lr)
    return [g for g in groups if "manifolds" in g], [g for g in groups if "manifolds" not in g]


def _radamw_matched(model: nn.Module, rate: float, settings: Settings) -> JointStepper:
    spheres, rest = _apart(model, settings, by_size(model, rate))
    return JointStepper(mn.optim.RiemannianAdam([*spheres, *rest], lr=rate, decoupled_weight_decay=True))


def _with_adamw(
    kind: Callable[..., torch.optim.Optimizer], sphere_lr: Callable[[nn.Module, float], float | dict[str, float]]
) -> Callable[[nn.Module, float, Settings], JointStepper]:
    def make(model: nn.Module, rate: float, settings: Settings) -> JointStepper:
        spheres, rest = _apart(model, settings, sphere_lr(model, rate))
        on_spheres = kind(spheres, lr=rate, momentum=settings.momentum)
        return JointStepper(on_spheres, torch.optim.AdamW(rest, lr=rate)) if rest else JointStepper(on_spheres)

    return make


def _recipe(name: str, family: str, make: Callable[[nn.Module, float, Settings], JointStepper]) -> OptimizerSpec:
    return OptimizerSpec(name, "converted", family, "manifold_nets", make)


_NOISE = math.sqrt((1 - 0.9) / (1 + 0.9))

#: Optimizers on spheres beside those that `manifold_nets.compare` knows.
RECIPES = {
    found.name: found
    for found in (
        _recipe("radamw, matched", "adam", _radamw_matched),
        _recipe("rsgd and adamw", "sgd", _with_adamw(mn.optim.RiemannianSGD, lambda _, rate: 10 * rate)),
        _recipe(
            "angular and adamw",
            "sgd",
            _with_adamw(mn.optim.AngularSGD, lambda model, rate: by_size(model, _NOISE * rate)),
        ),
    )
}
EUCLIDEAN = ("sgd", "adamw")
SPHERES = ("rsgd", "radam", *RECIPES)


def entrants(names: Sequence[str]) -> list[OptimizerSpec]:
    """The optimizers of these names."""
    return [optimizer_spec(name) if name in OPTIMIZERS else RECIPES[name] for name in names]
