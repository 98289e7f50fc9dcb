"""convert: the function is preserved, the plan is data, and nothing is half done."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.conversion_cases import EVAL_LIMIT, actions, conv_net, images, randomized
from helpers.diagnosis_cases import LAYERS, assert_same, build, snapshot
from helpers.toy_networks import TOYS, Lambda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.conversion import moves as moves_module
from manifold_nets.conversion.moves import rescaled_variance, train_mode_deviation
from manifold_nets.errors import (
    DegenerateGroupError,
    FunctionChangedError,
    ManifoldNetsError,
    NothingToConvertError,
    OptionError,
    ReportMismatchError,
)

CONVERTIBLE = [name for name, toy in TOYS.items() if any(toy.groups.values())]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_evaluation_mode_is_preserved_and_radius_keep_changes_nothing(name: str, dtype: torch.dtype) -> None:
    toy = TOYS[name]
    model = randomized(build(toy)).to(dtype)
    x = toy.inputs()
    x = x if toy.integer else x.to(dtype)
    report = mn.diagnose(model, x)
    converted, kept = mn.convert(model, report), mn.convert(model, report, radius="keep")
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT[dtype]
    assert mn.verify(model, kept, x) == mn.conversion.Verification(0.0, 0.0)
    for each in (converted, kept):
        assert [(k, v.shape) for k, v in each.state_dict().items()] == [
            (k, v.shape) for k, v in model.state_dict().items()
        ]
        for weight, groups in toy.groups.items():
            parameter = each.get_parameter(weight)
            assert isinstance(parameter, geoopt.ManifoldParameter) == (groups is not None)
            if groups is not None:
                parameter.manifold.assert_check_point_on_manifold(parameter, atol=0, rtol=4 * torch.finfo(dtype).eps)


def test_forgetting_eps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: running variances v/n² instead of (v + eps)/n² − eps."""
    monkeypatch.setattr(moves_module, "rescaled_variance", lambda variance, eps, factor: variance * factor**2)
    model, x = conv_net(), images()
    with pytest.raises(FunctionChangedError, match="evaluation"):
        mn.convert(model, x)


@pytest.mark.parametrize("forgotten", ["running_mean", "bias"])
def test_forgetting_what_moves_along_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = moves_module.rescaled_along
    monkeypatch.setattr(
        moves_module,
        "rescaled_along",
        lambda *args: {k: v for k, v in original(*args).items() if not k.endswith(forgotten)},
    )
    with pytest.raises(FunctionChangedError):
        mn.convert(conv_net(), images())


def test_failed_verification_in_place_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves_module, "rescaled_variance", lambda variance, eps, factor: variance * factor**2)
    model = conv_net()
    before = snapshot(model)
    with pytest.raises(FunctionChangedError):
        mn.convert(model, images(), inplace=True)
    assert_same(before, snapshot(model))
    assert not any(isinstance(p, geoopt.ManifoldParameter) for p in model.parameters())
    assert list(mn.constraints.constrained_weights(model)) == []


def layer_outputs(model: nn.Module, x: Tensor, kind: type[nn.Module]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o.detach()))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-1])
def test_reported_training_deviation_is_the_measured_one(eps: float) -> None:
    """Convert one layer alone and measure the output of its normalization with hooks."""
    model = conv_net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    reference, report = layer_outputs(copy.deepcopy(model), images(), nn.BatchNorm2d), mn.diagnose(model, images())
    for weight, normalization in (("0.weight", "1"), ("3.weight", "4"), ("6.weight", "7")):
        converted = mn.convert(model, report, include=weight, train_tolerance=math.inf)
        action = actions(converted)[weight]
        assert action.radius == "unit"
        measured = layer_outputs(converted.train(), images(), nn.BatchNorm2d)[normalization]
        difference = (measured - reference[normalization]).norm() / reference[normalization].norm()
        assert action.train_deviation == pytest.approx(float(difference), rel=1e-6, abs=1e-13)


