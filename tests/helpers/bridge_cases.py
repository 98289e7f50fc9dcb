"""Small networks, data and problems for the tests of the pymanopt bridge."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from helpers.sphere_cases import eps
from manifold_nets.layers import UnitNormConv2d, UnitNormLinear

pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge
from manifold_nets.pymanopt_bridge import NetworkProblem


def digits_like(count: int = 40, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Return inputs and classes that depend on the arguments alone."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, :classes] + 0.3 * inputs[:, -classes:].square()).argmax(1)


def batch_normalized_mlp(activation: type[nn.Module] = nn.GELU, radius: float = 1.0) -> nn.Module:
    """Return a float64 network whose first two weights lie on spheres of one radius."""
    torch.manual_seed(1)
    model = nn.Sequential(
        UnitNormLinear(6, 7, bias=False),
        nn.BatchNorm1d(7),
        activation(),
        UnitNormLinear(7, 5, bias=False),
        nn.BatchNorm1d(5),
        activation(),
        nn.Linear(5, 3),
    ).double()
    for layer in (model[0], model[3]):
        sphere = mn.SphereProduct(layer.weight.shape, radius=radius)
        mn.constraints.attach(layer, "weight", sphere, sphere.projx(layer.weight))
    return model


class Convolutions(nn.Module):
    """Convolutions on spheres, a parameter without axes, a frozen bias and weights on one common sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = UnitNormConv2d(1, 4, 2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head.bias.requires_grad_(False)
        sphere = mn.SphereProduct(mn.Partition.whole((3, 4)), radius=2.0)
        mn.constraints.attach(self.head, "weight", sphere, sphere.projx(self.head.weight))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.norm(self.first(x))).mean((2, 3))
        return self.head(features) * self.temperature


cross_entropy = nn.functional.cross_entropy


def mlp_problem(activation: type[nn.Module] = nn.GELU, radius: float = 1.0, count: int = 40) -> NetworkProblem:
    return bridge.problem(batch_normalized_mlp(activation, radius), cross_entropy, *digits_like(count))


def convolution_problem() -> NetworkProblem:
    torch.manual_seed(2)
    images, classes = torch.randn(20, 1, 5, 5, dtype=torch.float64), torch.arange(20) % 3
    return bridge.problem(Convolutions(), cross_entropy, images, classes)


def direction(problem: NetworkProblem, point: list[np.ndarray], seed: int = 0):
    np.random.seed(seed)  # noqa: NPY002  pymanopt draws from this one
    return problem.manifold.random_tangent_vector(point)


def check_finite_differences(problem: NetworkProblem) -> None:
    """Compare the Hessian along u with the central difference of gradients, to the accuracy of that difference."""
    point = problem.initial_point()
    u = direction(problem, point, seed=1)
    step = eps(torch.float64) ** (1 / 3)
    ahead, behind = ([x + sign * step * v for x, v in zip(point, u, strict=True)] for sign in (1, -1))
    pairs = zip(problem.euclidean_gradient(ahead), problem.euclidean_gradient(behind), strict=True)
    differences = [(a - b) / (2 * step) for a, b in pairs]
    for found, expected in zip(problem.euclidean_hessian(point, u), differences, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=100 * step**2)
