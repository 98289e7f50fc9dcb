"""Networks as pymanopt problems: gradients and Hessians by oracles and slopes, and what a cost leaves alone."""

import contextlib
import copy
import importlib
import io
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from bridge_cases import Convolutions, batch_normalized_mlp, digits_like
from sphere_cases import eps
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import OffManifoldError, UnsupportedManifoldError

pymanopt = pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge  # noqa: E402
from manifold_nets.pymanopt_bridge import CostError, NetworkProblem, PointError  # noqa: E402

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


# ---- derivatives -----------------------------------------------------------------------------------------------------


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


# ---- what a point is -------------------------------------------------------------------------------------------------


def test_points_hold_the_trained_parameters_in_the_order_of_the_state_dict() -> None:
    model = Convolutions()
    names = bridge.parameter_names(model)
    assert names == ("temperature", "first.weight", "norm.weight", "norm.bias", "head.weight")
    assert list(names) == [name for name in model.state_dict() if name in names]
    point = bridge.point_of(model)
    assert [array.shape for array in point] == [(1,), (4, 1, 2, 2), (4,), (4,), (3, 4)]
    manifold = bridge.product_manifold(model)
    assert [type(m).__name__ for m in manifold.manifolds] == [
        "Euclidean", "SphereProductManifold", "Euclidean", "Euclidean", "SphereProductManifold"
    ]  # fmt: skip
    assert manifold.dim == 1 + 4 * 3 + 4 + 4 + 11


def check_round_trip(write_back) -> None:
    model = Convolutions()
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    point = [array + 0.25 for array in bridge.point_of(model)]
    write_back(model, point)
    for name, value in zip(bridge.parameter_names(model), point, strict=True):
        assert np.array_equal(model.get_parameter(name).detach().numpy().reshape(value.shape), value)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for name in set(before) - set(bridge.parameter_names(model)):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_point_written_back_is_the_parameters() -> None:
    check_round_trip(bridge.write_back)


def test_sabotage_arrays_in_another_order_are_noticed() -> None:
    def swapped(model: nn.Module, point: list[np.ndarray]) -> None:
        bridge.write_back(model, [*point[:2], point[3] + 1, point[2], point[4]])

    with pytest.raises(AssertionError):
        check_round_trip(swapped)


def test_points_are_copies() -> None:
    model = batch_normalized_mlp()
    before = model[0].weight.detach().clone()
    for array in bridge.point_of(model):
        array.fill(3)
    assert torch.equal(model[0].weight, before)


def test_float32_networks_have_float64_points() -> None:
    inputs, targets = digits_like()
    problem = bridge.problem(batch_normalized_mlp().float(), cross_entropy, inputs.float(), targets)
    assert {array.dtype for array in problem.initial_point()} == {np.dtype("float64")}
    result = pymanopt.optimizers.ConjugateGradient(verbosity=0, max_iterations=20).run(
        problem, initial_point=problem.initial_point()
    )
    assert {array.dtype for array in result.point} == {np.dtype("float64")}
    assert result.cost < 0.5 * problem.cost(problem.initial_point())
    assert {parameter.dtype for parameter in problem.model.parameters()} == {torch.float32}


