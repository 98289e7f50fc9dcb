"""Wrong answers are worse than none: faults planted in the rules, and networks made to mislead, are all caught.

A fault in a rule makes the structure claim what is not so. It is caught where the certificate contradicts the claim:
a disagreement for a weight, a refuted family, a refuted shift. Each fault is preceded by the same check without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diagnosis_cases import (
    BRUTE_FORCE_TOLERANCE,
    MADE,
    PLANTED,
    Rule,
    build,
    toy,
)
from helpers.shift_cases import change, made
from helpers.toy_networks import TOYS, Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry.rules import RULES, SHIFT_RULES, elementwise


class JumpReLU(nn.Module):
    """A sparse autoencoder with one threshold a feature, which is a parameter, or follows from one."""

    def __init__(self, *, logarithm: bool) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 24), nn.Linear(24, 8)
        self.threshold, self.logarithm = nn.Parameter(torch.full((24,), -0.9 if logarithm else 0.4)), logarithm

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(x)
        return self.dec(torch.relu(h) * (h > (self.threshold.exp() if self.logarithm else self.threshold)))


def before_normalization(cut: Callable[[Tensor], Tensor]) -> nn.Module:
    """A layer, an operation on its result, and a normalization."""
    return Lambda(
        lambda m, x: m.out(m.norm(cut(m.fc(x)))),
        fc=nn.Linear(6, 8, bias=False), norm=nn.BatchNorm1d(8), out=nn.Linear(8, 3),
    )  # fmt: skip


# None of these sees a small change of scale on the example inputs: only a move that is finite shows the difference.
JUMPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a comparison with a constant": (lambda h: h * (h.abs() < 4), "lt.Scalar"),
    "a comparison with a tensor": (lambda h: h * (h < torch.full_like(h, 4.0)), "lt.Tensor"),
    "the smaller of two": (lambda h: torch.min(torch.relu(h), torch.tensor(4.0, dtype=h.dtype)), "min.other"),
    "integers": (lambda h: h * (1 + h.long()), "to.dtype"),
    "a sign": (lambda h: h * torch.sign(h - 4), "sub.Tensor"),
    "a bound": (lambda h: h.clamp(0, 4), "clamp"),
    "order across channels": (lambda h: h * (h >= h.amax(1, keepdim=True) - 2), "sub.Tensor"),
}


def far_change(model: nn.Module, x: Tensor, groups: int) -> float:
    """Relative change of the output in training mode as the filters move by random factors, on inputs farther out."""
    model, x = copy.deepcopy(model).double().train(), 3 * x.double()
    generator = torch.Generator().manual_seed(2)
    factors = 10 ** (4 * torch.rand(groups, 1, generator=generator, dtype=torch.float64) - 2)
    model.norm.eps = 1e-30
    with torch.no_grad():
        before = model(x)
        model.fc.weight *= factors
        return float((model(x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", JUMPS)
def test_a_jump_is_not_called_invariant(name: str) -> None:
    cut, _ = JUMPS[name]
    torch.manual_seed(0)
    model, x = before_normalization(cut), torch.randn(32, 6)
    report = mn.diagnose(model, x)
    weight = report["fc.weight"]
    assert weight.status in ("not invariant", "unknown")
    assert not report.disagreements
    assert far_change(model, x, 8) > 1e-3


@pytest.mark.parametrize("name", ["a comparison with a constant", "the smaller of two", "a bound"])
def test_a_jump_that_the_rules_overlook_changes_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the claim that a rule without its condition makes is not true far from the weights."""
    cut, key = JUMPS[name]
    torch.manual_seed(0)
    model, x = before_normalization(cut), torch.randn(32, 6)
    monkeypatch.setitem(RULES, key, elementwise.sign if key == "lt.Scalar" else elementwise.passes)
    assert mn.diagnose(model, x)["fc.weight"].partition is not None
    with pytest.raises(AssertionError):
        assert far_change(model, x, 8) <= BRUTE_FORCE_TOLERANCE


def test_the_threshold_of_a_jump_moves_along() -> None:
    torch.manual_seed(0)
    model, x = JumpReLU(logarithm=False), torch.randn(64, 8)
    (family,) = mn.diagnose(model, x).families
    assert set(family.parameters) == {"enc.weight", "enc.bias", "threshold", "dec.weight"}
    converted = mn.convert(model, x, remedies="balance")
    assert mn.verify(model, converted, 5 * x).eval_difference <= 1e-5


def test_a_threshold_that_cannot_move_along_allows_no_rescaling() -> None:
    """The sabotage twin of the test above."""
    torch.manual_seed(0)
    model, x = JumpReLU(logarithm=True), torch.randn(64, 8)
    assert not [family for family in mn.diagnose(model, x).families if "enc.weight" in family.parameters]


