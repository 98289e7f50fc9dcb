"""Weights, gradients and inputs that are not finite: said plainly, valid JSON, and refused by name where converted."""

from __future__ import annotations

import json
import math
import sys
from typing import Literal

import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.errors import DegenerateGroupError
from manifold_nets.models import draw_not_finite

Memory = Literal["full", "small"]
X = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(2))


def two_convolutions() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 2))


def with_value(value: float) -> nn.Sequential:
    model = two_convolutions()
    with torch.no_grad():
        model[3].weight[2, 0, 1, 1] = value
    return model


def valid_json(report: mn.SymmetryReport) -> str:
    return json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_group_is_named_and_the_others_are_certified(value: float, memory: Memory) -> None:
    model = with_value(value)
    before = model[3].weight.detach().clone()
    report = mn.diagnose(model, X, memory=memory)
    assert [w.status for w in report.weights] == ["invariant", "invariant", "not invariant"]
    found = report["3.weight"]
    assert (found.certificate.groups_certified, found.certificate.groups_without_evidence) == (3, 1)
    assert "1 without evidence: group 2 is not finite" in str(report)
    assert "re-initialize or prune" in found.remedy
    assert [*report.refuted_families, *report.refuted_shifts, *report.unexplained] == []
    silent = [f.certificate.groups_without_evidence for f in report.families if "3.weight" in f.parameters]
    assert sum(silent) >= 1
    assert valid_json(report)
    assert torch.equal(before.nan_to_num(7.0), model[3].weight.detach().nan_to_num(7.0))
    with pytest.raises(DegenerateGroupError, match=r"3\.weight: group 2 with norm (nan|inf)"):
        mn.convert(model, report)
    converted = mn.plan(model, report, exclude="3.weight")
    assert [action.name for action in converted.spheres] == ["0.weight"]


def test_without_new_values_all_evidence_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the test above."""
    monkeypatch.setattr(sys.modules["manifold_nets.symmetry.diagnose"], "draw_not_finite", lambda twin: {})
    report = mn.diagnose(with_value(math.nan), X)
    assert [w.status for w in report.weights] != ["invariant", "invariant", "not invariant"]
    assert valid_json(report)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4)], ids=["whole", "filters"])
def test_a_weight_of_which_nothing_is_left_is_refused_by_name(norm: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)), torch.randn(5, 3)
    nn.init.constant_(model[0].weight, math.nan)
    report = mn.diagnose(model, x)
    assert report["0.weight"].status == "no evidence"
    assert "not finite" in report["0.weight"].certificate.because
    assert not report.unexplained
    for given in (report, x):
        with pytest.raises(DegenerateGroupError, match=r"0\.weight: group 0 with norm nan"):
            mn.convert(model, given)


def test_a_weight_on_no_sphere_names_its_rows_as_well() -> None:
    model = two_convolutions()
    with torch.no_grad():
        model[6].weight[1, 5] = math.nan
    report = mn.diagnose(model, X)
    assert report["6.weight"].status == "not invariant"
    assert report["6.weight"].certificate.because == "group 1 is not finite"
    assert [w.status for w in report.invariant] == ["invariant", "invariant"]


def test_a_bias_leaves_its_group_without_evidence() -> None:
    model = two_convolutions()
    with torch.no_grad():
        model[3].bias[1] = math.nan
    assert mn.diagnose(model, X)["3.weight"].certificate.because == "group 1 is not finite"


def test_inputs_that_are_not_finite_are_no_contradiction() -> None:
    x = X.clone()
    x[0, 0, 0, 0] = math.nan
    report = mn.diagnose(two_convolutions(), x)
    assert {w.status for w in report.weights} == {"no evidence"}
    assert "gradients are not finite on these inputs" in str(report)
    assert [*report.disagreements, *report.refuted_families, *report.refuted_shifts] == []
    assert valid_json(report)


def test_an_untraceable_model_names_the_group_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = with_value(math.nan)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if bool((x.sum() > -1e9).item()) else x

    found = mn.diagnose(Branching(), X)["inner.3.weight"]
    assert found.certificate.because == "group 2 is not finite"
    assert found.certificate.groups_certified == 3


def test_finite_entries_keep_their_values() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.inf
    stored, before = layer.weight.data, layer.weight.detach().clone()
    masks = draw_not_finite(layer)
    assert list(masks) == ["weight"]
    assert masks["weight"].sum() == 1
    assert bool(layer.weight.isfinite().all())
    assert torch.equal(layer.weight.detach()[~masks["weight"]], before[~masks["weight"]])
    assert torch.equal(stored, before)  # not in place: it may be the model's
    assert draw_not_finite(layer) == {}