def test_train_mode_deviation_formula_against_torch() -> None:
    z = torch.randn(64, 5, dtype=torch.float64) * torch.tensor([1e-3, 1e-2, 0.1, 1, 10], dtype=torch.float64)
    gamma, beta = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    factor = torch.tensor([7.0, 0.2, 3.0, 0.5, 100.0], dtype=torch.float64)
    before = F.batch_norm(z, None, None, gamma, beta, training=True, eps=1e-3)
    after = F.batch_norm(z * factor, None, None, gamma, beta, training=True, eps=1e-3)
    predicted = train_mode_deviation(z.var(0, unbiased=False), 1e-3, gamma, beta, factor)
    assert predicted == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-10)
    wrong = train_mode_deviation(z.var(0, unbiased=False), 1e-3, gamma, beta, 1 / factor)
    assert wrong != pytest.approx(float((after - before).norm() / before.norm()), rel=1e-2)


@settings(deadline=None)
@given(
    st.floats(1e-8, 1e3), st.floats(1e-12, 1e-1), st.floats(1e-2, 1e2)
)  # fmt: skip
def test_rescaled_variance_is_exact(variance: float, eps: float, factor: float) -> None:
    v, f = torch.tensor([variance], dtype=torch.float64), torch.tensor([factor], dtype=torch.float64)
    rescaled = rescaled_variance(v, eps, f)
    exact = (variance + eps) * factor**2
    magnified = torch.finfo(torch.float64).eps * (abs(float(rescaled)) + eps) / exact
    assert float(rescaled + eps) == pytest.approx(exact, rel=8 * max(magnified, torch.finfo(torch.float64).eps))


def test_tiny_variances_keep_their_radius() -> None:
    """Running variances of 1e-6 … 1e-4 and filters of norm 0.01: plain rescaling is off by tens of per cent."""
    model = conv_net()
    with torch.no_grad():
        model[0].weight *= 0.01 / model[0].weight.flatten(1).norm(dim=1)[:, None, None, None]
        model[0].bias *= 0.01
        model[1].running_var.copy_(torch.logspace(-6, -4, 6))
        model[1].running_mean *= 1e-3
    converted = mn.convert(model, images())
    action = actions(converted)["0.weight"]
    assert action.radius == "keep"
    assert "train_tolerance" in action.reason
    assert mn.verify(model, converted, images()).eval_difference <= EVAL_LIMIT[torch.float64]
    forced = mn.convert(model, images(), train_tolerance=math.inf)
    assert actions(forced)["0.weight"].train_deviation > 0.01
    assert mn.verify(model, forced, images()).eval_difference <= EVAL_LIMIT[torch.float64]


def test_running_variance_that_would_cancel_keeps_its_radius() -> None:
    model = conv_net(torch.float32)
    with torch.no_grad():
        model[0].weight *= 100
        model[1].running_var.fill_(1e-9)
    action = actions(mn.convert(model, images(torch.float32), train_tolerance=math.inf))["0.weight"]
    assert action.radius == "keep"
    assert "too small compared with its eps" in action.reason


@pytest.mark.parametrize("name", ["conv-gn", "conv-in", "linear-ln", "linear-rms", "qk-norm"])
def test_normalizations_without_running_statistics_keep_their_norms(name: str) -> None:
    toy = TOYS[name]
    for action in actions(mn.convert(build(toy), toy.inputs())).values():
        if action.action == "sphere":
            assert action.radius == "keep"
            assert "no running statistics" in action.reason


def test_radius_of_a_joint_group_is_the_root_of_its_number_of_filters() -> None:
    toy = TOYS["flatten-linear-bn"]
    converted = mn.convert(randomized(build(toy)), toy.inputs(), train_tolerance=math.inf)
    weight = converted.get_parameter("0.weight")
    assert weight.manifold.uniform_radius == pytest.approx(2.0)
    mean_square = weight.detach().flatten(1).norm(dim=1).square().mean()
    assert float(mean_square) == pytest.approx(1.0, rel=1e-5)


