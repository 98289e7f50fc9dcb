"""The measurements of a monitor: its history, files and loggers, and its findings in words."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_nets.errors import ArgumentTypeError
from manifold_nets.files import atomic_file

__all__ = ["COLUMNS", "QUANTITIES", "CSVWriter", "Finding", "History", "MonitorWarning", "Row", "as_writers"]

# Of each weight at each measured step; described in `manifold_nets.Monitor`.
QUANTITIES = (
    "norm", "norm_min", "norm_max", "rotation", "rotation_max", "effective_lr", "radial_gradient", "radial_step",
    "equilibrium_rotation", "steps_to_equilibrium", "lr", "weight_decay",
)  # fmt: skip
COLUMNS = ("step", "weight", "groups", *QUANTITIES)
# Those that go to a logger, which shows each as a plot of its own.
_LOGGED = ("norm", "rotation", "effective_lr", "radial_gradient", "radial_step", "steps_to_equilibrium")
_PLACE = {name: place for place, name in enumerate(QUANTITIES)}
# How many samples a history keeps at most; beyond that every other one is dropped.
_KEPT = 512

Row = dict[str, Any]
Writer = Callable[[int, Sequence[Row]], None]


class MonitorWarning(UserWarning):
    """A problem that a monitor found in a run."""


@dataclass(frozen=True)
class Finding:
    """A finding about a run.

    Args:
        kind: ``"slow"``, ``"equilibrium"``, ``"fast"``, ``"radial"`` or ``"not finite"``.
        weight: the weight with the largest value.
        number: the value.
        text: the finding as a sentence.
    """

    kind: str
    weight: str
    number: float
    text: str

    def __str__(self) -> str:
        return self.text


class History:
    """The measured steps of a run: one row of `QUANTITIES` for each weight, with NaN for missing values.

    Long runs are thinned out: at most 512 steps are kept, at equal distances, in addition to the last one.

    Args:
        weights: the names of the weights.
        groups: the number of scale-invariant groups of each.

    Example:
        >>> history = History(["conv.weight"], [8])
        >>> history.append(0, [[1.0] * 12])
        >>> history.rows()[0]["norm"], history.steps
        (1.0, [0])
    """

    def __init__(self, weights: Sequence[str], groups: Sequence[int]) -> None:
        self.weights, self.groups = list(weights), list(groups)
        self.steps: list[int] = []
        self._values: list[NDArray[np.float64]] = []
        self._stride, self._seen = 1, 0
        self._rates: NDArray[np.float64] = np.full(len(self.weights), np.inf)
        # Step, rotation per rate, norm and effective rate per rate where each weight turned fastest at its rate.
        self.fastest = np.full((4, len(self.weights)), np.nan)
        # The earliest step at which each weight was expected to be in equilibrium.
        self.arrival = np.full(len(self.weights), np.inf)

    def append(self, step: int, values: Any) -> None:
        """Add a measured step: the number of steps before it, and one row per weight."""
        array = np.asarray(values, dtype=np.float64)
        if self._seen and (self._seen - 1) % self._stride:
            self.steps.pop(), self._values.pop()
        self.steps.append(step)
        self._values.append(array)
        self._seen += 1
        if len(self.steps) > _KEPT:
            self.steps, self._values = self.steps[::2], self._values[::2]
            self._stride *= 2
        self._note_fastest(step, array)
        rates = array[:, _PLACE["lr"]]
        if self._seen > 2 and (rates <= self._rates).all():  # the first samples, and those of a warm-up, tell nothing
            self.arrival = np.fmin(self.arrival, step + array[:, _PLACE["steps_to_equilibrium"]])
        self._rates = rates

    def _note_fastest(self, step: int, array: NDArray[np.float64]) -> None:
        norm, rotation, rate = (array[:, _PLACE[name]] for name in ("norm", "rotation", "lr"))
        with np.errstate(all="ignore"):
            speed, effective = rotation / rate, array[:, _PLACE["effective_lr"]] / rate
        new = np.isfinite(speed) & ~(speed <= self.fastest[1])
        self.fastest[:, new] = np.stack([np.full_like(norm, step), speed, norm, effective])[:, new]

    def go_on_from(self, fastest: Sequence[Sequence[float]], arrival: Sequence[float]) -> None:
        """Copy `fastest` and `arrival` from an earlier part of the run."""
        self.fastest, self.arrival = (np.asarray(values, dtype=np.float64) for values in (fastest, arrival))

    def of(self, quantity: str) -> NDArray[np.float64]:
        """One quantity as an array (steps, weights)."""
        return np.stack(self._values)[:, :, _PLACE[quantity]]

    def rows(self, place: int = -1) -> list[Row]:
        """The rows of a measured step, the last one by default; none before the first."""
        if not self.steps:
            return []
        pairs = zip(self.weights, self.groups, self._values[place].tolist(), strict=True)
        return [
            {"step": self.steps[place], "weight": name, "groups": groups, **dict(zip(QUANTITIES, row, strict=True))}
            for name, groups, row in pairs
        ]

    def layers(self, depth: int | None = None) -> dict[str, list[int]]:
        """The weights by layer: numbers of those whose names begin with the same `depth` parts."""
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.weights):
            layer = name if depth is None else ".".join(name.split(".")[:-1][:depth]) or name
            found.setdefault(layer, []).append(number)
        return found

    def by_layer(self, quantity: str, depth: int | None = None) -> dict[str, NDArray[np.float64]]:
        """One quantity over the steps for each layer: the median over its weights; extremes are over all of them."""
        values = self.of(quantity)
        over = np.min if quantity.endswith("_min") else np.max if quantity.endswith("_max") else _median
        return {layer: over(values[:, numbers], axis=1) for layer, numbers in self.layers(depth).items()}

    def summary(self, depth: int | None = None) -> list[Row]:
        """The last measured step: one row for each weight, or for each layer.

        Args:
            depth: number of name parts that make a layer: 2 groups ``layer3.0.conv1.weight`` and
                ``layer3.0.conv2.weight`` as ``layer3.0`` (default: one row per weight).
        """
        if depth is None or not self.steps:
            return self.rows()
        columns = {quantity: self.by_layer(quantity, depth) for quantity in QUANTITIES}
        return [
            {
                "step": self.steps[-1],
                "layer": layer,
                "groups": sum(self.groups[number] for number in numbers),
                **{quantity: float(columns[quantity][layer][-1]) for quantity in QUANTITIES},
            }
            for layer, numbers in self.layers(depth).items()
        ]

    # ---- in words ----------------------------------------------------------------------------------------------------

    def findings(self, total_steps: int | None = None) -> list[Finding]:
        """The findings at the last measured step, with their values; at most one sentence of each kind.

        Args:
            total_steps: the length of the run.
        """
        if not self.steps:
            return []
        now = dict(zip(QUANTITIES, self._values[-1].T, strict=True))
        found = [self._not_finite(now), self._fast(now), self._slow(now), self._radial(now)]
        if total_steps is not None:
            found.append(self._late(total_steps))
        return [finding for finding in found if finding is not None]

    def _worst(
        self, kind: str, numbers: NDArray[np.float64], limit: float, text: Callable[[int, str], str]
    ) -> Finding | None:
        """The finding on the weight with the largest number, where that is above a limit."""
        above = np.flatnonzero(numbers > limit)  # NaN is not
        if not len(above):
            return None
        worst = int(above[np.argmax(numbers[above])])
        others = len(above) - 1
        more = "" if not others else f" The same holds of {others} other weight{'s' if others > 1 else ''}."
        name = self.weights[worst].removesuffix(".weight")
        return Finding(kind, self.weights[worst], float(numbers[worst]), text(worst, name) + more)

    def _not_finite(self, now: Mapping[str, NDArray[np.float64]]) -> Finding | None:
        bad = (~np.isfinite(now["norm_max"])).astype(np.float64)
        return self._worst(
            "not finite", bad, 0.5, lambda _, name: f"{name} has NaN or infinity in it at step {self.steps[-1]:,}."
        )

    def _fast(self, now: Mapping[str, NDArray[np.float64]]) -> Finding | None:
        def text(i: int, name: str) -> str:
            why = f"the learning rate {now['lr'][i]:.2g} is large for its norm {now['norm'][i]:.2g}"
            return f"{name} turns {now['rotation'][i]:.2g} radians per step: {why}."

        return self._worst("fast", now["rotation"], 0.5, text)

    def _slow(self, now: Mapping[str, NDArray[np.float64]]) -> Finding | None:
        step, _, norm, effective = self.fastest
        with np.errstate(all="ignore"):
            times = effective * now["lr"] / now["effective_lr"]

        def text(i: int, name: str) -> str:
            only = " Without weight decay it only grows." if not now["weight_decay"][i] else ""
            grew = f"its norm grew from {norm[i]:.2g} to {now['norm'][i]:.2g}"
            slower = f"{_rounded(times[i])} times slower than at step {int(step[i]):,}, all else equal"
            return f"{name} turns {slower}: {grew}.{only}"

        return self._worst("slow", np.where(now["norm"] > norm, times, 0.0), 10, text)

    def _radial(self, now: Mapping[str, NDArray[np.float64]]) -> Finding | None:
        return self._worst(
            "radial",
            now["radial_gradient"],
            0.05,
            lambda i, name: (
                f"{now['radial_gradient'][i]:.0%} of the gradient of {name} is along the weight, so its scale matters "
                "in this run. Perhaps its normalization is in evaluation mode, eps is large compared with the "
                "variance, or a bias in front of the normalization is large."
            ),
        )

    def _late(self, total_steps: int) -> Finding | None:
        steps = np.where(np.isfinite(self.arrival), self.arrival, 0.0)
        return self._worst(
            "equilibrium",
            steps,
            float(total_steps),
            lambda i, name: (
                f"{name}: with this decay equilibrium takes {_rounded(steps[i])} steps, the run has {total_steps:,}."
            ),
        )

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> History:
        """Read a file that a monitor wrote.

        Raises:
            ArgumentTypeError: the file has another format.
            OSError: it cannot be read.
        """
        remedy = "Pass a file written by manifold_nets.Monitor(…, writer='run.csv')."
        by_step: dict[int, dict[str, list[float]]] = {}
        groups: dict[str, int] = {}
        with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            head = next(reader, [])
            if head != list(COLUMNS):
                raise ArgumentTypeError(str(path), ",".join(head[:20]), f"the columns {', '.join(COLUMNS)}", remedy)
            for line in reader:
                try:
                    step, name, count = int(line[0]), line[1], int(line[2])
                    values = [float(cell) if cell else math.nan for cell in line[3:]]
                    if len(values) != len(QUANTITIES):
                        raise ValueError
                except (ValueError, IndexError):
                    raise ArgumentTypeError(
                        f"{path}, line {reader.line_num}", ",".join(line), f"{len(COLUMNS)} cells of numbers", remedy
                    ) from None
                by_step.setdefault(step, {})[name] = values
                groups[name] = count
        if not groups:
            raise ArgumentTypeError(str(path), "", "at least one measured step", remedy)
        history = cls(list(groups), list(groups.values()))
        missing = [math.nan] * len(QUANTITIES)
        for step in sorted(by_step):
            history.append(step, [by_step[step].get(name, missing) for name in groups])
        return history


def _median(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The median of the numbers that there are, NaN where there is none."""
    known = np.where(np.isnan(values).all(axis=axis, keepdims=True), -1.0, values)
    middle = np.nanmedian(known, axis=axis)
    return np.where(np.isnan(values).all(axis=axis), np.nan, middle)


