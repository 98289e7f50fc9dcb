"""What an analysis costs: how often the network is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diagnosis_cases import MOST_PASSES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import manifold_nets as mn
from manifold_nets.symmetry import gradients, low_memory, propagate
from manifold_nets.symmetry.group_sums import group_sums
from manifold_nets.symmetry.shifts import ShiftStructure
from manifold_nets.symmetry.trace import trace

# Forward passes alone, beside these: before and after the finite move, at two points.
MOST_MOVES = 4


class Counting(nn.Module):
    """Counts how often real numbers run forward and backward through the network, on all copies of it."""

    counts: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        if type(y) is Tensor and type(x) is Tensor and not torch.compiler.is_compiling():
            Counting.counts["forward"] += 1
            if y.requires_grad:
                y.register_hook(lambda g: Counting.counts.update(backward=Counting.counts["backward"] + 1))
        return y


@pytest.mark.parametrize("loss", [None, "cross_entropy", lambda y: y.square().mean()], ids=["none", "name", "function"])
def test_few_passes(loss: str | Callable[[Tensor], Tensor] | None) -> None:
    Counting.counts = {"forward": 0, "backward": 0}
    report = mn.diagnose(Counting(), torch.randn(8, 5), loss=loss)
    assert report.invariant
    assert 1 <= Counting.counts["backward"] <= MOST_PASSES
    # Forward passes alone: the loss twice at most; variances are read off the graph in one more.
    assert Counting.counts["forward"] <= MOST_PASSES + MOST_MOVES


class Branching(Counting):
    """The same with control flow that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if bool(x.abs().max() < 1e6) else -y


@pytest.mark.parametrize("memory", ["full", "small"])
def test_one_pass_and_one_reading_of_each_weight_without_a_graph(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.counts = {"forward": 0, "backward": 0}
    read: list[tuple[int, ...]] = []

    def reading(weight: Tensor, gradient: Tensor, partitions: Any) -> Any:
        read.append(tuple(weight.shape))
        return group_sums(weight, gradient, partitions)

    for module in (gradients, low_memory):
        monkeypatch.setattr(module, "group_sums", reading)
    report = mn.diagnose(Branching(), torch.randn(8, 5), memory=memory)
    assert report.counts() == {"unknown": 2}
    assert report.unexplained_groups == 6
    assert Counting.counts["backward"] == 1
    assert Counting.counts["forward"] <= 2  # once more to see whether the model takes the inputs
    assert [shape for shape in read if len(shape) > 1] == [(6, 5), (3, 6)][:: 1 if memory == "full" else -1]


def test_the_counter_counts() -> None:
    """Sabotage twin: a pass more is seen."""
    Counting.counts = {"forward": 0, "backward": 0}
    network = Counting()
    for _ in range(MOST_PASSES + 1):
        network(torch.randn(8, 5)).sum().backward()
    with pytest.raises(AssertionError):
        assert max(Counting.counts.values()) <= MOST_PASSES
    assert pytree.tree_leaves(Counting.counts) == [MOST_PASSES + 1] * 2


class Dense(nn.Module):
    """Convolutions that read all that comes before, each behind a normalization."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(2 + 2 * k, 2, 1, bias=False) for k in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 + 2 * k) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.cat([x, convolution(torch.relu(norm(x)))], 1)
        return x.mean((2, 3))


def visits(depth: int) -> int:
    """How many operations the shifts of all rows of a dense network are followed through."""
    count: list[Any] = []
    visit = propagate._ShiftWalk._visit
    model = Dense(depth)
    structure = ShiftStructure(trace(model, ((torch.randn(3, 2, 4, 4),), {})), model, loss=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagate._ShiftWalk, "_visit", lambda walk, node: (count.append(node), visit(walk, node)))
        assert structure.rows is not None
    return len(count)


def test_a_refused_shift_is_followed_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the depth, twice the way; the sabotage twin does not refuse, and the way grows with the square."""
    assert visits(12) <= 2.5 * visits(6)
    monkeypatch.setattr(propagate._ShiftWalk, "_refuse_sources", lambda walk: None)
    assert visits(12) > 3 * visits(6)
