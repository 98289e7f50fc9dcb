"""Weights of which only some filters are invariant: queries and keys of cosine and linear attention beside values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import NothingToConvertError
from manifold_nets.symmetry.page import page_html
from manifold_nets.symmetry.rules import RULES

HEADS, SIZE, FEATURES = 2, 3, 5


class Attention(nn.Module):
    """Attention with one weight for queries, keys and values; keys have no bias, which is written as zeros."""

    def __init__(self, kind: str, zeros: str) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.kind, self.zeros = kind, zeros
        self.qkv = nn.Linear(FEATURES, 3 * width, bias=zeros == "zeroed")
        if zeros in ("buffer", "stored buffer", "ones"):
            self.q_bias = nn.Parameter(torch.randn(width))
            self.v_bias = nn.Parameter(torch.randn(width))
            fill = torch.ones if zeros == "ones" else torch.zeros
            self.register_buffer("k_bias", fill(width), persistent=zeros == "stored buffer")
        elif zeros == "zeros_like":
            self.q_bias = nn.Parameter(torch.randn(width))
            self.v_bias = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2)

    def bias(self) -> Tensor | None:
        width = HEADS * SIZE
        if self.zeros == "zeroed":
            bias = self.qkv.bias.clone()
            bias[width : 2 * width].zero_()
            return bias
        if self.zeros == "zeros_like":
            return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return torch.cat([self.q_bias, self.k_bias, self.v_bias]) if self.zeros != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.bias()).unflatten(-1, (3, HEADS, SIZE)).movedim(-3, 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kind == "cosine":
            y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v
        else:
            scores = q.abs() @ k.abs().mT
            y = (scores @ v) / scores.sum(-1, keepdim=True)
        return self.out(y.transpose(1, 2).flatten(2))


def report_of(kind: str, zeros: str) -> mn.SymmetryReport:
    torch.manual_seed(1)
    return mn.diagnose(Attention(kind, zeros), torch.randn(4, 7, FEATURES))


def check(report: mn.SymmetryReport, groups: int) -> None:
    """All heads of queries and keys are explained, certified and counted; nothing is left unexplained or claimed."""
    finding = report["qkv.weight"]
    partial = [family for family in report.families if family.partial]
    assert finding.free_groups == sum(family.count for family in partial) == groups
    assert finding.free_filters == groups * SIZE
    assert all(family.certificate.verdict == "invariant" for family in partial)
    assert report.unexplained_groups == 0
    assert not report.refuted_families


@pytest.mark.parametrize("zeros", ["none", "buffer", "zeroed", "zeros_like"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_heads_beside_values_are_explained(kind: str, zeros: str) -> None:
    check(report_of(kind, zeros), 2 * HEADS)


@pytest.mark.parametrize("zeros", ["buffer", "zeroed", "zeros_like"])
def test_without_the_rule_keys_stay_unexplained(zeros: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: zeros that count as entries whose scale is fixed."""
    monkeypatch.setattr("manifold_nets.symmetry.rules.use._MOST_ZEROS", -1)
    monkeypatch.delitem(RULES, "zero")
    with pytest.raises(AssertionError):
        check(report_of("cosine", zeros), 2 * HEADS)


def test_a_bias_of_keys_that_is_not_zero_fixes_their_scale() -> None:
    check(report_of("cosine", "ones"), HEADS)


def test_zeros_that_a_checkpoint_may_replace_are_not_taken_for_granted() -> None:
    report = report_of("cosine", "stored buffer")
    assert report["qkv.weight"].free_groups == HEADS
    assert report.unexplained_groups == HEADS


def test_zeros_may_have_any_scale_but_no_shift() -> None:
    """Half of what a layer normalization reads is shifted, which it sees."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))
            self.register_buffer("none", torch.zeros(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x + torch.cat([self.bias, self.none]), (8,))

    report = mn.diagnose(Half(), torch.randn(5, 8))
    assert report.shifts == ()
    assert report.unexplained == ()


def test_they_are_left_with_the_reason_and_printed() -> None:
    torch.manual_seed(1)
    model, x = Attention("cosine", "buffer"), torch.randn(4, 7, FEATURES)
    report = mn.diagnose(model, x)
    with pytest.raises(NothingToConvertError, match="4 groups of its filters, 12 of 18, are invariant by themselves"):
        mn.convert(model, report, remedies="all", exclude="*bias")
    finding = report["qkv.weight"]
    assert "parameter of their own" in finding.remedy
    data: Any = report.to_dict()
    assert [w["free_groups"] for w in data["weights"] if w["name"] == "qkv.weight"] == [4]
    assert [f["convert_remedy"] for f in data["families"] if f["partial"]] == [None, None]
    assert "or of some filters of a weight" in str(report)
    assert "12 of 18, are invariant by themselves" in page_html(report, model)
