"""The tables of the report on CamVid, and the numbers in them, all made of stored runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from camvid_figures import LABELS
from camvid_scores import Key, Scores, Stored
from evidence import table
from paper.camvid import CLASSES

from manifold_nets.comparison.measures import Sensitivity, learning_rate_sensitivity
from manifold_nets.comparison.statistics import PairedDifference, holm, mean_interval, paired_difference

SGD, RSGD = ("SGD", "sgd", "plain"), ("SGD", "rsgd", "plain")
ADAM, RADAM = ("Adam", "adam", "plain"), ("Riemannian Adam", "radam", "plain")
MAIN = (SGD, RSGD, ADAM, RADAM)
RECIPES = {
    "rsgd-matched": "Riemannian SGD, rates matched to SGD's at the start",
    "rsgd-own-rate": "Riemannian SGD, classifier and normalizations at 0.1",
}
LARGER = (("larger images, sgd", "sgd", "plain"), ("larger images, rsgd", "rsgd", "plain"))


def label(key: Key) -> str:
    """What an optimizer of an arm is called."""
    return {**LABELS, **RECIPES}[key[1]]


def values(stored: Stored, key: Key, score: Callable[[Scores], float]) -> np.ndarray:
    """A score of the chosen runs by seed; NaN where one diverged."""
    found, seeds = stored.of(key), sorted({run.seed for run in stored.runs.of(*key)})
    return np.array([score(found[seed]) if seed in found else math.nan for seed in seeds])


def mean_iou(scores: Scores) -> float:
    """The score that everything is judged by."""
    return scores.mean_iou


def spread(numbers: np.ndarray, digits: int = 1) -> str:
    """Mean and standard deviation."""
    if not np.isfinite(numbers).any():
        return "none"
    deviation = f" ± {np.nanstd(numbers, ddof=1):.{digits}f}" if np.isfinite(numbers).sum() > 1 else ""
    return f"{np.nanmean(numbers):.{digits}f}{deviation}"


def difference(stored: Stored, first: Key, second: Key) -> PairedDifference:
    """Paired difference of the mean IoU: seeds give the same start and the same batches in all arms."""
    return paired_difference(*(values(stored, key, mean_iou) for key in (first, second)), names=(first[1], second[1]))


def interval(found: PairedDifference, digits: int = 1) -> str:
    """The difference with Student's interval: for few seeds a bootstrap interval is too narrow."""
    text = f"{found.value:+.{digits}f}"
    if found.count > 1:
        text += f" ({found.t_low:+.{digits}f} … {found.t_high:+.{digits}f})"
    return text.replace("-", "−")


def judged(found: PairedDifference) -> str:
    """The interval, and what it says."""
    if not found.t_low <= 0 <= found.t_high:
        words = "the interval leaves out zero" if found.count > 1 else "one seed"
    else:
        words = f"{found.count} seeds do not tell the two apart"
    return f"{interval(found)} points of mean IoU, {words}"


def width(stored: Stored, key: Key) -> Sensitivity:
    """Learning rates whose validation mean IoU is at least 90 % of the best."""
    runs = stored.runs.of(*key)
    rates, seeds = (sorted({getattr(run, name) for run in runs}) for name in ("learning_rate", "seed"))
    errors = {(run.learning_rate, run.seed): run.validation_error for run in runs}
    grid = [[errors[rate, seed] for seed in seeds] for rate in rates]
    best = learning_rate_sensitivity(rates, grid, 0.0).best_error
    tolerance = 0.0 if math.isnan(best) else 0.1 * (1 - best) / best
    return learning_rate_sensitivity(rates, grid, tolerance)


# ---- tables ----------------------------------------------------------------------------------------------------------


