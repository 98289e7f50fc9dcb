"""Weights on spheres, and an independent reference for the optimizers' steps, in float64 numpy from the formulas.

The reference knows nothing of views: it is told the number of the group of every entry, which is written out here
by hand, and adds with `numpy.bincount`.
"""

from dataclasses import dataclass
from typing import Any

import geoopt
import numpy as np
import torch

import manifold_nets as mn

STEPS = 20


@dataclass(frozen=True)
class Layout:
    """A weight's shape, its partition, and the group of the entry at an index, written out by hand."""

    name: str
    partition: mn.Partition
    group_of: Any

    def ids(self):
        shape = self.partition.shape
        return np.array([self.group_of(*index) for index in np.ndindex(*shape)]).reshape(shape)


LAYOUTS = [
    Layout("linear", mn.Partition.filters((5, 7)), lambda i, j: i),
    Layout("convolution", mn.Partition.filters((4, 3, 3, 2)), lambda i, *rest: i),
    Layout(
        "transposed",  # 2 groups of 3 input channels, 5 output channels each
        mn.Partition.transposed_filters((6, 5, 2, 2), groups=2),
        lambda i, j, *rest: (i // 3) * 5 + j,
    ),
    Layout("blocks", mn.Partition.blocks((6, 4), 3), lambda i, j: i // 2),
    Layout("whole", mn.Partition.whole((3, 4, 2)), lambda *index: 0),
]


def radii_for(layout, kind):
    """Unit radius, one radius of 3.7, or one a group."""
    if kind == "per group":
        return np.linspace(0.2, 5.0, layout.partition.n_groups)
    return np.full(layout.partition.n_groups, {"unit": 1.0, "uniform": 3.7}[kind])


class Problem:
    """A start on spheres and the loss ⟨R_t, u⟩ + ⟨C, u²⟩/2 of the unit directions ``u = w/r``, one R_t a step."""

    def __init__(self, layout, radii, seed=0, steps=STEPS):
        rng = np.random.default_rng(seed)
        shape = layout.partition.shape
        self.layout, self.ids = layout, layout.ids()
        self.radii = np.asarray(radii, dtype=float)
        self.linear, self.curvature = rng.standard_normal((steps, *shape)), rng.standard_normal(shape)
        start = rng.standard_normal(shape)
        self.start = start * self.spread(self.radii / np.sqrt(self.dot(start, start)))

    def spread(self, per_group):
        return per_group[self.ids]

    def dot(self, x, y):
        return np.bincount(self.ids.ravel(), weights=(x * y).ravel())

    def gradient(self, w, step):
        r = self.spread(self.radii)
        return (self.linear[step] + self.curvature * w / r) / r

    def manifold(self):
        values = set(self.radii.tolist())
        return mn.SphereProduct(self.layout.partition, radius=self.radii[0] if len(values) == 1 else self.radii)

    def parameter(self, dtype=torch.float64, memory_format=torch.contiguous_format):
        point = torch.tensor(self.start, dtype=dtype).contiguous(memory_format=memory_format)
        return geoopt.ManifoldParameter(point, manifold=self.manifold())

    def backward(self, parameter, step):
        """Set the gradient at the present point."""
        parameter.grad = None
        r = torch.from_numpy(self.spread(self.radii)).to(parameter.dtype)
        u = parameter / r
        linear, curvature = (torch.from_numpy(x).to(parameter.dtype) for x in (self.linear[step], self.curvature))
        (linear * u + curvature * u * u / 2).sum().backward()


def run(optimizer, problem, parameter, steps=STEPS):
    """Step an optimizer and return the weights after each step, in float64."""
    path = []
    for step in range(steps):
        problem.backward(parameter, step)
        optimizer.step()
        path.append(parameter.detach().double().numpy().copy())
    return path


def reference_sgd(problem, *, lr, momentum=0.0, dampening=0.0, nesterov=False, maximize=False, fault=None, steps=STEPS):
    """Riemannian SGD with the semantics of torch's momentum, group by group."""
    w, r2, b, path = problem.start, problem.radii**2, None, []
    for step in range(steps):
        xi = _riemannian_gradient(problem, w, step, maximize, fault)
        if fault == "longer first step" and b is None:
            b = momentum * xi  # geoopt's: a buffer that starts as the gradient and is updated at once
        if momentum == 0:
            d = xi
        else:
            b = xi if b is None else momentum * b + (1 - dampening) * xi
            if fault == "dampened first step" and step == 0:
                b = (1 - dampening) * xi
            d = xi + momentum * b if nesterov else b
        w = _retract(problem, w - lr * d)
        if b is not None and fault != "no transport":
            b = b - problem.spread(problem.dot(w, b) / r2) * w
        path.append(w)
    return path


def reference_adam(
    problem, *, lr, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, maximize=False, fault=None, steps=STEPS
):
    """Riemannian Adam with one second moment a group."""
    w, r2, path = problem.start, problem.radii**2, []
    m, v, largest = np.zeros_like(w), np.zeros(len(r2)), np.zeros(len(r2))
    for step in range(steps):
        xi = _riemannian_gradient(problem, w, step, maximize, fault)
        m = betas[0] * m + (1 - betas[0]) * xi
        if fault == "Euclidean second moment":
            g = problem.gradient(w, step)
            v = betas[1] * v + (1 - betas[1]) * problem.dot(g, g)
        else:
            v = betas[1] * v + (1 - betas[1]) * problem.dot(xi, xi) / r2
        largest = np.maximum(largest, v)
        corrected = (largest if amsgrad else v) / (1 - betas[1] ** (step + 1))
        root = np.sqrt(corrected)
        if fault == "no root of the bias correction":
            root = np.sqrt(largest if amsgrad else v) / (1 - betas[1] ** (step + 1))
        d = m / (1 - betas[0] ** (step + 1)) / problem.spread(root + eps)
        w = _retract(problem, w - lr * d)
        if fault != "no transport":
            m = m - problem.spread(problem.dot(w, m) / r2) * w
        path.append(w)
    return path


def _riemannian_gradient(problem, w, step, maximize, fault):
    g, r2 = problem.gradient(w, step), problem.radii**2
    xi = problem.spread(r2) * (g - problem.spread(problem.dot(w, g) / r2) * w)
    if fault == "metric without radius":
        xi = xi / problem.spread(r2)
    if fault == "unprojected gradient":
        xi = problem.spread(r2) * g
    return -xi if maximize and fault != "minimize" else xi


def _retract(problem, w):
    return w * problem.spread(problem.radii / np.sqrt(problem.dot(w, w)))


def check_path(found, expected, problem, dtype):
    """Every entry within 32 roundings of the radius for each step taken so far."""
    eps = torch.finfo(dtype).eps
    for step, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        error = np.max(np.abs(a - b) / problem.spread(problem.radii))
        assert error <= 32 * step * eps, f"step {step}: off by {error / eps:.1f} eps"
