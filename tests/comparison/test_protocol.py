"""Schedules, early ends, tuned weight decay, tuning on few examples, balanced starts and held norms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner
from helpers.comparison_runs import Batch, CountingPart, reproducible, tiny_task
from helpers.example_modules import EXAMPLES, example
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.comparison import Comparison, OptimizerSpec, RunKey, Settings, TorchStepper, scheduler, selection
from manifold_nets.comparison.errors import DifferentCommandError, SettingsError
from manifold_nets.comparison.experiment import Experiment, InitialModels, balance_weights
from manifold_nets.comparison.optimizers import optimizer_spec
from manifold_nets.comparison.report import summarise
from manifold_nets.comparison.run import learning_rate_factor, should_stop

protocol = example("paper.protocol")

EPS = torch.finfo(torch.float32).eps


def mlp() -> nn.Module:
    """Two hidden layers, the first of which is normalized."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)
    )


def bare_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def tiny(model: Callable[[], nn.Module] = mlp, **changes) -> Comparison:
    options = {"optimizers": ["sgd", "rsgd"], "learning_rates": [0.05, 0.5], "seeds": 2, "epochs": 2, "report": False}
    return mn.compare(model, task=tiny_task(), **{**options, **changes})


# ---- schedules -------------------------------------------------------------------------------------------------------


def bold_driver_by_hand(costs: list[float]) -> float:
    factor, last = 1.0, costs[0]
    for cost in costs[1:]:
        if math.isnan(cost) or cost > last:
            factor /= 2
        else:
            factor *= 1.1
        last = last if math.isnan(cost) else cost
    return factor


def check_bold_driver(rule: Callable[..., float]) -> None:
    for costs in ([1.0], [1.0, 1.0], [2.0, 1.0, 1.5, 1.4, 1.4], [1.0, math.nan, 0.5], [3.0, 2.0, 1.0]):
        found = rule("bold-driver", epoch=len(costs) + 1, share=0.0, epochs=9, losses=costs)
        assert found == pytest.approx(bold_driver_by_hand(costs), rel=1e-12)


def test_the_bold_driver_grows_and_cuts_by_the_mean_cost_of_epochs():
    check_bold_driver(learning_rate_factor)
    assert learning_rate_factor("bold-driver", epoch=1, share=0.0, epochs=9, losses=[]) == 1.0

    def never_cut(schedule, *, losses, **_):
        return 1.1 ** (len(losses) - 1)

    with pytest.raises(AssertionError):
        check_bold_driver(never_cut)


def rates_taken(schedule: str) -> tuple[list[float], Comparison]:
    """The learning rate of every step of a run whose cost rises and falls."""
    rates: list[float] = []

    class Watched(TorchStepper):
        def step(self, objective):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().step(objective)

    own = OptimizerSpec(
        "mine", "plain", "own", "here", lambda m, rate, _: Watched(torch.optim.SGD(m.parameters(), rate))
    )
    found = tiny(optimizers=[own], learning_rates=[20.0], seeds=1, epochs=6, schedule=schedule)
    return rates[-18:], found


def check_rates_follow(schedule: str, factor: Callable[[list[float]], float]) -> None:
    rates, found = rates_taken(schedule)
    costs = [record.train_loss for record in found.results[0].epochs]
    assert len(costs) == 6
    for epoch in range(6):
        expected = 20.0 * factor(costs[:epoch])
        assert rates[3 * epoch : 3 * epoch + 3] == pytest.approx([expected] * 3, rel=1e-12)


def test_runs_take_the_learning_rates_of_their_schedule():
    check_rates_follow("bold-driver", lambda costs: bold_driver_by_hand(costs) if costs else 1.0)
    check_rates_follow("exponential", lambda costs: 0.95 ** len(costs))
    # Sabotage: the rule of the other.
    with pytest.raises(AssertionError):
        check_rates_follow("exponential", lambda costs: bold_driver_by_hand(costs) if costs else 1.0)


