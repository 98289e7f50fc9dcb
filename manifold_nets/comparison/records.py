"""What a comparison is told and what it finds, as frozen data with a JSON form both ways.

Everything but times, memory and the machine follows from `Settings` alone: those fields are named in
`MEASURED_FIELDS`, and two runs of the same command agree in all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from manifold_nets.comparison.plain import PlainRecord
from manifold_nets.comparison.settings import InitialScale, RunKey, Schedule, Settings, Trial, Tuned

__all__ = [
    "MEASURED_FIELDS",
    "Choice",
    "Environment",
    "EpochRecord",
    "InitialScale",
    "LayerRecord",
    "RunKey",
    "RunResult",
    "Schedule",
    "Settings",
    "Trial",
    "Tuned",
]

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
    """What a run found.

    A run diverges when a loss, a weight or the validation error is no longer finite; its epochs end before that.

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
        test_error: on the test data; None for all runs but the chosen ones, and for diverged ones. NaN or infinite
            where the test data, or the outputs for them, are.
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

    def contradiction(self) -> str | None:
        """See `PlainRecord`."""
        if [record.epoch for record in self.epochs] != list(range(1, len(self.epochs) + 1)):
            return "epochs that are not 1, 2, 3, …"
        if any(len(record.layers) != len(self.layers) for record in self.epochs):
            return f"an epoch without a record for each of {len(self.layers)} layers"
        return None if self.epochs or self.diverged else "a finished run without an epoch"

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
    """The learning rate of one contestant, its weight decay where that is tuned, and why.

    Args:
        optimizer: name of the contestant.
        initial_scale: for the runs from these initial weights.
        learning_rate: the one of the smallest mean validation error over the seeds at the end of training, a diverged
            run counted as worse than any error; equal ones are decided by the mean validation loss, then by the smaller
            rate, then by the smaller weight decay. None where every run of every rate diverged.
        validation_errors: for each of `Settings.trials` the mean over the runs that did not diverge; None where all
            did.
        diverged: how many runs diverged of each of them.
        reason: the same in words.
        weight_decay: chosen along with the learning rate; None where weight decay is not tuned.
    """

    optimizer: str
    initial_scale: InitialScale
    learning_rate: float | None
    validation_errors: tuple[float | None, ...]
    diverged: tuple[int, ...]
    reason: str
    weight_decay: float | None = None

    def __str__(self) -> str:
        return self.optimizer if self.initial_scale == "plain" else f"{self.optimizer}, {self.initial_scale}"

    @property
    def trial(self) -> Trial | None:
        """Learning rate and weight decay; None where every run diverged."""
        return None if self.learning_rate is None else (self.learning_rate, self.weight_decay)


@dataclass(frozen=True)
class Environment(PlainRecord):
    """Where a comparison ran.

    Args:
        versions: pairs of a package and its version.
        machine: processor, cores and system in words.
    """

    versions: tuple[tuple[str, str], ...]
    machine: str
