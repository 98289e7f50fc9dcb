"""Channels without variance tell nothing: reported as no evidence, by name, and never as a contradiction."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from helpers.diagnosis_cases import PLANTED, build, toy
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry import low_variance
from manifold_nets.symmetry.low_variance import LowVariance
from manifold_nets.symmetry.rules import RULES

Memory = Literal["full", "small"]


def dead_channel(norm: nn.Module) -> nn.Sequential:
    """The third channel of a ReLU is never active: the depthwise filter behind it reads zeros and adds a constant."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(4, 4, 3, groups=4, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), depthwise, norm, nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].bias[2] = -20.0
    return model


def contradictions(report: mn.SymmetryReport) -> list[object]:
    return [*report.disagreements, *report.refuted_families, *report.refuted_shifts]


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)], ids=["batch", "instance"])
def test_a_dead_channel_is_named_and_the_others_are_certified(norm: nn.Module, memory: Memory) -> None:
    report = mn.diagnose(dead_channel(norm), torch.randn(4, 3, 8, 8), memory=memory)
    found = report["3.weight"]
    assert not contradictions(report), str(report)
    assert found.status == "invariant"
    assert (found.certificate.groups_certified, found.certificate.groups_without_evidence) == (3, 1)
    words = f"1 without evidence: channel 2 has hardly any variance in front of 4 ({norm_name(norm)})"
    assert words in str(found.certificate)
    assert words in str(report)


def norm_name(norm: nn.Module) -> str:
    return "batch_norm" if isinstance(norm, nn.BatchNorm2d) else "instance_norm"


CONSTANT = {"zeros": torch.zeros(8, 4), "ones": torch.ones(8, 4), "thirds": torch.full((8, 4), 1 / 3)}


@pytest.mark.parametrize("inputs", CONSTANT)
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=lambda n: type(n).__name__
)
def test_constant_inputs_contradict_nothing(norm: nn.Module, inputs: str) -> None:
    torch.manual_seed(1)
    report = mn.diagnose(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2)), CONSTANT[inputs])
    assert not contradictions(report), str(report)
    found = report["0.weight"]
    if isinstance(norm, nn.BatchNorm1d):  # the others normalize over what is not constant
        assert found.status == "no evidence"
        assert "channels 0, 1, 2, 3 have hardly any variance in front of 1 (batch_norm)" in found.certificate.because
        assert "on these inputs; try other inputs" in found.remedy
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e-12, 1e-15, 1e-25])
def test_a_filter_whose_variance_is_lost_in_eps_has_no_evidence(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight[1] *= scale
    x = torch.randn(8, 3, 7, 7)
    report = mn.diagnose(model, x)
    found = report["0.weight"].certificate
    assert not contradictions(report), str(report)
    assert (found.groups_certified, found.groups_without_evidence) == (3, 1)
    assert mn.plan(model, report)["0.weight"].action == "sphere"


def test_the_biases_of_other_channels_stay_certified() -> None:
    """Of the bias in front of a normalization, the entry of a channel without variance alone has no evidence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[3].weight[2] *= 1e-12
    report = mn.diagnose(model, torch.randn(8, 3, 7, 7))
    (found,) = [shift.certificate for shift in report.shifts if shift.parameters == ("3.bias",)]
    assert (found.groups_certified, found.groups_without_evidence) == (3, 1)
    assert "channel 2 has hardly any variance in front of 4 (batch_norm)" in found.because
    assert not contradictions(report)
    assert not report.unexplained


def test_rounding_and_eps_are_what_would_refute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the tests above: nobody asks for the variances."""
    monkeypatch.setattr(LowVariance, "_masks", {})
    assert contradictions(mn.diagnose(dead_channel(nn.BatchNorm2d(4)), torch.randn(4, 3, 8, 8)))
    torch.manual_seed(1)
    constant = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert contradictions(mn.diagnose(constant, CONSTANT["thirds"]))


def test_a_channel_that_varies_little_beside_its_mean_is_low_just_where_rounding_reaches_the_tolerance() -> None:
    eps, tolerance = torch.finfo(torch.float64).eps, 1e-8
    wave = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)

    def masks(deviation: float) -> bool:
        x = (1.0 + deviation * wave)[:, None]
        judge = LowVariance(None, nn.Identity(), ((), {}), 0, None, tolerance)  # type: ignore[arg-type]
        mask = judge._is_low("batch_norm", x, {})
        assert mask is not None
        assert mask.shape == (1, 1)
        return bool(mask[0, 0])

    assert masks(0.5 * eps / tolerance)
    assert not masks(2.0 * eps / tolerance)


@pytest.mark.parametrize("fault", PLANTED)
def test_no_variance_is_asked_for_where_nothing_is_refuted_and_no_fault_is_excused(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    is_low = LowVariance._is_low
    monkeypatch.setattr(LowVariance, "_is_low", lambda *args: (asked.append(args[2]), is_low(*args))[1])
    name, op, wrong = PLANTED[fault]
    model, x = build(toy(name)), toy(name).inputs()
    assert not mn.diagnose(model, x).disagreements
    assert not asked
    monkeypatch.setitem(RULES, op, wrong)
    assert mn.diagnose(model, x).disagreements


def test_the_pass_for_the_variances_leaves_no_trace() -> None:
    model = dead_channel(nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    mn.diagnose(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_places_in_words() -> None:
    assert low_variance.describe([{"n (layer_norm)": set()}]) == (
        "there is hardly any variance in front of n (layer_norm) on these inputs"
    )
    assert low_variance.describe([]) == ""
