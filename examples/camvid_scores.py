"""What is stored of the comparisons on CamVid beside their runs: curves, counts of the test images, a few predictions.

Everything that tables and figures show is made of these files and of ``camvid_runs.csv``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import Arm, Runs, read_runs, write_text
from numpy.typing import NDArray
from paper.camvid import CLASSES
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison import Comparison, RunKey, Task
from manifold_nets.comparison.experiment import converted_form, derived_seed
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.selection import kept_weights
from manifold_nets.comparison.tasks import load_task
from manifold_nets.files import atomic_file

NAME = "camvid"
PAPER = Path(__file__).parent / "paper" / "camvid.py"
PICTURES = 4  # test images that are shown
PICTURED = ("SGD", "larger images, sgd", "larger images, rsgd")  # what later arms show replaces what earlier ones do

Key = tuple[str, str, str]  # arm, optimizer, initial scale


@dataclass(frozen=True)
class Curve:
    """One chosen run, epoch by epoch."""

    arm: str
    optimizer: str
    initial_scale: str
    seed: int
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_iou: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """What a chosen run makes of the test images.

    Args:
        arm: of the run.
        optimizer: of the run.
        initial_scale: of the run.
        seed: of the run.
        counts: pixels of each true class (rows) by predicted class; the last column counts scores that are NaN.
    """

    arm: str
    optimizer: str
    initial_scale: str
    seed: int
    counts: NDArray[np.int64]

    @property
    def class_iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class in percent; NaN for classes that do not occur."""
        right, true = self.counts.diagonal(), self.counts.sum(1)
        union = true + self.counts[:, : len(self.counts)].sum(0) - right
        return 100 * np.divide(right, union, out=np.full(len(right), np.nan), where=true > 0)

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union of the classes that occur, in percent."""
        return float(np.nanmean(self.class_iou))

    @property
    def class_average(self) -> float:
        """Mean accuracy of the classes that occur, in percent."""
        occurs = self.counts.sum(1) > 0
        return float(100 * (self.counts.diagonal()[occurs] / self.counts.sum(1)[occurs]).mean())

    @property
    def global_accuracy(self) -> float:
        """Share of the pixels with a class that are right, in percent."""
        return float(100 * self.counts.diagonal().sum() / self.counts.sum())


@dataclass(frozen=True)
class Stored:
    """All that is stored of an experiment."""

    runs: Runs
    curves: tuple[Curve, ...]
    scores: tuple[Scores, ...]
    about: Mapping[str, Any]

    def of(self, key: Key) -> dict[int, Scores]:
        """The scores of the chosen runs of an optimizer in an arm, by seed."""
        return {s.seed: s for s in self.scores if (s.arm, s.optimizer, s.initial_scale) == key}

    def curves_of(self, key: Key) -> list[Curve]:
        """The curves of the same runs."""
        return [curve for curve in self.curves if (curve.arm, curve.optimizer, curve.initial_scale) == key]

    def keys(self, arm: str) -> list[Key]:
        """What an arm compared, in order."""
        rows = [(run.arm, run.optimizer, run.initial_scale) for run in self.runs.rows if run.arm == arm]
        return list(dict.fromkeys(rows))


# ---- from comparisons that have ended --------------------------------------------------------------------------------


def store(arm: Arm, output: Path, folder: Path, command: str, name: str = NAME) -> None:
    """Write curves, scores and settings of an arm that was carried out, and pictures; those of other arms are kept.

    Args:
        arm: the arm.
        output: the folder of its comparison.
        folder: where to write.
        command: that leads to it.
        name: what files begin with.
    """
    comparison = Comparison.read(output)
    task = load_task(comparison.settings.task, data=comparison.settings.data)
    earlier = read_stored(folder, name) if (folder / f"{name}_about.json").is_file() else None
    curves = [curve for curve in earlier.curves if curve.arm != arm.name] if earlier else []
    scores = [found for found in earlier.scores if found.arm != arm.name] if earlier else []
    for key in _chosen(comparison):
        counts = test_counts(trained(comparison, task, output, key), task.to(comparison.settings.device))
        curves.append(_curve(arm.name, comparison, key))
        scores.append(Scores(arm.name, key.optimizer, key.initial_scale, key.seed, counts))
    about = {**(earlier.about if earlier else {}), arm.name: {"command": command, **_about(comparison, task)}}
    write_curves(curves, folder / f"{name}_epochs.csv")
    write_scores(scores, folder / f"{name}_scores.csv")
    write_text(folder / f"{name}_about.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    if arm.name in PICTURED:
        store_pictures(comparison, task, output, folder / f"{name}_pictures.npz")


def _chosen(comparison: Comparison) -> list[RunKey]:
    return [
        run.key
        for choice in comparison.choices
        for run in comparison.chosen_runs(choice.optimizer, choice.initial_scale)
        if not run.diverged
    ]


def trained(comparison: Comparison, task: Task, place: Path, key: RunKey) -> nn.Module:
    """The network of a chosen run at the end of training, as a plain one: all forms share names and function."""
    weights = kept_weights(place / "weights", key)
    if weights is None:
        raise SystemExit(f"{place / 'weights'} lacks the weights of {key}: delete the folder and start again")
    model = build_model(comparison.settings.model, task, seed=0)
    model.load_state_dict(weights)
    return model.to(comparison.settings.device).eval()


@torch.no_grad()
def test_counts(model: nn.Module, task: Task) -> NDArray[np.int64]:
    """Counts of true and predicted classes over the test images."""
    part = task.parts["test"]
    batches = torch.arange(len(part)).split(4 * task.batch_size)
    return sum(task.measure(model(x), y).cpu() for x, y in map(part.batch, batches)).numpy()


def _curve(arm: str, comparison: Comparison, key: RunKey) -> Curve:
    run = next(run for run in comparison.results if run.key == key)
    return Curve(
        arm,
        key.optimizer,
        key.initial_scale,
        key.seed,
        tuple(record.train_loss for record in run.epochs),
        tuple(record.validation_loss for record in run.epochs),
        tuple(100 * (1 - record.validation_error) for record in run.epochs),
    )


def _about(comparison: Comparison, task: Task) -> dict[str, Any]:
    """Settings, data, radii, versions and machine, without paths."""
    settings = {name: value for name, value in comparison.settings.to_dict().items() if name != "data"}
    for name in ("task", "model"):
        settings[name] = settings[name].replace(str(PAPER), "examples/paper/camvid.py")
    return {
        "settings": settings,
        "task": task.to_dict(),
        "radius": _radius(comparison, task),
        "versions": dict(comparison.environment.versions),
        "machine": comparison.environment.machine,
    }


def _radius(comparison: Comparison, task: Task) -> str:
    """Which radii the filters of the converted networks have, over all seeds, in words."""
    unit = []
    for seed in comparison.settings.seeds:
        plain = build_model(comparison.settings.model, task, seed=derived_seed(seed, "weights"))
        form = converted_form(plain, task.example_inputs())
        unit += [weight.manifold.uniform_radius == 1 for weight in mn.constraints.constrained_weights(form)]
    if all(unit):
        return "radius 1"
    others = "the radii that they come with, where radius 1 would change the function through eps or rounding"
    return f"radius 1 in {sum(unit)} of {len(unit)} weights and else {others}" if any(unit) else others


@torch.no_grad()
def store_pictures(comparison: Comparison, task: Task, output: Path, file: Path) -> None:
    """Add what the first seed of each optimizer makes of a few test images; another size starts the file anew."""
    part: Any = task.parts["test"].to(comparison.settings.device)
    rows = torch.linspace(0, len(part) - 1, 2 * PICTURES + 1)[1::2].long()
    x, y = part.batch(rows)
    arrays = {"images": part.inputs[rows].permute(0, 2, 3, 1).cpu().numpy(), "truth": y.byte().cpu().numpy()}
    if file.is_file():
        held = read_pictures(file)
        arrays = {**held, **arrays} if held["truth"].shape == arrays["truth"].shape else arrays
    for key in _chosen(comparison):
        if key.seed == comparison.settings.seeds[0]:
            arrays[key.optimizer] = trained(comparison, task, output, key)(x).argmax(1).byte().cpu().numpy()
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_pictures(file: Path) -> dict[str, NDArray[np.uint8]]:
    """Read ``"images"``, ``"truth"`` and the predictions of each optimizer."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_csv(file: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(file, text.getvalue())


