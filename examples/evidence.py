"""What the scripts that collect evidence share: comparisons in arms, runs stored as CSV, tables made of stored runs.

An experiment is a list of `Arm`: one comparison each, with the options of `manifold_nets.compare`. `collect` carries
the arms out, resumably, and stores every run in ``NAME_runs.csv``, and in ``NAME_runs.json`` with which command, on
which machine and with which versions. Tables and figures are made of these files alone, so ``--report-only`` makes them
again in seconds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray

import manifold_nets as mn
from manifold_nets.comparison import Comparison, Progress
from manifold_nets.comparison.measures import learning_rate_sensitivity
from manifold_nets.comparison.statistics import PairedDifference, holm, mean_interval, paired_difference
from manifold_nets.files import atomic_file

__all__ = [
    "Arm",
    "Run",
    "Runs",
    "collect",
    "options_for",
    "origin",
    "preamble",
    "read_runs",
    "show",
    "summary_table",
    "table",
    "write_runs",
    "write_text",
]


@dataclass(frozen=True)
class Arm:
    """One comparison of an experiment.

    Args:
        name: what tells it from the others, as it appears in tables.
        options: keyword arguments of `manifold_nets.compare`.
    """

    name: str
    options: Mapping[str, Any]

    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """One run as it is stored: a row of ``NAME_runs.csv``; numbers that a run does not have are NaN."""

    arm: str
    optimizer: str
    initial_scale: str
    learning_rate: float
    weight_decay: float
    seed: int
    epochs: int
    diverged: bool
    chosen: bool
    train_loss: float
    validation_error: float
    test_error: float
    seconds_per_step: float


@dataclass(frozen=True)
class Runs:
    """The stored runs of an experiment, and questions to them.

    Args:
        rows: all of them.
        about: the command that they came from, the machine and the versions, as one sentence each.
    """

    rows: tuple[Run, ...]
    about: str = ""

    def of(self, arm: str, optimizer: str | None = None, initial_scale: str = "plain") -> tuple[Run, ...]:
        """The runs of an arm, of one optimizer if it is named."""
        return tuple(
            run
            for run in self.rows
            if (run.arm, run.initial_scale) == (arm, initial_scale) and optimizer in (None, run.optimizer)
        )

    def optimizers(self, arm: str) -> tuple[str, ...]:
        """The optimizers of an arm, in the order in which they are stored."""
        return tuple(dict.fromkeys(run.optimizer for run in self.rows if run.arm == arm))

    def chosen(self, arm: str, optimizer: str, initial_scale: str = "plain") -> tuple[Run, ...]:
        """The runs with the settings that validation chose, by seed."""
        found = [run for run in self.of(arm, optimizer, initial_scale) if run.chosen]
        return tuple(sorted(found, key=lambda run: run.seed))

    def test_errors(self, arm: str, optimizer: str, initial_scale: str = "plain") -> NDArray[np.float64]:
        """Test errors in percent of the chosen runs, by seed; NaN for runs that diverged."""
        return np.array([100 * run.test_error for run in self.chosen(arm, optimizer, initial_scale)])

    def difference(self, arm: str, first: str, second: str, initial_scale: str = "plain") -> PairedDifference:
        """Paired difference first − second of the test errors in percent."""
        errors = (self.test_errors(arm, name, initial_scale) for name in (first, second))
        return paired_difference(*errors, names=(first, second))

    def width(self, arm: str, optimizer: str, initial_scale: str = "plain", tolerance: float = 0.10) -> float:
        """Decades of learning rates whose validation error is within ``tolerance`` of the best, at the chosen decay."""
        runs = self.of(arm, optimizer, initial_scale)
        decays = {run.weight_decay for run in runs if run.chosen}
        runs = tuple(run for run in runs if run.weight_decay in decays)
        rates = sorted({run.learning_rate for run in runs})
        if not runs or len(rates) < 2:
            return math.nan
        seeds = sorted({run.seed for run in runs})
        errors = {(run.learning_rate, run.seed): run.validation_error for run in runs}
        grid = [[errors[rate, seed] for seed in seeds] for rate in rates]
        return learning_rate_sensitivity(rates, grid, tolerance).width

    def seconds_per_step(self, arm: str, optimizer: str) -> float:
        """Median over the runs of an arm, of both initial scales."""
        found = [run.seconds_per_step for run in self.rows if (run.arm, run.optimizer) == (arm, optimizer)]
        return median([second for second in found if math.isfinite(second)] or [math.nan])


def options_for(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all these scripts take; add to them what one needs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evidence") / name, help="folder that keeps the runs")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="store runs, tables and figures here")
    parser.add_argument("--report-only", action="store_true", help="tables and figures from the runs stored in FOLDER")
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose names contain one of these")
    parser.add_argument("--workers", type=int, default=1, help="processes that carry out runs")
    return parser


def collect(name: str, arms: Sequence[Arm], options: argparse.Namespace) -> Runs:
    """Carry out the arms, or read their stored runs with ``--report-only``.

    Killed and started again, it goes on where it stopped. Stored runs of arms that are not carried out are kept.

    Raises:
        SystemExit: an option is missing, or no arm has such a name.
    """
    file = None if options.write is None else options.write / f"{name}_runs.csv"
    if options.report_only:
        if file is None or not file.is_file():
            raise SystemExit(f"--report-only needs --write FOLDER, a folder with {name}_runs.csv")
        return read_runs(file)
    asked = [arm for arm in arms if not options.arms or any(text in arm.name for text in options.arms)]
    if not asked:
        raise SystemExit(f"--arms {' '.join(options.arms)}: no such arm; there are: {', '.join(a.name for a in arms)}")
    stored = read_runs(file).rows if file is not None and file.is_file() else ()
    for arm in asked:
        print(f"== {arm.name}", file=sys.stderr, flush=True)
        comparison = mn.compare(
            **arm.options,
            output=options.output / arm.folder(),
            workers=options.workers,
            report=False,
            progress=_line(),
        )
        stored = (*(run for run in stored if run.arm != arm.name), *_stored(arm.name, comparison))
        if file is not None:
            write_runs(Runs(stored, origin()), file)
    # With the digits that are stored, so that tables made again are the same to the last one.
    return Runs(stored) if file is None else read_runs(file)


def _line() -> Callable[[Progress], None]:
    """Tell of every tenth part of the runs."""
    told = -1

    def tell(progress: Progress) -> None:
        nonlocal told
        tenth = 10 * progress.done // progress.total
        if tenth != told:  # it falls where runs that tuned are over
            told = tenth
            print(f"   {progress.done} of {progress.total} runs", file=sys.stderr, flush=True)

    return tell


def _stored(arm: str, comparison: Comparison) -> Iterable[Run]:
    for run in comparison.results:
        key = run.key
        last = run.epochs[-1] if run.epochs and not run.diverged else None
        trial = comparison.choice(key.optimizer, key.initial_scale).trial
        yield Run(
            arm=arm,
            optimizer=key.optimizer,
            initial_scale=key.initial_scale,
            learning_rate=key.learning_rate,
            weight_decay=comparison.settings.decay_of(key),
            seed=key.seed,
            epochs=len(run.epochs),
            diverged=run.diverged,
            chosen=trial == (key.learning_rate, key.weight_decay),
            train_loss=math.nan if last is None else last.train_loss,
            validation_error=math.nan if last is None else last.validation_error,
            test_error=math.nan if run.test_error is None else run.test_error,
            seconds_per_step=math.nan if run.seconds_per_step is None else run.seconds_per_step,
        )


def write_runs(runs: Runs, file: Path) -> None:
    """Store runs, a row each, with six digits, and how they came about beside them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Run)]
    writer.writerow(names)
    for run in runs.rows:
        writer.writerow([_cell(getattr(run, name)) for name in names])
    write_text(file, text.getvalue())
    write_text(file.with_suffix(".json"), json.dumps({"about": runs.about}, ensure_ascii=False) + "\n")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def read_runs(file: Path) -> Runs:
    """Read what `write_runs` wrote."""
    # Annotations are texts here, as in every file that postpones their evaluation.
    readers: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "bool": lambda text: text == "1",
        "float": lambda text: float(text) if text else math.nan,
    }
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [
            Run(**{field.name: readers[str(field.type)](row[field.name]) for field in fields(Run)})
            for row in csv.DictReader(stream)
        ]
    about = file.with_suffix(".json")
    return Runs(tuple(rows), json.loads(about.read_text(encoding="utf-8"))["about"] if about.is_file() else "")


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def show(name: str, text: str, draw: Callable[[Path], None], options: argparse.Namespace) -> None:
    """Print a report, and write it and its figure where ``--write`` says."""
    print(text)
    if options.write is not None:
        write_text(options.write / f"{name}.md", text)
        draw(options.write / f"{name}.png")


