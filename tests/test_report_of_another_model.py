"""A report is taken for the model that it was made of, and refused for any other, by what differs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_networks import TOYS

import manifold_nets as mn
from manifold_nets.conversion.same_model import require_same_model
from manifold_nets.errors import ReportMismatchError


def net(*between: nn.Module, last: int = 2) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4), *between, nn.Linear(4, last))


def inputs() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(5))


class Net(nn.Sequential):
    """The same modules under another name."""


class BatchNorm(nn.BatchNorm1d):
    """The same tensors, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


@pytest.mark.parametrize(
    ("reported", "given", "said"),
    [
        (net(nn.BatchNorm1d(4)), net(nn.ReLU()), r"1 \(ReLU, BatchNorm1d in the report\)"),
        (net(nn.LayerNorm(4)), net(nn.ReLU()), r"1 \(ReLU, LayerNorm in the report\)"),
        (net(nn.LayerNorm(4, elementwise_affine=False)), net(nn.Identity()), r"1 \(Identity, LayerNorm in the report"),
        (net(nn.LayerNorm(4)), net(nn.BatchNorm1d(4)), r"1 \(BatchNorm1d, LayerNorm in the report\)"),
        (net(nn.BatchNorm1d(4)), net(BatchNorm(4)), r"1 \(BatchNorm, BatchNorm1d in the report\)"),
        (net(nn.BatchNorm1d(4)), net(nn.BatchNorm1d(4, track_running_stats=False)), r"1\.running_mean \(missing\)"),
        (net(nn.BatchNorm1d(4)), net(nn.BatchNorm1d(4, affine=False)), r"1\.weight \(missing\)"),
        (net(nn.BatchNorm1d(4)), net(nn.BatchNorm1d(4, eps=1e-3)), r"1\.eps \(0\.001, 1e-05 in the report\)"),
        (net(nn.BatchNorm1d(4)), net(nn.BatchNorm1d(4), last=3), r"2\.weight \(\(3, 4\), \(2, 4\) in the report\)"),
        (net(nn.BatchNorm1d(4)), net(nn.BatchNorm1d(4), nn.Linear(4, 4)), r"3\.weight \(\(2, 4\), not in the report\)"),
        (net(nn.BatchNorm1d(4)), Net(*net(nn.BatchNorm1d(4))), r"its class \(Net, Sequential in the report\)"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        mn.convert,
        mn.balance,
        lambda model, report: mn.plan(model, report, remedies="all"),
        lambda model, report: mn.convert(model, report, plan={"actions": []}),
    ],
)
def test_another_model_is_refused_by_what_differs(
    reported: nn.Module, given: nn.Module, said: str, use: Callable[..., Any]
) -> None:
    report = mn.diagnose(reported, inputs())
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pytest.raises(ReportMismatchError, match=said):
        use(given, report)
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


def test_other_values_dtypes_and_modes_are_the_same_model() -> None:
    model = net(nn.BatchNorm1d(4))
    report = mn.diagnose(model, inputs())
    for same in (copy.deepcopy(model), net(nn.BatchNorm1d(4)).eval(), net(nn.BatchNorm1d(4)).double()):
        require_same_model(same, report)
    converted = mn.convert(model, report)
    require_same_model(converted, report)
    require_same_model(mn.revert(converted), report)


def test_a_removed_bias_makes_another_model() -> None:
    model = net(nn.BatchNorm1d(4))
    report = mn.diagnose(model, inputs())
    converted = mn.convert(model, report, remedies="dead-biases")
    with pytest.raises(ReportMismatchError, match=r"0\.bias \(missing\)"):
        mn.convert(converted, report)
    mn.convert(mn.revert(converted), report)


def test_a_report_without_its_modules_takes_another_model() -> None:
    """The sabotage twin: by shapes alone, a network without a normalization is the same one."""
    report = mn.diagnose(net(nn.LayerNorm(4, elementwise_affine=False)), inputs())
    require_same_model(net(nn.Identity()), dataclasses.replace(report, graph=()))
    with pytest.raises(ReportMismatchError):
        require_same_model(net(nn.Identity()), report)


@pytest.mark.parametrize("name", TOYS)
def test_every_network_is_the_one_that_its_report_was_made_of(name: str) -> None:
    model = TOYS[name].build()
    require_same_model(model, mn.diagnose(model, TOYS[name].inputs(), memory="small"))
