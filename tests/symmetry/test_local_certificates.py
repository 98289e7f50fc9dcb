"""Weights that no output depends on: certified at the normalization that absorbs them, and only these."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import MOST_PASSES
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights
from manifold_nets.models import analysis_copy
from manifold_nets.running import split_inputs, to_float64
from manifold_nets.symmetry import gradients
from manifold_nets.symmetry.graph import op_name
from manifold_nets.symmetry.local_certificates import LocalCertificates, _hands_on_nan
from manifold_nets.symmetry.rules import RULES
from manifold_nets.symmetry.trace import TracedGraph, trace
from manifold_nets.symmetry.weight_structure import follow_weight

X = (4, 5, 6)
PLACE = "norm (layer_norm)"
EVAL_LIMIT = 4 * torch.finfo(torch.float32).eps


class Bypassed(nn.Module):
    """A class token that bypasses a pooled, layer-normalized branch, as in the last block of MViT.

    Tokens are pooled with a weight of their own; the class token, in front, is not. The branch is added to the other
    tokens, and the head reads `read` of the result: of the class token, what `read` makes of all tokens.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], normalize: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.pool = nn.Linear(6, 6, bias=False)
        self.norm = normalize or nn.LayerNorm(6)
        self.attend = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pooled = torch.cat([x[:, :1], self.pool(x[:, 1:])], 1)
        queries = self.norm(pooled)
        attention = torch.softmax(queries @ x.transpose(1, 2), -1) @ self.attend(x)
        out = attention.clone()
        out[:, 1:] += queries[:, 1:]
        result: Tensor = self.head(self.read(out))
        return result


def class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def finding(model: nn.Module, name: str = "pool.weight", **options: Any) -> mn.WeightFinding:
    return mn.diagnose(model, torch.randn(X), **options)[name]


def test_a_weight_behind_which_only_other_tokens_lie_is_certified_at_its_normalization() -> None:
    found = finding(Bypassed(class_token))
    assert found.status == found.certificate.verdict == "invariant"
    assert found.certificate.taken_at == PLACE
    assert found.certificate.groups_certified == 1
    assert found.certificate.value is not None
    assert found.certificate.value < 1e-12
    assert str(found.certificate).endswith(
        ", taken at norm (layer_norm): the network's output does not depend on this weight"
    )
    assert "no output depends on it" in found.remedy
    assert json.loads(json.dumps(found.to_dict()))["certificate"]["taken_at"] == PLACE


def test_it_is_converted_and_the_function_stays() -> None:
    model, x = Bypassed(class_token).eval(), torch.randn(X)
    converted = mn.convert(model, x)
    assert [w.name for w in constrained_weights(converted)] == ["pool.weight"]
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT
    assert mn.diagnose(converted, x)["pool.weight"].status == "constrained"


def test_with_influence_the_certificate_is_that_of_the_output() -> None:
    found = finding(Bypassed(lambda x: x.mean(1)))
    assert found.status == "invariant"
    assert found.certificate.taken_at == ""
    assert "taken at" not in str(found.certificate)
    assert "no output" not in found.remedy


SATURATED = {
    "relu": lambda x: x[:, 0] + F.relu(x[:, 1:] - 1e6).sum(1),
    "relu, written out": lambda x: x[:, 0] + torch.where(x[:, 1:] > 1e6, x[:, 1:], 0.0).sum(1),
    "step": lambda x: x[:, 0] + torch.sign(x[:, 1:]).sum(1),
    "hardtanh": lambda x: x[:, 0] + F.hardtanh(x[:, 1:] + 1e6).sum(1),
    "hardsigmoid": lambda x: x[:, 0] + F.hardsigmoid(x[:, 1:] - 1e6).sum(1),
    "sigmoid": lambda x: x[:, 0] + torch.sigmoid(x[:, 1:] - 1e6).sum(1),
    "times zero": lambda x: x[:, 0] + 0.0 * x[:, 1:].sum(1),
    "detached": lambda x: x[:, 0] + x[:, 1:].detach().sum(1),
    "mask": lambda x: x[:, 0] * (x[:, 1] > -1e6),
    "nan_to_num": lambda x: x[:, 0] + torch.nan_to_num(F.relu(x[:, 1:] - 1e6)).sum(1),
}