def test_a_cautious_rule_leaves_a_weight_unknown_and_says_why() -> None:
    torch.manual_seed(0)
    cautious = before_normalization(lambda h: torch.where(h > 1e9, torch.ones_like(h), h))
    found = mn.diagnose(cautious, torch.randn(32, 6))["fc.weight"]
    assert found.certificate.verdict == "invariant"
    assert found.status == "not invariant"  # the comparison jumps for certain
    assert "compares with the constant" in str(found.broken_by)
    cautious = before_normalization(lambda h: torch.where(torch.zeros_like(h) > 0, torch.ones_like(h), h))
    found = mn.diagnose(cautious, torch.randn(32, 6))["fc.weight"]
    assert found.certificate.verdict == "invariant"
    assert found.status == "unknown"
    assert "chooses between it and something that is not scaled with it" in str(found.broken_by)
    for undone, why in (
        (lambda h: h.abs().log(), "turns its scale into a shift"),
        (lambda h: h.abs() ** (p := torch.full((), 1.5)) ** (1 / p), "has exponents that are not constant numbers"),
    ):
        found = mn.diagnose(before_normalization(undone), torch.randn(32, 6))["fc.weight"]
        assert found.certificate.verdict == "invariant"
        assert found.status == "unknown"
        assert why in str(found.broken_by)
    smooth = before_normalization(lambda h: torch.where(torch.zeros_like(h) > 0, torch.sigmoid(h), h))
    assert mn.diagnose(smooth, torch.randn(32, 6))["fc.weight"].status == "disagreement"


@pytest.mark.parametrize("name", MADE)
def test_networks_made_to_mislead_are_not_called_invariant(name: str) -> None:
    report = mn.diagnose(build(MADE[name]), MADE[name].inputs())
    assert not report.invariant
    assert all(w.certificate.verdict == "not invariant" for w in report.weights)
    assert not report.disagreements
    assert not report.refuted_families


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_a_rule_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, op, wrong = PLANTED[fault]
    assert not mn.diagnose(build(toy(name)), toy(name).inputs()).disagreements
    monkeypatch.setitem(RULES, op, wrong)
    report = mn.diagnose(build(toy(name)), toy(name).inputs())
    assert report.disagreements, str(report)


@pytest.mark.parametrize("fault", PLANTED)
def test_no_conversion_trusts_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that structure alone claims is put on spheres."""
    name, op, wrong = PLANTED[fault]
    model, x = build(toy(name)), toy(name).inputs()
    monkeypatch.setitem(RULES, op, wrong)
    report = mn.diagnose(model, x)
    spheres = {action.name for action in mn.plan(model, report).spheres}
    assert spheres.isdisjoint(w.name for w in report.disagreements)


def test_a_convolution_used_twice_of_which_one_use_is_overlooked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = TOYS["shared weight with a bypass"]
    assert not mn.diagnose(build(shared), shared.inputs()).disagreements
    original = RULES["conv2d"]
    seen: list[Any] = []

    def first_use_only(use: Any) -> Any:
        seen.append(use.node)
        return original(use) if use.node is seen[0] else None

    monkeypatch.setitem(RULES, "conv2d", first_use_only)
    assert mn.diagnose(build(shared), shared.inputs()).disagreements


def test_a_rescaling_that_leaks_through_a_gate_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = TOYS["squeeze-excite"]
    assert not mn.diagnose(build(gate), gate.inputs()).refuted_families
    monkeypatch.setitem(RULES, "sigmoid", elementwise.passes)
    assert mn.diagnose(build(gate), gate.inputs()).refuted_families


SHIFT_FAULTS: dict[str, tuple[str, str, Rule]] = {
    "relu": ("conv-relu-bn", "relu", lambda use: use.label("self")),
    "a mean that is not subtracted": ("linear-rms", "rms_norm", lambda use: SHIFT_RULES["layer_norm"](use)),
    "zeros of the padding": ("conv-padded mean-bn", "avg_pool2d", lambda use: use.label("self")),
    "zeros beyond the border": ("grid sampler, zeros beyond the border", "grid_sampler", elementwise.passes),
    "distances": ("distances", "cdist", lambda use: use.absorb("difference", use.ids("x1"))),
    "the larger of two": ("larger of two, one fixed", "max.other", lambda use: use.label("self")),
    "queries": ("stream", "scaled_dot_product_attention", lambda use: use.absorb("softmax", use.label("query").ids)),
}


@pytest.mark.parametrize("fault", SHIFT_FAULTS)
def test_a_fault_in_a_rule_of_shifts_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, op, wrong = SHIFT_FAULTS[fault]
    model, x = made(name)
    assert not mn.diagnose(model, x).refuted_shifts
    monkeypatch.setitem(SHIFT_RULES, op, wrong)
    refuted = mn.diagnose(model, x).refuted_shifts
    assert refuted
    with pytest.raises(AssertionError):
        assert all(change(model, x, shift, 0) <= BRUTE_FORCE_TOLERANCE for shift in refuted)
