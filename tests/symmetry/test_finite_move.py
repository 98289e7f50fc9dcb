"""The third witness: jumps that no derivative sees and rules that are wrong are caught by carrying claims out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import BRUTE_FORCE_TOLERANCE, build
from helpers.toy_networks import TOYS, Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import NothingToConvertError
from manifold_nets.groups import Partition
from manifold_nets.models import analysis_copy
from manifold_nets.running import split_inputs, to_float64
from manifold_nets.symmetry import finite_move
from manifold_nets.symmetry.finite_move import FiniteMove
from manifold_nets.symmetry.generators import Generators, Part
from manifold_nets.symmetry.gradients import gradient_pass
from manifold_nets.symmetry.rules import RULES, SHIFT_RULES

WIDTH = 8


def behind(cut: Callable[[Tensor], Tensor]) -> Lambda:
    """A linear map, an operation, a batch normalization, and another linear map."""
    torch.manual_seed(0)
    return Lambda(
        lambda m, x: m.out(m.norm(cut(m.fc(x)))),
        fc=nn.Linear(6, WIDTH, bias=False), norm=nn.BatchNorm1d(WIDTH), out=nn.Linear(WIDTH, 3),
    )  # fmt: skip


def six(h: Tensor) -> Tensor:
    return torch.min(torch.relu(h), torch.tensor(6.0, dtype=h.dtype))


# Operations of which structure and derivative are made to say that they let a scale pass.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "entries above a constant are cut off": lambda h: h * (h.abs() < 4),
    "entries below a constant are cut off": lambda h: h * (h.abs() > 0.3),
    "a bound in another tensor": six,
    "a sign against a constant": lambda h: h * torch.sign(h - 1),
}


def wrong_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules as they must not be: a comparison, a sign and a minimum of two tensors let every scale pass."""

    def blind(use: Any) -> Any:
        return None

    def passes(use: Any) -> Any:
        return use.label("self")

    for name in ("lt", "gt", "sign"):
        for overload in ("", ".Scalar", ".Tensor", ".default"):
            monkeypatch.setitem(RULES, name + overload, blind)
    for name in ("min", "minimum"):
        for overload in ("", ".other", ".default"):
            monkeypatch.setitem(RULES, name + overload, passes)
    plain = RULES.get("sub") or RULES["sub.Tensor"]

    def lets_constants_pass(use: Any) -> Any:
        return use.label("self") if not isinstance(use.args["other"], torch.fx.Node) else plain(use)

    monkeypatch.setitem(RULES, "sub" if "sub" in RULES else "sub.Tensor", lets_constants_pass)


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("name", CUTS)
def test_a_wrong_rule_is_contradicted_and_nothing_is_converted(
    name: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_rules(monkeypatch)
    model, x = behind(CUTS[name]), torch.randn(32, 6)
    report = mn.diagnose(model, x, memory=memory)
    finding = report["fc.weight"]
    assert finding.status == "disagreement", str(report)
    assert finding.certificate.moved is not None
    assert finding.certificate.moved > 1e-3
    assert f"a finite move changes the outputs by {finding.certificate.moved:.2g}" in str(report)
    assert finding.certificate.verdict == "not invariant"
    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["certificate"]["moved"] == finding.certificate.moved
    with pytest.raises(NothingToConvertError, match="a finite move changes the outputs"):
        mn.convert(model, report)


@pytest.mark.parametrize("name", CUTS)
def test_without_the_move_it_is_called_invariant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: the derivative alone sees nothing, which is what makes these cases hard."""
    wrong_rules(monkeypatch)
    monkeypatch.setattr(finite_move, "_DECADES", 0.0)
    assert mn.diagnose(behind(CUTS[name]), torch.randn(32, 6))["fc.weight"].status == "invariant"


@pytest.mark.parametrize("seed", range(20))
def test_it_is_caught_whatever_the_factors(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_rules(monkeypatch)
    for name in ("entries above a constant are cut off", "a bound in another tensor"):
        assert mn.diagnose(behind(CUTS[name]), torch.randn(32, 6), seed=seed)["fc.weight"].status == "disagreement"


def test_a_threshold_for_each_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse autoencoder: its rescaling is refuted, and `balance` leaves it."""
    wrong_rules(monkeypatch)
    model = Lambda(
        lambda m, z: m.dec(torch.relu(m.enc(z)) * (m.enc(z) > m.threshold)), enc=nn.Linear(8, 24), dec=nn.Linear(24, 8)
    )
    model.threshold = nn.Parameter(torch.full((24,), 0.4))
    report = mn.diagnose(model, torch.randn(64, 8))
    assert report.refuted_families
    assert all(family.convert_remedy is None for family in report.families)
    with pytest.raises(NothingToConvertError):
        mn.convert(model, report, remedies="balance")


def test_structure_that_refuses_a_jump_is_right_against_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disagreement: the move refutes what the derivative shows."""
    for overload in ("", ".Scalar"):
        monkeypatch.setitem(RULES, "lt" + overload, lambda use: use.refuse("compares with 4", certainty="smooth"))
    finding = mn.diagnose(behind(CUTS["entries above a constant are cut off"]), torch.randn(32, 6))["fc.weight"]
    assert finding.partition is None
    assert finding.status == "not invariant"
    assert "a finite move changes the outputs" in str(finding.certificate)


def test_a_wrong_rule_for_shifts_is_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rectifier that is active everywhere has the derivative of the identity."""

    def passes(use: Any) -> Any:
        return use.label("self")

    for key in ("relu", "relu.default"):
        monkeypatch.setitem(SHIFT_RULES, key, passes)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6))
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    (shift,) = mn.diagnose(model, torch.randn(12, 5)).refuted_shifts
    assert "a finite move changes the outputs" in str(shift)
    assert shift.convert_remedy is None
    monkeypatch.setattr(finite_move, "_draws", lambda claim, seed, number: np.zeros(claim.count))
    assert not mn.diagnose(model, torch.randn(12, 5)).refuted_shifts


