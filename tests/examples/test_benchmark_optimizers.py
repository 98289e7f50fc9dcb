"""The benchmark of the optimizers times what it says: shapes, peers, executions, ratios."""

import argparse
import math

import pytest
import torch
from helpers.example_modules import example
from torch import nn

from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.backends import dispatch
from manifold_nets.sources import import_torchvision

SMALL = [(8, 3, 3, 3), (6, 8, 1, 1), (4, 6, 3, 3)]


def benchmark(*packages):
    return example("benchmark_optimizers", *packages), example("optimizer_workloads")


@pytest.mark.parametrize(
    ("workload", "name", "entries"), [("resnet50", "resnet50", 23.5), ("mobilenet", "mobilenet_v3_small", 0.93)]
)
def test_the_weights_are_those_of_the_networks(workload, name, entries):
    _, workloads = benchmark("torchvision")
    with torch.device("meta"):
        net = getattr(import_torchvision().models, name)()
    expected = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    found = list(workloads.SHAPES[workload]())
    assert sorted(found) == sorted(expected)
    assert sum(map(math.prod, found)) / 1e6 == pytest.approx(entries, rel=0.02)


def test_the_transformer_has_a_hundred_million_entries():
    shapes = list(benchmark()[1].transformer())
    assert sum(map(math.prod, shapes)) / 1e6 == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_every_execution_is_timed_as_what_it_is(method, monkeypatch):
    timing, workloads = benchmark()
    chosen = [c for c in workloads.contestants(method, relatives=True) if c.weights in ("plain", "spheres", "rows")]
    assert [c.execution for c in chosen[:2]] == ["fused=True", "foreach=True"]
    assert {c.name for c in chosen} >= {n for n, row in OPTIMIZERS.items() if row.adaptive == (method == "adam")} - {
        *("rsgd", "radam")
    }
    chosen = [c for c in chosen if c.execution != "compile=True"]  # which takes long
    steps = dict(zip(chosen, workloads.steps_over(SMALL, chosen, "cpu"), strict=True))
    for contestant, timed in steps.items():
        if contestant.name not in OPTIMIZERS and not contestant.name.startswith("Riemannian"):
            timed.step()
            continue
        called = []
        for how in ("run_native", "run_in_passes", "run_batched"):
            monkeypatch.setattr(dispatch, how, lambda *_, how=how, called=called: called.append(how))
        timed.step()
        monkeypatch.undo()
        name = timing.named(contestant, "cpu")
        expected = {
            "foreach=True": ["run_batched"],
            "foreach=False": [],
            "default: native kernel": ["run_native"],
            "default: passes of the native kernel": ["run_in_passes"],
        }
        assert called == expected.get(name, ["run_batched"]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_whole_training_steps_of_all_peers_learn_from_the_same_loss(method, monkeypatch):
    timing, workloads = benchmark("torchvision")
    monkeypatch.setitem(workloads.TRAINING, "training", ("resnet18", (4, 3, 32, 32), None))
    options = argparse.Namespace(device="cpu", relatives=False, only=[])
    chosen = [c for c in timing.of_workload("training", method, options) if c.execution != "compile=True"]
    assert {c.weights for c in chosen} == {"plain", "spheres", "rows", "weight_norm", "normalized"}
    torch.manual_seed(0)
    timed = workloads.training_steps("training", chosen, "cpu")
    rows = timing.measure("training", chosen, timed, 2, "cpu")
    assert [row.optimizer for row in rows] == [c.name for c in chosen]
    for row, each in zip(rows, timed, strict=True):
        assert row.milliseconds > 0
        assert row.to_fused_lower_quartile <= row.to_fused <= row.to_fused_upper_quartile
        assert sum(group["lr"] > 0 for group in each.optimizer.param_groups)
        assert all(p.grad is not None for group in each.optimizer.param_groups for p in group["params"])
    kept = {row.optimizer: row.state_over_weights for row in rows}
    assert kept["RiemannianAdam" if method == "adam" else "RiemannianSGD"] <= 1.02


def test_ratios_are_taken_within_a_repetition():
    timing, _ = benchmark()
    base = [1.0, 10.0, 100.0]  # a machine that became busy
    assert timing.ratio([2.0, 20.0, 200.0], base) == (2.0, 2.0, 2.0)
    assert timing.ratio([2.0, 30.0, 400.0], base) == (3.0, 2.0, 4.0)


def test_a_run_that_was_stopped_goes_on(monkeypatch, tmp_path):
    timing, workloads = benchmark()
    chosen = workloads.contestants("sgd")[:3]
    rows = timing.measure("mobilenet", chosen, workloads.steps_over(SMALL, chosen, "cpu"), 3, "cpu")
    words = ["--workloads", "mobilenet", "--methods", "sgd", "--write", str(tmp_path), "--missing"]
    monkeypatch.setattr("sys.argv", ["benchmark_optimizers.py", *words])
    assert timing.stored(tmp_path, "cpu") == []
    timing.write(rows, tmp_path, timing.arguments())
    assert timing.stored(tmp_path, "cpu") == rows
    monkeypatch.setattr(timing, "ProcessPoolExecutor", None)  # nothing is left to run
    timing.main()
    assert "Machine: " in (tmp_path / "benchmark_optimizers.md").read_text()


def test_the_table_has_every_column_and_too_few_repetitions_are_not_stored(monkeypatch, capsys):
    timing, workloads = benchmark()
    chosen = workloads.contestants("sgd")[:3]
    rows = timing.measure("small", chosen, workloads.steps_over(SMALL, chosen, "cpu"), 3, "cpu")
    lines = timing.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert rows[0].to_fused == 1.0
    assert rows[1].to_foreach == 1.0
    monkeypatch.setattr("sys.argv", ["benchmark_optimizers.py", "--repetitions", "19", "--write", "."])
    with pytest.raises(SystemExit, match="2"):
        timing.arguments()
    assert "at least 20 with --write" in capsys.readouterr().err
