"""What a comparison is told and what it finds, as frozen data with a JSON form both ways.

Everything but times, memory and the machine follows from `Settings` alone: those fields are named in
`MEASURED_FIELDS`, and two runs of the same command agree in all others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Literal

from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.plain import PlainRecord

__all__ = [
    "MEASURED_FIELDS",
    "Choice",
    "Environment",
    "EpochRecord",
    "InitialScale",
    "LayerRecord",
    "RunKey",
    "RunResult",
    "Settings",
]

InitialScale = Literal["plain", "rescaled"]
MEASURED_FIELDS = (
    "seconds",
    "seconds_per_step",
    "peak_memory_bytes",
    "harness_seconds",
    "validation_seconds",
    "machine",
)
"""Fields of `EpochRecord` and `RunResult` that are measured on a machine and differ from one repetition to the next."""


@dataclass(frozen=True)
class Settings(PlainRecord):
    """All that determines the results of a comparison.

    Args:
        task: name of the task, or ``file.py:callable``.
        model: name of the model, such as ``mlp:100,100``, or ``file.py:callable``.
        optimizers: names of the contestants, in the order in which they are shown; the first is the reference.
        learning_rates: the grid, the same for every contestant; positive.
        seeds: each gives initial weights and an order of the data.
        epochs: passes over the training data.
        batch_size: examples a step; contestants that need the full batch take one step of all examples an epoch.
        weight_decay: coefficient of weight decay on the weights that are not on spheres.
        momentum: of the contestants that have one.
        schedule: of the learning rate over the steps: constant, or half a cosine from 1 to 0.
        target_error: validation error whose reaching is timed.
        initial_scales: ``"plain"`` initial weights, ``"rescaled"`` ones, or both; see `RunKey`.
        data: folder of the data, for tasks that read files.
        device: torch device.
        threads: torch threads of each run; results of different numbers differ by rounding.

    Raises:
        SettingsError: a value has no meaning.

    Example:
        >>> settings = Settings(optimizers=("sgd", "rsgd"), learning_rates=(0.01, 0.1), seeds=(0, 1, 2), epochs=2)
        >>> len(list(settings.run_keys())), Settings.from_dict(settings.to_dict()) == settings
        (12, True)
    """

    optimizers: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    task: str = "digits"
    model: str = "mlp:100,100"
    batch_size: int = 100
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    target_error: float = 0.05
    initial_scales: tuple[InitialScale, ...] = ("plain",)
    data: str | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("optimizers", "learning_rates", "seeds", "initial_scales"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(set(values)) != len(values):
                raise SettingsError(name, values, "at least one, each once")
        rates = tuple(float(rate) for rate in self.learning_rates)
        object.__setattr__(self, "learning_rates", rates)
        finite = math.isfinite
        self._require("learning_rates", all(finite(r) and r > 0 for r in rates), "positive finite numbers")
        self._require("seeds", all(0 <= s < 2**31 for s in self.seeds), "integers from 0")
        self._require("epochs", self.epochs >= 1, "at least 1")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("weight_decay", finite(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._require("schedule", self.schedule in ("constant", "cosine"), "constant or cosine")
        self._require("target_error", self.target_error >= 0, "an error of at least 0")
        known = set(self.initial_scales) <= {"plain", "rescaled"}
        self._require("initial_scales", known, "plain, rescaled, or both")
        self._require("threads", self.threads >= 1, "at least 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise SettingsError(name, getattr(self, name), expected)

    def run_keys(self) -> Iterator[RunKey]:
        """All runs, seeds first and contestants last, so that every contestant has runs early on."""
        for seed, scale, rate, optimizer in product(
            self.seeds, self.initial_scales, self.learning_rates, self.optimizers
        ):
            yield RunKey(optimizer, rate, seed, scale)

    def canonical_json(self) -> str:
        """The settings as one line of JSON in which equal settings are equal texts."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def hash(self) -> str:
        """SHA-256 of `canonical_json`, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def differences(self, other: Settings) -> tuple[str, ...]:
        """Name every setting in which another command differs, with both values."""
        return tuple(
            f"{field.name} is {getattr(other, field.name)!r} there and {getattr(self, field.name)!r} here"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


@dataclass(frozen=True, order=True)
class RunKey(PlainRecord):
    """Which run: everything in a run's result follows from the settings and this.

    Args:
        optimizer: name of the contestant.
        learning_rate: its learning rate.
        seed: of initial weights and of the order of the data; both are the same for every contestant.
        initial_scale: ``"plain"``, or ``"rescaled"``: every filter whose scale is absorbed by a normalization is
            multiplied by 10^u, u uniform on [-2, 2], before anything is converted.
    """

    optimizer: str
    learning_rate: float
    seed: int
    initial_scale: InitialScale = "plain"

    def __str__(self) -> str:
        rescaled = ", rescaled" if self.initial_scale == "rescaled" else ""
        return f"{self.optimizer}, learning rate {self.learning_rate:.6g}, seed {self.seed}{rescaled}"


@dataclass(frozen=True)
class LayerRecord(PlainRecord):
    """One weight at the end of an epoch; where epochs have fewer than 32 steps, of the last one that was measured.

    Args:
        norm: mean Euclidean norm of its filters.
        rotation: mean angle in radians by which a filter turned in a step, over the steps that were sampled.
    """

    norm: float
    rotation: float


@dataclass(frozen=True)
class EpochRecord(PlainRecord):
    """One epoch of a run.

    Args:
        epoch: counted from 1.
        steps: steps of the optimizer since the start.
        evaluations: examples whose loss was computed in training since the start, over the size of the training set:
            passes over the data. More than ``epoch`` for contestants that evaluate the loss several times a step.
        train_loss: mean over the epoch of the loss before each step.
        validation_loss: after the epoch, in evaluation mode.
        validation_error: after the epoch; for classification the share of wrong answers, in [0, 1].
        seconds: training time since the start, without validation and measurements.
        layers: one record for each of `RunResult.layers`.
    """

    epoch: int
    steps: int
    evaluations: float
    train_loss: float
    validation_loss: float
    validation_error: float
    seconds: float
    layers: tuple[LayerRecord, ...]


@dataclass(frozen=True)
class RunResult(PlainRecord):
    """What a run found. A run diverges when a loss or a weight is no longer finite; its epochs end before that.

    Args:
        key: which run.
        status: ``"finished"`` or ``"diverged"``.
        layers: names of the weights that norms and rotation are recorded of.
        epochs: records of the epochs that were finished.
        steps: steps taken.
        seconds_per_step: median time of a step: forward, backward, update; None where no step was timed.
        peak_memory_bytes: largest memory of the process (of the device, on a GPU) that the run added; None where it
            cannot be measured.
        harness_seconds: time in which the run neither trained nor validated: building, converting, measuring.
        machine: name of the machine in words.
        test_error: on the test data; None for all runs but the chosen ones, and for diverged ones.
        test_loss: likewise.
        validation_seconds: time in which the run was judged on the validation data.
    """

    key: RunKey
    status: Literal["finished", "diverged"]
    layers: tuple[str, ...]
    epochs: tuple[EpochRecord, ...]
    steps: int
    seconds_per_step: float | None
    peak_memory_bytes: int | None
    harness_seconds: float
    machine: str
    test_error: float | None = None
    test_loss: float | None = None
    validation_seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the run diverged."""
        return self.status == "diverged"

    @property
    def validation_error(self) -> float | None:
        """Validation error at the end of training; None where the run diverged."""
        return None if self.diverged or not self.epochs else self.epochs[-1].validation_error

    @property
    def validation_loss(self) -> float | None:
        """Validation loss at the end of training; None where the run diverged."""
        return None if self.diverged or not self.epochs else self.epochs[-1].validation_loss

    def first_at(self, error: float) -> EpochRecord | None:
        """The first epoch whose validation error is at most ``error``; its ``epoch`` and ``seconds`` say when."""
        return next((record for record in self.epochs if record.validation_error <= error), None)

    def with_test(self, error: float, loss: float) -> RunResult:
        """The same with what was found on the test data."""
        return replace(self, test_error=error, test_loss=loss)


@dataclass(frozen=True)
class Choice(PlainRecord):
    """The learning rate of one contestant, and why.

    Args:
        optimizer: name of the contestant.
        initial_scale: for the runs from these initial weights.
        learning_rate: the one of the smallest mean validation error over the seeds at the end of training, a diverged
            run counted as worse than any error; equal ones are decided by the mean validation loss, then by the smaller
            rate. None where every run of every rate diverged.
        validation_errors: for each of `Settings.learning_rates` the mean over the runs that did not diverge; None where
            all did.
        diverged: how many runs diverged at each learning rate.
        reason: the same in words.
    """

    optimizer: str
    initial_scale: InitialScale
    learning_rate: float | None
    validation_errors: tuple[float | None, ...]
    diverged: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Environment(PlainRecord):
    """Where a comparison ran.

    Args:
        versions: pairs of a package and its version.
        machine: processor, cores and system in words.
    """

    versions: tuple[tuple[str, str], ...]
    machine: str
