"""All optimizers of the package in one table: what drives the common tests, the benchmark and the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from manifold_nets.optim.angular_adam import AngularAdam
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.radam import RiemannianAdam
from manifold_nets.optim.relatives import SGDG, AdamG, AngularSGD, ProjectedSGD
from manifold_nets.optim.rsgd import RiemannianSGD
from manifold_nets.optim.scaled_metric import ScaledMetricSGD

__all__ = ["OPTIMIZERS", "ListedOptimizer"]


@dataclass(frozen=True)
class ListedOptimizer:
    """One row of the table.

    Args:
        kind: the class.
        weights: whether it steps on ``"spheres"``, in the groups of `manifold_nets.param_groups`, or on ``"plain"``
            weights, in those of `manifold_nets.optim.scaled_metric_groups`.
        adaptive: whether it is a relative of Adam; of SGD otherwise.
        source: where it comes from.
        options: what to pass beside parameters, learning rate and, for a relative of SGD, momentum.
    """

    kind: type[SphereOptimizer]
    weights: Literal["spheres", "plain"]
    adaptive: bool
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: Optimizers by the names that the command line gives them.
OPTIMIZERS: Mapping[str, ListedOptimizer] = {
    "rsgd": ListedOptimizer(RiemannianSGD, "spheres", False, "arXiv:1511.01029, arXiv:1111.5280"),
    "radam": ListedOptimizer(RiemannianAdam, "spheres", True, "arXiv:1810.00760"),
    "sgd-g": ListedOptimizer(SGDG, "spheres", False, "arXiv:1709.09603"),
    "adam-g": ListedOptimizer(AdamG, "spheres", True, "arXiv:1709.09603"),
    "angular": ListedOptimizer(AngularSGD, "spheres", False, "arXiv:2305.17212"),
    "angular-adam": ListedOptimizer(AngularAdam, "spheres", True, "arXiv:2305.17212, arXiv:2606.16899"),
    "pbwn": ListedOptimizer(ProjectedSGD, "spheres", False, "arXiv:1710.02338"),
    "sm": ListedOptimizer(ScaledMetricSGD, "plain", False, "arXiv:1511.01754"),
}
