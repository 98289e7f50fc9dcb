"""The engine of a comparison: records, fairness, what is measured, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.comparison_runs import COUNT, CountingPart, small_settings, tiny, tiny_network, tiny_starts, tiny_task
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison import Comparison, EpochRecord, RunKey, task_from_data
from manifold_nets.comparison.errors import (
    ComparisonFolderError,
    OptimizerNameError,
    RecordError,
    RunFailedError,
    SettingsError,
)
from manifold_nets.comparison.experiment import InitialModels
from manifold_nets.comparison.observation import FilterWatch
from manifold_nets.comparison.optimizers import OPTIMIZERS, OptimizerSpec, TorchStepper, optimizer_spec
from manifold_nets.comparison.run import Runner
from manifold_nets.comparison.selection import choose, keep_weights, kept_weights, weights_file
from manifold_nets.comparison.tasks import TensorPart
from manifold_nets.groups import Partition

# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_comparison_comes_back_from_its_file(tmp_path):
    found = tiny(seeds=1, epochs=1)
    found.write(tmp_path)
    assert Comparison.read(tmp_path) == found
    assert "rsgd" in str(found)
    damaged = json.loads((tmp_path / "comparison.json").read_text())
    damaged["settings"]["epochs"] = "two"
    (tmp_path / "comparison.json").write_text(json.dumps(damaged))
    with pytest.raises(RecordError, match=r"comparison\.json: found settings/epochs: 'two' is not of type 'integer'"):
        Comparison.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rates", (0.1, -1.0)),
        ("learning_rates", (float("nan"),)),
        ("learning_rates", ()),
        ("seeds", (1, 1)),
        ("epochs", 0),
        ("batch_size", 0),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("schedule", "steps"),
        ("initial_scales", ("huge",)),
        ("threads", 0),
    ],
)
def test_settings_without_meaning_are_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=rf"^{name}: found"):
        small_settings(**{name: value})


def test_names_of_nothing_are_refused():
    with pytest.raises(OptimizerNameError, match=r"'sdg'.*sgd"):
        mn.compare(optimizers=["sdg"])
    with pytest.raises(SettingsError, match="epochz"):
        mn.compare(epochz=3)
    with pytest.raises(SettingsError, match="workers"):
        tiny(workers=0)
    with pytest.raises(ComparisonFolderError, match=r"comparison\.json"):
        Comparison.read("/nowhere")


def test_weights_kept_until_the_test_are_those_that_were_written(tmp_path, monkeypatch):
    key, other = RunKey("sgd", 0.1, 0), RunKey("sgd", 0.1, 1)
    weights = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}
    keep_weights(tmp_path, key, weights)
    path = weights_file(tmp_path, key)
    good = path.read_bytes()

    def kept(content):
        path.write_bytes(content)
        return kept_weights(tmp_path, key)

    assert all(torch.equal(value, weights[name]) for name, value in kept(good).items())
    for place in range(len(good)):
        found = kept(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        # Blanks between the header and the tensors mean nothing.
        assert found is None or (found.keys() == weights.keys() and torch.equal(found["weight"], weights["weight"]))
    assert kept(good[:-1]) is None
    path.rename(weights_file(tmp_path, other))
    assert kept_weights(tmp_path, other) is None  # of another run
    assert kept_weights(tmp_path, key) is None  # none
    # Sabotage: a changed number passes without its checksum.
    monkeypatch.setattr("manifold_nets.comparison.selection.tensors_checksum", lambda *_: "crc32:00000000")
    keep_weights(tmp_path, key, weights)
    data = path.read_bytes()
    assert kept(data[:-1] + bytes([data[-1] ^ 1])) is not None


def test_weights_that_cannot_be_read_back_end_the_comparison_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("manifold_nets.comparison.run.kept_weights", lambda *_: None)
    with pytest.raises(RunFailedError, match="weights that cannot be read back"):
        tiny(output=tmp_path, seeds=1, epochs=1)


# ---- fairness --------------------------------------------------------------------------------------------------------


def seen_by_optimizers():
    """The function that each run starts from and the examples of its steps, by seed, as a real comparison has them."""
    inputs = tiny_task().parts["validation"].batch(torch.arange(30))[0]
    task, read, outputs, found = tiny_task(), [], [], {}

    class Recorded(TensorPart):
        def batch(self, rows):
            read.append(rows.tolist())
            return super().batch(rows)

    def watched(name):
        inner = optimizer_spec(name)

        def make(model, rate, settings):
            outputs.append(model.eval()(inputs).detach())
            return inner.make(model, rate, settings)

        return replace(inner, make=make)

    def note(progress):
        if progress.last is not None:
            # What was read and made before is the measurement of memory.
            found.setdefault(progress.last.key.seed, []).append((outputs[-1], read[-6:]))

    train = task.parts["train"]
    task = replace(task, parts={**task.parts, "train": Recorded(train.inputs, train.targets)})
    optimizers = [watched(name) for name in ("sgd", "rsgd", "adam")]
    mn.compare(tiny_network, task=task, optimizers=optimizers, learning_rates=[0.05], seeds=2, epochs=2, progress=note)
    return found


def check_equal_chances(found):
    outputs = {seed: runs[0][0] for seed, runs in found.items()}
    assert not torch.allclose(*outputs.values())
    for runs in found.values():
        (first, order), *others = runs
        assert len(others) == 2
        for epoch in (order[:3], order[3:]):
            assert sorted(row for batch in epoch for row in batch) == list(range(COUNT))
        assert order[:3] != order[3:]
        for output, batches in others:
            limit = 64 * torch.finfo(output.dtype).eps * first.abs().max()
            assert (output - first).abs().max() <= limit
            assert batches == order


def test_every_optimizer_starts_from_the_same_function_in_the_same_order():
    check_equal_chances(seen_by_optimizers())


def test_sabotage_another_start_is_noticed(monkeypatch):
    honest = InitialModels.model

    def another(self, key):
        model = honest(self, key)
        if key.optimizer == "rsgd":
            with torch.no_grad():
                model[4].weight += 0.01
        return model

    monkeypatch.setattr(InitialModels, "model", another)
    with pytest.raises(AssertionError):
        check_equal_chances(seen_by_optimizers())


def test_sabotage_another_order_is_noticed(monkeypatch):
    honest = Runner._order

    def another(self, key, epoch):
        batches = honest(self, key, epoch)
        return batches[::-1] if key.optimizer == "adam" else batches

    monkeypatch.setattr(Runner, "_order", another)
    with pytest.raises(AssertionError):
        check_equal_chances(seen_by_optimizers())


def check_device(starts, settings):
    """Models are made and analysed beside the data as they were read; a run has model and data on its device."""
    runner, key = Runner(starts, settings), RunKey("rsgd", 0.05, 0)
    inputs, targets = runner._train.batch(torch.arange(4))
    loss = starts.experiment.task.loss(starts.model(key)(inputs), targets)
    assert {loss.device.type, starts.inputs.device.type} == {"meta", "cpu"}


def test_models_are_made_on_the_processor_and_trained_on_the_device():
    """On torch's device without data, where nothing can be computed but everything has its place."""
    check_device(*tiny_starts(device="meta"))


