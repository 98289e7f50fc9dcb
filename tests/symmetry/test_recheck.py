"""Shifts that the numbers show and the structure explains when it is asked for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from click.testing import CliRunner
from helpers.diagnosis_cases import BRUTE_FORCE_TOLERANCE
from helpers.shift_cases import change, found
from helpers.toy_networks import Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.cli import main

ROWS, SEQUENCE, IMAGE = (6, 5), (4, 7, 5), (4, 3, 9, 9)
L = nn.Linear


def outlook(m: Any, x: Tensor) -> Tensor:
    """Attention whose weights a linear map makes, three softmaxes over four values each."""
    weights = m.a(x).unflatten(-1, (3, 4)).softmax(-1)
    return (weights * m.b(x).unflatten(-1, (3, 4))).sum(-1)


def two_heads(m: Any, x: Tensor, talk: bool) -> Tensor:
    """Attention of two heads, of which a pointwise convolution may mix the logits."""
    q, k = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in (m.q(x), m.k(x)))
    logits = q @ k.transpose(-1, -2)
    return (m.mix(logits) if talk else logits).softmax(-1) @ x[:, None]


def relative(m: Any, x: Tensor) -> Tensor:
    """Attention with logits of relative positions, which padding and reshaping move to where they belong."""
    n = x.shape[1]
    far = x @ m.table.T
    far = F.pad(far, (0, 1)).flatten(1)
    far = F.pad(far, (0, n - 1)).reshape(-1, n + 1, 2 * n - 1)[:, :n, n - 1 :]
    return (x @ x.transpose(1, 2) + far).softmax(-1) @ x


def causal(m: Any, x: Tensor) -> Tensor:
    """Logits to which a table of rows is added, then a mask."""
    n = x.shape[1]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp_min(0)
    bias = m.table(distance).permute(2, 0, 1)
    logits = x[:, None] @ x[:, None].transpose(-1, -2) + bias
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    return torch.where(seen, logits, -math.inf).softmax(-1) @ x[:, None]


def one_key_for_all_heads(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(x)[:, None], x[:, None, :1], x[:, None, :1])


def in_place_at_the_end(m: Any, x: Tensor) -> Tensor:
    """What is written into a view, of a tensor that nothing reads any more."""
    part = torch.cat([m.a(x), m.a(x)], 1)[:, :6]
    part += m.b(x)
    return m.n(part)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[tuple[str, str], int]]
CASES: dict[str, Case] = {
    "softmaxes over blocks": (
        lambda: Lambda(outlook, a=L(5, 12), b=L(5, 12)), ROWS,
        {("row shift", "a.weight"): 15, ("logit shift", "a.bias"): 3},
    ),
    "heads": (
        lambda: Lambda(lambda m, x: two_heads(m, x, False), q=L(5, 6), k=L(5, 6)), SEQUENCE,
        {("dead bias", "k.bias"): 6},
    ),
    "heads by Einstein's sums": (
        lambda: Lambda(
            lambda m, x: torch.einsum(
                "bhij,bjd->bhid",
                torch.einsum("bihd,bjhd->bhij", m.q(x).unflatten(-1, (2, 3)), m.k(x).unflatten(-1, (2, 3))).softmax(-1),
                x,
            ),
            q=L(5, 6), k=L(5, 6),
        ),
        SEQUENCE, {("dead bias", "k.bias"): 6},
    ),
    "heads that talk": (
        lambda: Lambda(lambda m, x: two_heads(m, x, True), q=L(5, 6), k=L(5, 6), mix=nn.Conv2d(2, 2, 1)),
        SEQUENCE, {("dead bias", "k.bias"): 6, ("dead bias", "mix.bias"): 2},
    ),
    "relative positions": (
        lambda: Lambda(relative, table=nn.Parameter(torch.randn(13, 5))), SEQUENCE, {("row shift", "table"): 5},
    ),
    "a looked-up table and a mask": (
        lambda: Lambda(causal, table=nn.Embedding(9, 2)), SEQUENCE, {("row shift", "table.weight"): 2},
    ),
    "a view of a tensor that is not read any more": (
        lambda: Lambda(in_place_at_the_end, a=L(5, 6, bias=False), b=L(5, 6), n=nn.BatchNorm1d(6)), ROWS,
        {("dead bias", "b.bias"): 6},
    ),
    "one key": (
        lambda: Lambda(lambda m, x: F.scaled_dot_product_attention(m.q(x), x[:, :1], x[:, :1]), q=L(5, 5)), SEQUENCE,
        {("dead bias", "q.bias"): 5},
    ),
    # The kernel for several heads leaves rounding for a gradient, in every release of torch.
    "one key, several heads": (
        lambda: Lambda(one_key_for_all_heads, q=L(5, 5)), SEQUENCE, {("dead bias", "q.bias"): 5},
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    return CASES[name][0](), torch.randn(CASES[name][1])


@pytest.mark.parametrize("name", CASES)
def test_structure_explains_them_and_carrying_them_out_changes_nothing(name: str) -> None:
    model, x = made(name)
    report = mn.diagnose(model, x)
    shifts = found(report.shifts)
    assert CASES[name][2].items() <= shifts.items(), str(report)
    assert report.unexplained_shifts == 0, str(report)
    assert all(shift.certificate.verdict in ("invariant", "no evidence") for shift in report.shifts), str(report)
    for shift in report.shifts:
        assert change(model, x, shift, shift.count - 1) <= BRUTE_FORCE_TOLERANCE, str(shift)


def test_unasked_it_misses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: without the question they stay unexplained."""
    module = sys.modules["manifold_nets.symmetry.diagnose"]  # the package has a function of this name
    monkeypatch.setattr(module, "recheck_shifts", lambda *a, **k: ())
    assert mn.diagnose(*made("softmaxes over blocks")).unexplained_shifts > 0


