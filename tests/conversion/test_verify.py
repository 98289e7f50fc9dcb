"""How models are compared: where outputs hold infinities or NaN, and where a network magnifies rounding."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.conversion import apply as apply_module
from manifold_nets.conversion import moves as moves_module
from manifold_nets.conversion.verify import compare_outputs, eval_limit
from manifold_nets.errors import FunctionChangedError

verify_module = importlib.import_module("manifold_nets.conversion.verify")  # the package has a function of this name
INF, NAN = math.inf, math.nan

# ---- networks that magnify rounding: converted where float64 copies agree, and refused where not ---------------------


class NearTies(nn.Module):
    """A max-unpooling of two features that differ by about one rounding of float32: which is larger, rounding says."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            row = self.features.weight[0].clone()
            self.features.weight[1] = (row / 2) * (1 + 3 * torch.finfo(torch.float32).eps * torch.randn(4))
            self.features.bias.zero_()
            self.norm.running_mean.normal_()
            self.norm.running_mean[1] = self.norm.running_mean[0] / 2
            self.norm.running_var[1] = (1 + self.norm.eps) / 4 - self.norm.eps

    def forward(self, x: Tensor) -> Tensor:
        largest, index = nn.functional.max_pool1d(self.norm(self.features(x))[:, None], 2, return_indices=True)
        return self.head(nn.functional.max_unpool1d(largest, index, 2)[:, 0])


@pytest.fixture
def near_ties() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NearTies(), torch.randn(400, 4)


@pytest.mark.parametrize("inplace", [False, True])
def test_rounding_is_told_from_a_change(near_ties: tuple[nn.Module, Tensor], inplace: bool) -> None:
    model, x = near_ties
    exact = mn.convert(copy.deepcopy(model).double(), x.double())
    converted = mn.convert(model, x, inplace=inplace)
    record = mn.conversion_record(converted)
    assert record is not None
    found = record.verification
    assert found.eval_difference > eval_limit(torch.float32)
    assert found.float64_eval_difference is not None
    assert found.float64_eval_difference <= eval_limit(torch.float64)
    assert "in float64" in str(record)
    for name, value in converted.state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[name].to(value.dtype), rtol=1e-6, atol=0)


def test_float64_is_not_asked_where_float32_agrees() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    record = mn.conversion_record(mn.convert(model, torch.randn(8, 4)))
    assert record is not None
    assert record.verification.float64_eval_difference is None


def refused(model: nn.Module, x: Tensor, why: str) -> None:
    """A wrong conversion is refused, and the model is left as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = ""
    try:
        mn.convert(model, x, inplace=True)
    except FunctionChangedError as error:
        told = str(error)
    assert told, "a wrong conversion was accepted"
    assert why in told
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def plant_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that float64 copies do not have: a bias is off by a thousandth."""
    original = apply_module._carry_out

    def faulty(model: Any, chosen: Any) -> Any:
        undo = original(model, chosen)
        if model.features.weight.dtype == torch.float32:
            with torch.no_grad():
                model.norm.running_mean *= 1.001
        return undo

    monkeypatch.setattr(apply_module, "_carry_out", faulty)


def test_a_fault_in_the_lower_precision_is_refused(
    near_ties: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_in_float32(monkeypatch)
    refused(*near_ties, "norm.running_mean differs from its value in a float64 copy")


def test_a_fault_in_the_formula_is_refused(
    near_ties: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves_module, "rescaled_variance", lambda variance, eps, factor: 1.01 * variance * factor**2)
    refused(*near_ties, "float64 copies differ by")


def test_without_the_comparison_of_values_the_fault_would_pass(
    near_ties: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin: outputs in float64 alone say nothing about values in float32."""
    plant_in_float32(monkeypatch)
    monkeypatch.setattr(verify_module, "_is_rounded", lambda value, exact: True)
    with pytest.raises(AssertionError, match="was accepted"):
        refused(*near_ties, "")


# ---- outputs with infinities or NaN in fixed places, as masks leave them ---------------------------------------------


class Masked(nn.Module):
    """A policy that may not take one of its actions: the logit there is a fill of the caller's choice."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("mask", torch.tensor([False, False, True, False]))
        self.register_buffer("bias", torch.tensor([0.0, 0.0, fill, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(self.mask, 0.0) + self.bias


@pytest.mark.parametrize("fill", [-INF, INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", ["unit", "keep"])
def test_a_network_with_masked_outputs_is_converted(fill: float, dtype: torch.dtype, radius: str) -> None:
    model, x = Masked(fill).to(dtype), torch.randn(8, 6, dtype=dtype)
    converted = mn.convert(model, x, radius=radius)
    record = mn.conversion_record(converted)
    assert record is not None
    assert record.verification.eval_difference <= eval_limit(dtype)
    assert record.verification.train_difference <= 1e-3
    assert mn.verify(converted, mn.revert(converted), x) == mn.conversion.Verification(0.0, 0.0)


def test_a_change_beside_a_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the running variances are wrong; the mask must not hide what that does to the other outputs."""
    monkeypatch.setattr(moves_module, "rescaled_variance", lambda v, eps, factor: 1.01 * v * factor**2)
    with pytest.raises(mn.errors.FunctionChangedError):
        mn.convert(Masked(-INF), torch.randn(8, 6))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, -INF, INF, NAN], [1.0, -INF, INF, NAN], 0.0),
        ([-INF, -INF], [-INF, -INF], 0.0),
        ([4.0, -INF, 1.0], [4.0, -INF, 2.0], 0.25),
        ([4.0, NAN, 1.0], [4.0, NAN, 2.0], 0.25),
        ([1.0, -INF], [1.0, INF], INF),
        ([1.0, -INF], [1.0, NAN], INF),
        ([1.0, -INF], [1.0, 0.0], INF),
        ([1.0, 0.0], [1.0, -INF], INF),
        ([1.0, NAN], [1.0, 0.0], INF),
        ([1.0, 0.0], [1.0, NAN], INF),
        ([-INF, 1.0], [1.0, -INF], INF),
        ([0.0, -INF], [1.0, -INF], INF),
    ],
)
def test_places_without_a_number(before: list[float], after: list[float], expected: float) -> None:
    outputs = [{"eval": [torch.tensor(values)], "train": []} for values in (before, after)]
    assert compare_outputs(*outputs).eval_difference == expected


def test_a_difference_that_skips_what_is_no_number_hides_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: entries that are no numbers are passed over, wherever they are."""
    monkeypatch.setattr(verify_module, "_relative", lambda a, b: float((a - b).nan_to_num(0, 0, 0).abs().max()))
    with pytest.raises(AssertionError):
        test_places_without_a_number([1.0, 0.0], [1.0, NAN], INF)


@pytest.mark.parametrize(("fault", "told"), [(None, None), ("bias", "bias differs from its value in a float64 copy")])
def test_buffers_that_hold_infinities_are_their_own_rounding(fault: str | None, told: str | None) -> None:
    model, x = Masked(-INF), torch.randn(8, 6)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if fault is not None:
        values[fault][2] = 0.0
    found = verify_module.compare_in_float64(copy.deepcopy(model), values, x, lambda twin: None)
    assert found == (0.0, told and f"{told} by more than rounding")
