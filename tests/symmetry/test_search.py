"""The certificate the other way: what the rules cannot see is found by numbers, and nothing else is."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import build, hidden
from helpers.toy_networks import TOYS, Lambda
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry import explained
from manifold_nets.symmetry.explained import Explained
from manifold_nets.symmetry.rules import RULES, SHIFT_RULES

ROWS = (12, 5)


class Hidden(torch.autograd.Function):
    """A root-mean-square normalization over the last axis that no graph can look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.exp(0.5 * torch.logsumexp(2 * x.abs().log(), -1, keepdim=True)) / x.shape[-1] ** 0.5
        ctx.save_for_backward(x / length, length)
        return x / length

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        y, length = ctx.saved_tensors
        return (gradient - y * (gradient * y).mean(-1, keepdim=True)) / length


def centred(x: Tensor) -> Tensor:
    """Subtracts the mean in a way that no rule follows."""
    return x + torch.cumsum(-x, -1)[..., -1:] / x.shape[-1]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[tuple[str, ...], tuple[str, int]]]] = {
    "whole matrix": (
        lambda: Lambda(lambda m, x: hidden(m.a(x)), a=nn.Linear(5, 8, bias=False)),
        {("a.weight",): ("scale", 1)},
    ),
    "matrix and bias": (
        lambda: Lambda(lambda m, x: hidden(m.a(x)), a=nn.Linear(5, 8)),
        {("a.weight", "a.bias"): ("scale", 1)},
    ),
    "heads": (
        lambda: Lambda(lambda m, x: hidden(m.a(x).unflatten(-1, (4, 2))).flatten(1), a=nn.Linear(5, 8, bias=False)),
        {("a.weight",): ("scale", 4)},
    ),
    "interleaved heads": (
        lambda: Lambda(lambda m, x: hidden(m.a(x).unflatten(-1, (4, 2)).mT).flatten(1), a=nn.Linear(5, 8, bias=False)),
        {("a.weight",): ("scale", 2)},
    ),
    "filters": (
        lambda: Lambda(lambda m, x: hidden(m.a(x).T), a=nn.Linear(5, 8, bias=False)),
        {("a.weight",): ("scale", 8)},
    ),
    "columns": (
        lambda: Lambda(lambda m, x: hidden((x @ m.a.weight).T), a=nn.Linear(8, 5, bias=False)),
        {("a.weight",): ("scale", 8)},
    ),
    "embedding rows": (
        lambda: Lambda(lambda m, x: hidden(m.e(torch.arange(7))) * x.mean(), e=nn.Embedding(7, 4)),
        {("e.weight",): ("scale", 7)},
    ),
    "scale and shift of a normalization": (
        lambda: Lambda(lambda m, x: hidden(m.n(x)), n=nn.LayerNorm(5)),
        {("n.weight", "n.bias"): ("scale", 1)},
    ),
    "row shift": (
        lambda: Lambda(lambda m, x: centred(m.a(x)), a=nn.Linear(5, 8, bias=False)),
        {("a.weight",): ("shift", 5)},
    ),
}


def found(report: mn.SymmetryReport) -> dict[tuple[str, ...], tuple[str, int]]:
    return {u.parameters: (u.kind, u.count) for u in report.unexplained if u.parameters != ("a.bias",)}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_rules_cannot_see_is_found(name: str) -> None:
    model, expected = NETWORKS[name]
    torch.manual_seed(1)
    report = mn.diagnose(model(), torch.randn(ROWS))
    assert found(report) == expected
    assert report.unexplained_groups + report.unexplained_shifts == sum(u.count for u in report.unexplained)


def test_a_function_of_its_own_backward_is_searched() -> None:
    model = Lambda(lambda m, x: Hidden.apply(m.a(x)), a=nn.Linear(5, 8, bias=False))
    assert found(mn.diagnose(model, torch.randn(ROWS))) == {("a.weight",): ("scale", 1)}


@pytest.mark.parametrize("op", ["batch_norm", "layer_norm"])
def test_a_missing_rule_leaves_what_it_explained(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6)), torch.randn(ROWS)
    assert not mn.diagnose(model, x).unexplained
    monkeypatch.delitem(RULES, op)
    monkeypatch.delitem(SHIFT_RULES, op)
    names = {name for u in mn.diagnose(model, x).unexplained for name in u.parameters}
    assert ("0.weight" if op == "batch_norm" else "2.weight") in names