def origin() -> str:
    """The command that runs, without the folders of this machine, the machine and the versions."""
    command = f"python examples/{Path(sys.argv[0]).name} {shlex.join(_general(sys.argv[1:]))}".strip()
    return f"Command: `{command}`. {machine()}"


def preamble(runs: Runs, note: str = "") -> str:
    """How the figures came about: the command, the machine, the versions, the number of runs and of seeds."""
    seeds = len({run.seed for run in runs.rows})
    return f"{runs.about or origin()} {len(runs.rows)} runs, at most {seeds} seeds each. {note}".strip()


def _general(words: Sequence[str]) -> list[str]:
    """The words of a command that matter to its figures, without the folders of a machine."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--data":
            next(rest, None)
            kept += ["--data", "FOLDER"]
        elif word in ("--output", "--workers"):
            next(rest, None)
        elif Path(word).is_absolute():
            kept.append("FOLDER")
        elif word != "--report-only":
            kept.append(word)
    return kept


def summary_table(runs: Runs, arm: str, reference: str, initial_scale: str = "plain") -> list[list[str]]:
    """A row an optimizer: settings chosen by validation, test error, paired difference from a reference.

    Test errors are in percent, mean ± standard deviation over the seeds. Differences are paired by seed, with a
    bootstrap interval of 95 %; the p-values are corrected for the number of optimizers (Holm).
    """
    names = runs.optimizers(arm)
    others = [name for name in names if name != reference]
    differences = {name: runs.difference(arm, name, reference, initial_scale) for name in others}
    corrected = dict(zip(others, holm([differences[name].p_value for name in others]), strict=True)) if others else {}
    rows = []
    for name in names:
        chosen, everything = runs.chosen(arm, name, initial_scale), runs.of(arm, name, initial_scale)
        errors = mean_interval(runs.test_errors(arm, name, initial_scale)) if chosen else None
        rows.append(
            [
                name,
                f"{chosen[0].learning_rate:.3g}" if chosen else "none",
                f"{chosen[0].weight_decay:.3g}" if chosen else "none",
                "every run diverged" if errors is None else f"{errors.value:.2f} ± {errors.deviation:.2f}",
                "reference" if name == reference else _difference(differences[name], float(corrected[name])),
                f"{sum(run.diverged for run in everything)} of {len(everything)}",
                f"{runs.width(arm, name, initial_scale):.2f}",
            ]
        )
    return rows


SUMMARY_HEAD = (
    "optimizer",
    "learning rate",
    "weight decay",
    "test error (%)",
    "difference from the reference",
    "runs diverged",
    "good learning rates (decades)",
)


def _difference(found: PairedDifference, corrected: float) -> str:
    if not found.count:
        return "none: no pair of runs came through"
    interval = "in every pair" if found.is_constant else f"{found.low:+.2f} … {found.high:+.2f}"
    return f"{found.value:+.2f} ({interval}), p = {corrected:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