def test_a_shared_weight_stands_in_a_point_once() -> None:
    model = nn.Sequential(mn.layers.UnitNormLinear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(9, 4, dtype=torch.float64)
    problem = bridge.problem(model, lambda m: m(x).pow(2).mean())
    assert problem.names == ("0.weight", "0.bias", "2.bias")
    check_finite_differences(problem)


def test_a_weight_whose_parameter_object_was_replaced_stays_on_its_spheres() -> None:
    model = batch_normalized_mlp()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    kinds = [type(m).__name__ for m in bridge.product_manifold(model).manifolds]
    assert kinds.count("SphereProductManifold") == 2


# ---- what a cost leaves alone ----------------------------------------------------------------------------------------


def test_evaluations_leave_the_model_alone_and_are_counted_once() -> None:
    problem = mlp_problem()
    before = copy.deepcopy(problem.model.state_dict())
    point = problem.initial_point()
    u = direction(problem, point)
    for _ in range(3):
        value, gradient = problem.cost(point), problem.euclidean_gradient(point)
        along = problem.euclidean_hessian(point, u)
    assert problem.evaluations.to_dict() == {"cost": 1, "gradient": 2, "hessian": 3}
    moved = problem.manifold.retraction(point, u)
    assert problem.cost(moved) != value
    assert problem.cost(point) == value
    assert all(np.array_equal(a, b) for a, b in zip(problem.euclidean_gradient(point), gradient, strict=True))
    np.testing.assert_allclose(along[0], problem.euclidean_hessian(point, u)[0], rtol=0, atol=1e-15)
    after = problem.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_costs_are_handed_over_and_may_end_the_optimizer() -> None:
    seen = []

    def record(point: list[np.ndarray], cost: float) -> None:
        seen.append((point, cost))
        if len(seen) == 5:
            raise StopIteration

    problem = bridge.problem(batch_normalized_mlp(), cross_entropy, *digits_like(), on_cost=record)
    optimizer = pymanopt.optimizers.ConjugateGradient(verbosity=0)
    with pytest.raises(StopIteration):
        optimizer.run(problem, initial_point=problem.initial_point())
    assert problem.evaluations.cost == 5
    costs = [cost for _, cost in seen]
    assert [problem.cost(point) for point, _ in list(seen)] == costs


def check_statistics(problem: NetworkProblem, inputs: Tensor) -> None:
    """Compare the running statistics with the mean and variance of what reaches the first batch normalization."""
    moved = problem.manifold.retraction(problem.initial_point(), direction(problem, problem.initial_point()))
    problem.write_back(moved)
    first, normalization = problem.model[0], problem.model[1]
    features = first(inputs).detach()
    assert torch.allclose(normalization.running_mean, features.mean(0), rtol=0, atol=1e-14)
    assert torch.allclose(normalization.running_var, features.var(0), rtol=0, atol=1e-14)
    assert normalization.momentum == 0.1


def test_writing_back_takes_the_statistics_at_the_point() -> None:
    check_statistics(mlp_problem(), digits_like()[0])


def test_sabotage_statistics_of_the_start_are_noticed() -> None:
    problem = mlp_problem()
    write_back = problem.write_back
    problem.write_back = lambda point: write_back(point, refresh_statistics=False)
    with pytest.raises(AssertionError):
        check_statistics(problem, digits_like()[0])


def test_statistics_of_frozen_normalizations_stay() -> None:
    problem = mlp_problem()
    problem.model.eval()
    before = problem.model[1].running_mean.clone()
    problem.write_back(problem.initial_point())
    assert torch.equal(problem.model[1].running_mean, before)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SteepestDescent", "ConjugateGradient", "TrustRegions"])
def test_optimizers_train(name: str) -> None:
    problem = mlp_problem(radius=0.6)
    start = problem.initial_point()
    optimizer = getattr(pymanopt.optimizers, name)(verbosity=0, max_iterations=15)
    result = optimizer.run(problem, initial_point=start)
    assert result.cost < 0.3 * problem.cost(start)
    problem.write_back(result.point)
    inputs, targets = digits_like()
    assert float(cross_entropy(problem.model(inputs), targets).detach()) == pytest.approx(result.cost, rel=1e-12)
    for weight in mn.constraints.constrained_weights(problem.model):
        assert weight.manifold.check_point_on_manifold(weight.parameter, atol=1e-12)


def test_a_particle_swarm_runs() -> None:
    np.random.seed(0)  # noqa: NPY002
    x = torch.randn(9, 3, dtype=torch.float64)
    model = nn.Sequential(mn.layers.UnitNormLinear(3, 1, bias=False)).double()
    problem = bridge.problem(model, lambda m: m(x).pow(2).mean())
    smallest = float(torch.linalg.eigvalsh(x.T @ x / 9)[0])
    result = pymanopt.optimizers.ParticleSwarm(verbosity=0, max_iterations=40).run(problem)
    assert result.cost == pytest.approx(smallest, rel=1e-3)


def test_trust_regions_find_the_smallest_eigenvalue() -> None:
    torch.manual_seed(3)
    x = torch.randn(30, 6, dtype=torch.float64)
    model = mn.layers.UnitNormLinear(6, 1, bias=False).double()
    problem = bridge.problem(model, lambda m: m(x).pow(2).mean())
    result = pymanopt.optimizers.TrustRegions(verbosity=0).run(problem, initial_point=problem.initial_point())
    assert result.cost == pytest.approx(float(torch.linalg.eigvalsh(x.T @ x / 30)[0]), rel=1e-10)


def test_a_loss_that_is_not_finite_is_infinite() -> None:
    model = nn.Linear(2, 1).double()
    problem = bridge.problem(model, lambda m: m.weight.exp().sum())
    point = problem.initial_point()
    assert problem.cost([np.full_like(array, 1e3) for array in point]) == np.inf
    assert problem.cost([np.full_like(array, np.nan) for array in point]) == np.inf


# ---- one iteration at a time -----------------------------------------------------------------------------------------


def optimizer_of(name: str, count: int):
    return getattr(pymanopt.optimizers, name)(verbosity=0, max_iterations=count)


def check_iterations(name: str, run) -> None:
    """The costs that are computed on the way are those of the optimizer run through."""

    def recording(costs: list[float]) -> NetworkProblem:
        on_cost = lambda _, cost: costs.append(cost)  # noqa: E731
        return bridge.problem(batch_normalized_mlp(), cross_entropy, *digits_like(), on_cost=on_cost)

    expected, found = [], []
    problem = recording(expected)
    whole = optimizer_of(name, 8).run(problem, initial_point=problem.initial_point())
    problem = recording(found)
    passed = list(run(optimizer_of(name, 8), problem))
    assert found == expected
    # Conjugate gradient counts the look before its first step as an iteration.
    assert len(passed) == (7 if name == "ConjugateGradient" else 8)
    assert passed[-1].cost == min(expected) <= whole.cost
    assert [i.cost for i in passed] == sorted((i.cost for i in passed), reverse=True)
    assert [problem.cost(i.point) for i in passed] == [i.cost for i in passed]


@pytest.mark.parametrize("name", ["SteepestDescent", "ConjugateGradient", "TrustRegions"])
def test_iterations_are_those_of_a_run_in_one_go(name: str) -> None:
    check_iterations(name, bridge.iterations)


def test_sabotage_an_optimizer_that_forgets_between_iterations_is_noticed() -> None:
    def forgetful(optimizer, problem):
        point = problem.initial_point()
        for _ in range(7):
            found = next(bridge.iterations(optimizer, problem, initial_point=point))
            point = found.point
            yield found

    with pytest.raises(AssertionError):
        check_iterations("ConjugateGradient", forgetful)


def test_dropped_iterations_leave_no_thread_and_errors_reach_the_caller() -> None:
    problem = mlp_problem()
    running = bridge.iterations(optimizer_of("ConjugateGradient", 50), problem)
    first = next(running)
    assert [thread.name for thread in threading.enumerate()].count("pymanopt") == 1
    assert problem.evaluations.cost < 20
    running.close()
    assert [thread.name for thread in threading.enumerate()].count("pymanopt") == 0
    assert first.cost < problem.cost(problem.initial_point())
    assert problem._network_cost.on_cost is None

    def fails(point, cost):
        raise ZeroDivisionError

    failing = bridge.problem(batch_normalized_mlp(), cross_entropy, *digits_like(), on_cost=fails)
    with pytest.raises(ZeroDivisionError):
        next(bridge.iterations(optimizer_of("TrustRegions", 5), failing))


@pytest.mark.slow
def test_trust_regions_get_further_than_conjugate_gradients_with_as_many_costs() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    inputs, targets = torch.tensor(data.data[:500] / 16), torch.tensor(data.target[:500])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.GELU(), nn.Linear(20, 10)).double()
    model = mn.convert(model, inputs)
    lowest = {}
    for name in ("ConjugateGradient", "TrustRegions"):
        costs = []

        def record(_, cost: float, costs: list[float] = costs) -> None:
            costs.append(cost)
            if len(costs) == 30:
                raise StopIteration

        problem = bridge.problem(model, cross_entropy, inputs, targets, on_cost=record)
        with contextlib.suppress(StopIteration):
            optimizer_of(name, 1000).run(problem, initial_point=problem.initial_point())
        assert len(costs) <= 30
        lowest[name] = min(costs)
    assert lowest["TrustRegions"] < 0.1 * lowest["ConjugateGradient"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_random_losses_are_refused() -> None:
    inputs, targets = digits_like()
    model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(), nn.Linear(20, 3)).double()
    with pytest.raises(CostError, match=r"the same value at every evaluation.*dropout"):
        bridge.problem(model, cross_entropy, inputs, targets)
    assert bridge.problem(model.eval(), cross_entropy, inputs, targets).names


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda model: model(torch.ones(2, 3).double()),
            r"found a tensor of shape \(2, 4\); expected a",
        ),
        (lambda model: 0.5, "found a float; expected a tensor"),
        (lambda model: (model.weight * torch.inf).sum(), "expected a finite number"),
    ],
)
def test_what_is_no_number_is_refused(loss, message: str) -> None:
    with pytest.raises(CostError, match=message):
        bridge.problem(nn.Linear(3, 4).double(), loss)


