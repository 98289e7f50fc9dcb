"""Matched learning rates: how they follow the weights, what is refused, and what the command line prints."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import manifold_nets as mn
from manifold_nets import errors
from manifold_nets.cli import main
from manifold_nets.symmetry.learning_rates import Spread
from manifold_nets.symmetry.optimizer_settings import OptimizerSettings

EPS = torch.finfo(torch.float64).eps
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}


def two_norms(dtype=torch.float64):
    torch.manual_seed(0)
    features = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(16, 3)).to(dtype)


@pytest.fixture(scope="module")
def report():
    return mn.diagnose(two_norms(), torch.randn(4, 2, 6, 6, dtype=torch.float64))


def gradients_of(net, count):
    """Gradients of mini-batches: any loss will do."""
    batches = []
    for seed in range(count):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        names, weights = zip(*((n, p) for n, p in net.named_parameters() if p.ndim > 1), strict=True)
        batches.append(dict(zip(names, torch.autograd.grad(net(x).square().sum(), weights), strict=True)))
    return batches


# ---- the values ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-10, 1e10), min_size=1, max_size=40))
def test_spread_is_that_of_numpy(values):
    found = Spread.of(torch.tensor(values, dtype=torch.float64))
    expected = np.percentile(values, [50, 25, 75, 0, 100])
    np.testing.assert_allclose(dataclasses.astuple(found), expected, rtol=8 * EPS)


def test_sabotage_another_order_of_the_quartiles_is_noticed():
    values = [1.0, 2.0, 4.0, 8.0]
    expected = np.percentile(values, [50, 75, 25, 0, 100])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(dataclasses.astuple(Spread.of(torch.tensor(values))), expected, rtol=8 * EPS)


def check_scaling(report, options, factor, power):
    """Weights times α: rates for the next step times α^power; those of the long run stay."""
    before, after = two_norms(), two_norms()
    with torch.no_grad():
        for name in ("0.weight", "3.weight"):
            after.get_parameter(name).mul_(factor)
    gradients = gradients_of(before, 2)
    # Scale invariance divides the gradients.
    rescaled = [{name: g / factor for name, g in batch.items()} for batch in gradients]
    old = mn.matched_learning_rates(before, report, gradients=gradients, **options)
    new = mn.matched_learning_rates(after, report, gradients=rescaled, **options)
    assert [w.name for w in new.weights] == ["0.weight", "3.weight"]
    assert [w.groups for w in new.weights] == [6, 2]
    for a, b in zip([*old.weights, old], [*new.weights, new], strict=True):
        scaled = np.array(dataclasses.astuple(a.next_step)) * factor**power
        np.testing.assert_allclose(dataclasses.astuple(b.next_step), scaled, rtol=64 * EPS)
        np.testing.assert_allclose(
            dataclasses.astuple(b.equilibrium), dataclasses.astuple(a.equilibrium), rtol=64 * EPS
        )


@pytest.mark.parametrize(("options", "power"), [(SGD, -2), (ADAMW, -1)])
@given(factor=st.floats(1e-3, 1e3))
def test_rates_follow_the_scale_of_the_weights(report, options, power, factor):
    check_scaling(report, options, factor, power)


def test_sabotage_a_wrong_power_of_the_norm_is_noticed(report):
    with pytest.raises(AssertionError):
        check_scaling(report, SGD, 2.0, -1)


def test_long_run_of_sgd_takes_the_root_mean_square_of_the_gradients(report):
    net = two_norms()
    batches = gradients_of(net, 3)
    norms = net[0].weight.detach().flatten(1).norm(dim=1)
    squares = torch.stack([batch["0.weight"].flatten(1).norm(dim=1).square() for batch in batches])
    expected = (2 * 0.1 * 5e-4 * 0.1) ** 0.5 / (norms * squares.mean(0).sqrt())
    found = mn.matched_learning_rates(net, report, gradients=batches, **SGD)
    assert found["0.weight"].equilibrium.median == pytest.approx(float(expected.quantile(0.5)), rel=64 * EPS)
    assert found["0.weight"].equilibrium.largest == pytest.approx(float(expected.max()), rel=64 * EPS)
    only_last = mn.matched_learning_rates(net, report, gradients=batches[-1:], **SGD)
    assert only_last["0.weight"].equilibrium != found["0.weight"].equilibrium


def test_what_is_not_known_is_none(report):
    without_gradients = mn.matched_learning_rates(two_norms(), report, **SGD)
    assert without_gradients.equilibrium is None
    assert without_gradients["0.weight"].gradients is None
    assert without_gradients.settings.equilibrium_rotation == pytest.approx((2 * 0.1 * 5e-4 / 1.9) ** 0.5, rel=4 * EPS)
    assert "/G" in str(without_gradients)
    without_decay = mn.matched_learning_rates(two_norms(), report, optimizer="adam", lr=1e-3)
    assert without_decay.equilibrium is None
    assert without_decay.settings.equilibrium_rotation is None
    partly = mn.matched_learning_rates(two_norms(), report, gradients=[{"0.weight": torch.ones(6, 2, 3, 3)}], **SGD)
    assert partly["0.weight"].equilibrium is not None
    assert partly["3.weight"].equilibrium is None
    assert partly.equilibrium is None


def test_adamw_has_one_rate_in_the_long_run(report):
    rates = mn.matched_learning_rates(two_norms(), report, betas=(0.8, 0.95), **ADAMW)
    assert rates.settings.equilibrium_rotation == pytest.approx((2 * 1e-3 * 0.05 * 0.2 / 1.8) ** 0.5, rel=4 * EPS)
    assert dataclasses.astuple(rates.equilibrium) == pytest.approx((1e-4**0.5,) * 5, rel=4 * EPS)


def test_half_precision_norms_are_taken_in_float64(report):
    net = two_norms(torch.bfloat16)
    exact = net[0].weight.detach().double().flatten(1).norm(dim=1)
    found = mn.matched_learning_rates(net, report, lr=0.1)["0.weight"]
    assert found.norms.largest == pytest.approx(float(exact.max()), rel=8 * EPS)
    assert found.next_step.smallest == pytest.approx(0.1 / float(exact.max()) ** 2, rel=8 * EPS)


def test_converted_models_and_models_without_symmetries():
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    converted = mn.convert(two_norms(), x)
    rates = mn.matched_learning_rates(converted, mn.diagnose(converted, x), lr=0.1)
    assert rates["0.weight"].next_step.median == pytest.approx(0.1, rel=64 * EPS)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    none = mn.matched_learning_rates(plain, mn.diagnose(plain, torch.randn(4, 4)), lr=0.1)
    assert (none.weights, none.next_step) == ((), None)
    assert "no weight is scale-invariant" in str(none)
    with pytest.raises(errors.ArgumentTypeError, match=r"^report: found an object of type Tensor; expected the report"):
        mn.matched_learning_rates(plain, torch.randn(4, 4), lr=0.1)
    with pytest.raises(KeyError, match="expected nothing, because there are no entries"):
        none["0.weight"]


def test_data_are_plain_and_frozen(report):
    rates = mn.matched_learning_rates(two_norms(), report, **SGD)
    document = json.loads(json.dumps(rates.to_dict()))
    assert {key: document[key] for key in SGD} == SGD
    assert document["next_step"]["median"] == rates.next_step.median
    assert [weight["groups"] for weight in document["weights"]] == [6, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rates.model = "other"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "lion"}, "optimizer: found 'lion'"),
        ({"lr": 0.0}, "lr: found 0.0"),
        ({"lr": float("inf")}, "lr: found inf"),
        ({"lr": float("nan")}, "lr: found nan"),
        ({"momentum": 1.0}, "momentum: found 1.0"),
        ({"momentum": float("nan")}, "momentum: found nan"),
        ({"weight_decay": -1.0}, "weight_decay: found -1.0"),
        ({"weight_decay": 10.0}, "below 1/lr = 10"),
        ({"optimizer": "adamw", "betas": (0.9, 1.0)}, "betas"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum: found 0.9; expected 0 with optimizer 'adamw'"),
        ({"betas": (0.9, 0.95)}, "no betas with optimizer 'sgd'"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "or optimizer 'adamw'"),
    ],
)
def test_settings_without_meaning_are_refused(report, options, named):
    with pytest.raises(errors.OptionError, match=named.replace("(", r"\(")):
        mn.matched_learning_rates(two_norms(), report, **{"lr": 0.1, **options})


def test_other_models_and_degenerate_groups_are_refused_by_name(report):
    with pytest.raises(errors.ReportMismatchError, match=r"0\.weight"):
        mn.matched_learning_rates(nn.Sequential(nn.Linear(2, 2)), report, lr=0.1)
    net = two_norms()
    with torch.no_grad():
        net[3].weight[:2] = 0
    with pytest.raises(errors.DegenerateGroupError, match=r"3\.weight: group 0"):
        mn.matched_learning_rates(net, report, lr=0.1)
    with pytest.raises(errors.OptionError, match=r"0\.weight on the meta device"):
        mn.matched_learning_rates(two_norms().to("meta"), report, lr=0.1)


@pytest.mark.parametrize("gradient", [torch.ones(6, 2), torch.zeros(6, 2, 3, 3), torch.full((6, 2, 3, 3), torch.nan)])
def test_gradients_that_do_not_fit_are_refused(report, gradient):
    with pytest.raises(errors.OptionError, match=r"gradients\['0\.weight'\]"):
        mn.matched_learning_rates(two_norms(), report, gradients=[{"0.weight": gradient}], **SGD)


# ---- the command line ------------------------------------------------------------------------------------------------

NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(main, ["diagnose", "nets.py:net", "--input-shape", "4", *arguments])

    return run


def test_diagnose_prints_a_row_a_weight_and_what_is_known_of_the_long_run(command):
    options = ("--optimizer", "sgd", "--lr", "0.1", "--momentum", "0.9", "--weight-decay", "5e-4")
    result = command(*options)
    assert result.exit_code == 0, result.output
    rates = json.loads(command(*options, "--json").stdout)["learning_rates"]
    row = next(line for line in reversed(result.stdout.splitlines()) if line.startswith("0.weight"))
    assert row.split()[1:4] == [
        "8",
        f"{rates['weights'][0]['norms']['median']:.3g}",
        f"{rates['next_step']['median']:.3g}",
    ]
    assert "0.00725 radians per step" in result.stdout
    assert rates["equilibrium_rotation"] == pytest.approx((2 * 0.1 * 5e-4 / 1.9) ** 0.5)
    settings = OptimizerSettings("sgd", 0.1, 0.9, weight_decay=5e-4)
    assert {key: rates[key] for key in settings.to_dict()} == settings.to_dict()


def test_diagnose_takes_betas_and_says_nothing_unasked(command):
    rates = json.loads(
        command(
            "--optimizer", "adamw", "--lr", "1e-3", "--betas", "0.8", "0.95", "--weight-decay", "0.1", "--json"
        ).stdout
    )["learning_rates"]
    assert rates["betas"] == [0.8, 0.95]
    assert rates["equilibrium"]["median"] == pytest.approx((2 * 1e-3 * 0.1) ** 0.5)
    assert "learning_rates" not in json.loads(command("--json").stdout)
    assert "radians" not in command().stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.1"], "--lr can be used only with --optimizer"),
        (["--momentum", "0.9", "--weight-decay", "0"], "--momentum, --weight-decay can be used only with --optimizer"),
        (["--optimizer", "sgd"], "--optimizer needs --lr"),
        (["--optimizer", "lion", "--lr", "0.1"], "lion"),
        (["--optimizer", "sgd", "--lr", "nan"], "lr: found nan"),
        (["--optimizer", "sgd", "--lr", "0.1", "--momentum", "1"], "momentum: found 1.0"),
        (["--optimizer", "sgd", "--lr", "0.1", "--betas", "0.9", "0.999"], "--optimizer sgd has no --betas"),
        (["--optimizer", "adamw", "--lr", "0.1", "--momentum", "0"], "--optimizer adamw has no --momentum"),
        (["--optimizer", "adam", "--lr", "0.1", "--weight-decay", "0.1"], "or optimizer 'adamw'"),
    ],
)
def test_bad_combinations_are_wrong_usage(command, arguments, message):
    result = command(*arguments, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())
