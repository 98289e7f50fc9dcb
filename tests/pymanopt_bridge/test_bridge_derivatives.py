"""Gradients and Hessians of networks against oracles, by slopes, and by pymanopt's own checks."""

import copy
import importlib
import io
from collections.abc import Iterator
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from helpers.bridge_cases import (
    check_finite_differences,
    convolution_problem,
    cross_entropy,
    digits_like,
    direction,
    mlp_problem,
)
from helpers.sphere_cases import eps
from torch import Tensor, nn

pymanopt = pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge  # noqa: E402
from manifold_nets.pymanopt_bridge import NetworkProblem  # noqa: E402
from manifold_nets.pymanopt_bridge.problem import NetworkCost  # noqa: E402


def flat_loss(problem: NetworkProblem, inputs: Tensor, targets: Tensor):
    """Return the loss as a function of one flat vector of all parameters, by torch alone, and that vector."""
    model = copy.deepcopy(problem.model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    shapes = [parameter.shape for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return cross_entropy(torch.func.functional_call(model, values, (inputs,)), targets)

    return loss, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def check_derivatives(problem: NetworkProblem) -> None:
    """Compare value, gradient and Hessian with `torch.func`'s gradient and dense Hessian of the flat vector."""
    loss, start = flat_loss(problem, *digits_like())
    point = problem.initial_point()
    u = direction(problem, point)
    flat = torch.from_numpy(np.concatenate([np.ravel(array) for array in u]))
    gradient = torch.func.grad(loss)(start)
    hessian = torch.autograd.functional.hessian(loss, start)
    limit = {"rtol": 0, "atol": 1e3 * eps(torch.float64)}

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(array) for array in arrays])

    np.testing.assert_allclose(problem.cost(point), float(loss(start)), **limit)
    np.testing.assert_allclose(joined(problem.euclidean_gradient(point)), gradient.numpy(), **limit)
    np.testing.assert_allclose(joined(problem.euclidean_hessian(point, u)), (hessian @ flat).numpy(), **limit)


@pytest.mark.parametrize("radius", [1.0, 0.6])
def test_derivatives_are_those_of_the_dense_hessian(radius: float) -> None:
    check_derivatives(mlp_problem(radius=radius))


def test_sabotage_the_gradient_in_the_place_of_the_hessian_is_noticed() -> None:
    problem = mlp_problem()
    problem._network_cost.hessian = lambda *both: problem._network_cost.gradient(*both[: len(both) // 2])
    with pytest.raises(AssertionError):
        check_derivatives(problem)


@pytest.mark.parametrize("make", [mlp_problem, convolution_problem])
def test_the_hessian_is_the_difference_of_gradients(make) -> None:
    check_finite_differences(make())


def test_sabotage_a_hessian_off_by_one_percent_is_noticed() -> None:
    problem = mlp_problem()
    exact = problem._network_cost.hessian
    problem._network_cost.hessian = lambda *both: [1.01 * array for array in exact(*both)]
    with pytest.raises(AssertionError):
        check_finite_differences(problem)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("radius", [1.0, 0.3])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.ReLU])
def test_slopes_of_gradient_and_hessian(activation: type[nn.Module], radius: float, seed: int) -> None:
    # A kink of the rectifier between x and Exp(t u) is no fault of the gradient: few examples, few kinks.
    problem = mlp_problem(activation, radius, count=40 if activation is not nn.ReLU else 6)
    point = problem.initial_point()
    u = direction(problem, point, seed)
    assert abs(bridge.gradient_slope(problem, point, u) - 2) <= 0.1
    if activation is not nn.ReLU:
        assert abs(bridge.hessian_slope(problem, point, u) - 3) <= 0.1
    assert bridge.hessian_asymmetry(problem, point) <= 1e-10


def test_slopes_of_convolutions_and_of_a_common_sphere() -> None:
    problem = convolution_problem()
    point = problem.initial_point()
    u = direction(problem, point)
    assert abs(bridge.gradient_slope(problem, point, u) - 2) <= 0.1
    assert abs(bridge.hessian_slope(problem, point, u) - 3) <= 0.1


