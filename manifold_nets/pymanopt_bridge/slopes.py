"""The numerical checks of `pymanopt.tools.diagnostics` as functions that return numbers instead of plotting.

Slopes are those of log error against log step, over the range of steps where they are closest to a line.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pymanopt
from numpy.typing import NDArray
from pymanopt.manifolds.manifold import Manifold

__all__ = ["gradient_slope", "hessian_asymmetry", "hessian_slope", "retraction_slope"]

_WINDOW = 10  # neighbouring step sizes to which a line is fitted, as in pymanopt's checks


def gradient_slope(problem: pymanopt.Problem, point: Any = None, tangent_vector: Any = None) -> float:
    """Return the order in t of ``f(Exp(t u)) − f(x) − t ⟨grad f, u⟩``: 2 for the true gradient.

    If the error is zero throughout, the slope is infinity.

    Args:
        problem: any problem of pymanopt.
        point: the point (default: random).
        tangent_vector: the direction (default: random).

    Example:
        >>> import numpy as np, pymanopt
        >>> sphere = pymanopt.manifolds.Sphere(3)
        >>> f = pymanopt.function.numpy(sphere)(lambda x: float(x[0] ** 3))
        >>> g = pymanopt.function.numpy(sphere)(lambda x: np.array([3 * x[0] ** 2, 0, 0]))
        >>> x, u = np.array([0.6, 0.8, 0.0]), np.array([0.8, -0.6, 0.0])
        >>> round(gradient_slope(pymanopt.Problem(sphere, f, euclidean_gradient=g), x, u), 1)
        2.0
    """
    return _model_slope(problem, point, tangent_vector, quadratic=False)


def hessian_slope(problem: pymanopt.Problem, point: Any = None, tangent_vector: Any = None) -> float:
    """Return the order in t of the difference between ``f(Exp(t u))`` and its quadratic model: 3 for the true Hessian.

    A loss whose third derivative along ``u`` is zero gives 4. Arguments as in `gradient_slope`.

    Example:
        >>> import torch
        >>> from manifold_nets import layers, pymanopt_bridge as bridge
        >>> inputs, targets = torch.randn(8, 2).double(), torch.arange(8) % 3
        >>> net = torch.nn.Sequential(layers.UnitNormLinear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
        >>> problem = bridge.problem(net, torch.nn.functional.cross_entropy, inputs, targets)
        >>> round(hessian_slope(problem))
        3
    """
    return _model_slope(problem, point, tangent_vector, quadratic=True)


def hessian_asymmetry(problem: pymanopt.Problem, point: Any = None) -> float:
    """Return ``|⟨u, H v⟩ − ⟨H u, v⟩| / (|⟨u, H v⟩| + |⟨H u, v⟩|)`` for random tangent vectors: 0 up to rounding.

    Example:
        >>> import torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> inputs, targets = torch.randn(8, 2).double(), torch.randn(8, 1).double()
        >>> problem = bridge.problem(torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss, inputs, targets)
        >>> hessian_asymmetry(problem) < 1e-9
        True
    """
    manifold = problem.manifold
    point = manifold.random_point() if point is None else point
    u, v = (manifold.random_tangent_vector(point) for _ in range(2))
    first = manifold.inner_product(point, u, problem.riemannian_hessian(point, v))
    second = manifold.inner_product(point, problem.riemannian_hessian(point, u), v)
    return float(abs(first - second) / max(abs(first) + abs(second), np.finfo(np.float64).tiny))


def retraction_slope(manifold: Manifold, point: Any = None, tangent_vector: Any = None) -> float:
    """Return the order in t of the difference between ``retraction(x, t u)`` and the geodesic; 3 for second order.

    Args:
        manifold: a manifold with `exp`, `retraction` and `dist`.
        point: the point (default: random).
        tangent_vector: the direction (default: random).

    Example:
        >>> from manifold_nets import Partition, SphereProduct, pymanopt_bridge as bridge
        >>> manifold = bridge.SphereProductManifold(SphereProduct(Partition.filters((3, 4))))
        >>> round(retraction_slope(manifold))
        3
    """
    point = manifold.random_point() if point is None else point
    u = manifold.random_tangent_vector(point) if tangent_vector is None else tangent_vector
    steps = np.logspace(-12, 0, 251)
    errors = np.array([manifold.dist(manifold.exp(point, t * u), manifold.retraction(point, t * u)) for t in steps])
    return _slope(steps, errors, floor=0.0)


def _model_slope(problem: pymanopt.Problem, point: Any, tangent_vector: Any, *, quadratic: bool) -> float:
    manifold = problem.manifold
    x = manifold.random_point() if point is None else point
    u = manifold.random_tangent_vector(x) if tangent_vector is None else tangent_vector
    coefficients = [manifold.inner_product(x, problem.riemannian_gradient(x), u), problem.cost(x)]
    if quadratic:
        coefficients.insert(0, 0.5 * manifold.inner_product(x, problem.riemannian_hessian(x, u), u))
    steps = np.logspace(-8, 0, 51)
    values = np.array([problem.cost(manifold.exp(x, t * u)) for t in steps])
    errors = np.abs(np.polyval(coefficients, steps) - values)
    # Errors of a few roundings may lie on a line too, a level one.
    return _slope(steps, errors, floor=float(64 * np.finfo(np.float64).eps * np.abs(values).max()))


def _slope(steps: NDArray[Any], errors: NDArray[Any], *, floor: float) -> float:
    """Return the slope of log error against log step over the window in which it is closest to a line.

    Not `pymanopt.tools.diagnostics.identify_linear_piece`, which fails on NumPy 2.4 and takes rounding for a line.
    """
    visible = errors > floor
    x, y = np.log10(steps[visible]), np.log10(errors[visible])
    if len(x) <= _WINDOW:
        return math.inf  # the model is exact
    fits = [
        np.polyfit(x[start : start + _WINDOW + 1], y[start : start + _WINDOW + 1], 1, full=True)[:2]
        for start in range(len(x) - _WINDOW)
    ]
    line, _ = min(fits, key=lambda fit: float(fit[1].sum()))
    return float(line[0])
