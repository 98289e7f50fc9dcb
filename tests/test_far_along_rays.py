"""Bounds that no activation reaches near the two points: what looks free there is asked again far along its ray."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cost_of_diagnose import MOST_PASSES
from test_reverse_search import hidden
from torch import Tensor, nn
from toy_networks import Lambda

import manifold_nets as mn
from manifold_nets.symmetry.certificate.euler import EulerField, euler_field
from manifold_nets.symmetry.certificate.points import farther_field, second_field
from manifold_nets.symmetry.network.twin import analysis_copy
from manifold_nets.symmetry.reverse import scales

# The module, which the function of the same name hides.
DIAGNOSE = sys.modules["manifold_nets.symmetry.diagnose"]
CHANNELS = 8
# Out of reach at both points: scales are near 1 at the first and near 10 at the second.
BOUND = 60.0
TRUE = ("a.weight",)
FALSE = ("n.weight", "n.bias")


def network(bound: float = BOUND) -> nn.Module:
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


def unexplained(rows: int, seed: int, model: Callable[[], nn.Module] = network) -> dict[tuple[str, ...], int]:
    torch.manual_seed(seed)
    return {u.parameters: u.count for u in mn.diagnose(model(), torch.randn(rows, 5)).unexplained}


@pytest.mark.parametrize("rows", [3, 6, 12, 500])
@pytest.mark.parametrize("seed", range(3))
def test_a_bound_out_of_reach_frees_nothing_and_what_is_free_is_found(rows: int, seed: int) -> None:
    assert unexplained(rows, seed) == {TRUE: 1}


def test_without_the_far_points_the_bound_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(scales, "_factors", lambda searches, parts: [])
    assert unexplained(12, 0) == {TRUE: 1, FALSE: CHANNELS}


def test_not_far_enough_the_bound_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: a step of no length."""
    monkeypatch.setattr(scales, "_FAR", 1.0)
    assert unexplained(12, 0) == {TRUE: 1, FALSE: CHANNELS}


def test_all_channels_cut_off_at_once_hide_what_lies_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: all groups in one pass."""
    assert unexplained(6, 1) == {TRUE: 1}
    in_parts = scales._factors
    monkeypatch.setattr(scales, "_factors", lambda searches, parts: in_parts(searches, 1))
    assert unexplained(6, 1) == {}


def whole() -> nn.Module:
    """The same with one scale for all channels that are cut off."""
    model = network()
    model.depthwise = nn.Conv1d(CHANNELS, 1, 1, bias=False)
    model.last = nn.BatchNorm1d(1)
    return model


@pytest.mark.parametrize("seed", range(6))
def test_a_layer_that_is_cut_off_as_a_whole_hides_nothing_before_it(seed: int) -> None:
    assert unexplained(4, seed, whole) == {TRUE: 1}


def test_evidence_is_asked_only_of_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin of the test above: asked of everything, and all in one pass."""
    in_parts = scales._factors
    monkeypatch.setattr(scales, "_factors", lambda searches, parts: in_parts(searches, 1))
    assert any(unexplained(4, seed, whole) == {} for seed in range(6))


def test_a_bound_that_does_not_exist_leaves_everything_free() -> None:
    """No rule knows that so far a bound is never reached; numbers find that scales and biases are free."""
    assert unexplained(12, 0, lambda: network(1e30)) == {TRUE: 1, FALSE: CHANNELS}


def passes(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> int:
    """How often an analysis takes gradients."""
    taken: list[int] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return grad(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        mn.diagnose(model, x)
    return len(taken)


def test_passes_are_few_and_only_taken_where_something_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(12, 5)
    assert passes(monkeypatch, network(), x) == MOST_PASSES
    assert passes(monkeypatch, nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()), x) == 2


def test_a_second_point_that_took_two_passes_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that has no answer to inputs other than its own."""
    x = torch.randn(12, 5)
    inside = network()

    def forward(m: Lambda, y: Tensor) -> Tensor:
        return m.inside(y) * torch.where((y - x.double()).abs().max() > 0, torch.nan, 1.0)

    assert passes(monkeypatch, Lambda(forward, inside=inside), x) == MOST_PASSES


def test_a_far_field_has_the_gradients_asked_for_and_leaves_the_copy_alone() -> None:
    torch.manual_seed(0)
    twin = analysis_copy(network())
    x = ((torch.randn(12, 5, dtype=torch.float64),), {})
    euler_field(twin, x, 0)
    second_field(twin, x, 0)
    before = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    factors = {"a.weight": torch.full((CHANNELS, 5), 128.0, dtype=torch.float64)}
    far = farther_field(twin, x, 2, factors)
    assert far is not None
    assert set(far.gradients) == set(far.weights) == {"a.weight"}
    assert torch.equal(far.weights["a.weight"], 128 * before["a.weight"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in twin.named_parameters())


def test_a_far_point_with_infinite_gradients_tells_nothing() -> None:
    twin = analysis_copy(Lambda(lambda m, x: torch.exp(m.a(x).abs()), a=nn.Linear(5, 2)))
    x = ((torch.ones(3, 5, dtype=torch.float64),), {})
    for factor, known in ((2.0, True), (1e9, False)):
        factors = {"a.weight": torch.full((2, 5), factor, dtype=torch.float64)}
        assert (farther_field(twin, x, 2, factors) is not None) is known


def test_where_the_far_point_fails_what_was_found_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> EulerField | None:
        return None

    monkeypatch.setattr(DIAGNOSE, "farther_field", fails)
    assert unexplained(12, 0) == {TRUE: 1, FALSE: CHANNELS}
