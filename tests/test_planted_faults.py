"""Wrong answers are worse than none: faults planted in the rules, and networks made to mislead, are all caught.

A fault in a rule makes the structure claim what is not so. It is caught where the certificate contradicts the claim:
a disagreement for a weight, a refuted family, a refuted shift. Each fault is preceded by the same check without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_diagnose import BRUTE_FORCE_TOLERANCE, build
from test_shifts import change, made
from torch import Tensor, nn
from toy_networks import TOYS, Lambda, Toy

import manifold_nets as mn
from manifold_nets.symmetry.structure.rules import RULES, elementwise, normalization
from manifold_nets.symmetry.structure.rules.shift_use import SHIFT_RULES

Rule = Callable[[Any], Any]


def always_passes(use: Any) -> Any:
    return elementwise.homogeneous(use)


def always_absorbs(use: Any) -> Any:
    use.args["training"] = True
    return normalization.per_channel(use)


def absorbs_in_a_quotient(use: Any) -> Any:
    """Take any division for one by a statistic of what is divided."""
    label = use.label("self")
    if label is not None:
        use.absorb("quotient", label.ids)


class RunningScale(nn.Module):
    """A normalization by a scale that is stored or learned: it does not follow the weights."""

    def __init__(self, width: int, *, learned: bool) -> None:
        super().__init__()
        scale = 1 + torch.rand(width)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def gated(m: Lambda, x: Tensor) -> Tensor:
    """A sum of a normalized path and of one that leaks the scale through a gate."""
    y = m.c(x)
    return m.n(y) * torch.sigmoid(y.mean((2, 3), keepdim=True))


MADE = {
    "leaking gate": Toy(lambda: Lambda(gated, c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)), (4, 3, 9, 9), {}),
    "leaking tanh": Toy(
        lambda: Lambda(lambda m, x: m.n(m.c(x)) + torch.tanh(m.c(x)), c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)),
        (4, 3, 9, 9),
        {},
    ),
    "learned scale": Toy(lambda: nn.Sequential(nn.Linear(5, 6), RunningScale(6, learned=True)), (8, 5), {}),
    "running scale": Toy(lambda: nn.Sequential(nn.Linear(5, 6), RunningScale(6, learned=False)), (8, 5), {}),
    "bypass": Toy(
        lambda: Lambda(lambda m, x: (m.n(m.c(x)), m.c(x)), c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)), (4, 3, 9, 9), {}
    ),
    "used twice": Toy(
        lambda: Lambda(lambda m, x: m.n(m.a(x)) @ m.a.weight, a=nn.Linear(5, 6, bias=False), n=nn.BatchNorm1d(6)),
        (8, 5),
        {},
    ),
}


def toy(name: str) -> Toy:
    return MADE[name] if name in MADE else TOYS[name]


@pytest.mark.parametrize("name", MADE)
def test_networks_made_to_mislead_are_not_called_invariant(name: str) -> None:
    report = mn.diagnose(build(MADE[name]), MADE[name].inputs())
    assert not report.invariant
    assert all(w.certificate.verdict == "not invariant" for w in report.weights)
    assert not report.disagreements
    assert not report.refuted_families


PLANTED: dict[str, tuple[str, str, Rule]] = {
    "a wrong rule for tanh": ("tanh", "tanh", always_passes),
    "a scale leaking through a tanh beside the normalization": ("leaking tanh", "tanh", lambda use: None),
    "a scale leaking through a sigmoid gate": ("squeeze-excite", "sigmoid", lambda use: None),
    "a scale leaking through a gate behind the normalization": ("leaking gate", "sigmoid", lambda use: None),
    "a frozen normalization taken for a live one": ("frozen bn", "batch_norm", always_absorbs),
    "a running scale taken for a statistic": ("running scale", "div.Tensor", absorbs_in_a_quotient),
    "a learned scale taken for a statistic": ("learned scale", "div.Tensor", absorbs_in_a_quotient),
    "an output that bypasses the normalization": ("dense with a bypass", "cat", lambda use: None),
    "a residual sum whose other branch is forgotten": (
        "pre-activation residual",
        "add.Tensor",
        lambda use: use.label("other"),
    ),
    "a normalization taken for one that does not exist": ("conv2d-bn", "batch_norm", lambda use: use.label("input")),
    "a second use of the weight that is overlooked": ("used twice", "matmul", lambda use: None),
}


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
    monkeypatch.setitem(RULES, "sigmoid", elementwise.homogeneous)
    assert mn.diagnose(build(gate), gate.inputs()).refuted_families


SHIFT_FAULTS: dict[str, tuple[str, str, Rule]] = {
    "relu": ("conv-relu-bn", "relu", lambda use: use.label("self")),
    "a mean that is not subtracted": ("linear-rms", "rms_norm", lambda use: SHIFT_RULES["layer_norm"](use)),
    "zeros of the padding": ("conv-padded mean-bn", "avg_pool2d", lambda use: use.label("self")),
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
