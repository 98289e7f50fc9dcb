"""Optimizers, tasks and models of one's own, in one process and in several, and what a worker may run."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers.comparison_runs import reproducible, small_settings, tiny, tiny_network, tiny_task
from helpers.example_modules import example

import manifold_nets as mn
from manifold_nets import comparison
from manifold_nets.cli import main
from manifold_nets.comparison import OptimizerSpec, TorchStepper, errors
from manifold_nets.comparison.api import compare_settings, join_comparison, study_name
from manifold_nets.comparison.errors import (
    CodeNotAllowedError,
    OptimizerBuildError,
    OptimizerNameError,
    RunFailedError,
    SettingsError,
    TaskNameError,
)
from manifold_nets.comparison.experiment import foreign_code
from manifold_nets.comparison.optimizers import OPTIMIZERS, optimizer_spec, spec_of
from manifold_nets.comparison.pool import unpacked
from manifold_nets.comparison.results import environment
from manifold_nets.comparison.store import RunStore
from manifold_nets.errors import ModelNotFoundError

MINE = """
import torch
from torch import nn
from manifold_nets.comparison import OptimizerSpec, TorchStepper, task_from_data

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, weight_decay=9.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * (p.grad.sign() + group["weight_decay"] * p)

def plain(params, lr):
    return torch.optim.SGD(params, lr)

def stepper(model, rate, settings):
    return TorchStepper(torch.optim.SGD(model.parameters(), rate))

WHOLE = OptimizerSpec("x", "converted", "own", "own", stepper)

def wrong(params, lr):
    return "no optimizer"

def without_rate(params):
    return torch.optim.SGD(params, 0.1)

def make_task():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(5))
    y = (x.sum(1) > 0).long()
    return task_from_data((x[:50], y[:50]), (x[50:70], y[50:70]), (x[70:], y[70:]), name="points", batch_size=20)

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a file of one's own, which is the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(*more: str) -> list[str]:
    given = ["--task", "mine.py:make_task", "--model", "mine.py:net", "--optimizers", "sgd,mine.py:Signs,mine.py:plain"]
    return ["compare", *given, "--lr", "0.01,0.1", "--seeds", "2", "--epochs", "1", *more]


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_optimizers_of_a_file_are_found_by_name(mine):
    assert optimizer_spec("rsgd") is OPTIMIZERS["rsgd"]
    model = tiny_network()
    settings = small_settings(weight_decay=0.25)
    for name, kind in (("mine.py:Signs", "Signs"), ("mine.py:plain", "SGD"), ("torch.optim:Rprop", "Rprop")):
        found = optimizer_spec(name)
        assert (found.name, found.form) == (name, "plain")
        optimizer = found.make(model, 0.5, settings).optimizer
        assert type(optimizer).__name__ == kind
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}
        # The weight decay is the comparison's, never the optimizer's own default.
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25, 0.0}
    assert (optimizer_spec("mine.py:WHOLE").name, optimizer_spec("mine.py:WHOLE").form) == (
        "mine.py:WHOLE",
        "converted",
    )


def test_what_is_no_optimizer_is_refused_by_name(mine):
    for name in ("mine", "torchvision:resnet18", "mine.py:"):
        with pytest.raises(OptimizerNameError, match=r"file\.py:NAME of an optimizer class"):
            optimizer_spec(name)
    with pytest.raises(ModelNotFoundError, match="Sings"):
        optimizer_spec("mine.py:Sings")
    for name in ("mine.py:without_rate", "mine.py:torch.__name__"):
        with pytest.raises(SettingsError, match="a function of params and lr"):
            optimizer_spec(name)
    with pytest.raises(OptimizerBuildError, match=r"mine\.py:wrong.*not a torch\.optim\.Optimizer"):
        mn.compare("mine.py:net", task="mine.py:make_task", optimizers="mine.py:wrong", seeds=1, epochs=1)


def test_classes_and_functions_take_part_as_they_are():
    def slow(params, lr):
        return torch.optim.SGD(params, lr / 100, momentum=0.9)

    found = tiny(optimizers=["sgd", torch.optim.Rprop, slow], seeds=1)
    assert found.settings.optimizers == ("sgd", "Rprop", "slow")
    assert tiny(optimizers=torch.optim.Rprop, seeds=1).settings.optimizers == ("Rprop",)
    # At a hundredth of the rate the steps are those of the built-in optimizer at that rate.
    same = tiny(optimizers=["sgd"], learning_rates=[0.0005], seeds=1)
    assert found.runs("slow", 0.05)[0].epochs[-1].train_loss == same.results[0].epochs[-1].train_loss