def _read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


_KEY = ("arm", "optimizer", "initial_scale", "seed")


def write_curves(curves: Iterable[Curve], file: Path) -> None:
    """Store curves, a row an epoch."""
    rows = (
        (c.arm, c.optimizer, c.initial_scale, c.seed, epoch, *(f"{value:.5g}" for value in values))
        for c in curves
        for epoch, values in enumerate(zip(c.train_loss, c.validation_loss, c.validation_iou, strict=True), 1)
    )
    _write_csv(file, (*_KEY, "epoch", "train_loss", "validation_loss", "validation_iou"), rows)


def read_curves(file: Path) -> list[Curve]:
    """Read what `write_curves` wrote."""
    found: dict[tuple[str, str, str, int], list[tuple[float, ...]]] = {}
    for row in _read_csv(file):
        key = (row["arm"], row["optimizer"], row["initial_scale"], int(row["seed"]))
        values = tuple(float(row[name]) for name in ("train_loss", "validation_loss", "validation_iou"))
        found.setdefault(key, []).append(values)
    return [Curve(*key, *map(tuple, zip(*values, strict=True))) for key, values in found.items()]


def write_scores(scores: Iterable[Scores], file: Path) -> None:
    """Store counts, a row a true class."""
    rows = (
        (s.arm, s.optimizer, s.initial_scale, s.seed, name, *counts.tolist())
        for s in scores
        for name, counts in zip(CLASSES, s.counts, strict=True)
    )
    _write_csv(file, (*_KEY, "class", *CLASSES, "none"), rows)


def read_scores(file: Path) -> list[Scores]:
    """Read what `write_scores` wrote."""
    found: dict[tuple[str, str, str, int], list[list[int]]] = {}
    for row in _read_csv(file):
        key = (row["arm"], row["optimizer"], row["initial_scale"], int(row["seed"]))
        found.setdefault(key, []).append([int(row[name]) for name in (*CLASSES, "none")])
    return [Scores(*key, np.array(counts)) for key, counts in found.items()]


def read_stored(folder: Path, name: str = NAME) -> Stored:
    """Read all that is stored of an experiment."""
    return Stored(
        read_runs(folder / f"{name}_runs.csv"),
        tuple(read_curves(folder / f"{name}_epochs.csv")),
        tuple(read_scores(folder / f"{name}_scores.csv")),
        json.loads((folder / f"{name}_about.json").read_text(encoding="utf-8")),
    )
