"""Sums over groups taken from sums over common blocks are those of the entries, also after groups are multiplied."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_nets.conversion.energies import Energies
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

    return [one(view) for view in draw(st.lists(st.sampled_from(sorted(views)), min_size=1, max_size=4))]


def check(found: list[Partition], seed: int, sabotage: float = 1.0) -> None:
    """Multiply the groups of each partition in turn, and compare with the same on single entries."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.rand(found[0].shape, generator=generator, dtype=torch.float64)
    energies = Energies.of(entries, found)
    assert energies.blocks.numel() <= entries.numel()
    for partition in found:
        factors = 0.5 + torch.rand(partition.n_groups, generator=generator, dtype=torch.float64)
        energies.multiply(partition, sabotage * factors)
        entries = partition.multiply(entries, partition.spread(factors))
        for other in found:
            expected = other.sum(entries).flatten()
            bound = 4 * entries.numel() * EPS * float(expected.max())
            assert float((energies.over(other) - expected).abs().max()) <= bound


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(0, 1000))
def test_sums_of_blocks_are_sums_of_entries(found: list[Partition], seed: int) -> None:
    check(found, seed)


def test_sabotage_another_factor_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check([Partition.filters((4, 3)), Partition((4, 3), (4, 3), (1,))], 0, sabotage=1.001)


def test_blocks_of_convolutions_are_kernels_and_entries_where_views_cross() -> None:
    rows, columns = Partition.filters((6, 4, 3, 3)), Partition((6, 4, 3, 3), (6, 4, 3, 3), (1,))
    assert tuple(Energies.of(torch.ones(6, 4, 3, 3), [rows, columns]).blocks.shape) == (6, 4)
    crossing = [Partition((6,), (2, 3), (0,)), Partition((6,), (3, 2), (0,))]
    assert tuple(Energies.of(torch.ones(6), crossing).blocks.shape) == (6,)
