"""The groups of a report are the finest ones: no part of a group is invariant by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import HAND_WRITTEN_EPS, build, sharp
from helpers.toy_networks import TOYS, Lambda
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry import weight_structure as find
from manifold_nets.symmetry.seeds import joined_partition

# Between the rounding of float64 and the values of groups that are not invariant.
TOLERANCE = 1e-8


def values_of_parts(weight: Tensor, gradient: Tensor, group: Tensor) -> dict[tuple[int, int], float]:
    """Certificate value of the part of a group at each index of each axis, where it is a strict part of it."""
    found = {}
    for axis, size in enumerate(weight.shape):
        for index in range(size):
            part = torch.zeros_like(group)
            part.select(axis, index).copy_(group.select(axis, index))
            w, g = weight[part], gradient[part]
            if 1 < int(part.sum()) < int(group.sum()) and w.norm() * g.norm() > 1e-9 * weight.norm() * gradient.norm():
                found[axis, index] = float((w @ g).abs() / (w.norm() * g.norm()))
    return found


def refined(model: nn.Module, x: Any, name: str, partition: mn.Partition) -> list[float]:
    """Certificate values below the tolerance of parts of the groups of a partition."""
    twin = sharp(model)
    output = twin(x.double() if x.is_floating_point() else x)
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(21))
    weight = dict(twin.named_parameters())[name]
    (gradient,) = torch.autograd.grad((output * cotangent).sum(), weight)
    values = [
        value
        for number in range(partition.n_groups)
        for value in values_of_parts(weight.detach(), gradient, partition.group_ids() == number).values()
    ]
    return [value for value in values if value <= TOLERANCE]


# What they normalize by is hidden from the copy with negligible eps, or the finest groups have no view.
NO_VIEW = {"groups without a view": 2, "embedding with a zero row": 7, "unequal groups": 2}


@pytest.mark.parametrize("name", [n for n in TOYS if n not in HAND_WRITTEN_EPS | NO_VIEW.keys()])
def test_no_part_of_a_group_is_invariant_by_itself(name: str) -> None:
    model, x = build(TOYS[name]), TOYS[name].inputs()
    for finding in mn.diagnose(model, x).invariant:
        assert finding.partition is not None
        assert not refined(model, x, finding.name, finding.partition), str(finding)
        assert finding.finer_groups == 0


@pytest.mark.parametrize("name", ["conv2d-bn", "embedding-ln", "weight from the right", "experts"])
def test_coarser_groups_than_the_finest_are_noticed(name: str) -> None:
    """Sabotage twin: the whole tensor in place of its groups."""
    model, x = build(TOYS[name]), TOYS[name].inputs()
    finding = mn.diagnose(model, x).invariant[0]
    with pytest.raises(AssertionError):
        assert not refined(model, x, finding.name, mn.Partition.whole(finding.shape))


@pytest.mark.parametrize("name", NO_VIEW)
def test_finer_groups_that_no_view_expresses_are_counted(name: str) -> None:
    report = mn.diagnose(build(TOYS[name]), TOYS[name].inputs())
    finding = report.invariant[0]
    assert finding.partition == mn.Partition.whole(finding.shape)
    assert finding.finer_groups == NO_VIEW[name]
    assert f"{NO_VIEW[name]} finer groups" in str(report)
    assert report.to_dict()["weights"][0]["finer_groups"] == NO_VIEW[name]


def test_rows_of_a_table_are_not_free_where_positions_are_added() -> None:
    model = Lambda(
        lambda m, x: m.n(m.e(x) + m.p(torch.arange(5))), e=nn.Embedding(7, 6), p=nn.Embedding(5, 6), n=nn.LayerNorm(6)
    )
    report = mn.diagnose(model, torch.randint(0, 7, (4, 5)))
    assert not report.invariant
    assert not report.disagreements


@st.composite
def mixed_radix(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return sizes, draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))


@given(mixed_radix(), st.integers(1, 3))
def test_groups_that_a_view_expresses_get_one(radix: tuple[list[int], list[bool]], fan_in: int) -> None:
    """Any pattern of kept and joined factors comes back as a partition with the same groups."""
    sizes, kept = radix
    count = int(np.prod(sizes))
    made = mn.Partition((count, fan_in), (*sizes, fan_in), tuple(a for a, keep in enumerate(kept) if keep))
    ids = made.group_ids()[:, 0].numpy()
    classes = [np.flatnonzero(ids == k).tolist() for k in range(made.n_groups)]
    found = joined_partition(mn.Partition.filters((count, fan_in)), classes)
    assert found.n_groups == made.n_groups
    pairs = set(zip(made.group_ids().flatten().tolist(), found.group_ids().flatten().tolist(), strict=True))
    assert len(pairs) == made.n_groups


@given(st.permutations(range(8)))
def test_whatever_the_groups_are_none_is_cut(order: list[int]) -> None:
    classes = [sorted(order[:3]), sorted(order[3:6]), sorted(order[6:])]
    found = joined_partition(mn.Partition.filters((8, 2)), classes)
    assert found == mn.Partition.whole((8, 2))


def test_channels_of_grouped_transposed_convolutions() -> None:
    seed = mn.Partition.transposed_filters((4, 6, 3), groups=2)
    found = joined_partition(seed, [[k, k + 3] for k in (0, 1, 2, 6, 7, 8)])
    assert found == mn.Partition((4, 6, 3), (2, 2, 2, 3, 3), (0, 3))


class Modulated(nn.Module):
    """A convolution whose weight an example's style scales by input channel, normalized again by output channel."""

    def __init__(self, channels_in: int, channels_out: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels_out, channels_in, size, size))
        self.style, self.pad = nn.Linear(6, channels_in), size // 2

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        count, channels, *image = x.shape
        weight = self.weight * self.style(style).reshape(count, 1, channels, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, -1, *image), weight.flatten(0, 1), padding=self.pad, groups=count)
        return y.reshape(count, -1, *image)


class Generator(nn.Module):
    """Two of them, from a picture that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.randn(1, 4, 5, 5))
        self.a, self.b = Modulated(4, 8, 3), Modulated(8, 3, 1)

    def forward(self, style: Tensor) -> Tensor:
        x = self.picture.expand(len(style), -1, -1, -1)
        return self.b(F.leaky_relu(self.a(x, style), 0.2), style)


@pytest.mark.parametrize("memory", ["full", "small"])
def test_a_leading_axis_of_size_one_hides_no_groups(memory: Any) -> None:
    model, style = Generator(), torch.randn(5, 6)
    report = mn.diagnose(model, style, memory=memory)
    for name, filters in (("a.weight", 8), ("b.weight", 3)):
        shape = report[name].shape
        assert report[name].status == "invariant"
        assert report[name].partition == mn.Partition(shape, shape, (1,))
        assert report[name].partition.n_groups == filters
    assert report.unexplained_groups == 0
    converted = mn.convert(model, report)
    assert mn.verify(model, converted, style).train_difference <= 1e2 * torch.finfo(torch.float32).eps


def test_without_its_graph_the_certificate_finds_them_as_well() -> None:
    class Branching(Generator):
        def forward(self, style: Tensor) -> Tensor:
            return super().forward(style if float(style.sum()) < torch.inf else -style)

    finding = mn.diagnose(Branching(), torch.randn(5, 6))["a.weight"]
    assert finding.status == "unknown"
    assert "8 groups" in str(finding.broken_by)


def test_along_its_first_axis_alone_there_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(find, "_along_other_axes", lambda *args: [])
    partition = mn.diagnose(Generator(), torch.randn(5, 6))["a.weight"].partition
    assert partition is not None
    assert partition.n_groups == 1
