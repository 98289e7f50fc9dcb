"""pymanopt's optimizers on networks: in one go, one iteration at a time, and against each other."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from helpers.bridge_cases import (
    batch_normalized_mlp,
    cross_entropy,
    digits_like,
    mlp_problem,
)
from torch import nn

import manifold_nets as mn

pymanopt = pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge  # noqa: E402
from manifold_nets.pymanopt_bridge import NetworkProblem  # noqa: E402

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
