"""Shift symmetries: found, certified, true when they are carried out, and refuted where a rule is wrong."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import BRUTE_FORCE_TOLERANCE, HAND_WRITTEN_EPS, build
from helpers.shift_cases import (
    CASES,
    Expected,
    change,
    found,
    made,
)
from helpers.toy_networks import TOYS
from torch import Tensor

import manifold_nets as mn
from manifold_nets.errors import OptionError


@pytest.mark.parametrize("name", CASES)
def test_finds_the_expected_shifts_and_certifies_them(name: str) -> None:
    model, x = made(name)
    report = mn.diagnose(model, x)
    assert found(report.shifts) == CASES[name][2]
    assert all(shift.certificate.verdict == "invariant" for shift in report.shifts), str(report)


@pytest.mark.parametrize("name", CASES)
def test_carrying_a_shift_out_leaves_the_function_alone(name: str) -> None:
    model, x = made(name)
    shifts = mn.diagnose(model, x).shifts
    assert len(shifts) == len(CASES[name][2])
    for shift in shifts:
        for index in {0, shift.count - 1}:
            assert change(model, x, shift, index) <= BRUTE_FORCE_TOLERANCE, str(shift)


@pytest.mark.parametrize("name", [n for n in TOYS if n not in HAND_WRITTEN_EPS])
def test_shifts_of_all_toys_are_true(name: str) -> None:
    model, x = build(TOYS[name]), TOYS[name].inputs()
    report = mn.diagnose(model, x)
    assert not report.refuted_shifts, str(report)
    for shift in report.shifts:
        assert change(model, x, shift, 0) <= BRUTE_FORCE_TOLERANCE, str(shift)


def mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def likelihood(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long))


LOGITS = {("logit shift", "0.bias"): 1, ("row shift", "0.weight"): 5}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("cross_entropy", LOGITS), ("softmax", LOGITS), (likelihood, LOGITS), (mean_square, {}), (None, {})],
)
def test_a_loss_of_logits_absorbs_what_is_added_to_all_of_them(loss: Any, expected: Expected) -> None:
    model, x = made("logits without a loss")
    report = mn.diagnose(model, x, loss=loss)
    assert found(report.shifts) == expected
    assert all(shift.certificate.verdict == "invariant" for shift in report.shifts)


def test_a_loss_that_is_none_is_refused() -> None:
    model, x = made("logits without a loss")
    with pytest.raises(OptionError, match="hinge"):
        mn.diagnose(model, x, loss="hinge")
    with pytest.raises(OptionError, match="TypeError"):
        mn.diagnose(model, x, loss=lambda: torch.zeros(()))


def test_shifts_are_in_the_text_and_in_the_data() -> None:
    report = mn.diagnose(*made("conv-bn"))
    data = json.loads(json.dumps(report.to_dict()))["shifts"]
    assert [(s["kind"], s["parameters"], s["count"]) for s in data] == [("dead bias", ["0.bias"], 6)]
    assert "running_mean" in data[0]["remedy"]
    assert "6 × dead bias: 0.bias · absorbed by 1 (batch_norm)" in str(report)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_biases_of_vgg_are_dead() -> None:
    model = mn.sources.load_model("torchvision:vgg16_bn")
    shifts = mn.diagnose(model, torch.randn(2, 3, 64, 64)).shifts
    assert [s.kind for s in shifts] == ["dead bias"] * 13
    assert sum(s.count for s in shifts) == 4224
    assert all(s.certificate.verdict == "invariant" for s in shifts)