@pytest.mark.parametrize("name", TOYS)
def test_nothing_is_found_where_structure_explains_all(name: str) -> None:
    report = mn.diagnose(build(TOYS[name]), TOYS[name].inputs())
    assert not report.unexplained, str(report)


def test_gradients_that_vanish_and_accidents_raise_no_alarm() -> None:
    """Rows that are never reached, dead units, and inputs that sum to zero, which hides shifts of columns."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    x = torch.randn(ROWS)
    assert not mn.diagnose(model, x - x.mean(1, keepdim=True)).unexplained
    looked_up = nn.Sequential(nn.Embedding(9, 5), nn.Tanh())
    assert not mn.diagnose(looked_up, torch.tensor([[1, 2, 3], [1, 2, 4]])).unexplained


def test_blocks_of_grouped_convolutions_are_explained_from_both_sides() -> None:
    """A group's input channels, scaled together, are its filters, which the next normalization absorbs."""
    for conv in (nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.ConvTranspose2d(6, 6, 3, groups=3, bias=False)):
        model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), conv, nn.BatchNorm2d(6))
        report = mn.diagnose(model, torch.randn(4, 6, 7, 7))
        assert not report.unexplained, str(report)


def test_without_a_graph_everything_that_is_found_is_unexplained() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = F.rms_norm(m.a(x), (8,))
        return y if bool(y.sum() > 0) else -y

    report = mn.diagnose(Lambda(forward, a=nn.Linear(5, 8, bias=False)), torch.randn(ROWS))
    assert report["a.weight"].status == "unknown"
    assert found(report) == {("a.weight",): ("scale", 1)}
    assert "Left out: the model could not be traced" in str(report)
    assert report.to_dict()["not_searched"] == report.not_searched


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize(("name", "count"), [("columns", 8), ("heads", 4)])
def test_without_a_graph_columns_and_heads_are_found_as_well(name: str, count: int, memory: Any) -> None:
    model = NETWORKS[name][0]()
    inner = model.function
    model.function = lambda m, x: inner(m, x) if bool(x.abs().max() < 1e6) else -inner(m, x)
    report = mn.diagnose(model, torch.randn(ROWS), memory=memory)
    assert found(report) == {("a.weight",): ("scale", count)}
    assert report.not_searched


def test_a_traced_model_leaves_nothing_out() -> None:
    assert not mn.diagnose(nn.Linear(5, 8), torch.randn(ROWS)).not_searched


def test_they_are_in_the_text_and_in_the_data() -> None:
    model, _ = NETWORKS["heads"]
    report = mn.diagnose(model(), torch.randn(ROWS))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["unexplained_groups"] == 4
    assert data["unexplained"][0]["groups"] == [0, 1, 2, 3]
    assert "4 × scale: a.weight, of 4 groups of 10" in str(report)


# ---- what follows from what is known ---------------------------------------------------------------------------------


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix)) if matrix.size else 0


entries = st.sampled_from([0.0, 0.0, 1.0, 1.0, -1.0, 2.0])


@given(st.lists(st.lists(entries, min_size=6, max_size=6), max_size=7), st.permutations(range(6)), st.integers(1, 3))
def test_what_follows_is_what_leaves_the_rank(rows: list[list[float]], order: list[int], size: int) -> None:
    """Against the ranks of dense matrices; of groups that are taken one by one each counts for the next."""
    check_ranks(rows, order, size)


def check_ranks(rows: list[list[float]], order: list[int], size: int) -> None:
    matrix = np.array(rows).reshape(-1, 6)
    known = Explained()
    numbers, places = np.nonzero(matrix)
    known.coordinates(6)
    known.add(numbers, places, matrix[numbers, places])
    assert np.abs(matrix @ known.vector).max(initial=0.0) <= 1e-9
    assert known.rank == rank(matrix)
    groups = np.array(order).reshape(-1, size)
    moved = np.array([np.isin(np.arange(6), group) for group in groups], dtype=float)
    alone = [rank(np.vstack([matrix, row])) == rank(matrix) for row in moved]
    assert known.follows(groups).tolist() == alone
    before = [rank(np.vstack([matrix, moved[:k]])) for k in range(len(groups) + 1)]
    assert known.take(groups).tolist() == [b > a for a, b in itertools.pairwise(before)]
    assert known.follows(groups).all()