@pytest.mark.parametrize("kind", SATURATED)
def test_a_gradient_that_vanishes_by_saturation_certifies_nothing(kind: str) -> None:
    """The sabotage twin: no gradient either, but the outputs are functions of the weight."""
    found = finding(Bypassed(SATURATED[kind]))
    assert found.certificate.verdict != "invariant"
    assert found.certificate.taken_at == ""
    assert found.status in ("no evidence", "unknown")


def test_without_a_normalization_nothing_is_certified() -> None:
    found = finding(Bypassed(class_token, nn.Identity()))
    assert found.status == "no evidence"
    assert found.partition is None


def test_a_normalization_that_is_written_out_certifies_nothing() -> None:
    """Its eps is not known there."""
    found = finding(Bypassed(class_token, lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-6)))  # type: ignore[arg-type]
    assert found.status == "no evidence"


def test_what_structure_claims_wrongly_is_refuted_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate at the normalization can refute: a rule that lets a scale through where it must not is seen."""
    monkeypatch.setitem(RULES, "sigmoid", RULES["relu"])
    model = Bypassed(class_token)
    model.pool = nn.Sequential(model.pool, nn.Sigmoid())
    found = finding(model, "pool.0.weight")
    assert found.status == "disagreement"
    assert found.certificate.verdict == "not invariant"
    assert found.certificate.taken_at == PLACE


@pytest.mark.parametrize("read", [class_token, lambda x: x.mean(1)])
def test_the_copy_is_left_as_it_was(read: Callable[[Tensor], Tensor]) -> None:
    twin = analysis_copy(nn.Sequential(Bypassed(read), nn.BatchNorm1d(3)))
    inputs = to_float64(split_inputs(torch.randn(X)))
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    graph = trace(twin, inputs)
    local = LocalCertificates(twin, graph, inputs, 0)
    fields = local.fields([follow_weight(graph, "0.pool.weight")])
    assert list(fields) == (["0.pool.weight"] if read is class_token else [])
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def cut_off(x: Tensor) -> Tensor:
    """Of the other tokens what exceeds a bound that none reaches: there is no gradient, but there is an influence."""
    return x[:, 0] + F.relu(x[:, 1:] - 1e6).sum(1)


def chain(*reads: Callable[[Tensor], Tensor]) -> nn.Module:
    """One network after the other, each reading what the one before made of each example, repeated as tokens."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Bypassed(read) for read in reads)
            self.between = nn.ModuleList(nn.Linear(3, 6) for _ in reads)

        def forward(self, x: Tensor) -> Tensor:
            for part, between in zip(self.parts, self.between, strict=True):
                x = x + between(part(x))[:, None]
            return x.mean(1)

    return Chain()


def passes_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[mn.SymmetryReport, int, int]:
    """A report, and how many passes forward and backward it took, and forward alone."""
    counts = {"forward": 0, "backward": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting("backward", torch.autograd.grad))
        patch.setattr(TracedGraph, "interpret", counting("forward", TracedGraph.interpret))
        patch.setattr(gradients, "differentiable_outputs", counting("forward", gradients.differentiable_outputs))
        report = mn.diagnose(model, torch.randn(X))
    return report, counts["backward"], counts["forward"] - counts["backward"]


def test_many_silent_weights_take_one_pass_and_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    report, backward, forward = passes_of(chain(*[class_token] * 5), monkeypatch)
    found = [report[f"parts.{i}.pool.weight"] for i in range(5)]
    assert [w.status for w in found] == ["invariant"] * 5
    assert [w.certificate.taken_at for w in found] == [f"parts.{i}.norm (layer_norm)" for i in range(5)]
    assert max(w.certificate.value or 0.0 for w in found) < 1e-12
    # No second point, as nothing is left to explain, and no pass for variances without a batch normalization.
    assert (backward, forward) == (2, 1)


