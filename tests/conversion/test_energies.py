"""Sums over blocks are those over entries, after any rescaling; so are the products with the Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_nets.conversion.remedies.balance import Energies, _Problem, exponents_of
from manifold_nets.groups import Partition

EPS = torch.finfo(torch.float64).eps


@st.composite
def partitions(draw: st.DrawFn) -> list[Partition]:
    """Partitions of one weight, by views that merge and split its axes."""
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4)))
    views = {shape, (math.prod(shape),), (shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1])}
    if shape[0] % 2 == 0:
        views.add((2, shape[0] // 2, *shape[1:]))

    def one(view: tuple[int, ...]) -> Partition:
        axes = draw(st.sets(st.integers(0, len(view) - 1)))
        return Partition(shape, view, tuple(sorted(axes)))

    return list({one(view): None for view in draw(st.lists(st.sampled_from(sorted(views)), min_size=1, max_size=4))})


COUNT = 5


def moved(partition: Partition, generator: torch.Generator) -> torch.Tensor:
    """Symmetries that each move some groups, neighbours often alike."""
    run = int(torch.randint(1, 4, (), generator=generator))
    entries = []
    for group in range(partition.n_groups):
        number = (group // run) % (COUNT + 1)
        if number < COUNT:
            entries.append((group, number, 1.0 if number % 2 else -2.0))
    if partition.n_groups % 2:
        entries += [(group, 0, 0.5) for group in range(partition.n_groups) if (group // run) % (COUNT + 1) == 1]
    return exponents_of(entries, (partition.n_groups, COUNT))


def close(found: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Agree up to the rounding of sums of positive and negative terms as large as the largest result."""
    assert float((found - expected).abs().max()) <= 64 * terms * EPS * float(expected.abs().max() + 1)


def check(found: list[Partition], seed: int, sabotage: float = 1.0) -> Energies:
    """Compare value, gradient and Hessian with automatic differentiation of the entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(found[0].shape, generator=generator, dtype=torch.float64)
    exponents = {partition: moved(partition, generator) for partition in found}
    energies = Energies.of(weight, exponents)
    assert energies.blocks.numel() <= weight.numel()

    def squared_norm(steps: torch.Tensor) -> torch.Tensor:
        value = weight
        for partition, each in exponents.items():
            value = partition.multiply(value, partition.spread((each.to_dense() @ steps).exp()))
        return value.square().sum()

    steps, direction = (0.3 * torch.randn(2, COUNT, generator=generator, dtype=torch.float64)).unbind()
    problem = _Problem([energies], COUNT)
    at, size = problem.at(sabotage * steps), weight.numel()
    close(torch.tensor(at.energy, dtype=torch.float64), squared_norm(steps), size)
    close(at.slope, torch.autograd.functional.jacobian(squared_norm, steps), size)
    hessian = torch.autograd.functional.hessian(squared_norm, steps)
    close(at.curvature, 4 * (problem.exponents.to_dense().square().T @ at.energies), size)
    close(problem.hessian_times(at, direction), hessian @ direction, size)
    return energies


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(0, 1000))
def test_sums_of_blocks_are_sums_of_entries(found: list[Partition], seed: int) -> None:
    check(found, seed)


def test_sabotage_another_factor_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check([Partition.filters((4, 3)), Partition((4, 3), (4, 3), (1,))], 0, sabotage=1.001)


def each_alone(partition: Partition) -> torch.Tensor:
    return exponents_of([(group, group, 1.0) for group in range(partition.n_groups)], (partition.n_groups, 99))


def test_blocks_of_convolutions_are_kernels_and_entries_where_views_cross() -> None:
    rows, columns = Partition.filters((6, 4, 3, 3)), Partition((6, 4, 3, 3), (6, 4, 3, 3), (1,))
    energies = Energies.of(torch.ones(6, 4, 3, 3), {rows: each_alone(rows), columns: each_alone(columns)})
    assert tuple(energies.blocks.shape) == (6, 4)
    crossing = [Partition((6,), (2, 3), (0,)), Partition((6,), (3, 2), (0,))]
    assert tuple(Energies.of(torch.ones(6), {p: each_alone(p) for p in crossing}).blocks.shape) == (2, 3)
    # Every filter of a depthwise convolution has one input channel: a matrix would be larger than the weight.
    depthwise = {p: each_alone(p) for p in (Partition.filters((6, 1, 3)), Partition((6, 1, 3), (6, 1, 3), (0, 1)))}
    assert tuple(Energies.of(torch.ones(6, 1, 3), depthwise).blocks.shape) == (6, 1)


@pytest.mark.parametrize("number", [lambda g: g // 3, lambda g: g % 4], ids=["consecutive", "interleaved"])
def test_groups_that_move_alike_are_one_block(number: object) -> None:
    """As the columns of the linear layer behind a flattened image, of which one channel has many."""
    columns = Partition((5, 12), (5, 12), (1,))
    alike = exponents_of([(g, number(g), 1.0) for g in range(12)], (12, 4))  # type: ignore[operator]
    weight = torch.arange(60.0).reshape(5, 12)
    energies = Energies.of(weight, {columns: alike})
    assert tuple(energies.blocks.shape) == (4, 1)
    assert (energies.exponents @ torch.arange(4.0, dtype=torch.float64)).tolist() == [0, 1, 2, 3, 0]
    expected = [float(weight[:, [g for g in range(12) if number(g) == k]].square().sum()) for k in range(4)]  # type: ignore[operator]
    assert energies.blocks.flatten().tolist() == expected
