"""The numbers of a comparison as CSV and JSON, for spreadsheets and other programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from manifold_nets.comparison.report.summary import Summary
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.settings import Settings

__all__ = ["epochs_csv", "runs_csv", "summary_json", "times_csv"]

_KEY = ("optimizer", "initial_scale", "learning_rate", "weight_decay", "seed")


def runs_csv(comparison: Comparison) -> str:
    """One row a run, without anything that is measured on a machine: the same command gives the same text.

    Empty cells are values that a run does not have: it diverged, or it is not one of those that the test data were read
    for. Texts that a spreadsheet would take for a formula begin with an apostrophe.
    """
    head = (
        *_KEY,
        "status",
        "chosen",
        "epochs",
        "steps",
        "passes",
        "train_loss",
        "validation_loss",
        "validation_error",
        "test_loss",
        "test_error",
        "epoch_at_target",
    )
    chosen = {(c.optimizer, c.initial_scale, c.trial) for c in comparison.choices}
    rows = []
    for run in comparison.results:
        key, last = run.key, run.epochs[-1] if run.epochs else None
        first = run.first_at(comparison.settings.target_error)
        rows.append(
            (
                *_key(run, comparison.settings),
                run.status,
                int((key.optimizer, key.initial_scale, (key.learning_rate, key.weight_decay)) in chosen),
                len(run.epochs),
                run.steps,
                None if last is None else last.evaluations,
                None if last is None else last.train_loss,
                run.validation_loss,
                run.validation_error,
                run.test_loss,
                run.test_error,
                None if first is None else first.epoch,
            )
        )
    return _csv(head, rows)


def epochs_csv(comparison: Comparison) -> str:
    """One row a run and epoch, without anything that is measured on a machine; norm and rotation of every layer."""
    layers = list(dict.fromkeys(name for run in comparison.results for name in run.layers))
    head = (
        *_KEY,
        "epoch",
        "steps",
        "passes",
        "train_loss",
        "validation_loss",
        "validation_error",
        *(f"{what}:{name}" for name in layers for what in ("norm", "rotation")),
    )
    rows = []
    for run in comparison.results:
        for epoch in run.epochs:
            traced = dict(zip(run.layers, epoch.layers, strict=True))
            values = [
                getattr(traced[name], what) if name in traced else None
                for name in layers
                for what in ("norm", "rotation")
            ]
            rows.append(
                (
                    *_key(run, comparison.settings),
                    epoch.epoch,
                    epoch.steps,
                    epoch.evaluations,
                    epoch.train_loss,
                    epoch.validation_loss,
                    epoch.validation_error,
                    *values,
                )
            )
    return _csv(head, rows)


def times_csv(comparison: Comparison) -> str:
    """What was measured on the machine: one row a run, with the training time to the end of each epoch."""
    epochs = comparison.settings.epochs
    head = (
        *_KEY,
        "seconds_per_step",
        "peak_memory_bytes",
        "harness_seconds",
        "validation_seconds",
        "machine",
        *(f"seconds_to_epoch_{i}" for i in range(1, epochs + 1)),
    )
    rows = []
    for run in comparison.results:
        seconds = [epoch.seconds for epoch in run.epochs[:epochs]]
        rows.append(
            (
                *_key(run, comparison.settings),
                run.seconds_per_step,
                run.peak_memory_bytes,
                run.harness_seconds,
                run.validation_seconds,
                run.machine,
                *seconds,
                *[None] * (epochs - len(seconds)),
            )
        )
    return _csv(head, rows)


def summary_json(summary: Summary) -> str:
    """Everything that the tables and figures show as one JSON document; null for what is not finite."""
    return json.dumps(_plain(dataclasses.asdict(summary)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(run: RunResult, settings: Settings) -> tuple[object, ...]:
    key = run.key
    return key.optimizer, key.initial_scale, key.learning_rate, settings.decay_of(key), key.seed


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, head))
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float):
        return repr(value)  # the shortest text from which it is read back bit for bit
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
