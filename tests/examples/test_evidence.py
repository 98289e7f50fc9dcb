"""The scripts that collect evidence: runs are stored, read back, and made into tables."""

import argparse
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from evidence import Arm, Run, Runs, collect, options_for, origin, preamble, read_runs, summary_table, table

ARMS = (
    Arm("small, 1", {"model": "mlp:4", "optimizers": ["sgd", "rsgd"], "learning_rates": [1e-2, 1e-1], "seeds": 2}),
    Arm("small, 2", {"model": "mlp:3", "optimizers": ["sgd"], "learning_rates": [1e-1], "seeds": 1}),
)


def options(tmp_path, *words):
    return options_for("tiny", "a test").parse_args(
        ["--output", str(tmp_path / "out"), "--write", str(tmp_path / "results"), *words]
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    arms = [Arm(arm.name, {**arm.options, "epochs": 1}) for arm in ARMS]
    return folder, arms, collect("tiny", arms, options(folder))


def same(a, b):
    """Whether stored runs agree to the digits that are kept; NaN equals NaN."""
    assert len(a.rows) == len(b.rows)
    for left, right in zip(a.rows, b.rows, strict=True):
        for name in Run.__dataclass_fields__:
            x, y = getattr(left, name), getattr(right, name)
            if isinstance(x, float):
                assert (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=1e-5), name
            else:
                assert x == y, name


def test_runs_are_stored_and_read_back(collected):
    folder, arms, runs = collected
    assert len(runs.rows) == 2 * 2 * 2 + 1
    same(runs, read_runs(folder / "results" / "tiny_runs.csv"))
    same(runs, collect("tiny", arms, options(folder, "--report-only")))
    chosen = runs.chosen("small, 1", "rsgd")
    assert [run.seed for run in chosen] == [0, 1]
    assert all(math.isfinite(run.test_error) for run in chosen)
    others = [run for run in runs.of("small, 1", "rsgd") if not run.chosen]
    assert len(others) == 2
    assert all(math.isnan(run.test_error) for run in others)  # test data are read for the chosen runs only


def test_sabotage_another_run_is_noticed(collected):
    _, _, runs = collected
    wrong = Runs((*runs.rows[:-1], replace(runs.rows[-1], validation_error=0.5)))
    with pytest.raises(AssertionError):
        same(runs, wrong)


def test_one_arm_again_keeps_the_others(collected):
    folder, arms, runs = collected
    again = collect("tiny", arms, options(folder, "--arms", "small, 2"))
    assert {run.arm for run in again.rows} == {"small, 1", "small, 2"}
    assert len(again.rows) == len(runs.rows)


def test_an_arm_of_no_name_and_missing_runs_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no such arm; there are: small, 1, small, 2"):
        collect("tiny", ARMS, options(tmp_path, "--arms", "large"))
    with pytest.raises(SystemExit, match=r"tiny_runs\.csv"):
        collect("tiny", ARMS, options(tmp_path, "--report-only"))
    with pytest.raises(SystemExit, match=r"tiny_runs\.csv"):
        collect("tiny", ARMS, argparse.Namespace(write=None, report_only=True))


def run_of(optimizer, seed, error, rate=0.1, chosen=True, scale="plain"):
    lost = math.isnan(error)
    return Run("a", optimizer, scale, rate, 0.0, seed, 3, lost, chosen, 0.1, error, error if chosen else math.nan, 1e-3)


def test_the_table_agrees_with_numpy():
    first, second = [0.05, 0.06, 0.08, 0.05], [0.04, 0.06, 0.05, 0.03]
    rows = [run_of("sgd", seed, error) for seed, error in enumerate(first)]
    rows += [run_of("rsgd", seed, error) for seed, error in enumerate(second)]
    rows += [run_of("rsgd", seed, math.nan, rate=1.0, chosen=False) for seed in range(4)]
    runs = Runs(tuple(rows))
    sgd, rsgd = summary_table(runs, "a", "sgd")
    assert sgd[3] == f"{100 * np.mean(first):.2f} ± {100 * np.std(first, ddof=1):.2f}"
    assert sgd[4] == "reference"
    assert rsgd[4].startswith(f"{100 * (np.mean(second) - np.mean(first)):+.2f} (")
    assert rsgd[5] == "4 of 8"
    assert runs.seconds_per_step("a", "sgd") == 1e-3


def test_a_table_and_how_it_came_about(monkeypatch):
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    monkeypatch.setattr(sys, "argv", ["/somewhere/mnist.py", "--write", "examples/results", "--report-only"])
    text = preamble(Runs((run_of("sgd", 0, 0.1),)))
    assert text.startswith("Command: `python examples/mnist.py --write examples/results`. Machine: ")
    assert "/somewhere" not in text
    words = ["mnist.py", "--data", "/data/mnist", "--write", "/somewhere", "--output", "/out", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert origin().startswith("Command: `python examples/mnist.py --data FOLDER --write FOLDER --seeds 3`. Machine: ")


def test_tables_made_again_elsewhere_tell_of_the_machine_that_trained(collected, monkeypatch):
    folder, arms, _ = collected
    told = preamble(read_runs(folder / "results" / "tiny_runs.csv"))
    monkeypatch.setattr(sys, "argv", ["another.py"])
    monkeypatch.setattr("evidence.machine", lambda: "Machine: another.")
    assert preamble(collect("tiny", arms, options(folder, "--report-only"))) == told
    # Sabotage: without what was stored, the table would tell of the wrong one.
    assert preamble(Runs(read_runs(folder / "results" / "tiny_runs.csv").rows)) != told
