"""diagnose on networks that carry their expected answer, against brute force, and with planted faults."""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Callable

import pytest
import torch
from helpers.diagnosis_cases import (
    BRUTE_FORCE_TOLERANCE,
    HAND_WRITTEN_EPS,
    LAYERS,
    assert_same,
    build,
    sharp,
    snapshot,
)
from helpers.toy_networks import TOYS, Lambda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import AnalysisError, ExampleInputsError
from manifold_nets.symmetry import exact_mode as certificate_module
from manifold_nets.symmetry.diagnose import LARGEST_SEED
from manifold_nets.symmetry.report import SymmetryReport, WeightFinding


def output_change(model: nn.Module, x: Tensor, finding: WeightFinding, group: int, factor: float) -> float:
    """Relative change of the output when one group, and the biases scaled along with it, are multiplied."""
    assert finding.partition is not None
    scaled = copy.deepcopy(model)
    parameters = dict(scaled.named_parameters())
    with torch.no_grad():
        parameters[finding.name][finding.partition.group_ids() == group] *= factor
        for bias in finding.scaled_along:
            mask = torch.tensor(bias.groups).reshape(parameters[bias.name].shape) == group
            parameters[bias.name][mask] *= factor
        x = x.double() if x.is_floating_point() else x
        before, after = copy.deepcopy(model)(x), scaled(x)
    return float((before - after).abs().max() / before.abs().max())


def groups_found(report: SymmetryReport) -> dict[str, int | None]:
    return {w.name: None if w.partition is None else w.partition.n_groups for w in report.weights}


@pytest.mark.parametrize("name", TOYS)
def test_finds_the_expected_groups_and_agrees_with_the_certificate(name: str) -> None:
    toy = TOYS[name]
    report = mn.diagnose(build(toy), toy.inputs())
    found = groups_found(report)
    assert {weight: found[weight] for weight in toy.groups} == toy.groups
    assert not report.disagreements, str(report)
    for weight, expected in toy.moves_along.items():
        assert set(report[weight].moves_along) == expected


@pytest.mark.parametrize("name", [n for n in TOYS if n not in HAND_WRITTEN_EPS])
def test_scaling_a_found_group_leaves_the_function_alone(name: str) -> None:
    """Brute force, independent of gradients and of the graph: multiply a group and run the network."""
    toy = TOYS[name]
    model = build(toy)
    twin = sharp(model)
    for finding in mn.diagnose(model, toy.inputs()).invariant:
        assert finding.partition is not None
        for group in {0, finding.partition.n_groups - 1}:
            assert output_change(twin, toy.inputs(), finding, group, 3.7) <= BRUTE_FORCE_TOLERANCE


@pytest.mark.parametrize("name", ["tanh", "pre-activation residual", "dense with a bypass", "frozen bn"])
def test_brute_force_notices_a_group_that_is_not_invariant(name: str) -> None:
    """The sabotage twin of the test above: claim filters where there are none."""
    toy = TOYS[name]
    model = build(toy)
    finding = next(w for w in mn.diagnose(model, toy.inputs()).weights if toy.groups[w.name] is None)
    claimed = copy.copy(finding)
    object.__setattr__(claimed, "partition", mn.Partition.filters(finding.shape))
    with pytest.raises(AssertionError):
        assert output_change(sharp(model), toy.inputs(), claimed, 0, 3.7) <= BRUTE_FORCE_TOLERANCE


@pytest.mark.parametrize("name", ["conv-gn", "linear-ln", "qk-norm", "flatten-linear-bn", "transposed1d-gn"])
def test_joint_groups_are_the_finest_ones(name: str) -> None:
    """A single filter of a joint group is not invariant by itself."""
    toy = TOYS[name]
    model = build(toy)
    for finding in mn.diagnose(model, toy.inputs()).invariant:
        if finding.filters_per_group == 1:
            continue
        single = copy.copy(finding)
        object.__setattr__(single, "partition", mn.Partition.filters(finding.shape))
        object.__setattr__(single, "scaled_along", ())
        assert output_change(sharp(model), toy.inputs(), single, 0, 3.7) > 1e-3


def test_an_operation_without_a_rule_is_reported_as_unknown() -> None:
    model = Lambda(lambda m, x: m.n(torch.cumprod(m.c(x), 1)), c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4))
    finding = mn.diagnose(model, torch.randn(4, 3, 6, 6))["c.weight"]
    assert finding.status == "unknown"
    assert "cumprod" in str(finding.broken_by)


def test_a_vanishing_gradient_is_no_evidence() -> None:
    model = Lambda(lambda m, x: m.n(m.c(x)) * 0.0 + x[:, :1].mean(), c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4))
    finding = mn.diagnose(model, torch.randn(4, 3, 6, 6))["c.weight"]
    assert finding.status == "no evidence"
    assert finding.certificate.groups_without_evidence == 4


def test_break_names_the_operation_and_the_module() -> None:
    toy = TOYS["tanh"]
    broken_by = mn.diagnose(build(toy), toy.inputs())["0.weight"].broken_by
    assert broken_by is not None
    assert "tanh" in broken_by
    assert " 1:" in broken_by


