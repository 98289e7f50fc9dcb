"""Figures of the comparisons on CamVid: curves, learning rates, and pictures of what the networks see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from camvid_scores import Key, Stored
from numpy.typing import NDArray
from paper.camvid import CLASSES, VOID

from manifold_nets.comparison.report.style import rate_axis
from manifold_nets.files import atomic_file
from manifold_nets.page.plots import plot_settings, save_figure

LABELS = {"sgd": "SGD", "rsgd": "Riemannian SGD", "adam": "Adam", "radam": "Riemannian Adam"}
# Colours of Okabe and Ito; solid lines on spheres, broken ones off them.
LOOKS: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#D55E00", "linestyle": "--", "marker": "o"},
    "rsgd": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "adam": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "radam": {"color": "#009E73", "linestyle": "-", "marker": "s"},
}
# The colours of the SegNet tutorial, in the order of CLASSES, and black for void.
COLOURS = np.array(
    [
        *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
        *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0)),
    ],
    dtype=np.uint8,
)


def draw_curves(stored: Stored, keys: Sequence[Key], file: Path) -> None:
    """Training loss and validation scores over the epochs, and validation scores over the learning rates.

    Lines are means over the seeds, bands reach from the lowest to the highest; runs diverged at rates with a cross.
    """
    with plot_settings(9.0):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.6), layout="constrained")
        losses, scores, rates = figure.subplots(1, 3)
        for key in keys:
            curves = stored.curves_of(key)
            for axes, name in ((losses, "train_loss"), (scores, "validation_iou")):
                values = np.array([getattr(curve, name) for curve in curves])
                _band(axes, np.arange(1, values.shape[1] + 1), values, key[1])
            grid, table = _over_rates(stored, key)
            _band(rates, grid, table, key[1])
            lost = grid[np.isnan(table).any(0)]
            if len(lost):
                rates.plot(lost, np.zeros(len(lost)), "x", color=LOOKS[key[1]]["color"], **_at_the_foot(rates))
        losses.set(title="Training loss", xlabel="epoch")
        scores.set(title="Validation: mean IoU (%)", xlabel="epoch")
        rates.set(title="Validation at the end: mean IoU (%)", xlabel="learning rate")
        rate_axis(rates, {run.learning_rate for key in keys for run in stored.runs.of(*key)})
        figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=len(keys))
        with atomic_file(file) as temporary:
            save_figure(figure, temporary, "png", dots=130)


def _band(axes: Any, x: NDArray[Any], values: NDArray[np.float64], optimizer: str) -> None:
    look = LOOKS[optimizer]
    axes.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(x, values.mean(0), label=LABELS[optimizer], markersize=3.5, **look)


def _at_the_foot(axes: Any) -> dict[str, Any]:
    """How to draw beside the x axis, whatever the y axis shows."""
    return {"transform": axes.get_xaxis_transform(), "clip_on": False, "markersize": 6}


def _over_rates(stored: Stored, key: Key) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rates, and the mean IoU of every seed at each; rates at which a run diverged are a gap."""
    runs = stored.runs.of(*key)
    grid = sorted({run.learning_rate for run in runs})
    seeds = sorted({run.seed for run in runs})
    errors = {(run.learning_rate, run.seed): run.validation_error for run in runs}
    table = [[100 * (1 - errors.get((rate, seed), math.nan)) for rate in grid] for seed in seeds]
    return np.array(grid), np.array(table)


def draw_pictures(arrays: Mapping[str, NDArray[np.uint8]], optimizers: Sequence[str], file: Path) -> None:
    """A row a test image: the image, its labels, and the predictions; the colours of the classes below."""
    with plot_settings(9.0):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        columns = ["image", "truth", *optimizers]
        count, height, width = arrays["truth"].shape
        figure = Figure(figsize=(2.4 * len(columns), 2.4 * count * height / width + 0.9), layout="constrained")
        panels = figure.subplots(count, len(columns), squeeze=False)
        for number, row in enumerate(panels):
            for axes, column in zip(row, columns, strict=True):
                axes.imshow(_picture(arrays, column, number), interpolation="nearest")
                axes.set_axis_off()
                if number == 0:
                    axes.set_title({"image": "image", "truth": "truth", **LABELS}[column])
        names = [*CLASSES, "void"]
        patches = [Patch(color=colour / 255, label=name) for colour, name in zip(COLOURS, names, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=6)
        with atomic_file(file) as temporary:
            save_figure(figure, temporary, "png", dots=110)


def _picture(arrays: Mapping[str, NDArray[np.uint8]], column: str, number: int) -> NDArray[np.uint8]:
    if column == "image":
        return arrays["images"][number]
    labels = arrays[column][number]
    return COLOURS[np.minimum(labels, VOID)]