def _rounded(number: float) -> str:
    """Two significant digits, with commas between thousands.

    Example:
        >>> _rounded(213456.0), _rounded(40.4), _rounded(9.96)
        ('210,000', '40', '10')
    """
    if not math.isfinite(number):
        return "infinitely many"
    return f"{float(f'{number:.2g}'):,.0f}"


class CSVWriter:
    """Writes the rows of a monitor to a file, step by step; a resumed run continues the file.

    Args:
        path: the file. An existing one is replaced, except by a resumed run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._begun = Path(path), False

    def __call__(self, step: int, rows: Sequence[Row], *, resumed: int = 0) -> None:
        """Write the rows of a step, and close the file: what was measured outlives a run that breaks off.

        Args:
            step: the number of the step.
            rows: one for each weight.
            resumed: the step from which a resumed run goes on; what the file has of that and later ones is cut.
                True for the step itself.
        """
        goes_on = self._begun or (resumed > 0 and self.path.exists() and self.path.stat().st_size > 0)
        if goes_on and not self._begun:
            self._cut(step if resumed is True else resumed)
        with self.path.open("a" if goes_on else "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            if not goes_on:
                lines.writerow(COLUMNS)
            lines.writerows([_cell(row[column]) for column in COLUMNS] for row in rows)
        self._begun = True

    def _cut(self, first: int) -> None:
        """Cut the rows of a step and of later ones, and a line that was not written to its end."""
        with self.path.open(newline="", encoding="utf-8") as file:
            lines = file.readlines()
        kept = lines[:1] + [line for line in lines[1:] if _is_before(line, first)]
        if kept != lines:
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8", newline="")


def _is_before(line: str, first: int) -> bool:
    """Whether a line is a whole row of an earlier step."""
    (cells,) = csv.reader([line])
    return line.endswith("\n") and len(cells) == len(COLUMNS) and cells[0].isdigit() and int(cells[0]) < first


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def as_writers(given: Any) -> list[Writer]:
    """Make writers of a user's argument: file names, loggers, functions, or several of them.

    Raises:
        ArgumentTypeError: it is none of these.
    """
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return [writer for one in given for writer in as_writers(one)]
    if isinstance(given, (str, os.PathLike)):
        return [CSVWriter(given)]
    if hasattr(given, "add_scalar"):  # a SummaryWriter of TensorBoard
        return [partial(_to_board, given)]
    if hasattr(given, "log_metrics"):  # a logger of Lightning
        return [lambda step, rows: given.log_metrics(dict(_scalars(rows)), step=step)]
    if type(given).__module__.startswith("accelerate"):
        return [lambda step, rows: given.log(dict(_scalars(rows)), step=step)]
    if hasattr(given, "log"):  # a run of Weights & Biases, whose own steps go on with the user's next call
        return [lambda step, rows: given.log({"monitor/step": step, **dict(_scalars(rows))}, commit=False)]
    if callable(given):
        return [given]
    raise ArgumentTypeError(
        "writer",
        given,
        "a file name, a SummaryWriter of TensorBoard, a run of Weights & Biases, a logger of Lightning, an "
        "Accelerator, or a function of a step and its rows",
        "Pass one of these, or a list of them.",
    )


def _to_board(board: Any, step: int, rows: Sequence[Row]) -> None:
    for name, value in _scalars(rows):
        board.add_scalar(name, value, step)


def _scalars(rows: Iterable[Row]) -> Iterable[tuple[str, float]]:
    """Names and values for a logger, which takes finite numbers."""
    for row in rows:
        for quantity in _LOGGED:
            if math.isfinite(row[quantity]):
                yield f"{quantity}/{row['weight'].removesuffix('.weight')}", row[quantity]