def test_sabotage_slopes_of_another_metric_are_smaller() -> None:
    problem = mlp_problem(radius=0.3)
    point = problem.initial_point()
    u = direction(problem, point)
    for manifold in problem.manifold.manifolds:
        if isinstance(manifold, bridge.SphereProductManifold):
            manifold.euclidean_to_riemannian_gradient = manifold.projection
            manifold.euclidean_to_riemannian_hessian = lambda x, g, h, u, m=manifold: m.projection(x, h)
    assert bridge.gradient_slope(problem, point, u) <= 1.1
    assert bridge.hessian_slope(problem, point, u) <= 1.1


@pytest.fixture
def diagnostics(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """pymanopt's own checks without windows, and with the one line mended that fails on NumPy 2.4."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    module = importlib.import_module("pymanopt.tools.diagnostics")
    polyfit = np.polyfit

    def fit(*args, full=False, **kwargs):
        result = polyfit(*args, full=full, **kwargs)
        return (result[0], result[1].sum(), *result[2:]) if full else result

    monkeypatch.setattr(np, "polyfit", fit)
    monkeypatch.setattr(plt, "show", lambda: None)
    yield module
    plt.close("all")


def reported(check, *args) -> dict[str, float]:
    """Run one of pymanopt's checks and return the numbers that it prints, by the sentence before them."""
    text = io.StringIO()
    with redirect_stdout(text):
        check(*args)
    numbers = {}
    for line in text.getvalue().splitlines():
        before, colon, after = line.rpartition(":")
        number = after.rpartition("=")[2].strip().rstrip(".,")
        if colon and number[-1:].isdigit():
            numbers[before] = float(number)
    return numbers


def test_pymanopts_own_checks(diagnostics, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp_problem()
    point = problem.initial_point()
    u = direction(problem, point)
    (residual,) = reported(diagnostics.check_gradient, problem, point, u).values()
    assert residual <= 1e-12
    numbers = reported(diagnostics.check_hessian, problem, point, u)
    assert len(numbers) == 3  # not tangent, not linear, not symmetric
    assert all(abs(number) <= 1e-12 for number in numbers.values()), numbers
    # Of shorter steps our distances are exactly zero, which has no logarithm.
    logspace = np.logspace
    monkeypatch.setattr(np, "logspace", lambda start, stop, count: logspace(max(start, -3), stop, count))
    slope = reported(diagnostics.check_retraction, problem.manifold)["It appears the slope is"]
    assert abs(slope - 3) <= 0.1
    for quadratic, order in ((False, 2), (True, 3)):
        *_, line = diagnostics.check_directional_derivative(problem, point, u, use_quadratic_model=quadratic)
        assert abs(line[0] - order) <= 0.1


def test_sabotage_pymanopts_own_checks_notice_a_gradient_that_is_not_tangent(diagnostics) -> None:
    problem = mlp_problem()
    point = problem.initial_point()
    for manifold in problem.manifold.manifolds:
        manifold.euclidean_to_riemannian_gradient = lambda x, g: g
    residual = reported(diagnostics.check_gradient, problem, point, direction(problem, point))
    assert min(residual.values()) > 1e-6


def test_attention_has_a_hessian() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    problem = bridge.problem(layer, lambda model: model(x).pow(3).mean())
    check_finite_differences(problem)


def test_a_loss_linear_in_the_parameters_has_no_hessian() -> None:
    problem = bridge.problem(nn.Linear(3, 1).double(), lambda model: model(torch.ones(2, 3).double()).sum())
    point = problem.initial_point()
    assert not any(array.any() for array in problem.euclidean_hessian(point, point))


def test_sparse_gradients_are_what_dense_ones_are() -> None:
    ids = torch.arange(6).reshape(3, 2)
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 5, sparse=sparse), nn.Linear(5, 2)).double()
        cost = NetworkCost(model, lambda network: network(ids).square().mean())
        point = [parameter.detach().numpy() for parameter in model.parameters()]
        found.append(cost.gradient(*point))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=8 * eps(torch.float64), atol=0)
