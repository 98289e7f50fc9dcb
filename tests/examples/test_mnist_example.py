"""The experiment on MNIST: its protocol is the paper's, and its report gives known answers for known runs."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
from helpers.example_modules import example
from scipy import stats

evidence = example("evidence")
report = example("mnist_report")
script = example("mnist_paper")

OPTIONS = argparse.Namespace(data=None, seeds=5, epochs=30)


def test_the_protocol_is_the_papers():
    arms = script.paper_arms(OPTIONS)
    assert len(arms) == 2 * 2 * 2
    for arm in arms:
        given = arm.options
        assert given["learning_rates"] == tuple(10 ** (-half / 2) for half in range(11))
        assert (given["batch_size"], given["momentum"], given["initialization"]) == (100, 0.0, "balanced")
        assert (given["tune_on"], given.get("weight_decay", 0.0)) == ((1000, 500, 50), 0.0)
        assert given["early_stop"] == ("bold-driver" in arm.name)
        assert given["model"].count("100") == (4 if "depth 4" in arm.name else 2)
        # Without normalization the scaled metric is not known for layers between others.
        names = [getattr(optimizer, "name", optimizer) for optimizer in given["optimizers"]]
        assert ("sm-columns" in names) == given["model"].startswith("mlp:")
        assert given["model"].startswith("mlp-plain:") == arm.name.startswith("Arch1")


def test_the_contest_gives_every_optimizer_the_same_trials():
    for arm in script.today_arms(OPTIONS):
        names = [contestant.name for contestant in arm.options["optimizers"]]
        assert {"sgd", "adamw", "rsgd", "radam"} < set(names)
        assert len(names) == len(set(names)) == 7
        assert 0.0 in arm.options["weight_decays"]


ERRORS = {
    ("Arch2", 2, "sgd"): [0.030, 0.032, 0.031],
    ("Arch2", 2, "un"): [0.028, 0.031, 0.030],
    ("Arch2", 4, "sgd"): [0.029, 0.030, 0.031],
    ("Arch2", 4, "un"): [0.024, 0.026, 0.025],
}
SECONDS = {"sgd": 2e-3, "un": 3e-3}


def stored(errors=ERRORS):
    rows = [
        evidence.Run(
            *(report.paper_arm(architecture, depth, "bold-driver"), name, "plain", 0.1, 0.0, seed, 30, False, True),
            train_loss=0.1,
            validation_error=error,
            test_error=error,
            seconds_per_step=SECONDS[name],
        )
        for (architecture, depth, name), values in errors.items()
        for seed, error in enumerate(values)
    ]
    return evidence.Runs(tuple(rows), "Command: `python examples/mnist_paper.py`. Machine: one.")


def check_answers(runs):
    percent = {key: 100 * np.array(values) for key, values in ERRORS.items()}
    gains = [percent["Arch2", depth, "un"] - percent["Arch2", depth, "sgd"] for depth in (2, 4)]
    shallow = report.between(runs, "Arch2, depth 2, bold-driver", "un", "sgd")
    assert shallow.value == pytest.approx(gains[0].mean())
    (name, deeper), *others = report.deeper(runs).items()
    assert (name, others) == ("Arch2, bold-driver", [])
    low, high = stats.t.interval(0.95, 2, gains[1].mean() - gains[0].mean(), stats.sem(gains[1] - gains[0]))
    assert (deeper.t_low, deeper.t_high) == pytest.approx((low, high))
    assert report.cost(runs, "un") == (1.5, 1.5, 1.5, 2)
    assert math.isnan(report.cost(runs, "sm-columns")[1])


def test_differences_their_change_with_depth_and_costs_are_those_of_scipy():
    check_answers(stored())
    # Sabotage: the errors of two seeds change places.
    swapped = {**ERRORS, ("Arch2", 4, "un"): [0.026, 0.024, 0.025]}
    with pytest.raises(AssertionError):
        check_answers(stored(swapped))


def test_the_report_answers_what_is_stored_and_nothing_else(tmp_path):
    text = report.as_markdown(stored())
    assert "- UN minus B-SGD, Arch2, depth 4, bold-driver: −0.50 points (" in text
    assert "1.50 times as long as with B-SGD" in text
    assert "Arch1" not in text.partition("## ")[2]
    assert "SM" not in text.partition("## ")[2]
    report.draw(stored(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_counts_of_verdicts(monkeypatch):
    counted = example("evidence_summary").counted
    runs = stored()
    found = [report.between(runs, f"Arch2, depth {depth}, bold-driver", "un", "sgd") for depth in (2, 4)]
    assert counted([*found, None]) == "better in 1 of 2, worse in 0, not told apart in 1"
    opposite = [report.between(runs, f"Arch2, depth {depth}, bold-driver", "sgd", "un") for depth in (2, 4)]
    assert counted(opposite) == "better in 0 of 2, worse in 1, not told apart in 1"