def test_sabotage_data_that_stay_behind_are_noticed(monkeypatch):
    monkeypatch.setattr(TensorPart, "to", lambda part, device: part)
    with pytest.raises((AssertionError, RuntimeError)):
        check_device(*tiny_starts(device="meta"))


def test_rescaled_filters_keep_the_function():
    starts, settings = tiny_starts(initial_scales=("plain", "rescaled"))
    inputs = tiny_task().parts["validation"].batch(torch.arange(30))[0]
    models = [starts.model(RunKey("sgd", 0.05, 0, scale)).eval() for scale in settings.initial_scales]
    plain, rescaled = (model(inputs) for model in models)
    ratios = (models[1][0].weight / models[0][0].weight).detach()
    assert ratios.log10().std() > 0.3
    assert (ratios.log10().abs() <= 2.001).all()
    torch.testing.assert_close(rescaled, plain, rtol=1e-3, atol=1e-4)


def reads_before_and_after(**changes):
    """How many test examples were read before all runs had ended, and by the end."""
    before = []

    def watch(progress):
        before.append(CountingPart.reads)

    found = tiny(progress=watch, **changes)
    return max(before, default=0), CountingPart.reads, found


def check_test_read_once(before, after, found):
    chosen = [run for choice in found.choices for run in found.chosen_runs(choice.optimizer)]
    assert before == 0
    assert after == 30 * len(chosen)
    assert {run.key for run in found.results if run.test_error is not None} == {run.key for run in chosen}