def ending(function: Callable[[Tensor], Tensor]) -> Lambda:
    """A linear map, a function of its result, and another linear map."""
    first, last = nn.Linear(5, 6, bias=False), nn.Linear(6, 2)
    return Lambda(lambda m, x: m.o(m.end(m.a(x))), a=first, end=Lambda(lambda m, y: function(y)), o=last)


ENDS = {
    "sign in end: does not see its scale": ending(torch.sign),
    "gt in end: does not see its scale": ending(lambda y: (y > 0).to(y.dtype)),
    "scale: reaches neither": ending(torch.zeros_like),
    "unused: reaches neither": Lambda(lambda m, x: (m.a(x), m.o(x))[1], a=nn.Linear(5, 6), o=nn.Linear(5, 2)),
}


@pytest.mark.parametrize("where", ENDS)
def test_a_weight_without_a_gradient_is_called_unused_just_where_no_output_depends_on_it(where: str) -> None:
    model, x = ENDS[where], torch.randn(7, 5)
    finding = mn.diagnose(model, x)["a.weight"]
    other = copy.deepcopy(model)
    nn.init.normal_(other.a.weight)
    assert finding.status in ("no evidence", "not invariant")
    assert str(finding.broken_by).startswith(where)
    assert torch.equal(model(x), other(x)) == ("reaches neither" in where)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 3))
    x, refused = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)
    model(x).sum().backward()
    model.train(training)
    model[1].eval()
    before = snapshot(model)
    mn.diagnose(model, x)
    assert_same(before, snapshot(model))
    with pytest.raises(ExampleInputsError):
        mn.diagnose(model, refused)
    assert_same(before, snapshot(model))


def test_refusals_are_clear() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ExampleInputsError, match="at least two examples"):
        mn.diagnose(model, torch.randn(1, 3))
    with pytest.raises(ExampleInputsError, match="example_inputs: found int"):
        mn.diagnose(model, 3)

    model.lock = threading.Lock()
    with pytest.raises(AnalysisError, match=r"Sequential: copy\.deepcopy could not copy it"):
        mn.diagnose(model, torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_dtype_and_input_form(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    x = torch.randn(6, 3, dtype=dtype)
    for inputs in (x, (x,), {"input": x}, ((x,), {})):
        assert groups_found(mn.diagnose(model, inputs)) == {"0.weight": 4}


def test_report_is_readable_and_json() -> None:
    toy = TOYS["conv2d-bn"]
    report = mn.diagnose(build(toy), toy.inputs())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["summary"] == {"invariant": 1, "not invariant": 1}
    assert data["weights"][0]["moves_along"] == ["0.bias", "1.running_mean", "1.running_var"]
    assert data["weights"][0]["certificate"]["groups_certified"] == 6
    assert "0.weight" in str(report)
    assert "batch_norm" in str(report)
    with pytest.raises(KeyError):
        report["nothing"]


def test_a_converted_model_is_diagnosed_as_constrained() -> None:
    toy = TOYS["conv2d-bn"]
    converted = mn.convert(build(toy), toy.inputs())
    assert mn.diagnose(converted, toy.inputs())["0.weight"].status == "constrained"


def test_eps_is_what_makes_the_certificate_sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the eps left as they are, the same pass is orders of magnitude worse: the conditions matter."""
    toy = TOYS["conv2d-bn"]
    sharp_value = mn.diagnose(build(toy), toy.inputs())["0.weight"].certificate.value
    monkeypatch.setattr(certificate_module, "NEGLIGIBLE_EPS", 1e-2)
    blunt_value = mn.diagnose(build(toy), toy.inputs())["0.weight"].certificate.value
    assert sharp_value is not None
    assert blunt_value is not None
    assert sharp_value < 1e-12 < 1e-6 < blunt_value


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=7), st.integers(0, 2**16))
def test_structure_and_certificate_agree_on_random_networks(names: list[str], seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 4, 3, padding=1), *(layer for name in names for layer in LAYERS[name](4))]
        model, x = nn.Sequential(*layers), torch.randn(4, 3, 11, 11)
    report = mn.diagnose(model, x)
    assert not report.disagreements, str(report)


@pytest.mark.parametrize(
    ("option", "value"),
    [("tolerance", value) for value in (math.nan, math.inf, 0.0, -1e-8, "1e-8", None)]
    + [("seed", value) for value in (-1, 2**32, 10**30, 1.5, math.nan, None)],
)
def test_an_option_without_a_meaning_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(mn.errors.OptionError, match=f"{option}: found {re.escape(repr(value))}; expected"):
        mn.diagnose(nn.Linear(2, 2), torch.randn(4, 2), **{option: value})


@pytest.mark.parametrize("seed", [0, 3, LARGEST_SEED])
def test_every_other_seed_is_taken(seed: int) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    report = mn.diagnose(net, torch.randn(8, 4), seed=seed, tolerance=1e-9)
    assert [weight.status for weight in report.weights] == ["invariant", "not invariant"]
