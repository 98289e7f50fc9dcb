"""What an analysis costs: how often the network is run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import manifold_nets as mn

# The number promised: forward-and-backward passes in float64.
MOST_PASSES = 4
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


def test_the_counter_counts() -> None:
    """Sabotage twin: a pass more is seen."""
    Counting.counts = {"forward": 0, "backward": 0}
    network = Counting()
    for _ in range(MOST_PASSES + 1):
        network(torch.randn(8, 5)).sum().backward()
    with pytest.raises(AssertionError):
        assert max(Counting.counts.values()) <= MOST_PASSES
    assert pytree.tree_leaves(Counting.counts) == [MOST_PASSES + 1] * 2