def test_a_loss_that_does_not_depend_on_the_parameters_is_refused() -> None:
    problem = bridge.problem(nn.Linear(3, 4).double(), lambda model: torch.tensor(1.0))
    with pytest.raises(CostError, match="does not depend on the parameters"):
        problem.euclidean_gradient(problem.initial_point())


def test_points_that_do_not_fit_leave_the_model_alone() -> None:
    model = batch_normalized_mlp()
    before = copy.deepcopy(model.state_dict())
    point = bridge.point_of(model)
    flawed = {
        "found 7 arrays; expected 8": point[:-1],
        r"0.weight: found shape \(6, 7\); expected shape \(7, 6\)": [point[0].T, *point[1:]],
        "6.bias: found entries that are not finite": [*point[:-1], point[-1] * np.nan],
    }
    for message, bad in flawed.items():
        with pytest.raises(PointError, match=message):
            bridge.write_back(model, bad)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_that_make_no_point_are_refused() -> None:
    with pytest.raises(PointError, match="no parameter that requires a gradient"):
        bridge.point_of(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(PointError, match=r"bfloat16.*model\.double"):
        bridge.point_of(nn.Linear(2, 2).bfloat16())
    with pytest.raises(PointError, match="no values"):
        bridge.point_of(nn.Linear(2, 2, device="meta"))
    import geoopt

    model = nn.Linear(2, 2)
    model.weight = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Stiefel())
    with pytest.raises(UnsupportedManifoldError, match="weight"):
        bridge.product_manifold(model)
    layer = mn.layers.UnitNormLinear(3, 2)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    with pytest.raises(OffManifoldError, match="weight"):
        bridge.point_of(layer)