def test_runs_end_early_by_the_three_rules_and_never_before_epoch_25():
    falling = [1 / n for n in range(1, 31)]
    assert not should_stop([1e-9] * 24, [0.1] * 24)
    assert should_stop([*falling[:24], 9e-6], [0.1] * 25)
    assert should_stop([*falling[:24], falling[23] - 9e-6], [0.1] * 25)
    rising = [0.1] * 26 + [0.2] * 4
    assert should_stop(falling, rising)
    assert not should_stop(falling[:29], rising[:29])
    assert not should_stop(falling, falling)


def test_a_run_that_ends_early_is_finished_and_is_told_as_such():
    # At such a rate no cost changes by 1e-5: the end comes with epoch 25.
    options = {"learning_rates": [1e-9], "optimizers": ["sgd", protocol.un], "epochs": 27, "model": bare_network}
    found = tiny(**options, early_stop=True, batch_size=60)
    assert {(run.status, len(run.epochs)) for run in found.results} == {("finished", 25)}
    assert all(run.test_error is not None for run in found.results)
    errors = summarise(found).optimizers[0].errors[0]
    assert errors[24:] == (errors[24],) * 3
    whole = tiny(**options, batch_size=60)
    assert {len(run.epochs) for run in whole.results} == {27}
    assert [r.epochs[24].validation_loss for r in whole.results] == [
        r.epochs[24].validation_loss for r in found.results
    ]


# ---- weight decay as part of what is tuned ---------------------------------------------------------------------------

DECAYS = (0.0, 0.1)


def decayed(**changes) -> Comparison:
    return tiny(weight_decays=DECAYS, **changes)


def check_pairs(found: Comparison) -> None:
    """As many trials for everyone, and of those the one of the smallest mean validation error, then loss, then rate."""
    for name in found.settings.optimizers:
        runs = [run for run in found.results if run.key.optimizer == name]
        pairs = {(run.key.learning_rate, run.key.weight_decay) for run in runs}
        assert pairs == {(rate, decay) for rate in (0.05, 0.5) for decay in DECAYS}
        assert len(runs) == 2 * len(pairs)

        def worth(pair, runs=runs):
            own = [run for run in runs if (run.key.learning_rate, run.key.weight_decay) == pair]
            return sum(r.validation_error for r in own), sum(r.validation_loss for r in own)

        assert found.choice(name).trial == min(pairs, key=worth)
        tested = {(r.key.learning_rate, r.key.weight_decay) for r in runs if r.test_error is not None}
        assert tested == {found.choice(name).trial}


def test_weight_decay_is_tuned_along_with_the_learning_rate(tmp_path):
    found = decayed(output=tmp_path)
    check_pairs(found)
    assert Comparison.read(tmp_path) == found
    assert decayed(output=tmp_path) == found
    assert len({run.epochs[-1].train_loss for run in found.runs("sgd", 0.5, weight_decay=0.0)}) == 2
    losses = {found.runs("sgd", 0.5, weight_decay=decay)[0].epochs[-1].train_loss for decay in DECAYS}
    assert len(losses) == 2
    assert summarise(found).optimizers[0].sensitivity.rates == (0.05, 0.5)
    # A single decay is that of a comparison without tuning of it.
    single = tiny(weight_decay=0.1)
    assert single.runs("sgd", 0.5)[0].epochs[-1].train_loss in losses
    assert all(run.key.weight_decay is None for run in single.results)


def test_sabotage_a_choice_by_another_rule_or_fewer_trials_are_noticed(monkeypatch):
    def first_pair(settings, results):
        return tuple(
            selection.choose(settings, results, name, "plain", trials=[(0.05, 0.1)]) for name in settings.optimizers
        )

    with monkeypatch.context() as planted:
        planted.setattr(scheduler, "choose_all", first_pair)
        unfair = decayed()
    with pytest.raises(AssertionError):
        check_pairs(unfair)
    trials = Settings.trials

    def fewer(self, optimizer, scale="plain"):
        found = trials(self, optimizer, scale)
        return (found[0],) * len(found) if optimizer == "rsgd" else found

    with monkeypatch.context() as planted:
        planted.setattr(Settings, "trials", fewer)
        unfair = decayed()
    with pytest.raises(AssertionError):
        check_pairs(unfair)


