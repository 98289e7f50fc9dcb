"""Bounds that no activation reaches near the two points: what looks free there is moved as far as the bound."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from helpers.diagnosis_cases import hidden
from helpers.toy_networks import Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry import finite_move

# The module, which the function of the same name hides.
DIAGNOSE = sys.modules["manifold_nets.symmetry.diagnose"]
CHANNELS = 8
# Out of reach at both points: scales are near 1 at the first and near 10 at the second.
BOUND = 60.0
TRUE = ("a.weight",)
FALSE = ("n.weight", "n.bias")


def bounded_channels(bound: float = BOUND) -> nn.Module:
    """A matrix that a normalization without a rule absorbs, then channels that are cut off at a bound."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        y: Tensor = m.cut(m.n(hidden(m.a(x))))
        return m.last(m.depthwise(y.unsqueeze(-1)))

    return Lambda(
        forward,
        a=nn.Linear(5, CHANNELS, bias=False),
        n=nn.BatchNorm1d(CHANNELS),
        cut=nn.Hardtanh(0.0, bound),
        depthwise=nn.Conv1d(CHANNELS, CHANNELS, 1, groups=CHANNELS, bias=False),
        last=nn.BatchNorm1d(CHANNELS),
    )


def unexplained(rows: int, seed: int, model: Callable[[], nn.Module] = bounded_channels) -> dict[tuple[str, ...], int]:
    torch.manual_seed(seed)
    return {u.parameters: u.count for u in mn.diagnose(model(), torch.randn(rows, 5)).unexplained}


@pytest.mark.parametrize("rows", [3, 6, 12, 500])
@pytest.mark.parametrize("seed", range(3))
def test_a_bound_out_of_reach_frees_nothing_and_what_is_free_is_found(rows: int, seed: int) -> None:
    assert unexplained(rows, seed) == {TRUE: 1}


def test_without_the_finite_move_the_bound_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(DIAGNOSE, "moved_numbers", lambda move, findings, unexplained, alone: (findings, unexplained))
    assert unexplained(12, 0) == {TRUE: 1, FALSE: CHANNELS}


def test_not_far_enough_the_bound_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: a step of no length."""
    monkeypatch.setattr(finite_move, "_DECADES", 0.0)
    assert unexplained(12, 0) == {TRUE: 1, FALSE: CHANNELS}


def whole() -> nn.Module:
    """The same with one scale for all channels that are cut off."""
    model = bounded_channels()
    model.depthwise = nn.Conv1d(CHANNELS, 1, 1, bias=False)
    model.last = nn.BatchNorm1d(1)
    return model


@pytest.mark.parametrize("seed", range(6))
def test_a_layer_that_is_cut_off_as_a_whole_hides_nothing_before_it(seed: int) -> None:
    assert unexplained(4, seed, whole) == {TRUE: 1}


def test_a_bound_that_does_not_exist_leaves_everything_free() -> None:
    """No rule knows that so far a bound is never reached; numbers find that scales and biases are free."""
    assert unexplained(12, 0, lambda: bounded_channels(1e30)) == {TRUE: 1, FALSE: CHANNELS}
