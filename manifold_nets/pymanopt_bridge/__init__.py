"""Train a network with pymanopt: its parameters as one point, its loss as a cost with gradient and Hessian.

A *point* is a list of float64 NumPy arrays, one for each parameter that requires a gradient, in the order of
``model.named_parameters()``, which is also their order in ``state_dict``. Weights on a `manifold_nets.SphereProduct`
are points of `SphereProductManifold`, all others of `pymanopt.manifolds.Euclidean`. Frozen parameters and buffers are
not part of a point: the cost never changes them. A float32 network runs in float32, but its points are float64.

The cost is deterministic and should cover the whole training set (a "full batch"): line searches, conjugate gradients
and trust regions must compare values of the same function.

Needs the extra ``pymanopt``: ``pip install 'manifold_nets[pymanopt]'``.

Example:
    >>> import pymanopt, torch, manifold_nets as mn
    >>> from manifold_nets import pymanopt_bridge as bridge
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(mn.layers.UnitNormLinear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    >>> inputs, targets = torch.randn(30, 4), torch.arange(30) % 3
    >>> problem = bridge.problem(model.double(), torch.nn.functional.cross_entropy, inputs.double(), targets)
    >>> optimizer = pymanopt.optimizers.TrustRegions(verbosity=0, max_iterations=5)
    >>> result = optimizer.run(problem, initial_point=problem.initial_point())
    >>> problem.write_back(result.point)
    >>> bool(result.cost < problem.cost(problem.manifold.random_point()))
    True
"""

from __future__ import annotations

from manifold_nets.errors import MissingExtraError

try:
    import pymanopt  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("pymanopt", "the optimizers of manifold_nets.pymanopt_bridge", "pymanopt") from error

from manifold_nets.errors import CostError, PointError
from manifold_nets.pymanopt_bridge.manifold import (
    SphereProductManifold,
    parameter_names,
    point_of,
    product_manifold,
    write_back,
)
from manifold_nets.pymanopt_bridge.problem import Evaluations, NetworkProblem, problem
from manifold_nets.pymanopt_bridge.slopes import gradient_slope, hessian_asymmetry, hessian_slope, retraction_slope
from manifold_nets.pymanopt_bridge.stepping import Iteration, iterations

__all__ = [
    "CostError",
    "Evaluations",
    "Iteration",
    "NetworkProblem",
    "PointError",
    "SphereProductManifold",
    "gradient_slope",
    "hessian_asymmetry",
    "hessian_slope",
    "iterations",
    "parameter_names",
    "point_of",
    "problem",
    "product_manifold",
    "retraction_slope",
    "write_back",
]
