"""A report is taken for the model that it was made of, and refused for any other, by what differs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import newer_torch
from helpers.toy_networks import TOYS, Lambda
from torch import Tensor, nn

import manifold_nets as mn
import manifold_nets.symmetry.trace as graph
from manifold_nets.conversion.verify import require_same_model
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


def chained(modules: Any, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def block(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *last)


def one_module_under_two_names() -> nn.Module:
    shared = block(nn.ReLU())
    return Lambda(lambda m, x: m.second(x), first=shared, second=shared)


def a_list_beside_the_module_list() -> nn.Module:
    act = nn.ReLU()
    model = Lambda(lambda m, x: chained(m.plain, x), blocks=nn.ModuleList(block(act) for _ in range(3)))
    model.plain = list(model.blocks)[1:]
    return model


def two_layers_with_one_norm() -> nn.Module:
    norm, act = nn.BatchNorm1d(4), nn.ReLU()
    layers = [nn.Sequential(nn.Linear(4, 4), norm, act) for _ in range(2)]
    return Lambda(lambda m, x: chained(m.blocks[0:2], x), blocks=nn.ModuleList(layers))


def two_norms_of_one_layer() -> nn.Module:
    layer, act = nn.Linear(4, 4), nn.ReLU()
    blocks = [nn.Sequential(layer, nn.BatchNorm1d(4), act) for _ in range(2)]
    return Lambda(lambda m, x: chained(m.blocks[:2], x), blocks=nn.Sequential(*blocks))


# Networks in which modules have several names, with the modules that run, by the names through which they are reached.
SHARED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one module under two names": (one_module_under_two_names, "second.0 second.1 second.2"),
    "a sliced list": (
        lambda: (lambda act: Lambda(lambda m, x: chained(m.b[1:], x), b=nn.ModuleList(block(act) for _ in range(3))))(
            nn.ReLU()
        ),
        "b.1.0 b.1.1 b.1.2 b.2.0 b.2.1 b.2.2",
    ),
    "a sliced sequential": (
        lambda: (lambda act: Lambda(lambda m, x: m.s[3:](m.s[:3](x)), act=act, s=nn.Sequential(*block(act), *block())))(
            nn.ReLU()
        ),
        "s.0 s.1 s.2 s.3 s.4",
    ),
    "values of a dictionary": (
        lambda: (
            lambda act: Lambda(lambda m, x: chained(m.d.values(), x), d=nn.ModuleDict({k: block(act) for k in "ab"}))
        )(nn.ReLU()),
        "d.a.0 d.a.1 d.a.2 d.b.0 d.b.1 d.b.2",
    ),
    "a list beside the module list": (
        a_list_beside_the_module_list,
        "blocks.1.0 blocks.1.1 blocks.1.2 blocks.2.0 blocks.2.1 blocks.2.2",
    ),
    "one norm": (two_layers_with_one_norm, "blocks.0.0 blocks.0.1 blocks.0.2 blocks.1.0 blocks.1.1 blocks.1.2"),
    "one layer": (two_norms_of_one_layer, "blocks.0.0 blocks.0.1 blocks.0.2 blocks.1.0 blocks.1.1 blocks.1.2"),
}


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("name", SHARED)
def test_modules_go_by_the_names_under_which_they_run(name: str, memory: Any) -> None:
    build, ran = SHARED[name]
    torch.manual_seed(3)
    model = build()
    before = list(model.named_modules(remove_duplicate=False))
    report = mn.diagnose(model, inputs(), memory=memory)
    assert [node.module for node in report.graph if node.module] == ran.split()
    assert before == list(model.named_modules(remove_duplicate=False))
    converted = mn.convert(model, report, remedies="all")
    assert mn.verify(model, converted, inputs()).eval_difference <= 1e-5
    mn.convert(copy.deepcopy(model), inputs())


def test_names_of_the_way_that_was_taken_are_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: the tracer's own names of shared modules do not fit the model."""
    monkeypatch.setattr(graph, "one_module_per_name", lambda model: contextlib.nullcontext())
    with pytest.raises(ReportMismatchError, match=r"slice\(1, None, None\)"):
        mn.convert(SHARED["a sliced list"][0](), inputs())


class Encoded(nn.Module):
    """A model whose forward method calls another method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.fc(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x))


@newer_torch("2.10", "Dynamo cannot trace the functions around the forward method")
def test_modules_are_named_from_the_model_on_where_dynamo_traces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo names modules from the function around their forward method."""
    export = torch.export.export

    def by_dynamo(*args: Any, strict: bool, **options: Any) -> Any:
        if not strict:
            raise RuntimeError(graph._BY_DYNAMO)
        return export(*args, strict=strict, **options)

    monkeypatch.setattr(torch.export, "export", by_dynamo)
    model, x = Encoded(), torch.randn(16, 6)
    report = mn.diagnose(model, x)
    assert [absorber.module for absorber in report["fc.weight"].absorbers] == ["norm"]
    assert mn.conversion_record(mn.convert(model, x)).verification.eval_difference <= 1e-5
