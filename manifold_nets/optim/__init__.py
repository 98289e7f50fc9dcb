"""Optimizers on products of spheres, parameter groups, averages, clipping, and learning-rate schedules."""

from manifold_nets import _geoopt  # noqa: F401  # before the modules here import geoopt
from manifold_nets.optim.adam import AngularAdam, RiemannianAdam
from manifold_nets.optim.averaging import AveragedModel
from manifold_nets.optim.clipping import clip_plain_grad_norm_, clip_sphere_grad_norm_
from manifold_nets.optim.from_torch import from_torch, plain_norms, to_torch
from manifold_nets.optim.guard import allow_euclidean
from manifold_nets.optim.on_spheres import on_spheres
from manifold_nets.optim.param_groups import param_groups
from manifold_nets.optim.schedules import BoldDriver, CorrectedDecay
from manifold_nets.optim.sgd import RiemannianSGD
from manifold_nets.optim.transfer_state import carry_momentum
from manifold_nets.optim.variants import (
    OPTIMIZERS,
    SGDG,
    AdamG,
    AngularSGD,
    ListedOptimizer,
    ProjectedSGD,
    ScaledMetricSGD,
    scaled_metric_groups,
)

__all__ = [
    "OPTIMIZERS",
    "SGDG",
    "AdamG",
    "AngularAdam",
    "AngularSGD",
    "AveragedModel",
    "BoldDriver",
    "CorrectedDecay",
    "ListedOptimizer",
    "ProjectedSGD",
    "RiemannianAdam",
    "RiemannianSGD",
    "ScaledMetricSGD",
    "allow_euclidean",
    "carry_momentum",
    "clip_plain_grad_norm_",
    "clip_sphere_grad_norm_",
    "from_torch",
    "on_spheres",
    "param_groups",
    "plain_norms",
    "scaled_metric_groups",
    "to_torch",
]
