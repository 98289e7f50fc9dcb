"""The report of the comparisons on CamVid: tables, findings in words, and figures, all made of stored files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from camvid_figures import LABELS, draw_curves, draw_pictures
from camvid_scores import Key, Scores, Stored, read_pictures
from evidence import table, write_text

from manifold_nets.comparison.measures import Sensitivity, learning_rate_sensitivity
from manifold_nets.comparison.statistics import PairedDifference, holm, mean_interval, paired_difference
from manifold_nets.comparison.tasks.camvid import CLASSES

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


def interval(found: PairedDifference) -> str:
    """The difference with Student's interval: for few seeds a bootstrap interval is too narrow."""
    text = f"{found.value:+.1f}"
    if found.count > 1:
        text += f" ({found.t_low:+.1f} … {found.t_high:+.1f})"
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


# ---- in words --------------------------------------------------------------------------------------------------------


def findings(stored: Stored) -> list[str]:
    """What the runs say, one sentence each; those whose arms were not run are left out."""
    arms = {run.arm for run in stored.runs.rows}
    found = [
        f"**{label(ours)} against {label(plain)}**, each at its own learning rate: "
        f"{spread(values(stored, ours, mean_iou))} against {spread(values(stored, plain, mean_iou))} % mean IoU; "
        f"{judged(difference(stored, ours, plain))}."
        for ours, plain in ((RSGD, SGD), (RADAM, ADAM))
        if {ours[0], plain[0]} <= arms
    ]
    keys = [key for key in MAIN if key[0] in arms]
    found.append(
        "**Learning rates** within 90 % of the best validation score: "
        + "; ".join(f"{label(key)} {width(stored, key)}" for key in keys)
        + ". "
        + _narrower(stored, keys)
    )
    if "SGD, rescaled" in arms:
        found.append(_rescaled(stored, (RSGD, SGD)))
    decays = [key for arm in arms if "weight decay" in arm for key in stored.keys(arm)]
    if decays:
        tuned = best_by_validation(stored, [SGD, *decays])
        decay = stored.runs.chosen(*tuned)[0].weight_decay
        found.append(
            f"**Weight decay** for SGD, chosen by validation among 0 and {len(decays)} others: {decay:g}. "
            f"Riemannian SGD against SGD with it: {judged(difference(stored, RSGD, tuned))}."
        )
    found += _of_recipes(stored)
    if {key[0] for key in LARGER} <= arms:
        plain, ours = LARGER
        found.append(
            f"**At twice the resolution**, with the learning rates chosen at the lower one: Riemannian SGD "
            f"{spread(values(stored, ours, mean_iou))}, SGD {spread(values(stored, plain, mean_iou))} % mean IoU; "
            f"{judged(difference(stored, ours, plain))}."
        )
    return found


def _narrower(stored: Stored, keys: Sequence[Key]) -> str:
    """Whether spheres need less tuning, by the widths."""
    words = []
    for plain, ours in ((SGD, RSGD), (ADAM, RADAM)):
        if plain in keys and ours in keys:
            wider = width(stored, ours).width - width(stored, plain).width
            more = "as wide" if abs(wider) < 0.1 else "wider" if wider > 0 else "narrower"
            words.append(f"that of {label(ours)} is {more} {'as' if more == 'as wide' else 'than'} {label(plain)}'s")
    return f"By this measure {' and '.join(words)}." if words else ""


def _rescaled(stored: Stored, pair: tuple[Key, Key]) -> str:
    cells = []
    for key in pair:
        after = (f"{key[0]}, rescaled", key[1], "rescaled")
        cells.append(f"{label(key)} {interval(difference(stored, after, key))} points")
    return (
        "**Initial scale**: with every filter multiplied by 10^U(−2, 2), the same function, and the learning rate "
        f"chosen again, the mean IoU changes by {' and '.join(cells)}."
    )