def test_without_dropout_is_said() -> None:
    """A shift that dropout breaks holds where the certificate is taken, and is reported as what it is."""
    model = nn.Sequential(L(5, 8), nn.Dropout(0.3), nn.LayerNorm(8))
    report = mn.diagnose(model, torch.randn(ROWS))
    assert found(report.shifts) == {("bias shift", "0.bias"): 1, ("row shift", "0.weight"): 5}
    assert {shift.condition for shift in report.shifts} == {"while dropout is off"}
    assert {shift.remedy for shift in report.shifts} == {"leave it: dropout breaks it in training"}
    assert "while dropout is off" in str(report)
    assert report.unexplained_shifts == 0
    model[1].p = 0.0
    assert {shift.condition for shift in mn.diagnose(model, torch.randn(ROWS)).shifts} == {None}


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    network = "from torch import nn\n\n\ndef network():\n    return "
    network += "nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.LayerNorm(8))\n"
    (tmp_path / "net.py").write_text(network)
    done = CliRunner().invoke(main, ["diagnose", f"{tmp_path / 'net.py'}:network", "--input-shape", "5"])
    assert done.exit_code == 0, done.output
    assert done.output.count("while dropout is off") == 2


def test_a_bias_that_is_dead_without_dropout_only_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.3), nn.BatchNorm2d(6))
    x = torch.randn(IMAGE)
    (shift,) = mn.diagnose(model, x).shifts
    assert (shift.kind, shift.count, shift.condition) == ("dead bias", 6, "while dropout is off")
    assert shift.convert_remedy is None
    converted = mn.convert(model, x, remedies="all")
    assert "0.bias" in dict(converted.named_parameters())


def test_what_the_structure_refuses_stays_unexplained() -> None:
    """Numbers alone do not make a structure: an operation without a rule subtracts the mean."""
    model = Lambda(lambda m, x: F.gelu(m.a(x) - m.a(x).sort(-1).values.mean(-1, keepdim=True)), a=L(5, 6))
    report = mn.diagnose(model, torch.randn(ROWS))
    assert report.unexplained_shifts == 6
    assert not report.shifts
