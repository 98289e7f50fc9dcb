"""Optimizers on products of spheres, their parameter groups, and the paper's learning-rate schedule."""

from manifold_nets import _geoopt  # noqa: F401  # before the modules here import geoopt
from manifold_nets.optim.angular_adam import AngularAdam
from manifold_nets.optim.averaging import AveragedModel
from manifold_nets.optim.carry_over import carry_momentum
from manifold_nets.optim.clipping import clip_sphere_grad_norm_
from manifold_nets.optim.grouping import param_groups
from manifold_nets.optim.guard import allow_euclidean
from manifold_nets.optim.radam import RiemannianAdam
from manifold_nets.optim.relatives import SGDG, AdamG, AngularSGD, ProjectedSGD
from manifold_nets.optim.rsgd import RiemannianSGD
from manifold_nets.optim.scaled_metric import ScaledMetricSGD, scaled_metric_groups
from manifold_nets.optim.schedules import BoldDriver
from manifold_nets.optim.table import OPTIMIZERS, ListedOptimizer

__all__ = [
    "OPTIMIZERS",
    "SGDG",
    "AdamG",
    "AngularAdam",
    "AngularSGD",
    "AveragedModel",
    "BoldDriver",
    "ListedOptimizer",
    "ProjectedSGD",
    "RiemannianAdam",
    "RiemannianSGD",
    "ScaledMetricSGD",
    "allow_euclidean",
    "carry_momentum",
    "clip_sphere_grad_norm_",
    "param_groups",
    "scaled_metric_groups",
]
