"""Outputs that hold infinities or NaN in fixed places, as masks leave them: no change there, but any other one is."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.conversion.verify import compare_outputs, eval_limit
from manifold_nets.models import duplicate

verify_module = importlib.import_module("manifold_nets.conversion.verify")  # the package has a function of this name

INF, NAN = math.inf, math.nan


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
    monkeypatch.setattr("manifold_nets.conversion.moves.rescaled_variance", lambda v, eps, factor: 1.01 * v * factor**2)
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


@pytest.mark.parametrize(("fault", "told"), [(None, None), ("bias", "bias is not what it is in a float64 copy")])
def test_buffers_that_hold_infinities_are_their_own_rounding(fault: str | None, told: str | None) -> None:
    model, x = Masked(-INF), torch.randn(8, 6)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if fault is not None:
        values[fault][2] = 0.0
    found = verify_module.compare_in_float64(duplicate(model), values, x, lambda twin: None)
    assert found == verify_module.Float64Comparison(0.0, told and f"{told}, rounded")
