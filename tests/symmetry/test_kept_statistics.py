"""Buffers that a network writes: what no output reads does not count, what evaluation reads does."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from helpers import one_needs_newer_torch
from torch import Tensor, nn

import manifold_nets as mn
import manifold_nets.symmetry.trace as graph

Memory = Literal["full", "small"]
HOW = ("none", "copy", "assign", "fill", "slice", "average", "attribute", "without gradient")


class Watched(nn.Module):
    """A normalized layer of which a statistic is kept for a plot."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.how = how
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self._watch(h)
        return self.out(torch.relu(self.norm(h)))

    def _watch(self, h: Tensor) -> None:
        if self.how == "copy":
            self.seen.copy_(h.detach().mean(0))
        elif self.how == "assign":
            self.seen = h.detach().mean(0)
        elif self.how == "fill":
            self.seen[:] = self.fc.weight.detach().norm()
        elif self.how == "slice":
            self.seen[2:4] = h.detach().sigmoid().mean(0)[:2]
        elif self.how == "average":
            self.seen.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        elif self.how == "attribute":
            self.last = h.detach().abs().mean()
        elif self.how == "without gradient":
            with torch.no_grad():
                self.seen.copy_(torch.tanh(h).mean(0))


class Read(Watched):
    """The same where the output reads the statistic."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.seen.sum()


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize(
    "how", one_needs_newer_torch(HOW, "attribute", "2.10", "torch.export refuses attributes that forward assigns")
)
def test_a_statistic_that_no_output_reads_changes_nothing(how: str, memory: Memory) -> None:
    torch.manual_seed(0)
    report = mn.diagnose(Watched(how), torch.randn(16, 6), memory=memory)
    weight = report["fc.weight"]
    assert weight.status == "invariant"
    assert weight.partition is not None
    assert weight.partition.n_groups == 8
    assert report["out.weight"].status == "not invariant"


@pytest.mark.parametrize("how", ["copy", "fill", "average", "without gradient"])
def test_a_statistic_that_the_output_reads_counts(how: str) -> None:
    """The sabotage twin: with the statistic in the output the same weight is not free."""
    torch.manual_seed(0)
    report = mn.diagnose(Read(how), torch.randn(16, 6))
    assert report["fc.weight"].status != "invariant"
    assert not report.disagreements


class HandBatchNorm(nn.Module):
    """A batch normalization written by hand: evaluation reads statistics that only training keeps."""

    def __init__(self, width: int, *, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("mean", torch.randn(width) / 10)
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            if self.keep:
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(mean, alpha=0.1)
                    self.var.mul_(0.9).add_(var, alpha=0.1)
        return (x - mean) / (var + 1e-5).sqrt()


def by_hand() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), HandBatchNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"remedies": "all"},
    {"remedies": "all", "radius": "keep"},
    {"remedies": "all", "exclude": "0.weight"},
)


@pytest.mark.parametrize("memory", ["full", "small"])
def test_a_bias_that_a_running_mean_keeps_is_not_dead(memory: Memory) -> None:
    report = mn.diagnose(by_hand(), torch.randn(16, 6), memory=memory)
    assert [shift.parameters for shift in report.shifts] == [("3.bias",)]
    absorbers = {absorber.kind for absorber in report["0.weight"].absorbers}
    assert report["0.weight"].status == "invariant"
    assert absorbers == {"quotient", "buffer"}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_conversion_keeps_what_evaluation_computes(options: dict[str, Any]) -> None:
    model, x = by_hand(), torch.randn(16, 6)
    converted = mn.convert(model, x, **options)
    assert mn.verify(model, converted, x).eval_difference <= 1e-5


def test_a_buffer_that_is_overlooked_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: with the running mean taken for a plot, the bias is called dead, and its removal changes evaluation."""
    monkeypatch.setattr(graph, "_stored_buffers", lambda *_: frozenset())
    model, x = by_hand(), torch.randn(16, 6)
    assert ("0.bias",) in [shift.parameters for shift in mn.diagnose(model, x).shifts]
    with pytest.raises(mn.errors.FunctionChangedError):
        mn.convert(model, x, remedies="all")


class Both(nn.Module):
    """A layer in front of a batch normalization, and of a mean that only evaluation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.training:
            self.mean.lerp_(h.detach().mean(0), 0.1)
            return self.out(self.norm(h))
        return self.out(self.norm(h) + torch.tanh(h - self.mean))


def test_a_weight_whose_statistics_do_not_move_along_keeps_its_radius() -> None:
    torch.manual_seed(0)
    model, x = Both().train(), torch.randn(16, 6)
    model(x)
    converted = mn.convert(model, x)
    assert mn.verify(model, converted, x).eval_difference <= 1e-5
    (action,) = mn.plan(model, mn.diagnose(model, x)).spheres
    assert action.radius == "keep"
    assert "buffer mean" in action.reason


def test_the_graph_in_evaluation_mode_is_made_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    export = graph._export

    def counted(model: nn.Module, inputs: Any) -> Any:
        modes.append(model.training)
        return export(model, inputs)

    monkeypatch.setattr(graph, "_export", counted)
    x = torch.randn(16, 6)
    mn.diagnose(Watched("none"), x)
    assert modes == [True]
    model = by_hand()
    mn.diagnose(model, x)
    assert modes == [True, True, False]
    assert all(module.training for module in model.modules())


class Scaled(nn.Module):
    """A mean that the next step reads: it is kept, and it does not follow the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = self.norm(torch.relu(h - self.mean))
        self.mean.copy_(h.detach().mean(0))
        return y


def test_what_a_later_step_reads_counts() -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(16, 6)
    model(x)
    report = mn.diagnose(model, x)
    assert report["fc.weight"].status != "invariant"
    assert not report.shifts


class Shifted(nn.Module):
    """A buffer of zeros that no checkpoint holds is added; it does not stay zero where the network writes into it."""

    def __init__(self, *, write: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.write = nn.Linear(6, 8), nn.BatchNorm1d(8), write
        self.register_buffer("offset", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.fc(x) + self.offset))
        if self.write:
            self.offset.fill_(1.0)
        return y


@pytest.mark.parametrize("write", [False, True])
def test_zeros_that_a_later_step_finds_changed_are_no_zeros(write: bool) -> None:
    torch.manual_seed(0)
    found = mn.diagnose(Shifted(write=write), torch.randn(16, 6))["fc.weight"]
    assert (found.status == "invariant") is not write
