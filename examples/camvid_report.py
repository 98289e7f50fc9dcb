"""The report of the comparisons on CamVid: findings in words, tables and figures, all made of stored files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from camvid_figures import draw_curves, draw_pictures
from camvid_scores import Key, Stored, read_pictures
from camvid_tables import (
    ADAM,
    LARGER,
    MAIN,
    RADAM,
    RSGD,
    SGD,
    best_by_validation,
    class_table,
    difference,
    interval,
    judged,
    label,
    mean_iou,
    recipe_keys,
    robustness_table,
    score_table,
    spread,
    values,
    width,
)
from evidence import write_text

from manifold_nets.comparison.statistics import paired_difference


def findings(stored: Stored) -> list[str]:
    """What the runs say, one sentence each; those whose arms were not run are left out."""
    arms = {run.arm for run in stored.runs.rows}
    found = [_pair(stored, *pair) for pair in ((RSGD, SGD), (RADAM, ADAM)) if {pair[0][0], pair[1][0]} <= arms]
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


def _pair(stored: Stored, ours: Key, plain: Key) -> str:
    scores, losses = [], []
    for key in (ours, plain):
        scores.append(spread(values(stored, key, mean_iou)))
        losses.append(np.array([run.train_loss for run in stored.runs.chosen(*key)]))
    fall = paired_difference(*losses) if len(losses[0]) == len(losses[1]) else None
    return (
        f"**{label(ours)} against {label(plain)}**, each at its own learning rate: {scores[0]} against {scores[1]} % "
        f"mean IoU; {judged(difference(stored, ours, plain))}."
        + (f" Training loss in the last epoch: {interval(fall, digits=3)}." if fall else "")
    )


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
those around the best whose validation mean IoU is at least 90 % of its, interpolated on the grid. The time of a step \
is a median, relative to SGD's, beside other work on the same cores."""

CURVES = """\
Chosen runs epoch by epoch, and all learning rates: means over the seeds, with bands from the lowest to the highest; \
runs diverged at rates with a cross."""


def protocol(stored: Stored) -> str:
    """How the runs were made."""
    about = stored.about["SGD"]
    settings, task = about["settings"], about["task"]
    # segnet-basic:16,4 where earlier versions stored it, or …/camvid.py:segnet_basic_16x4.
    filters, blocks = re.findall(r"\d+", settings["model"])[-2:]
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
    machines, commands = (sorted({about[name] for about in stored.about.values()}) for name in ("machine", "command"))
    versions = stored.about["SGD"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "geoopt", "numpy") if name in versions)
    written = ", then ".join(f"`{command}`" for command in commands)
    return f"Command: {written}; {len(stored.runs.rows)} runs. {'; '.join(machines)}; {named}."


def as_markdown(stored: Stored, name: str) -> str:
    """The whole report."""
    arms = {run.arm for run in stored.runs.rows}
    keys = [key for key in MAIN if key[0] in arms]
    parts = ["# CamVid, SegNet-Basic", "\n".join(f"- {sentence}" for sentence in findings(stored))]
    parts += [protocol(stored), origin(stored)]
    parts += ["## Test images", score_table(stored, [(label(key), key) for key in keys], SGD)]
    parts += [f"![Curves]({name}_curves.png)", CURVES, "## Classes", class_table(stored, keys)]
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