def test_test_data_are_read_once_and_after_all_choices(tmp_path):
    check_test_read_once(*reads_before_and_after(output=tmp_path))
    assert reads_before_and_after(output=tmp_path)[1] == 0


def test_sabotage_choosing_by_test_data_is_noticed(monkeypatch):
    from manifold_nets.comparison import run as training

    honest = training.scores_of
    monkeypatch.setattr(training, "scores_of", lambda model, task, part, rows: honest(model, task, "test", rows))
    with pytest.raises(AssertionError):
        check_test_read_once(*reads_before_and_after())


def test_choices_follow_the_rule_and_count_divergence():
    found = tiny(learning_rates=[0.05, 1e30], optimizers=["sgd", "rsgd"])
    lost = [run.key for run in found.results if run.diverged]
    assert {key.optimizer for key in lost} == {"sgd", "rsgd"} or {key.optimizer for key in lost} == {"sgd"}
    choice = found.choice("sgd")
    assert (choice.learning_rate, choice.diverged) == (0.05, (0, 2))
    assert choice.validation_errors[1] is None
    assert "diverged" in choice.reason
    results = {run.key: run for run in found.results}
    assert choose(found.settings, results, "sgd", "plain", trials=[(1e30, None)]).learning_rate is None
    means = [sum(run.epochs[-1].validation_error for run in found.runs("sgd", rate)) / 2 for rate in [0.05]]
    assert choice.validation_errors[0] == pytest.approx(means[0])


