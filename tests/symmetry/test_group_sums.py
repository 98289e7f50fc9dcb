"""Sums over groups in one pass: against sums over group numbers, and against each other from fine to coarse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry import group_sums as reductions
from manifold_nets.symmetry.group_sums import GroupSums, coarsened, group_sums

SHAPE = (8, 12, 3, 3)
PARTITIONS = [
    Partition.filters(SHAPE),
    Partition(SHAPE, SHAPE, (1,)),
    Partition(SHAPE, SHAPE, (0, 1)),
    Partition.whole(SHAPE),
    Partition.blocks(SHAPE, 4),
    Partition(SHAPE, (2, 4, *SHAPE[1:]), (0, 2)),
    Partition(SHAPE, (1, *SHAPE), (0, 2, 3, 4)),
    Partition.transposed_filters(SHAPE, 2),
    Partition(SHAPE, SHAPE, (0, 1, 2, 3)),
    Partition(SHAPE, (6, 16, 9), (0,)),
]


def by_number(partition: Partition, entries: Tensor) -> Tensor:
    """Oracle: entries added by the number of their group."""
    return torch.zeros(partition.n_groups, dtype=torch.float64).index_add_(
        0, partition.group_ids().flatten(), entries.double().flatten()
    )


def check(partitions: list[Partition], weight: Tensor, gradient: Tensor) -> None:
    w, g = weight.double(), gradient.double()
    # Rounding of a sum of n terms stays below n machine epsilons of the sum of their moduli.
    eps = torch.finfo(torch.float64).eps
    for partition, sums in zip(partitions, group_sums(weight, gradient, partitions), strict=True):
        for found, terms in zip(map(torch.from_numpy, sums), (w * g, w * w, g * g, g), strict=True):
            limit = partition.group_size * eps * by_number(partition, terms.abs())
            assert bool(((found - by_number(partition, terms)).abs() <= limit).all()), partition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 100, 1 << 17])
def test_sums_are_those_by_number(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "_BLOCK", block)
    torch.manual_seed(block)
    weight, gradient = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    check(PARTITIONS, weight, gradient)
    check(PARTITIONS[:3], weight, gradient)  # these have a view in common
    check([Partition.filters((1, 1))], weight[:1, :1, 0, 0], gradient[:1, :1, 0, 0])


def test_a_block_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    blocks = reductions._blocks
    monkeypatch.setattr(reductions, "_BLOCK", 100)
    monkeypatch.setattr(reductions, "_blocks", lambda view: itertools.islice(blocks(view), 1, None))
    with pytest.raises(AssertionError):
        check(PARTITIONS, torch.randn(SHAPE), torch.randn(SHAPE))


@pytest.mark.parametrize(("fine", "coarse"), list(itertools.product(PARTITIONS, PARTITIONS)))
def test_coarse_sums_come_from_fine_ones(fine: Partition, coarse: Partition) -> None:
    """Wherever groups are not split; whole numbers, so that the sums are exact."""
    entries = torch.arange(len(torch.empty(SHAPE).flatten()), dtype=torch.float64).reshape(SHAPE)
    parent = torch.empty(fine.n_groups, dtype=torch.int64)
    parent[fine.group_ids().flatten()] = coarse.group_ids().flatten()
    split = not torch.equal(parent[fine.group_ids()], coarse.group_ids())
    values = by_number(fine, entries).numpy()
    found = coarsened(GroupSums(values, values + 1, -values, 2 * values), fine, coarse)
    if found is None:
        # Views that are not made of common axes are not compared.
        assert split or coarse.view == (6, 16, 9)
    else:
        assert not split
        n, expected = fine.n_groups / coarse.n_groups, by_number(coarse, entries).numpy()
        for one, other in zip(found, (expected, expected + n, -expected, 2 * expected), strict=True):
            np.testing.assert_array_equal(one, other)
