"""What the sums of one float64 pass prove, and what is only their rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.groups import Partition
from manifold_nets.symmetry.generators import Generators
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.invariance import EVIDENCE_FLOOR, ROUNDED, InvarianceTest

TOLERANCE = 1e-8
EPS = torch.finfo(torch.float64).eps


def verdict_of_second_row(product: float, size: float) -> str:
    """Verdict on a row with this ``Σ w ⊙ g`` and this ‖w‖‖g‖, beside a row whose ‖w‖‖g‖ is 1."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.0, 1.0], [product, max(size**2 - product**2, 0.0) ** 0.5]], dtype=torch.float64)
    if math.isnan(product):
        weight[1], gradient[1] = product, size
    test = InvarianceTest(GradientPass({"w": weight}, {"w": gradient}), TOLERANCE)
    return test.certificate(Generators.of_groups("w", Partition.filters((2, 2)), [1])).verdict


@pytest.mark.parametrize(
    ("product", "size", "verdict"),
    [
        (0.0, 1e-3, "invariant"),
        (1e-12, 1e-3, "invariant"),
        (1e-4, 1e-3, "not invariant"),
        (1e-10, 1e-3, "not invariant"),
        (8 * EPS, 1e-9, "no evidence"),  # a value of 2e-6, and nothing but rounding
        (1e-10, 1e-10, "not invariant"),
        (1e-13, 1e-13, "no evidence"),
        (float("nan"), 1e-3, "not invariant"),
    ],
)
def test_verdicts(product: float, size: float, verdict: str) -> None:
    assert verdict_of_second_row(product, size) == verdict


def test_the_smallest_scale_that_matters_above_the_floor_is_still_refuted() -> None:
    """What counts as rounding lies so far below the floor that no group of evidence hides behind it."""
    assert ROUNDED * EVIDENCE_FLOOR >= 32 * EPS
    size = 2 * EVIDENCE_FLOOR
    assert verdict_of_second_row(size, size) == "not invariant"
    assert verdict_of_second_row(2 * ROUNDED * size, size) == "not invariant"


def test_without_the_allowance_rounding_would_refute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the first test."""
    monkeypatch.setattr("manifold_nets.symmetry.invariance.ROUNDED", 0.0)
    with pytest.raises(AssertionError):
        assert verdict_of_second_row(8 * EPS, 1e-9) == "no evidence"


# ---- scales of filters ----------------------------------------------------------------------------------------------


def field_of(scale: float) -> GradientPass:
    """Four invariant rows beside one that is not, and the first of them multiplied by a scale, its gradient divided."""
    weight = torch.tensor([[1.0, 0.0]] * 5, dtype=torch.float64)
    gradient = torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 1.0]], dtype=torch.float64)
    factors = torch.tensor([scale, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    return GradientPass({"w": weight * factors}, {"w": gradient / factors})


SCALES = [1.0, 1e-6, 1e-14, 1e-40, 1e30]
ROWS = Partition.filters((5, 2))


@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_of_a_filter_takes_no_evidence_from_the_others(scale: float) -> None:
    test = InvarianceTest(field_of(scale), TOLERANCE)
    found = test.of_partition("w", ROWS)
    assert (found.groups_certified, found.groups_refuted, found.groups_without_evidence) == (4, 1, 0)
    assert test.floor() == pytest.approx(InvarianceTest(field_of(1.0), TOLERANCE).floor(), rel=8 * EPS)


@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_of_a_filter_does_not_make_the_whole_look_invariant(scale: float) -> None:
    assert (
        InvarianceTest(field_of(scale), TOLERANCE).of_partition("w", Partition.whole((5, 2))).verdict == "not invariant"
    )


def test_the_norms_of_whole_tensors_depend_on_the_scale_of_a_filter() -> None:
    """The sabotage twin of both: a floor from the product of the norms."""
    norms = {"w": (Partition.whole((5, 2)),)}
    test = InvarianceTest(replace(field_of(1e-14), required=norms), TOLERANCE)
    assert test.of_partition("w", ROWS).verdict == "no evidence"
    assert test.of_partition("w", Partition.whole((5, 2))).verdict == "invariant"


def test_a_group_without_a_gradient_has_no_evidence_whatever_the_scales() -> None:
    for scale in SCALES:
        field = field_of(scale)
        gradient = field.gradients["w"].clone()
        gradient[1] = 1e-3 * EVIDENCE_FLOOR * torch.ones(2, dtype=torch.float64)
        found = InvarianceTest(GradientPass(field.weights, {"w": gradient}), TOLERANCE).of_partition("w", ROWS)
        assert (found.groups_certified, found.groups_refuted, found.groups_without_evidence) == (3, 1, 1)


@pytest.mark.parametrize("memory", ["full", "small"])
def test_a_very_small_filter_takes_no_evidence_from_a_network(memory: Literal["full", "small"]) -> None:
    """Neither from its layer nor from the others; and the search the other way finds nothing that is not there."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight[2] *= 2.0**-33
    report = mn.diagnose(model, torch.randn(8, 3, 7, 7), memory=memory)
    certificates = [w.certificate for w in report.weights]
    assert [c.groups_certified for c in certificates] == [4, 4, 0]
    assert [c.groups_without_evidence for c in certificates] == [0, 0, 0]
    assert not report.disagreements
    assert not report.refuted_families
    assert not report.unexplained


def single_entry_filters():
    """A depthwise convolution of one weight per channel, in front of a batch normalization."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(8, 8, 1, groups=8, bias=False)
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), depthwise, nn.BatchNorm2d(8), head)
    return mn.diagnose(model, torch.randn(4, 3, 8, 8))["2.weight"]


def test_filters_of_a_single_entry_are_compared_with_the_other_weights() -> None:
    """Their own product of norms is the sum that is tested: it would vanish together with it."""
    found = single_entry_filters()
    assert (found.status, found.certificate.groups_certified) == ("invariant", 8)


def test_without_that_comparison_they_have_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generators, "entries", property(lambda self: np.full(self.count, 2)))
    assert single_entry_filters().status != "invariant"