def test_the_command_line_takes_a_file(mine):
    done = CliRunner().invoke(main, arguments("--output", "one"))
    assert done.exit_code == 0, done.stderr
    assert "mine.py:Signs" in done.stdout
    refused = CliRunner().invoke(main, ["compare", "--optimizers", "sgd,mine.py:without_rate", "--output", "x"])
    assert refused.exit_code == 2
    assert "mine.py:without_rate" in refused.stderr
    assert not (mine / "x").exists()


# ---- in other processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_give_the_same_file_as_one(mine):
    for workers in ("1", "2"):
        done = CliRunner().invoke(main, arguments("--output", f"out{workers}", "--workers", workers))
        assert done.exit_code == 0, done.stderr
    one, two = ((mine / f"out{workers}" / "runs.csv").read_text() for workers in (1, 2))
    assert one == two
    assert one.count("mine.py:Signs") == 4


@pytest.mark.slow
def test_two_workers_take_what_only_this_process_knows():
    """A network and optimizers without a name that could be imported, and data."""
    scale = 3.0

    class Scaled(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr * scale)

    def compared(workers: int):
        return mn.compare(
            lambda: tiny_network(),
            task=tiny_task(),
            optimizers=["sgd", Scaled, OptimizerSpec("mine", "plain", "own", "here", lambda m, r, s: made(m, r))],
            learning_rates=[0.05],
            seeds=2,
            epochs=1,
            workers=workers,
        )

    def made(model, rate):
        return TorchStepper(torch.optim.SGD(model.parameters(), rate))

    assert reproducible(compared(1)) == reproducible(compared(2))


@pytest.mark.parametrize("part", ["optimizer mine", "task", "model"])
def test_what_cannot_be_sent_is_named_and_nothing_is_written(part, tmp_path):
    lock = threading.Lock()

    def make(model, rate, settings):
        return TorchStepper(torch.optim.SGD(model.parameters(), rate)) if lock else None

    def network():
        return tiny_network() if lock else None

    task = tiny_task()
    locked = replace(task, loss=lambda outputs, targets: task.loss(outputs, targets) if lock else None)
    own = OptimizerSpec("mine", "plain", "own", "here", make)
    options = {
        "model": network if part == "model" else tiny_network,
        "task": locked if part == "task" else task,
        "optimizers": ["sgd", own] if part == "optimizer mine" else ["sgd"],
    }
    with pytest.raises(SettingsError, match=rf"workers: found .2, with {part}, which cannot be pickled.*lock"):
        mn.compare(**options, learning_rates=[0.05], seeds=1, epochs=1, workers=2, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    # In one process it takes part; this is the remedy that the message gives.
    mn.compare(**options, learning_rates=[0.05], seeds=1, epochs=1, workers=1)


class Unmade:
    """Can be sent, and not made again."""

    def __reduce__(self):
        return int, ("three",)


def test_what_cannot_be_made_again_in_a_worker_is_named():
    import pickle

    with pytest.raises(RuntimeError, match=r"^optimizer mine cannot be unpickled in a worker \(ValueError"):
        unpacked({"task": pickle.dumps(1), "optimizer mine": pickle.dumps(Unmade())})


@pytest.mark.slow
def test_a_worker_names_the_optimizer_that_it_cannot_make(tmp_path):
    own = replace(spec_of(torch.optim.Rprop, "mine"), description=Unmade())
    with pytest.raises(RunFailedError, match="optimizer mine cannot be unpickled in a worker"):
        tiny(optimizers=["sgd", own], workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 3])
def test_a_run_whose_process_ends_is_repeated_three_times_at_most(deaths, tmp_path):
    def make(model, rate, settings):
        ended = len(list(tmp_path.glob("died-*")))
        if os.getpid() != parent and ended < deaths:
            (tmp_path / f"died-{ended}").touch()
            os._exit(7)
        return optimizer_spec("sgd").make(model, rate, settings)

    parent = os.getpid()
    options = {"optimizers": [OptimizerSpec("mine", "plain", "own", "here", make)], "seeds": 1, "learning_rates": [0.1]}
    if deaths == 1:
        assert tiny(**options, workers=2).results[0].status == "finished"
        return
    with pytest.raises(RunFailedError, match=r"a process that ended with status 7, 3 times; expected a result"):
        tiny(**options, workers=2)