def shared_statistics(m: Lambda, x: Tensor) -> Tensor:
    return m.n(m.a(x)) + m.n(m.b(x))


def test_shared_running_statistics_keep_their_radius() -> None:
    model = Lambda(shared_statistics, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4))
    x = images(torch.float32)
    converted = mn.convert(randomized(model), x)
    for action in actions(converted).values():
        assert action.radius == "keep"
        assert "shared" in action.reason


def test_batch_norm_without_running_statistics_keeps_its_radius() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert actions(mn.convert(model, images(torch.float32)))["0.weight"].radius == "keep"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_every_bit(dtype: torch.dtype) -> None:
    model = conv_net(dtype)
    converted = mn.convert(model, images(dtype))
    for a, b in zip(model.state_dict().values(), converted.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all("half-precision" in a.reason for a in actions(converted).values() if a.action == "sphere")


def test_twice_changes_nothing() -> None:
    once = mn.convert(conv_net(), images())
    twice = mn.convert(once, images())
    for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [a.action for a in actions(twice).values()] == ["already", "already", "already", "leave"]


def test_in_place_and_copy() -> None:
    model, x = conv_net(), images()
    before = snapshot(model)
    converted = mn.convert(model, x)
    assert converted is not model
    assert_same(before, snapshot(model))
    assert mn.convert(model, x, inplace=True) is model
    for a, b in zip(model.state_dict().values(), converted.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_from_a_report() -> None:
    model, x = conv_net(), images()
    report = mn.diagnose(model, x)
    a, b = mn.convert(model, report), mn.convert(model, x)
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ReportMismatchError, match=r"0\.weight"):
        mn.convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), report)


SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"include": "0.*"}, {"0.weight"}),
    ({"include": ["0", "3.weight"]}, {"0.weight", "3.weight"}),
    ({"exclude": "3*"}, {"0.weight", "6.weight"}),
    ({"include": lambda name: name.startswith("6")}, {"6.weight"}),
    ({"include": "*", "exclude": ["0", "3"]}, {"6.weight"}),
]


@pytest.mark.parametrize(("options", "expected"), SELECTIONS)
def test_selection(options: dict[str, Any], expected: set[str]) -> None:
    plan = mn.plan(conv_net(), images(), **options)
    assert {a.name for a in plan.spheres} == expected


REFUSALS: list[tuple[dict[str, Any], type[ManifoldNetsError], str]] = [
    ({"include": "layer9.*"}, OptionError, r"layer9.*0\.weight"),
    ({"include": "0.weigth"}, OptionError, r"Near matches: 0\.weight"),
    ({"exclude": lambda name: False}, OptionError, "predicate"),
    ({"radius": "half"}, OptionError, "radius: found 'half'"),
    ({"train_tolerance": -1.0}, OptionError, "train_tolerance"),
    ({"train_tolerance": math.nan}, OptionError, "train_tolerance"),
    ({"include": "11.weight"}, NothingToConvertError, "nothing to convert"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_refusals(options: dict[str, Any], error: type[ManifoldNetsError], message: str) -> None:
    model = conv_net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        mn.convert(model, images(), inplace=True, **options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("radius", ["unit", "keep"])
def test_a_filter_without_direction_is_refused_by_name(poison: float, radius: str) -> None:
    model = conv_net()
    report = mn.diagnose(model, images())
    with torch.no_grad():
        model[3].weight[5] = poison
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DegenerateGroupError, match=r"3\.weight: group 5"):
        mn.convert(model, report, radius=radius, inplace=True)
    assert all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_nothing_to_convert_is_a_clear_answer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(NothingToConvertError, match=r"0\.weight .*output"):
        mn.convert(model, torch.randn(4, 3))


def test_nothing_to_convert_names_the_remedies_of_other_symmetries() -> None:
    rescaled = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    report = mn.diagnose(rescaled, torch.randn(4, 3))
    with pytest.raises(NothingToConvertError, match=r"pass remedies='balance' \(--remedies .*or train this model"):
        mn.convert(rescaled, report)
    # Nor is it named where it was left by hand, or where there is nothing.
    with pytest.raises(NothingToConvertError, match="behind them; train this model as it is"):
        mn.convert(rescaled, report, plan={"actions": []})
    with pytest.raises(NothingToConvertError, match="behind them; train this model as it is"):
        mn.convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3))