def test_a_comparison_of_an_older_version_is_read(tmp_path):
    found = tiny(output=tmp_path, weight_decay=0.1)
    file = tmp_path / "comparison.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    new = ("weight_decays", "initialization", "early_stop", "subset", "tune_on", "tune_seeds", "tuned")
    for name in new:
        del data["settings"][name]
    for choice in data["choices"]:
        del choice["weight_decay"]
    assert all("weight_decay" not in run["key"] for run in data["results"])
    file.write_text(json.dumps(data))
    assert Comparison.read(tmp_path) == found
    assert found.settings.decay_of(found.results[0].key) == 0.1


# ---- tuning on few examples ------------------------------------------------------------------------------------------


def tuned(**changes) -> Comparison:
    return tiny(tune_on=(30, 20, 3), tune_seeds=1, **changes)


def test_learning_rates_are_chosen_on_few_examples_and_used_on_all(tmp_path):
    before: list[int] = []
    found = tuned(output=tmp_path, progress=lambda _: before.append(CountingPart.reads))
    small = Comparison.read(tmp_path / "tuning")
    assert (small.settings.subset, small.settings.epochs, small.settings.seeds) == ((30, 20), 3, (0,))
    assert {run.epochs[0].evaluations for run in small.results} == {1.0}
    assert len(small.results) == 4
    assert all(run.test_error is None for run in small.results)
    assert {c.optimizer: c.trial for c in small.choices} == {c.optimizer: c.trial for c in found.choices}
    assert [run.key.seed for run in found.results] == [0, 0, 1, 1]
    assert len(found.results[0].epochs) == 2
    # No example of the tests is read before every run has ended, and each once for every run.
    assert (max(before), CountingPart.reads) == (0, 4 * 30)
    assert summarise(found).optimizers[0].learning_rate == found.choice("sgd").learning_rate


def test_tuning_is_resumed_and_gives_the_same(tmp_path):
    whole = tuned()

    def interrupt(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        tuned(output=tmp_path, progress=interrupt)
    assert reproducible(tuned(output=tmp_path, progress=seen.append)) == reproducible(whole)
    assert seen[0].done == 2
    with pytest.raises(DifferentCommandError, match="learning_rates"):
        tuned(output=tmp_path, learning_rates=[0.05, 0.1])
    # Sabotage: tuning on other examples chooses by other numbers.
    other = tiny(tune_on=(60, 30, 3), output=tmp_path / "other", tune_seeds=1)
    small = [Comparison.read(place / "tuning").choices[0].validation_errors for place in (tmp_path, tmp_path / "other")]
    assert small[0] != small[1]
    assert other.settings.tune_on == (60, 30, 3)


def test_an_optimizer_that_always_diverges_keeps_the_smallest_rate():
    def hopeless(model, rate, settings):
        return TorchStepper(torch.optim.SGD(model.parameters(), 1e30 * rate))

    own = OptimizerSpec("mine", "plain", "own", "here", hopeless)
    found = tuned(optimizers=["sgd", own])
    assert found.settings.trials("mine") == ((0.05, None),)
    assert all(run.diverged for run in found.results if run.key.optimizer == "mine")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subset": (1000, 10)}, r"subset: found \(1000, 10\); expected at most 60 train"),
        ({"subset": (0, 10)}, "subset: found"),
        ({"tune_on": (10, 10)}, "tune_on: found"),
        ({"tune_seeds": 1}, "tune_seeds: found 1"),
        ({"tune_on": (10, 10, 1), "storage": "sqlite://"}, "tune_on.*shared database"),
        ({"weight_decays": (0.1, -1.0)}, "weight_decays: found"),
        ({"weight_decays": (0.1, 0.1)}, "weight_decays: found"),
        (
            {"weight_decays": (0.1, 0.2), "weight_decay": 0.1},
            r"weight_decay: found 0\.1; expected 0 when weight_decays",
        ),
        ({"initialization": "zero"}, "initialization: found 'zero'"),
        ({"schedule": "steps"}, "schedule: found 'steps'"),
    ],
)
def test_options_without_meaning_are_refused_by_name(changes, said):
    with pytest.raises(SettingsError, match=said):
        tiny(**changes)


