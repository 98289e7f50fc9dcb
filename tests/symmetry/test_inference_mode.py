"""Analysis and conversion under torch.inference_mode(), where no tensor has a gradient."""

from __future__ import annotations

import contextlib
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import UnsupportedModelError


def made(model_inside: bool, inputs_inside: bool) -> tuple[nn.Sequential, Tensor]:
    """A model and its inputs, each made in inference mode or outside."""
    with torch.inference_mode() if model_inside else contextlib.nullcontext():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with torch.inference_mode() if inputs_inside else contextlib.nullcontext():
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    return model, x


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("model_inside", [True, False])
@pytest.mark.parametrize("inputs_inside", [True, False])
def test_the_answers_are_those_outside(
    model_inside: bool, inputs_inside: bool, memory: Literal["full", "small"]
) -> None:
    expected = mn.diagnose(*made(False, False), memory=memory)
    model, x = made(model_inside, inputs_inside)
    with torch.inference_mode():
        report = mn.diagnose(model, x, memory=memory)
        assert torch.is_inference_mode_enabled()
    assert str(report) == str(expected)
    assert mn.diagnose(model, x, memory=memory).counts() == expected.counts()


@pytest.mark.parametrize("model_inside", [True, False])
def test_a_copy_that_is_converted_there_can_be_trained(model_inside: bool) -> None:
    model, x = made(model_inside, True)
    with torch.inference_mode():
        planned = mn.plan(model, x)
        converted = mn.convert(model, x)
    assert [action.name for action in planned.spheres] == ["0.weight"]
    before = converted[0].weight.detach().clone()
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(converted), lr=0.1)
    converted(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, converted[0].weight.detach())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made(False, False)[0].parameters(), strict=True))


def test_in_place_a_model_that_cannot_be_trained_is_refused_and_another_is_not() -> None:
    model, x = made(False, True)
    with torch.inference_mode():
        assert mn.convert(model, x, inplace=True) is model
        assert mn.diagnose(model, x)["0.weight"].status == "constrained"
    model, x = made(True, True)
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedModelError, match="Leave inplace out"),
    ):
        mn.convert(model, x, inplace=True)