class Tied(nn.Module):
    """Two convolutions with one weight, each with its own normalization and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.n, self.k = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(self.b(F.relu(self.n(self.a(x)))))


def test_tied_weights_stay_tied() -> None:
    model = randomized(Tied())
    converted = mn.convert(model, images(torch.float32), train_tolerance=math.inf)
    assert converted.a.weight is converted.b.weight
    assert isinstance(converted.a.weight, geoopt.ManifoldParameter)
    assert mn.verify(model, converted, images(torch.float32)).eval_difference <= EVAL_LIMIT[torch.float32]
    assert mn.revert(converted).a.weight is not converted.a.weight


def test_record_and_plan_are_data() -> None:
    converted = mn.convert(conv_net(), images())
    record = mn.conversion_record(converted)
    assert record is not None
    data = json.loads(json.dumps(record.to_dict()))
    assert data["plan"]["actions"][0]["action"] == "sphere"
    assert data["verification"]["eval_difference"] <= EVAL_LIMIT[torch.float64]
    assert "0.weight" in str(record)
    assert mn.conversion_record(pickle.loads(pickle.dumps(converted))) == record
    assert mn.conversion_record(conv_net()) is None


def test_revert_gives_the_same_function_and_plain_parameters() -> None:
    model, x = conv_net(torch.float32), images(torch.float32)
    reverted = mn.revert(mn.convert(model, x))
    assert all(type(p) is nn.Parameter for p in reverted.parameters())
    assert mn.verify(model, reverted, x).eval_difference <= EVAL_LIMIT[torch.float32]


def train(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> list[Tensor]:
    optimizer, outputs = make(model), []
    target = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(4))
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(images())
        F.cross_entropy(output, target).backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


@pytest.mark.parametrize("optimizer", ["RiemannianSGD", "RiemannianAdam"])
def test_training_follows_the_same_functions_at_every_radius(optimizer: str) -> None:
    """The metric does not depend on the radius: with negligible eps, unit and kept radii give the same outputs."""
    model = conv_net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-14
    report = mn.diagnose(model, images())

    def make(each: nn.Module) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if optimizer == "RiemannianSGD" else {}
        return getattr(mn.optim, optimizer)(mn.param_groups(each), lr=0.02, **options)

    unit, keep = (train(mn.convert(model, report, radius=r), make, 30) for r in ("unit", "keep"))
    largest = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(unit, keep, strict=True))
    moved = float((unit[0] - unit[-1]).abs().max())
    assert largest < 1e-8 < 1e-2 < moved

    def euclidean(each: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(mn.revert(each, inplace=True).parameters(), lr=0.02)

    unit, keep = (train(mn.convert(model, report, radius=r), euclidean, 30) for r in ("unit", "keep"))
    assert max(float((a - b).abs().max()) for a, b in zip(unit, keep, strict=True)) > 1e-4


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_random_networks_are_preserved(names: list[str], seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 4, 3, padding=1), *(layer for name in names for layer in LAYERS[name](4))]
        model = randomized(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    x, report = images(), mn.diagnose(model, images())
    converted = mn.convert(model, report)
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT[torch.float64]
    assert mn.verify(model, mn.convert(model, report, radius="keep"), x).train_difference == 0.0