def score_table(stored: Stored, keys: Iterable[tuple[str, Key]], reference: Key) -> str:
    """A row a key: learning rate, the three scores, and the difference from a reference."""
    rows = list(keys)
    others = [key for _, key in rows if key != reference]
    found = {key: difference(stored, key, reference) for key in others}
    adjusted = dict(zip(others, holm([found[key].p_value for key in others]), strict=True)) if others else {}
    lines = []
    for name, key in rows:
        runs = stored.runs.chosen(*key)
        scores = (lambda s: s.global_accuracy, lambda s: s.class_average, mean_iou)
        if key == reference:
            last = "reference"
        else:
            last = interval(found[key]) + (f", p = {adjusted[key]:.2g}" if found[key].count > 1 else "")
        rate = f"{runs[0].learning_rate:g}" if runs else "none"
        loss = spread(np.array([run.train_loss for run in runs]), digits=3)
        lines.append([name, rate, loss, *(spread(values(stored, key, score)) for score in scores), last])
    head = (
        *("optimizer", "learning rate", "training loss", "global accuracy", "class average", "mean IoU"),
        "difference in mean IoU",
    )
    return table(head, lines)


def class_table(stored: Stored, keys: Sequence[Key]) -> str:
    """Intersection over union of each class."""
    lines = []
    for number, name in enumerate(CLASSES):
        cells = (spread(values(stored, key, lambda s, n=number: float(s.class_iou[n]))) for key in keys)
        lines.append([name, *cells])
    return table(("class", *(label(key) for key in keys)), lines)


def robustness_table(stored: Stored, keys: Sequence[Key]) -> str:
    """Good learning rates, spread over seeds, diverged runs, and what another initial scale costs."""
    lines = []
    for key in keys:
        good, runs = width(stored, key), stored.runs.of(*key)
        lines.append(
            [
                label(key),
                f"{good} ({good.low:.2g} … {good.high:.2g})",
                f"{mean_interval(values(stored, key, mean_iou)).deviation:.2f}",
                f"{sum(run.diverged for run in runs)} of {len(runs)}",
                *rescaled_cells(stored, key),
                f"{stored.runs.seconds_per_step(*key[:2]) / stored.runs.seconds_per_step(*SGD[:2]):.2f}",
            ]
        )
    head = (
        *("optimizer", "good learning rates", "sd over seeds (points)", "diverged"),
        *("validation mean IoU, rescaled, same rate", "test mean IoU, rescaled, rate chosen again", "time a step"),
    )
    return table(head, lines)


def rescaled_cells(stored: Stored, key: Key) -> tuple[str, str]:
    """Validation mean IoU with rescaled filters at the rate chosen for plain ones, and the test one at its own rate."""
    other = (f"{key[0]}, rescaled", key[1], "rescaled")
    chosen = stored.runs.chosen(*key)
    runs = [run for run in stored.runs.of(*other) if chosen and run.learning_rate == chosen[0].learning_rate]
    if not runs:
        return "not run", "not run"
    before = spread(np.array([100 * (1 - run.validation_error) for run in chosen]))
    after = spread(np.array([100 * (1 - run.validation_error) for run in runs]))
    found = difference(stored, other, key)
    return f"{after} (plain: {before})", f"{spread(values(stored, other, mean_iou))}; {interval(found)}"


def recipe_keys(stored: Stored) -> list[tuple[str, Key]]:
    """Every way to train with plain or spherical SGD beside the first, with what is different."""
    rows = [("SGD", SGD), ("Riemannian SGD", RSGD)]
    arms = dict.fromkeys(run.arm for run in stored.runs.rows)
    for arm in arms:
        if arm.startswith("SGD, ") and "rescaled" not in arm:
            rows += [(f"{label(key)}, {arm.removeprefix('SGD, ')}", key) for key in stored.keys(arm)]
        if arm == "recipes":
            rows += [(label(key), key) for key in stored.keys(arm)]
    return [*rows, *((label(key), key) for key in (ADAM, RADAM) if key[0] in arms)]


def best_by_validation(stored: Stored, keys: Iterable[Key]) -> Key:
    """The key whose chosen runs have the smallest mean validation error: no test data."""

    def error(key: Key) -> float:
        found = [run.validation_error for run in stored.runs.chosen(*key)]
        return math.inf if not found or any(map(math.isnan, found)) else float(np.mean(found))

    return min(keys, key=error)