# ---- what a shared database names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        ({"task": "mnist:100,50", "model": "timm:resnet18"}, ()),
        ({"model": "torchvision:resnet18"}, ()),
        ({"task": "a.py:task"}, ("a.py:task",)),
        ({"task": "os:getcwd", "model": "net.py:net"}, ("os:getcwd", "net.py:net")),
        ({"model": "torchvision:a.py:net"}, ("torchvision:a.py:net",)),
        ({"optimizers": ("sgd", "a.py:Lion")}, ("a.py:Lion",)),
    ],
)
def test_code_from_elsewhere_is_found_in_settings(changes, expected):
    assert foreign_code(small_settings(**changes)) == expected


def shared_study(folder, **changes):
    """A study in a database that names code which leaves a trace when it runs."""
    (folder / "evil.py").write_text(f"open({str(folder / 'trace')!r}, 'w').close()\nfrom torch.optim import SGD\n")
    settings = small_settings(learning_rates=(0.1,), seeds=(0,), epochs=1, **changes)
    url = f"sqlite:///{folder / 'shared.db'}"
    queue = RunStore(url, study_name(settings))
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    queue.close()
    return url, study_name(settings)


@pytest.mark.parametrize(
    "changes", [{"optimizers": ("sgd", "evil.py:SGD")}, {"task": "evil.py:SGD"}, {"model": "evil.py:SGD"}]
)
def test_a_worker_runs_no_code_that_only_the_database_names(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url, study = shared_study(tmp_path, **changes)
    with pytest.raises(CodeNotAllowedError, match=r"found evil\.py:SGD.*--allow evil\.py:SGD .in Python"):
        join_comparison(url, study)
    for allowed in ([], ["--allow", "other.py:SGD"], ["--optimizers", "evil.py:Adam"]):
        done = CliRunner().invoke(main, ["compare", "--worker", study, "--storage", url, *allowed])
        assert (done.exit_code, done.stdout) == (1, "")
        assert "--allow evil.py:SGD" in done.stderr
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [["--allow", "evil.py:SGD"], ["--optimizers", "sgd,evil.py:SGD"]])
def test_a_worker_runs_the_code_that_its_own_command_names(allowed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url, study = shared_study(tmp_path, optimizers=("sgd", "evil.py:SGD"))
    done = CliRunner().invoke(main, ["compare", "--worker", study, "--storage", url, *allowed])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "trace").exists()
    queue = RunStore(url, study)
    assert queue.count_done() == 2
    queue.close()


def test_names_with_control_characters_are_refused():
    for name in ("sgd\n", "\x1b[31msgd", "s\u202egd", ""):
        with pytest.raises(SettingsError, match=r"optimizers: found .*without control characters"):
            small_settings(optimizers=(name,))
        own = OptimizerSpec(name, "plain", "own", "here", OPTIMIZERS["sgd"].make)
        with pytest.raises(SettingsError, match="without control characters"):
            tiny(optimizers=[own])
    with pytest.raises(SettingsError, match="task: found"):
        compare_settings(small_settings(task="di\tgits"), None)


def test_former_names_are_known_for_one_release():
    for module, name, new in (
        (comparison, "Contestant", OptimizerSpec),
        (comparison, "CONTESTANTS", OPTIMIZERS),
        (errors, "ContestantError", OptimizerBuildError),
    ):
        with pytest.warns(DeprecationWarning, match=rf"{name} is now called \w+$"):
            assert getattr(module, name) is new
        with pytest.raises(AttributeError):
            getattr(module, f"{name}s")


@pytest.mark.parametrize(
    ("options", "name", "place"),
    [
        ({"task": "movielens"}, "movielens", "--task examples/paper/ratings.py:movielens"),
        ({"model": "segnet-basic:16,4"}, "segnet-basic", "--model examples/paper/camvid.py:segnet_basic"),
        ({"optimizers": ["sgd", "sm-columns"]}, "sm-columns", "--optimizers examples/paper/protocol.py:sm_columns"),
    ],
)
def test_names_that_have_moved_say_where_they_are(options, name, place):
    with pytest.raises(
        (TaskNameError, OptimizerNameError), match=rf"found '{name}.*no longer built in.*use {place}\.$"
    ):
        mn.compare(**options)
    attribute = place.rpartition(":")[2]
    assert getattr(example(place.split("/", 1)[1].partition(".py")[0].replace("/", ".")), attribute) is not None


def test_a_form_that_is_not_known_is_refused():
    """Earlier versions held filters at their norms for the form ``constrained``; it must not train the plain model."""
    with pytest.raises(SettingsError, match="mine, form: found 'constrained'; expected 'plain' or 'converted'"):
        OptimizerSpec("mine", "constrained", "sgd", "own", OPTIMIZERS["sgd"].make)