# ---- starts ----------------------------------------------------------------------------------------------------------


def check_balanced(model: nn.Module) -> None:
    *hidden, last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in hidden:
        assert (layer.weight.double().norm(dim=1) - 1).abs().max() <= EPS
    assert (last.weight.double().norm(dim=0) - 1).abs().max() <= EPS
    assert all(not layer.bias.any() for layer in (*hidden, last))


def test_a_balanced_start_has_unit_filters_and_unit_columns_of_the_classifier():
    model = mlp()
    balance_weights(model, seed=3)
    check_balanced(model)
    again = mlp()
    balance_weights(again, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(SettingsError, match="initialization"):
        balance_weights(nn.ReLU(), seed=0)
    with pytest.raises(AssertionError):
        check_balanced(mlp())


def spec(name: str) -> OptimizerSpec:
    return getattr(protocol, name.replace("-", "_"), None) or optimizer_spec(name)


def starts(model: Callable[[], nn.Module], *names: str) -> list[nn.Module]:
    settings = Settings(names, (0.1,), (0,), 1, initialization="balanced")
    specs = {name: spec(name) for name in names}
    made = InitialModels(Experiment(tiny_task(), model, specs), settings)
    models = [made.model(RunKey(name, 0.1, 0)) for name in names]
    for found, started in zip(specs.values(), models, strict=True):
        found.make(started, 0.1, settings)
    return models


def check_same_function(models: list[nn.Module]) -> None:
    inputs = tiny_task().parts["train"].batch(torch.arange(40))[0]
    first, *others = [model(inputs) for model in models]
    for output in others:
        assert (output - first).abs().max() <= 64 * EPS * first.abs().max()


def test_held_norms_start_from_the_same_function_with_and_without_normalization():
    normalized, bare = starts(mlp, "sgd", "sm-columns", "un", "rsgd", "rsgd-all"), starts(bare_network, "sgd", "un")
    check_same_function(normalized)
    check_same_function(bare)
    check_balanced(bare[0])
    held = [[weight.name for weight in mn.constraints.constrained_weights(model)] for model in normalized]
    assert held == [[], [], ["0.weight", "3.weight"], ["0.weight", "3.weight"], ["0.weight", "3.weight", "6.weight"]]
    assert [weight.manifold.uniform_radius for weight in mn.constraints.constrained_weights(bare[1])] == [1.0]
    # Norms that are not 1 are kept.
    plain = bare_network()
    norms = plain[0].weight.detach().double().norm(dim=1)
    (weight,) = mn.constraints.constrained_weights(protocol.constrained_form(plain))
    assert torch.equal(weight.manifold.radii, norms)
    # Sabotage: another start.
    with torch.no_grad():
        bare[1][0].weight.neg_()
    with pytest.raises(AssertionError):
        check_same_function(bare)


# ---- steps by the paper's formulas -----------------------------------------------------------------------------------


def batch_of(model: nn.Module) -> Batch:
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return Batch(model, inputs, (inputs.sum(1) > 0).long())


def after_steps(name: str, model: nn.Module, steps: int = 4, **changes) -> list[Tensor]:
    settings = Settings((name,), (0.1,), (0,), 1, **changes)
    stepper = spec(name).make(model, 0.1, settings)
    for _ in range(steps):
        stepper.step(batch_of(model))
    return [parameter.detach() for parameter in model.parameters()]


def by_hand(model: nn.Module, rule: Callable[[str, Tensor, Tensor], Tensor], steps: int = 4) -> list[Tensor]:
    for _ in range(steps):
        batch_of(model)()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(rule(name, parameter, parameter.grad))
    return [parameter.detach() for parameter in model.parameters()]


def un_rule(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    if name != "0.weight":
        return weight - 0.1 * gradient
    tangent = gradient - (weight * gradient).sum(1, keepdim=True) * weight
    moved = weight - 0.1 * tangent
    return moved / moved.norm(dim=1, keepdim=True)


def sm_rule(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    if weight.ndim < 2:
        return weight - 0.1 * gradient
    if name == "2.weight":
        return weight - 0.1 * gradient @ torch.diag((weight.T @ weight).diagonal())
    return weight - 0.1 * torch.diag((weight @ weight.T).diagonal()) @ gradient


def balanced_bare() -> nn.Module:
    model = bare_network().double()
    balance_weights(model, seed=2)
    return model


def check_steps(name: str, rule: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    ours = after_steps(name, balanced_bare())
    for found, expected in zip(ours, by_hand(balanced_bare(), rule), strict=True):
        assert (found - expected).abs().max() <= 1e3 * torch.finfo(torch.float64).eps


def test_steps_are_those_of_the_paper():
    check_steps("un", un_rule)
    check_steps("sm-columns", sm_rule)


def test_sabotage_a_classifier_by_rows_and_a_step_without_projection_are_noticed():
    def by_rows(name, weight, gradient):
        return sm_rule("0.weight", weight, gradient)

    def unprojected(name, weight, gradient):
        moved = weight - 0.1 * gradient
        return moved / moved.norm(dim=1, keepdim=True) if name == "0.weight" else moved

    with pytest.raises(AssertionError):
        check_steps("sm-columns", by_rows)
    with pytest.raises(AssertionError):
        check_steps("un", unprojected)


def test_un_takes_no_momentum_and_the_unknown_metric_is_refused():
    plain = after_steps("un", balanced_bare(), momentum=0.0)
    assert all(map(torch.equal, plain, after_steps("un", balanced_bare(), momentum=0.9)))
    deep = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(SettingsError, match=r"2 hidden layers and no normalization after 0.*no metric is known"):
        protocol.sm_columns.make(deep, 0.1, Settings(("sm-columns",), (0.1,), (0,), 1))
    half = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(SettingsError, match="no normalization after 3"):
        protocol.sm_columns.make(half, 0.1, Settings(("sm-columns",), (0.1,), (0,), 1))
    assert len(after_steps("sm-columns", mlp().double())) == 10


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_takes_the_options_of_the_protocol(tmp_path):
    small = [
        "--model",
        "mlp-plain:8",
        "--optimizers",
        f"sgd,{EXAMPLES}/paper/protocol.py:un",
        "--lr",
        "0.1,0.3",
        "--seeds",
        "1",
        "--epochs",
        "2",
    ]
    protocol = ["--weight-decay", "0,1e-3", "--schedule", "bold-driver", "--initialization", "balanced", "--early-stop"]
    tuning = ["--subset", "300,100", "--tune-on", "100,50,2", "--tune-seeds", "1", "--momentum", "0"]
    command = ["compare", *small, *protocol, *tuning, "--output", str(tmp_path), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    settings = Settings.from_dict(json.loads(done.stdout)["settings"])
    assert (settings.weight_decays, settings.weight_decay, settings.tune_on) == ((0.0, 1e-3), 0.0, (100, 50, 2))
    assert (settings.subset, settings.initialization, settings.early_stop) == ((300, 100), "balanced", True)
    assert len(Comparison.read(tmp_path / "tuning").results) == 8


def test_the_command_line_refuses_options_that_do_not_fit(tmp_path):
    wrong = CliRunner().invoke(main, ["compare", "--tune-on", "100,50", "--output", str(tmp_path)])
    assert (wrong.exit_code, "TRAIN,VALIDATION,EPOCHS" in wrong.stderr) == (2, True)
    wrong = CliRunner().invoke(main, ["compare", "--weight-decay", "much", "--output", str(tmp_path)])
    assert (wrong.exit_code, "is no list of weight decays" in wrong.stderr) == (2, True)