def test_an_optimizer_that_fails_stops_the_comparison_and_is_named(tmp_path):
    def broken(model, rate, settings):
        raise RuntimeError("no such thing")

    own = OptimizerSpec("mine", "plain", "own", "here", broken)
    with pytest.raises(RunFailedError, match=r"mine, learning rate 0\.05, seed 0: found RuntimeError: no such thing"):
        tiny(optimizers=["sgd", own], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_ones_own_and_schedules():
    rates = []

    class Watched(TorchStepper):
        def step(self, objective):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().step(objective)

    def make(model, rate, settings):
        return Watched(torch.optim.SGD(model.parameters(), rate))

    own = OptimizerSpec("mine", "plain", "own", "here", make)
    found = tiny(optimizers=[own], learning_rates=[0.5], seeds=1, schedule="cosine")
    assert [run.status for run in found.results] == ["finished"]
    taken = rates[-6:]
    assert taken[0] == 0.5
    assert taken == sorted(taken, reverse=True)
    assert 0 < taken[-1] < 0.05


def test_records_of_a_run_are_plausible():
    found = tiny(optimizers=["rsgd"], learning_rates=[0.05], seeds=1)
    (run,) = found.results
    assert [record.steps for record in run.epochs] == [3, 6]
    assert [record.evaluations for record in run.epochs] == [1.0, 2.0]
    assert run.layers == ("0.weight", "4.weight")
    for record in run.epochs:
        assert record.layers[0].norm == pytest.approx(1.0, abs=1e-5)
        assert 0 < record.layers[0].rotation < 1
    assert run.peak_memory_bytes is not None
    assert run.peak_memory_bytes > 3 * 4 * (4 * 6 + 6 * 2)
    assert set(OPTIMIZERS) >= {"sgd", "adam", "rsgd", "radam"}


# ---- data that are not finite ----------------------------------------------------------------------------------------


def broken_task(part, *, error=None):
    """The tiny task with one NaN among the inputs of a part; its error is that of classes, or one of one's own."""
    task = tiny_task()
    inputs = task.parts[part].inputs.clone()
    inputs[3, 2] = float("nan")
    parts = {**task.parts, part: TensorPart(inputs, task.parts[part].targets)}
    return task_from_data(*parts.values(), name="points", batch_size=20, outputs=2, error=error)


def distance(outputs, targets):
    return (outputs[:, 1] - targets).abs()


@pytest.mark.parametrize("error", [None, distance], ids=["classes", "distance"])
def test_one_nan_in_the_test_data_does_not_end_a_comparison(error, tmp_path):
    for _ in range(2):  # also when it is started again
        found = tiny(task=broken_task("test", error=error), output=tmp_path, optimizers=["sgd"], seeds=1)
    tested = [run for run in found.results if run.test_loss is not None]
    assert [math.isnan(run.test_loss) for run in tested] == [True]
    assert [math.isnan(run.test_error) for run in tested] == [error is distance]
    assert f"The test {'error' if error else 'loss'} of sgd is not finite in 1 of 1 runs" in str(found)
    assert repr(Comparison.read(tmp_path)) == repr(found)
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("error", [None, distance], ids=["classes", "distance"])
def test_a_validation_error_that_is_not_finite_is_divergence(error, tmp_path):
    task = broken_task("validation", error=error)
    # A loss that forgives what the error does not.
    task = replace(task, loss=lambda outputs, targets: nn.functional.cross_entropy(outputs.nan_to_num(), targets))
    found = tiny(task=task, output=tmp_path, optimizers=["sgd"], seeds=1)
    assert {run.diverged for run in found.results} == {error is distance}


def test_floats_that_are_not_finite_come_back_from_json():
    for value in (math.nan, math.inf, -math.inf):
        record = EpochRecord(1, 1, 1.0, value, 0.5, 0.5, 1.0, ())
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert repr(EpochRecord.from_dict(json.loads(text))) == repr(record)
    with pytest.raises(RecordError):
        EpochRecord.from_dict({**record.to_dict(), "train_loss": "NaN"})


# ---- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_and_where_it_is_asked_for(capsys, monkeypatch):
    few = {"optimizers": ["sgd"], "learning_rates": [0.05], "seeds": 1, "epochs": 1}
    for quiet in (None, False):
        tiny(progress=quiet, **few)
        assert capsys.readouterr() == ("", "")
    tiny(progress=True, **few)
    assert "1 of 1 runs; 0:00 left; best validation error" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    tiny(**few)
    assert "\x1b[2K" in capsys.readouterr().err  # a line that is drawn anew


# ---- measurements ----------------------------------------------------------------------------------------------------


def check_watch(plant=0.0):
    """Angles and norms of filters along axis 0 and along axis 1, against float64 and a formula of another form."""
    model = nn.ModuleDict({"linear": nn.Linear(6, 5), "transposed": nn.ConvTranspose2d(3, 4, 2)})
    partitions = {
        "linear.weight": Partition.filters((5, 6)),
        "transposed.weight": Partition.transposed_filters((3, 4, 2, 2), 1),
    }
    watch, totals = FilterWatch(model, partitions), [0.0, 0.0]
    with torch.no_grad():
        model["linear"].weight[0] = 0.0  # has no direction to turn from
        for size in (1e-4, 1.0):
            before = [partition.rows(weight_of(model, name).double()) for name, partition in partitions.items()]
            watch.before_step()
            for name in partitions:
                weight = weight_of(model, name)
                weight += size * torch.randn(weight.shape)
            norms = watch.after_step()
            after = [partition.rows(weight_of(model, name).double()) for name, partition in partitions.items()]
            for i, (old, new) in enumerate(zip(before, after, strict=True)):
                totals[i] += float(_angles(old, new).mean()) / 2
    expected = [float(new.norm(dim=1).mean()) for new in after]
    eps = torch.finfo(torch.float32).eps
    assert norms == pytest.approx(expected, rel=16 * eps)
    rotations = [record.rotation + plant for record in watch.finish_epoch(norms)]
    assert rotations == pytest.approx(totals, rel=256 * eps)


def _angles(old, new):
    along = (old * new).sum(1, keepdim=True) / (old * old).sum(1, keepdim=True)
    angle = torch.atan2((new - along * old).norm(dim=1), (along * old).norm(dim=1) * along.sign()[:, 0])
    return torch.where(old.norm(dim=1) == 0, 0.0, angle)


def weight_of(model, name):
    return model.get_parameter(name).detach()


def test_angles_and_norms_of_filters_are_those_of_float64():
    check_watch()
    with pytest.raises(AssertionError):
        check_watch(plant=1e-4)