# ---- no false alarms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("name", TOYS)
def test_true_claims_change_nothing_but_rounding(name: str, memory: Any) -> None:
    report = mn.diagnose(build(TOYS[name]), TOYS[name].inputs(), memory=memory)
    found = [*report.weights, *report.families, *report.shifts]
    assert not report.disagreements + report.refuted_families + report.refuted_shifts, str(report)
    moved = [f.certificate.moved for f in found if f.certificate.moved is not None]
    assert moved or not report.invariant
    assert max(moved, default=0.0) <= BRUTE_FORCE_TOLERANCE


class Remembers(nn.Module):
    """Keeps its last mean in a buffer, its last sum as an attribute, counts its calls, and adds noise."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.counts, self.calls = nn.Linear(5, 6), nn.BatchNorm1d(6), counts, [0]
        self.register_buffer("mean", torch.zeros(6))
        self.last = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x)) + self.mean + self.last + torch.randn(6, dtype=x.dtype)
        self.mean = self.mean + y.detach().mean(0)
        self.last = self.last + 1
        self.calls[0] += 1
        return y * self.calls[0] if self.counts else y


@pytest.mark.parametrize("counts", [False, True])
def test_what_a_network_remembers_or_draws_is_no_change(counts: bool) -> None:
    model = Remembers(counts=counts)
    report = mn.diagnose(model, torch.randn(12, 5))
    assert not report.disagreements + report.refuted_families + report.refuted_shifts, str(report)
    assert int(model.calls[0]) == 0
    assert not bool(model.mean.any())


def test_channels_without_variance_are_no_change() -> None:
    """Identical rows: what normalizations make of them is rounding."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6), nn.BatchNorm1d(6))
    report = mn.diagnose(model, torch.full((7, 5), 0.3))
    assert not report.disagreements + report.refuted_families + report.refuted_shifts, str(report)