def test_sabotage_an_elimination_that_keeps_one_direction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    eliminated = explained._echelon
    monkeypatch.setattr(explained, "_echelon", lambda directions: eliminated(directions)[:1])
    rows = [[1.0, 1.0, 2.0, 0.0, 0.0, 1.0], [2.0, 1.0, 1.0, 1.0, 0.0, 1.0], [1.0, 2.0, 1.0, 1.0, 1.0, 2.0]]
    rows += [[1.0, -1.0, 1.0, 2.0, 1.0, 1.0], [2.0, 2.0, -1.0, 1.0, 1.0, 1.0]]
    with pytest.raises(AssertionError):
        check_ranks(rows, list(range(6)), 1)


def test_rows_that_bring_each_other_back_come_to_an_end() -> None:
    """Each row holds the pivots of the next two, and the last two tie the ends: none can be set aside."""
    count = 60
    known = Explained()
    known.coordinates(count)
    places = (np.arange(count)[:, None] + np.arange(3)) % count
    known.add(np.repeat(np.arange(count), 3), places.ravel(), np.ones(3 * count))
    matrix = np.zeros((count, count))
    np.put_along_axis(matrix, places, 1.0, 1)
    assert np.abs(matrix @ known.vector).max() <= 1e-9
    assert known.rank == rank(matrix) == count - 2


def test_rows_and_columns_of_a_tensor_are_the_whole_in_both_ways() -> None:
    known = Explained()
    rows, columns = known.coordinates(256), known.coordinates(256)
    known.add(np.zeros(512, dtype=int), np.concatenate([rows, columns]), np.repeat([1.0, -1.0], 256))
    assert not known.follows(columns[None]).any()
    assert known.take(rows[:, None]).all()
    assert known.follows(columns[None]).all()
    assert not known.follows(columns[:1, None]).any()


# ---- weights with zeros ----------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(288, 4),
    )  # fmt: skip


def matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16),
        nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


class Residual(nn.Module):
    """A branch whose last scale starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.n, self.m, self.last = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.last(torch.relu(x + self.m(self.b(torch.relu(self.n(self.a(x)))))))


def half(weight: Tensor) -> None:
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0


def every_other(axis: int) -> Callable[[Tensor], None]:
    def zeroed(weight: Tensor) -> None:
        weight.movedim(axis, 0)[::2] = 0.0

    return zeroed


WITH_ZEROS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "Dirac": (convolutions, lambda m: [nn.init.dirac_(c.weight) for c in m if isinstance(c, nn.Conv2d)]),
    "identity": (matrices, lambda m: [nn.init.eye_(c.weight) for c in m if isinstance(c, nn.Linear)]),
    "pruned": (matrices, lambda m: [half(c.weight) for c in m if isinstance(c, nn.Linear)]),
    "filters pruned": (convolutions, lambda m: [every_other(0)(c.weight) for c in m if isinstance(c, nn.Conv2d)]),
    "channels pruned": (matrices, lambda m: [every_other(1)(c.weight) for c in m if isinstance(c, nn.Linear)]),
    "last layer": (matrices, lambda m: nn.init.zeros_(m[-1].weight)),
    "half of the last layer": (matrices, lambda m: every_other(0)(m[-1].weight)),
    "last scale of a branch": (Residual, lambda m: nn.init.zeros_(m.m.weight)),
}  # fmt: skip


def with_zeros(name: str) -> tuple[nn.Module, Tensor]:
    make, put = WITH_ZEROS[name]
    model = make()
    with torch.no_grad():
        put(model)
    return model, torch.randn(4, 3, 6, 6) if make is convolutions else torch.randn(24, 10)


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_zeros_in_weights_free_nothing_and_hide_nothing(name: str) -> None:
    model, x = with_zeros(name)
    report = mn.diagnose(model, x)
    assert report.unexplained == ()
    dense = mn.diagnose(WITH_ZEROS[name][0](), x)
    assert report.counts() == dense.counts()
    assert [w.partition for w in report.weights] == [w.partition for w in dense.weights]
    assert [s.count for s in report.shifts] == [s.count for s in dense.shifts]


@pytest.mark.parametrize("name", ["Dirac", "identity"])
def test_with_zeros_left_as_they_are_rows_pass_for_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin."""
    monkeypatch.setattr(sys.modules["manifold_nets.symmetry.diagnose"], "replace_zeros", lambda twin, seed: None)
    model, x = with_zeros(name)
    assert mn.diagnose(model, x).unexplained_groups > 0
