"""Networks as pymanopt problems: what a point is, what a cost leaves alone, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from helpers.bridge_cases import (
    Convolutions,
    batch_normalized_mlp,
    check_finite_differences,
    cross_entropy,
    digits_like,
    direction,
    mlp_problem,
)
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import OffManifoldError, ParameterGroupError

pymanopt = pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge  # noqa: E402
from manifold_nets.pymanopt_bridge import CostError, NetworkProblem, PointError  # noqa: E402

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
    with pytest.raises(ParameterGroupError, match="weight"):
        bridge.product_manifold(model)
    layer = mn.layers.UnitNormLinear(3, 2)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    with pytest.raises(OffManifoldError, match="weight"):
        bridge.point_of(layer)


def test_spheres_across_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    joint = mn.JointSphere({name: mn.Partition.filters((2, n)) for name, n in (("0.weight", 3), ("1.weight", 2))})
    points = joint.projx([model[0].weight.detach(), model[1].weight.detach()])
    for layer, manifold, point in zip(model, joint.manifolds, points, strict=True):
        mn.constraints.attach(layer, "weight", manifold, point)
    with pytest.raises(PointError, match=r"0\.weight: found a sphere that it shares with 1\.weight; .*joint-spheres"):
        bridge.product_manifold(model)