def test_an_eps_that_cannot_be_reached_is_moved_away_from() -> None:
    """Groups that shrink come near to it; groups that grow do not."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        return y / torch.add(y.square().sum(-1, keepdim=True).sqrt(), other=1e-9)

    model = Lambda(forward, a=nn.Linear(5, 6, bias=False))
    finding = mn.diagnose(model, torch.randn(12, 5))["a.weight"]
    assert (finding.status, finding.certificate.verdict) == ("invariant", "invariant"), str(finding)


def test_larger_inputs_that_are_refused_are_left_out() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and float(x.abs().max()) > 8:
            raise ValueError("out of range")
        return m.n(m.a(x))

    report = mn.diagnose(Lambda(forward, a=nn.Linear(5, 6), n=nn.BatchNorm1d(6)), torch.rand(12, 5) + 1)
    assert not report.disagreements


# ---- the search for what fails ---------------------------------------------------------------------------------------


def three() -> tuple[FiniteMove, list[Generators]]:
    """Three matrices in front of normalizations, and their claims, of which the second is a lie."""
    torch.manual_seed(3)
    model = Lambda(
        lambda m, x: m.n(m.a(x)) + torch.tanh(m.b(x)) + m.k(m.c(x)), a=nn.Linear(5, 6), b=nn.Linear(5, 6),
        c=nn.Linear(5, 6), n=nn.BatchNorm1d(6), k=nn.BatchNorm1d(6),
    )  # fmt: skip
    twin, inputs = analysis_copy(model), to_float64(split_inputs(torch.randn(9, 5)))
    move = FiniteMove(twin, inputs, gradient_pass(twin, inputs, 0), 1, 1e-8)
    rows, numbers = Partition.filters((6, 5)), np.arange(6)
    claims = []
    for name in "abc":
        bias = Part(f"{name}.bias", Partition((6,), (6,), (0,)), numbers, numbers, np.ones(6))
        claims.append(Generators((Part(f"{name}.weight", rows, numbers, numbers, np.ones(6)), bias), 6))
    return move, claims


def test_bisection_finds_the_claim_that_fails() -> None:
    move, claims = three()
    assert [outcome.refuted for outcome in move.outcomes(claims)] == [False, True, False]
    before = move.runs
    assert [outcome.refuted for outcome in move.outcomes([claims[0], claims[2]])] == [False, False]
    assert move.runs - before == 2  # the outputs of what is not moved are known


def test_half_of_a_claim_fails() -> None:
    """Sabotage twin: the bias that has to follow stays, or follows to the wrong power."""
    for coefficient in (0.0, 2.0):
        move, claims = three()
        weight, bias = claims[0].parts
        wrong = Generators((weight, replace(bias, coefficients=coefficient * np.ones(6))), 6)
        # A bias in front of a batch normalization is dead: only together with what it is divided by it matters.
        assert not move.outcomes([wrong])[0].refuted
        columns = Partition((6, 5), (6, 5), (1,))
        wrong = Generators((Part("a.weight", columns, np.arange(5), np.arange(5), np.ones(5)),), 5)
        assert move.outcomes([wrong])[0].refuted


def test_what_holds_for_equal_factors_only_fails() -> None:
    """A residual stream of two matrices that a normalization absorbs together, claimed one by one."""
    model = Lambda(
        lambda m, x: m.n(m.a(x) + m.b(x.flip(0))),
        a=nn.Linear(5, 6, bias=False), b=nn.Linear(5, 6, bias=False), n=nn.LayerNorm(6),
    )  # fmt: skip
    twin, inputs = analysis_copy(model), to_float64(split_inputs(torch.randn(9, 5)))
    whole, one = Partition.whole((6, 5)), (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.ones(1))
    a, b = (Part(f"{name}.weight", whole, *one) for name in "ab")
    for together, expected in (([(a, b)], [False]), ([(a,), (b,)], [True, True])):
        move = FiniteMove(twin, inputs, gradient_pass(twin, inputs, 0), 1, 1e-8)
        claims = [Generators(parts, 1) for parts in together]
        assert [outcome.refuted for outcome in move.outcomes(claims)] == expected


def test_what_is_not_cleared_when_the_search_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    move, claims = three()
    monkeypatch.setattr(finite_move, "MOST_RUNS", 3)
    assert [outcome.refuted for outcome in move.outcomes(claims)] == [True, True, True]


def test_the_copy_is_left_as_it_was() -> None:
    move, claims = three()
    before = {name: value.clone() for name, value in move.model_copy.state_dict().items()}
    move.outcomes(claims)
    assert all(torch.equal(before[name], value) for name, value in move.model_copy.state_dict().items())


# ---- shifts far out, and what the numbers alone show -----------------------------------------------------------------


class Points(nn.Module):
    """The largest of many rectified features nearly always is positive, and does not see a bias until it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.bn2, self.out = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bn2(self.fc(torch.relu(self.bn(self.conv(x))).amax(2))))


@pytest.mark.parametrize("seed", range(3))
def test_a_shift_that_holds_nearby_only_is_not_reported(seed: int) -> None:
    torch.manual_seed(seed)
    assert mn.diagnose(Points(), torch.randn(8, 3, 64), seed=seed).unexplained_shifts == 0


def test_moved_by_little_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(finite_move, "_DECADES", 0.0)
    assert mn.diagnose(Points(), torch.randn(8, 3, 64)).unexplained_shifts == 16


def test_constants_added_to_all_logits_are_no_change_to_their_loss() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    report = mn.diagnose(model, torch.randn(12, 5), loss=lambda y: F.cross_entropy(y, y.argmax(1)))
    assert {s.kind for s in report.shifts} == {"logit shift", "row shift"}
    assert not report.refuted_shifts


def small_filter() -> tuple[nn.Module, Tensor]:
    """A filter whose variance comes near to the eps of the analysis once it is made smaller still."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight[2] *= 2.0**-33
    return model, torch.randn(8, 3, 7, 7)


def test_a_small_filter_is_no_contradiction() -> None:
    report = mn.diagnose(*small_filter())
    assert report["3.weight"].certificate.groups_certified == 4
    assert not report.disagreements + report.refuted_families


def test_with_the_usual_eps_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(finite_move, "_SMALLER_EPS", finite_move.NEGLIGIBLE_EPS)
    model, x = small_filter()
    assert any(mn.diagnose(model, x, seed=seed).disagreements for seed in range(8))
