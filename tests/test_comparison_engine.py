"""The engine of a comparison: determinism, resumption, fairness, and what it refuses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comparison_runs import COUNT, CountingPart, reproducible, small_settings, tiny_network, tiny_task

import manifold_nets as mn
from manifold_nets.comparison import Comparison, RunKey, Settings
from manifold_nets.comparison.choosing import choose
from manifold_nets.comparison.contestants import CONTESTANTS, TorchStepper, contestant
from manifold_nets.comparison.engine import Progress
from manifold_nets.comparison.entry import compare_settings, join_comparison, study_name
from manifold_nets.comparison.environment import environment
from manifold_nets.comparison.errors import (
    ComparisonFolderError,
    DifferentCommandError,
    FolderInUseError,
    OptimizerNameError,
    RecordError,
    RunFailedError,
    SettingsError,
    StorageError,
)
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.comparison.queue import GRACE_SECONDS, RunQueue
from manifold_nets.comparison.report.data import runs_csv
from manifold_nets.comparison.starts import Starts, Subjects
from manifold_nets.comparison.training import Runner


def tiny(**changes):
    """Compare two optimizers on the tiny task in this process."""
    options = {"optimizers": ["sgd", "rsgd"], "learning_rates": [0.05, 0.5], "seeds": 2, "epochs": 2, "report": False}
    return mn.compare(tiny_network, task=tiny_task(), **{**options, **changes})


def tiny_starts(**changes):
    task = tiny_task()
    settings = Settings(
        **{"optimizers": ("sgd", "rsgd"), "learning_rates": (0.05,), "seeds": (0, 1), "epochs": 2, "batch_size": 20}
        | changes
    )
    subjects = Subjects(task, tiny_network, {name: contestant(name) for name in settings.optimizers})
    return Starts(subjects, settings), settings


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    """The tiny comparison, carried out at once."""
    return tiny()


def test_a_comparison_comes_back_from_its_file(tmp_path, whole):
    found = whole
    found.write(tmp_path)
    assert Comparison.read(tmp_path) == found
    assert "rsgd" in str(found)
    damaged = json.loads((tmp_path / "comparison.json").read_text())
    damaged["settings"]["epochs"] = "two"
    (tmp_path / "comparison.json").write_text(json.dumps(damaged))
    with pytest.raises(RecordError, match=r"Settings\.epochs: found 'two'; expected a int"):
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
    with pytest.raises(SettingsError, match=r"workers.*module of their own|cannot be sent"):
        mn.compare(lambda: tiny_network(), task=tiny_task(), optimizers=["sgd"], workers=2)
    with pytest.raises(ComparisonFolderError, match=r"comparison\.json"):
        Comparison.read("/nowhere")


# ---- determinism and resumption --------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_numbers(whole):
    assert reproducible(tiny()) == reproducible(whole)
    # Sabotage: another seed gives others.
    with pytest.raises(AssertionError):
        assert reproducible(tiny(seeds=[0, 2])) == reproducible(whole)


def test_what_is_done_is_not_done_again(tmp_path, whole):
    seen: list[Progress] = []

    def interrupt(progress):
        seen.append(progress)
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=tmp_path, progress=interrupt)
    seen.clear()
    resumed = tiny(output=tmp_path, progress=seen.append)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (3, 8, 8)
    assert sum(progress.last is not None for progress in seen) == 5
    assert reproducible(resumed) == reproducible(whole)
    assert seen[-1].best is not None
    assert tiny(output=tmp_path) == resumed
    assert runs_csv(resumed) == runs_csv(whole)


def test_another_command_into_the_same_folder_is_refused_with_the_difference(tmp_path):
    tiny(output=tmp_path)
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(DifferentCommandError, match=r"epochs is 2 there and 3 here; momentum is 0\.9 there and 0\.5"):
        tiny(output=tmp_path, epochs=3, momentum=0.5)
    # Nothing was written.
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_two_processes_do_not_share_a_folder(tmp_path):
    def second(progress):
        with pytest.raises(FolderInUseError):
            tiny(output=tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=tmp_path, progress=second)


COMMAND = ["--model", "mlp:10", "--optimizers", "sgd,rsgd", "--lr", "0.1,1e8", "--seeds", "2", "--epochs", "2"]


def started(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from manifold_nets.cli import main; main()", "compare", *COMMAND]
    return subprocess.Popen(
        [*command, "--output", str(folder), *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def killed_and_resumed(folder: Path, times: int, *more: str) -> bytes:
    """Kill the command so often, at random moments after the study has been made; let it end; return its CSV."""
    draw = random.Random(7)
    for _ in range(times):
        process = started(folder, *more)
        while not (folder / "study.db").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = started(folder, *more)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return (folder / "runs.csv").read_bytes()


@pytest.mark.slow
def test_one_or_two_workers_and_kills_give_the_same_file(tmp_path):
    expected = runs_csv(compare_settings(small_settings(), None)).encode()
    assert b"diverged" in expected
    assert killed_and_resumed(tmp_path / "two", 0, "--workers", "2") == expected
    assert killed_and_resumed(tmp_path / "killed", 2) == expected


@pytest.mark.slow
def test_ten_kills_give_the_same_file(tmp_path):
    killed = killed_and_resumed(tmp_path / "killed", 10)
    assert killed == runs_csv(compare_settings(small_settings(), None)).encode()


def test_every_run_is_queued_once_and_stale_ones_are_given_up(tmp_path):
    settings = small_settings()
    queue = RunQueue(f"sqlite:///{tmp_path / 'study.db'}", "test")
    queue.create(settings, environment())
    for _ in range(2):
        queue.fill(settings.run_keys())
    claimed = dict(filter(None, (queue.claim() for _ in range(9))))
    assert sorted(claimed.values()) == sorted(settings.run_keys())
    queue.fill(settings.run_keys())
    assert queue.claim() is None
    # Those that show no beat are stale after a while, those that do are not.
    alive = min(claimed)
    assert queue.give_up_stale(0.0) == 0
    queue.beat([alive])
    assert queue.give_up_stale(1.0) == 0
    assert queue.give_up_stale(GRACE_SECONDS + 0.5) == 7
    queue.fill(settings.run_keys())
    again = dict(filter(None, (queue.claim() for _ in range(8))))
    assert sorted(again.values()) == sorted(key for ticket, key in claimed.items() if ticket != alive)
    queue.close()


@pytest.mark.slow
def test_a_worker_joins_through_a_shared_database(tmp_path):
    settings, url = small_settings(), f"sqlite:///{tmp_path / 'shared.db'}"
    queue = RunQueue(url, study_name(settings))
    queue.create(settings, environment())
    queue.fill(settings.run_keys())
    assert join_comparison(url, study_name(settings)) == settings
    assert queue.done() == 8
    queue.close()
    # The one that started it has no weights of these runs, and carries the chosen ones out again.
    shared = compare_settings(settings, tmp_path / "shared", storage=url, report=False)
    assert reproducible(shared) == reproducible(compare_settings(settings, None))


def test_a_database_without_the_study_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"study nothing in sqlite.*no such study"):
        join_comparison(f"sqlite:///{tmp_path / 'x.db'}", "nothing")
    with pytest.raises(StorageError) as caught:
        RunQueue("postgresql+nothing://me:secret@host/db", "x")
    assert "secret" not in str(caught.value)


# ---- fairness --------------------------------------------------------------------------------------------------------


def seen_by_contestants(plant=None):
    """Initial outputs and the inputs of every training step, for each contestant."""
    starts, settings = tiny_starts()
    inputs = tiny_task().parts["validation"].batch(torch.arange(30))[0]
    found = {}
    for key in settings.run_keys():
        model = starts.model(key).eval()
        if plant is not None:
            plant(key, model)
        batches = [rows.tolist() for epoch in (1, 2) for rows in Runner(starts, settings)._order(key, epoch)]
        found.setdefault(key.seed, []).append((model(inputs).detach(), batches))
    return found


def check_equal_chances(found):
    outputs = {seed: runs[0][0] for seed, runs in found.items()}
    assert not torch.allclose(*outputs.values())
    for runs in found.values():
        (first, order), *others = runs
        assert len(others) == 1
        assert sorted(row for batch in order[:3] for row in batch) == list(range(COUNT))
        for output, batches in others:
            limit = 64 * torch.finfo(output.dtype).eps * first.abs().max()
            assert (output - first).abs().max() <= limit
            assert batches == order


def test_every_contestant_starts_from_the_same_function_in_the_same_order():
    check_equal_chances(seen_by_contestants())


def test_sabotage_another_start_or_order_is_noticed():
    def another_start(key, model):
        if key.optimizer == "rsgd":
            with torch.no_grad():
                model[4].weight += 0.01

    with pytest.raises(AssertionError):
        check_equal_chances(seen_by_contestants(another_start))
    found = seen_by_contestants()
    found[0][1][1].reverse()
    with pytest.raises(AssertionError):
        check_equal_chances(found)


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
    from manifold_nets.comparison import training

    evaluate = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda model, task, part, **k: evaluate(model, task, "test", **k))
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
    assert choose(found.settings, results, "sgd", "plain", rates=[1e30]).learning_rate is None
    means = [sum(run.epochs[-1].validation_error for run in found.runs("sgd", rate)) / 2 for rate in [0.05]]
    assert choice.validation_errors[0] == pytest.approx(means[0])


def test_a_contestant_that_fails_stops_the_comparison_and_is_named(tmp_path):
    def broken(model, rate, settings):
        raise RuntimeError("no such thing")

    own = Contestant("mine", "plain", "own", "here", broken)
    with pytest.raises(RunFailedError, match=r"mine, learning rate 0\.05, seed 0: found RuntimeError: no such thing"):
        tiny(optimizers=["sgd", own], output=tmp_path)


def test_a_contestant_of_ones_own_and_schedules():
    rates = []

    class Watched(TorchStepper):
        def step(self, objective):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().step(objective)

    def make(model, rate, settings):
        return Watched(torch.optim.SGD(model.parameters(), rate))

    own = Contestant("mine", "plain", "own", "here", make)
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
    assert set(CONTESTANTS) >= {"sgd", "adam", "rsgd", "radam"}
