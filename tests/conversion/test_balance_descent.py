"""The descent of `balance` reaches the minimum over all rescalings at once, and says so where it does not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.conversion.remedies import balance as balance_module
from manifold_nets.conversion.remedies.balance import LARGEST_IMBALANCE, Descent, Energies, descend, exponents_of
from manifold_nets.groups import Partition

EPS = torch.finfo(torch.float64).eps


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def chain(*widths: int, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Weights of a perceptron whose layers and filters differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5

    return [random(b, a) * 10 ** (2 * spread * (random(1) + random(b, 1))) for a, b in itertools.pairwise(widths)]


def energies_of(weights: list[Tensor]) -> tuple[list[Energies], int]:
    """One symmetry for each unit between two weights: its filter grows, its column shrinks."""
    first = [0, *itertools.accumulate(len(weight) for weight in weights[:-1])]
    count, found = first[-1], []
    for number, weight in enumerate(weights):
        rows, columns = Partition.filters(weight.shape), Partition(weight.shape, weight.shape, (1,))
        exponents = {}
        if number < len(weights) - 1:
            entries = [(unit, first[number] + unit, 1.0) for unit in range(len(weight))]
            exponents[rows] = exponents_of(entries, (len(weight), count))
        if number:
            entries = [(unit, first[number - 1] + unit, -1.0) for unit in range(weight.shape[1])]
            exponents[columns] = exponents_of(entries, (weight.shape[1], count))
        found.append(Energies.of(weight, exponents))
    return found, count


def one_by_one(weights: list[Tensor]) -> tuple[float, int]:
    """The smallest squared norm and the sweeps, by the closed form of one layer of units after the other."""
    squares = [weight.square() for weight in weights]
    for sweep in range(1, 100_000):
        largest = 0.0
        for before, behind in itertools.pairwise(range(len(squares))):
            factors = (squares[behind].sum(0) / squares[before].sum(1)).sqrt()
            squares[before] = squares[before] * factors[:, None]
            squares[behind] = squares[behind] / factors
            largest = max(largest, float(factors.log().abs().max()))
        if largest < 1e-10:
            return float(sum(square.sum() for square in squares)), sweep
    raise AssertionError("no end")


def check_reference(weights: list[Tensor]) -> tuple[Descent, int]:
    energies, count = energies_of(weights)
    found = descend(energies, zeros(count))
    reference, sweeps = one_by_one(weights)
    assert found.converged
    assert found.energies[1] == pytest.approx(reference, rel=1e-12)
    assert found.energies[1] < 0.95 * found.energies[0]
    return found, sweeps


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_a_long_chain_reaches_the_minimum_of_many_sweeps_in_few(spread: float) -> None:
    """Moving whole layers against each other takes single symmetries hundreds of sweeps."""
    found, sweeps = check_reference(chain(5, *[8] * 24, 3, spread=spread))
    assert found.sweeps <= 20 < sweeps / 10


def test_sabotage_without_steps_in_all_symmetries_it_does_not_converge_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(balance_module._Problem, "newton", lambda self, point, free: point)
    with pytest.raises(AssertionError):
        check_reference(chain(5, *[8] * 24, 3))
    energies, count = energies_of(chain(5, *[8] * 24, 3))
    found = descend(energies, zeros(count))
    assert (found.converged, found.sweeps) == (False, balance_module._SWEEPS)
    assert found.energies[1] < found.energies[0]
    assert "smallest norm not reached after 100 sweeps, imbalance" in str(found)


@pytest.mark.parametrize("seed", range(5))
def test_any_exponents_reach_the_minimum_of_a_general_optimizer(seed: int) -> None:
    """Rows and columns move by different powers, several symmetries move one entry, and each has a minimum."""
    generator = torch.Generator().manual_seed(seed)
    count, shape = 4, (6, 5)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    held = torch.rand(2 * count, generator=generator, dtype=torch.float64) + 0.1
    rows = torch.randint(-2, 3, (6, count), generator=generator).double() / 2
    columns = torch.randint(-2, 3, (5, count), generator=generator).double()
    ends = torch.cat([torch.eye(count), -1.5 * torch.eye(count)]).double()

    def sparse(matrix: Tensor) -> Tensor:
        places = [(int(i), int(s), float(matrix[i, s])) for i, s in matrix.nonzero()]
        return exponents_of(places, (len(matrix), count))

    partitions = {Partition.filters(shape): sparse(rows), Partition(shape, shape, (1,)): sparse(columns)}
    weights = [Energies.of(weight, partitions), Energies.of(held, {Partition.filters((8,)): sparse(ends)})]

    def squared_norm(t: Tensor) -> Tensor:
        first = weight.square() * (2 * ((rows @ t)[:, None] + columns @ t)).exp()
        return first.sum() + (held.square() * (2 * ends @ t).exp()).sum()

    def function(t: Any) -> tuple[float, Any]:
        point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        value = squared_norm(point)
        value.backward()
        assert point.grad is not None
        return value.item(), point.grad.numpy()

    found = descend(weights, zeros(count))
    reference = minimize(function, [0.0] * count, jac=True, method="BFGS", options={"gtol": 1e-8})
    assert found.converged
    assert found.energies[0] == pytest.approx(float(squared_norm(zeros(count))), rel=1e-14)
    assert found.energies[1] == pytest.approx(reference.fun, rel=1e-12)
    assert torch.allclose(found.steps, torch.tensor(reference.x), atol=1e-6)
    # No sweep raises the norm, even without the steps in all symmetries together.
    problem = balance_module._Problem(weights, count)
    point, free = problem.at(zeros(count)), torch.ones(count, dtype=torch.bool)
    for _ in range(20):
        moved = problem.separately(point, free)
        assert moved.energy <= point.energy * (1 + 16 * EPS)
        point = moved


def test_a_unit_without_inputs_or_outputs_stays_where_it_is() -> None:
    weights = chain(4, 6, 6, 3)
    weights[0][1] = 0
    weights[2][:, 2] = 0
    energies, count = energies_of(weights)
    found = descend(energies, zeros(count))
    assert found.converged
    assert found.steps[[1, 8]].tolist() == [0, 0]
    assert (found.steps == 0).sum() == 2


def test_a_start_is_kept_where_it_is_the_minimum_and_improved_where_not() -> None:
    energies, count = energies_of(chain(4, 6, 6, 3))
    found = descend(energies, zeros(count))
    again = descend(energies, found.steps)
    assert (again.sweeps, again.energies) == (0, found.energies)
    assert torch.equal(again.steps, found.steps)
    for start in (found.steps + 0.01, found.steps + 300.0, found.steps * float("nan")):
        other = descend(energies, start)
        assert other.imbalance <= LARGEST_IMBALANCE
        assert other.energies[1] == pytest.approx(found.energies[1], rel=1e-14)
        assert torch.allclose(other.steps, found.steps, atol=1e-7)


def test_weights_that_are_not_finite_stay_and_it_is_said() -> None:
    weights = chain(4, 6, 3)
    weights[0][0, 0] = float("inf")
    energies, count = energies_of(weights)
    found = descend(energies, zeros(count))
    assert not found.converged
    assert not found.steps.any()


def perceptron(seed: int = 0) -> nn.Module:
    weights = chain(5, *[8] * 6, 3, seed=seed)
    layers = [nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float64) for weight in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
    return nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers[:-1])), layers[-1])


def inputs() -> Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def squared_norm_of(model: nn.Module) -> float:
    return sum(float(parameter.detach().square().sum()) for parameter in model.parameters())


def test_a_conversion_descends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    descents: list[Descent] = []

    def counted(*args: Any) -> Descent:
        descents.append(descend(*args))
        return descents[-1]

    monkeypatch.setattr(balance_module, "descend", counted)
    model, x = perceptron(), inputs()
    report = mn.diagnose(model, x)
    converted = mn.convert(model, report, remedies="balance")
    assert [found.sweeps > 0 for found in descents] == [True, False]
    assert squared_norm_of(converted) == pytest.approx(descents[0].energies[1], rel=1e-14)
    descents.clear()
    mn.convert(model, report, plan=mn.plan(model, report, remedies="balance"))
    assert [found.sweeps > 0 for found in descents] == [True, False, False]
    descents.clear()
    mn.convert(model, report, plan=mn.plan(model, report, remedies="balance").to_dict())
    assert [found.sweeps > 0 for found in descents] == [True, True, False]


def check_other_weights() -> None:
    """Carry a plan out on weights that changed after it was made."""
    model, x = perceptron(), inputs()
    report = mn.diagnose(model, x)
    plan = mn.plan(model, report, remedies="balance")
    with torch.no_grad():
        for old, new in zip(model.parameters(), perceptron(seed=5).parameters(), strict=True):
            old.copy_(new)
    converted = mn.convert(model, report, plan=plan)
    assert mn.verify(model, converted, x).eval_difference <= 1e-12
    expected = mn.convert(model, report, remedies="balance")
    assert squared_norm_of(converted) == pytest.approx(squared_norm_of(expected), rel=1e-12)
    assert squared_norm_of(converted) == pytest.approx(one_by_one([p.detach() for p in model.parameters()])[0])


def test_a_plan_for_other_weights_is_not_out_of_date() -> None:
    check_other_weights()


def test_sabotage_a_plan_that_keeps_its_factors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(weights: list[Energies], start: Tensor) -> Descent:
        found = descend(weights, start)
        return Descent(start, 0, 0.0, found.energies) if start.any() else found

    monkeypatch.setattr(balance_module, "descend", stale)
    with pytest.raises(AssertionError):
        check_other_weights()


def test_a_balance_that_does_not_converge_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(balance_module, "_SWEEPS", 2)
    model, x = perceptron(), inputs()
    report = mn.diagnose(model, x)
    balanced, record = mn.balance(model, report)
    assert (record.converged, record.sweeps) == (False, 2)
    assert record.imbalance > LARGEST_IMBALANCE
    assert record.to_dict()["converged"] is False
    assert mn.verify(model, balanced, x).eval_difference <= 1e-12
    assert "smallest norm not reached after 2 sweeps" in caplog.text
    converted = mn.convert(model, report, remedies="balance")
    done = mn.conversion_record(converted)
    assert done is not None
    assert "smallest norm not reached after 2 sweeps" in str(done)
    data = mn.plan(model, report, remedies="balance").to_dict()
    edited = mn.conversion_record(mn.convert(model, report, plan=data))
    assert edited is not None
    assert "smallest norm not reached after 2 sweeps" in str(edited)
    monkeypatch.undo()
    converged = mn.conversion_record(mn.convert(model, report, remedies="balance"))
    assert converged is not None
    assert "not reached" not in str(converged)