@pytest.mark.parametrize(
    "reads", [(class_token, cut_off), (cut_off, class_token), (*[class_token] * 2, *[cut_off] * 2)]
)
def test_one_weight_with_influence_does_not_hide_those_without(
    reads: tuple[Callable[[Tensor], Tensor], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in all of them reaches the outputs, so the halves are asked; the one with influence gets no certificate."""
    report, backward, forward = passes_of(chain(*reads), monkeypatch)
    found = [report[f"parts.{i}.pool.weight"].status for i in range(len(reads))]
    assert ["invariant" if read is class_token else "no evidence" for read in reads] == found
    assert backward + (forward - 1) / 3 <= MOST_PASSES


@pytest.mark.slow
def test_what_cannot_be_settled_in_the_passes_there_are_has_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    report, backward, forward = passes_of(chain(*[cut_off, class_token] * 8), monkeypatch)
    certified = {w.name for w in report.weights if w.certificate.taken_at}
    assert certified <= {f"parts.{i}.pool.weight" for i in range(1, 16, 2)}
    assert {w.status for w in report.weights if w.name.endswith("pool.weight")} <= {"invariant", "no evidence"}
    assert backward + (forward - 2) / 3 <= MOST_PASSES


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_no_more_passes_are_taken_than_there_are(passes: int) -> None:
    model, x = chain(class_token, cut_off), torch.randn(X)
    twin, inputs = analysis_copy(model), to_float64(split_inputs(x))
    graph = trace(twin, inputs)
    local = LocalCertificates(twin, graph, inputs, 0, passes)
    found = local.fields(follow_weight(graph, f"parts.{i}.pool.weight") for i in range(2))
    assert local.passes == passes
    assert list(found) == (["parts.0.pool.weight"] if passes == 2 else [])


ELEMENTWISE = (
    F.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.softshrink, F.hardshrink, F.tanhshrink, F.sigmoid,
    F.tanh, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.softplus, F.logsigmoid, F.softsign, F.leaky_relu, F.rrelu,
    torch.sign, torch.round, torch.floor, torch.ceil, torch.erf, torch.exp, torch.abs, torch.square, torch.atan,
    lambda x: F.threshold(x, 0.0, 1.0), lambda x: x.clamp(0, 1), lambda x: x.clamp_min(0), lambda x: x.clamp_max(0),
    lambda x: F.max_pool1d(x, 1), lambda x: F.adaptive_max_pool1d(x, 1), lambda x: F.lp_pool1d(x, 2, 1),
    lambda x: x.amax(-1), lambda x: x.amin(-1), lambda x: x.max(-1).values, lambda x: x.logsumexp(-1),
    lambda x: x.softmax(-1), lambda x: torch.max(x, torch.zeros_like(x)), lambda x: 0 * x, lambda x: x.cumsum(-1),
    lambda x: torch.nan_to_num(x), lambda x: torch.where(x > 0, x, 0.0), lambda x: x.sort(-1).values,
    lambda x: x.topk(1, largest=False).values, lambda x: (x > 0).to(x.dtype), lambda x: x.argmax(-1).to(x.dtype),
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 64])
def test_operations_behind_a_weight_return_nan_or_are_refused(size: int) -> None:
    """What the proof rests on, operation by operation, with and without vector instructions."""
    poison = torch.full((2, 2, size), float("nan"), dtype=torch.float64)
    for function in ELEMENTWISE:

        class Single(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = function(x)  # noqa: B023
                return result

        graph = trace(Single(), ((torch.randn_like(poison),), {}))
        called = [node for node in graph.program.graph.nodes if node.op == "call_function" and node.all_input_nodes]
        allowed = all(_hands_on_nan(node) for node in called)
        assert not allowed or bool(function(poison).isnan().all()), [op_name(node) for node in called]
