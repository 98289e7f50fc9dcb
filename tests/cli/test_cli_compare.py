"""``manifold-nets compare`` on the command line: results, exit status, refusals."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from manifold_nets.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.mark.slow
def test_a_comparison_its_report_and_a_refusal(tmp_path):
    small = ["--model", "mlp:8", "--optimizers", "sgd,rsgd", "--lr", "0.05,0.2", "--seeds", "2", "--output", tmp_path]
    done = run(*small, "--epochs", "2", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"]
    assert len(document["results"]) == 8
    assert "8 of 8 runs" in done.stderr
    page = tmp_path / "report.html"
    page.unlink()
    again = run("--report-only", tmp_path)
    assert again.exit_code == 0
    assert page.is_file()
    assert "rsgd" in again.stdout
    other = run(*small, "--epochs", "3")
    assert other.exit_code == 1
    assert "epochs is 2 there and 3 here" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimizers", "sdg", "--output", "x"], "optimizers: found 'sdg'"),
        (["--lr", "1:2", "--output", "x"], "is no list of learning rates"),
        (["--lr", "-1", "--output", "x"], "learning_rates: found"),
        (["--task", "digitz", "--output", "x"], "digitz"),
        (["--model", "mpl:8", "--output", "x"], "Near matches: mlp"),
        (["--initial-scales", "huge", "--output", "x"], "initial_scales: found"),
        (["--device", "cdua", "--output", "x"], "device: found 'cdua'; expected a device that torch has"),
        (["--device", "cuda:999", "--output", "x"], "device: found 'cuda:999'"),
        (["--device", "meta", "--output", "x"], "device: found 'meta'"),
        (["--subset", "100000,10", "--output", "x"], "subset: found (100000, 10); expected at most"),
        (["--tune-on", "10,100000,1", "--output", "x"], "tune_on: found (10, 100000); expected at most"),
        ([], "--output is missing"),
        (["--worker", "study"], "--worker needs --storage"),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert said in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_optimizer_that_cannot_be_made_is_named_and_nothing_written(workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model", "mlp-plain:16", "--optimizers", "sgd,rsgd", "--lr", "0.1", "--seeds", "1", "--epochs", "1"]
    done = run(*small, "--output", "x", "--workers", workers)
    assert (done.exit_code, list(tmp_path.iterdir())) == (1, [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: run rsgd, learning rate 0.1, seed 0: found NothingToConvertError: ")
    assert line.endswith("no run was started. Fix the cause, or leave rsgd out of the optimizers.")


def test_a_folder_without_a_comparison_exits_with_1(tmp_path):
    done = run("--report-only", tmp_path, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == "ComparisonFolderError"