def _of_recipes(stored: Stored) -> list[str]:
    others = [key for _, key in recipe_keys(stored) if key[1].startswith(("rsgd", "radam")) and stored.of(key)]
    plain = [key for _, key in recipe_keys(stored) if not key[1].startswith(("rsgd", "radam")) and stored.of(key)]
    if len(others) < 2 or not plain:
        return []
    ours, theirs = best_by_validation(stored, others), best_by_validation(stored, plain)
    named = [f"{label(key)} ({key[0]})" for key in (ours, theirs)]
    outcome = judged(difference(stored, ours, theirs))
    return [f"**Best of all recipes by validation**: {named[0]} on spheres, {named[1]} off them; {outcome}."]


PROTOCOL = """\
SegNet-Basic with {filters} filters and {blocks} blocks on images of {width}×{height}, {train} for training, \
{validation} for validation and {test} for test, by the lists of the SegNet tutorial. The published network has 64 \
filters and images of 480×360: `--full` runs that, and the figures here are not comparable with published ones. \
{epochs} epochs in batches of {batch_size}, no augmentation, learning rate down to zero along half a cosine, momentum \
{momentum:g}, no weight decay unless stated. Cross-entropy with median-frequency weights of the classes; void is left \
out of loss and scores. {seeds} seeds: each gives one initial function, from which all optimizers start, and one order \
of the images. Filters on spheres have {radius}. Learning rates are chosen by the mean IoU on the validation images \
after the last epoch; then the test images are read, once for each chosen run.

Scores are means ± standard deviation over the seeds in percent. Differences are paired by seed, in points, with \
Student's interval of 95 %; p-values of the paired t-test are corrected within a table (Holm). Good learning rates are \
those around the best whose validation mean IoU is at least 90 % of its, interpolated on the grid."""


def protocol(stored: Stored) -> str:
    """How the runs were made."""
    about = stored.about["SGD"]
    settings, task = about["settings"], about["task"]
    filters, blocks = settings["model"].partition(":")[2].split(",")
    return PROTOCOL.format(
        filters=filters,
        blocks=blocks,
        width=task["input_shape"][2],
        height=task["input_shape"][1],
        **task["sizes"],
        **{name: settings[name] for name in ("epochs", "batch_size", "momentum")},
        seeds=len(settings["seeds"]),
        radius=about["radius"],
    )


def origin(stored: Stored) -> str:
    """Command, versions and machine."""
    machines = sorted({about["machine"] for about in stored.about.values()})
    versions = stored.about["SGD"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "geoopt", "numpy") if name in versions)
    return f"Command: `{stored.command}`; {len(stored.runs.rows)} runs. {'; '.join(machines)}; {named}."


def as_markdown(stored: Stored, name: str) -> str:
    """The whole report."""
    arms = {run.arm for run in stored.runs.rows}
    keys = [key for key in MAIN if key[0] in arms]
    parts = ["# CamVid, SegNet-Basic", "\n".join(f"- {sentence}" for sentence in findings(stored))]
    parts += [protocol(stored), origin(stored)]
    parts += ["## Test images", score_table(stored, [(label(key), key) for key in keys], SGD)]
    parts += [f"![Curves]({name}_curves.png)", "## Classes", class_table(stored, keys)]
    parts += ["## Robustness", robustness_table(stored, keys)]
    if (recipes := recipe_keys(stored)) and len(arms) > 2:
        parts += ["## Other recipes", score_table(stored, recipes, SGD)]
    if {key[0] for key in LARGER} <= arms:
        size = "×".join(map(str, stored.about[LARGER[0][0]]["task"]["input_shape"][:0:-1]))
        parts += [f"## Images of {size}", score_table(stored, [(label(key), key) for key in LARGER], LARGER[0])]
    parts.append(f"![Images, labels and predictions]({name}_pictures.png)")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_report(stored: Stored, folder: Path, name: str) -> None:
    """Write tables and figures into the folder of the stored files."""
    write_text(folder / f"{name}.md", as_markdown(stored, name))
    arms = {run.arm for run in stored.runs.rows}
    draw_curves(stored, [key for key in MAIN if key[0] in arms], folder / f"{name}_curves.png")
    pictures = folder / f"{name}_pictures.npz"
    if pictures.is_file():
        held = read_pictures(pictures)
        optimizers = [key for key in held if key not in ("images", "truth")]
        draw_pictures(held, optimizers, folder / f"{name}_pictures.png")
