"""The results of a comparison: epochs, runs, choices and the whole, as frozen data with a JSON form.

Everything except times, memory and the machine follows from `Settings` alone. The exceptions are listed in
`MEASURED_FIELDS`; two runs of the same command agree in all other fields.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from manifold_nets.comparison.errors import ComparisonFolderError
from manifold_nets.comparison.json_records import JsonRecord
from manifold_nets.comparison.settings import InitialScale, RunKey, Settings, Trial
from manifold_nets.files import atomic_file
from manifold_nets.page.markup import plural

if TYPE_CHECKING:
    from typing_extensions import Self

_FILE_NAME = "comparison.json"
_PACKAGES = ("manifold_nets", "torch", "geoopt", "numpy", "sqlalchemy", "pymanopt", "scikit-learn", "timm")

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
class LayerRecord(JsonRecord):
    """One weight at the end of an epoch; if epochs have fewer than 32 steps, at the last measured one.

    Args:
        norm: mean Euclidean norm of its filters.
        rotation: mean angle in radians by which a filter turned in a step, over the sampled steps.

    Example:
        >>> LayerRecord(norm=1.0, rotation=0.02).rotation
        0.02
    """

    norm: float
    rotation: float


@dataclass(frozen=True)
class EpochRecord(JsonRecord):
    """One epoch of a run.

    Args:
        epoch: counted from 1.
        steps: optimizer steps since the start.
        evaluations: passes over the data since the start: the number of examples whose loss was computed in training,
            over the size of the training set. More than ``epoch`` for optimizers that evaluate the loss several times
            per step.
        train_loss: mean over the epoch of the loss before each step.
        validation_loss: after the epoch, in evaluation mode.
        validation_error: after the epoch; for classification the share of wrong answers, in [0, 1].
        seconds: training time since the start, without validation and measurements.
        layers: one record for each of `RunResult.layers`.

    Example:
        >>> record = EpochRecord(1, 32, 1.0, 0.9, 0.6, 0.25, 0.4, (LayerRecord(1.0, 0.02),))
        >>> f"{record.validation_error:.0%} wrong after {record.steps} steps"
        '25% wrong after 32 steps'
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
class RunResult(JsonRecord):
    """The result of one run.

    A run diverges when a loss, a weight or the validation error is no longer finite; its epochs end before that.

    Args:
        key: the run.
        status: ``"finished"`` or ``"diverged"``.
        layers: names of the weights whose norms and rotation are recorded.
        epochs: records of the finished epochs.
        steps: number of steps.
        seconds_per_step: median time of a step: forward, backward, update; None if no step was timed.
        peak_memory_bytes: largest memory of the process (of the device, on a GPU) that the run added; None if it cannot
            be measured.
        harness_seconds: time spent outside training and validation: building, converting, measuring.
        machine: description of the machine.
        test_error: error on the test data; None for runs that were not chosen or diverged. NaN or infinite if the test
            data, or the outputs for them, are.
        test_loss: the same for the loss.
        validation_seconds: time for evaluating on the validation data.

    Example:
        >>> import manifold_nets as mn
        >>> found = mn.compare("mlp:4", optimizers=["rsgd"], learning_rates=[0.1], seeds=1, epochs=1, progress=False)
        >>> (run,) = found.results
        >>> run.key.optimizer, run.status, len(run.epochs), run.test_error < 1
        ('rsgd', 'finished', 1, True)
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
        """See `JsonRecord`."""
        if [record.epoch for record in self.epochs] != list(range(1, len(self.epochs) + 1)):
            return "epochs that are not numbered 1, 2, 3, …"
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
        """The first epoch whose validation error is at most ``error``."""
        return next((record for record in self.epochs if record.validation_error <= error), None)

    def with_test(self, error: float, loss: float) -> RunResult:
        """The same with its test error and loss."""
        return replace(self, test_error=error, test_loss=loss)


@dataclass(frozen=True)
class Choice(JsonRecord):
    """The chosen learning rate of one optimizer, its weight decay if that is tuned, and the reason.

    Args:
        optimizer: name of the optimizer.
        initial_scale: for the runs from these initial weights.
        learning_rate: the rate with the smallest mean validation error over the seeds at the end of training, where a
            diverged run counts as worse than any error. Ties are broken by the mean validation loss, then by the
            smaller rate, then by the smaller weight decay. None if every run of every rate diverged.
        validation_errors: for each of `Settings.trials` the mean over the runs that did not diverge; None if all did.
        diverged: number of diverged runs of each of them.
        reason: the reason in words.
        weight_decay: chosen along with the learning rate; None if weight decay is not tuned.

    Example:
        >>> import manifold_nets as mn
        >>> found = mn.compare("mlp:4", optimizers=["rsgd"], learning_rates=[0.1], seeds=1, epochs=1, progress=False)
        >>> (choice,) = found.choices
        >>> choice.learning_rate, len(choice.validation_errors), choice.diverged
        (0.1, 1, (0,))
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
        """Learning rate and weight decay; None if every run diverged."""
        return None if self.learning_rate is None else (self.learning_rate, self.weight_decay)

    def chose(self, key: RunKey) -> bool:
        """Whether a run has the chosen learning rate and weight decay of the optimizer."""
        return (key.optimizer, key.initial_scale, key.trial) == (self.optimizer, self.initial_scale, self.trial)


@dataclass(frozen=True)
class Environment(JsonRecord):
    """The software and machine of a comparison.

    Args:
        versions: pairs of a package and its version.
        machine: processor, cores and system in words.
    """

    versions: tuple[tuple[str, str], ...]
    machine: str


def environment() -> Environment:
    """Return the versions of the packages that results may depend on, and the machine.

    Example:
        >>> torch.__version__.startswith(dict(environment().versions)["torch"])
        True
    """
    versions = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(tuple(versions), machine_in_words())


@cache
def machine_in_words() -> str:
    """Processor, number of cores, system, and the GPU if there is one.

    Example:
        >>> "cores" in machine_in_words()
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{_processor()}, {cores} cores", platform.system()]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Comparison(JsonRecord):
    """A finished comparison.

    Args:
        settings: what was compared.
        results: one for each of `Settings.run_keys`, in that order.
        choices: one for each optimizer and initial scale.
        environment: versions and machine.

    Example:
        >>> import manifold_nets as mn
        >>> found = mn.compare("mlp:4", optimizers=["rsgd"], learning_rates=[0.1], seeds=1, epochs=1, progress=False)
        >>> found.choices[0].optimizer, found.choices[0].learning_rate, len(found.results)
        ('rsgd', 0.1, 1)
    """

    settings: Settings
    results: tuple[RunResult, ...]
    choices: tuple[Choice, ...]
    environment: Environment

    def contradiction(self) -> str | None:
        """See `JsonRecord`."""
        settings = self.settings
        if [result.key for result in self.results] != list(settings.run_keys()):
            return "results that do not match the runs of its settings, in order"
        wanted = [(name, scale) for scale in settings.initial_scales for name in settings.optimizers]
        if sorted((c.optimizer, c.initial_scale) for c in self.choices) != sorted(wanted):
            return "choices other than one for each optimizer and initial scale"
        for chosen in self.choices:
            trials = settings.trials(chosen.optimizer, chosen.initial_scale)
            if {len(chosen.validation_errors), len(chosen.diverged)} != {len(trials)}:
                return f"a choice for {chosen.optimizer!r} that does not list {len(trials)} trials"
            if chosen.trial is not None and chosen.trial not in trials:
                return f"a choice for {chosen.optimizer!r} of {chosen.trial}, which was not tried"
        return None

    def choice(self, optimizer: str, initial_scale: InitialScale = "plain") -> Choice:
        """The learning rate chosen for an optimizer.

        Raises:
            KeyError: the comparison has no such optimizer or scale.
        """
        for found in self.choices:
            if (found.optimizer, found.initial_scale) == (optimizer, initial_scale):
                return found
        raise KeyError(f"no choice for {optimizer!r} with {initial_scale} initial weights")

    def chosen_runs(self, optimizer: str, initial_scale: InitialScale = "plain") -> tuple[RunResult, ...]:
        """The runs of an optimizer at its chosen learning rate, one per seed; empty if all runs diverged."""
        choice = self.choice(optimizer, initial_scale)
        return tuple(run for run in self.results if choice.chose(run.key))

    def runs(
        self,
        optimizer: str,
        learning_rate: float,
        initial_scale: InitialScale = "plain",
        weight_decay: float | None = None,
    ) -> tuple[RunResult, ...]:
        """The runs of an optimizer at one learning rate, and one weight decay if that is tuned; one per seed."""
        found, seeds = {result.key: result for result in self.results}, self.settings.seeds
        return tuple(found[RunKey(optimizer, learning_rate, seed, initial_scale, weight_decay)] for seed in seeds)

    def is_at_edge(self, choice: Choice) -> bool:
        """Whether a chosen learning rate is the smallest or the largest of several: a better one may lie beyond."""
        rates = self.settings.learning_rates
        return len(rates) > 1 and choice.learning_rate in (min(rates), max(rates))

    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the tables must know.

        They cover choices at the edge of the grid, equal optimizers, and test values that are not finite.
        """
        notes = []
        edge = [
            f"{choice.optimizer} ({'' if choice.initial_scale == 'plain' else 'rescaled, '}{choice.learning_rate:.3g})"
            for choice in self.choices
            if self.is_at_edge(choice)
        ]
        if edge:
            rates, verb = ("learning rate", "is") if len(edge) == 1 else ("learning rates", "are")
            notes.append(f"The {rates} chosen for {', '.join(edge)} {verb} at the edge of the grid: extend the grid.")
        if any(c.optimizer == "adamw" and not (c.weight_decay or self.settings.weight_decay) for c in self.choices):
            notes.append("adamw with weight decay 0 takes the same steps as adam.")
        return (*notes, *filter(None, map(self._not_finite, self.choices)))

    def _not_finite(self, choice: Choice) -> str:
        runs = self.chosen_runs(choice.optimizer, choice.initial_scale)
        for name, values in (("error", [run.test_error for run in runs]), ("loss", [run.test_loss for run in runs])):
            bad = sum(value is not None and not math.isfinite(value) for value in values)
            if bad:
                return (
                    f"The test {name} of {choice} is not finite in {bad} of {len(runs)} runs: the test data or the "
                    f"network's outputs for them contain NaN or infinity."
                    f"{' Such runs rank last.' if name == 'error' else ''}"
                )
        return ""

    def __str__(self) -> str:
        heading = "rate, weight decay" if self.settings.weight_decays else "rate"
        head = f"{self.settings.task}, {self.settings.model}: {plural(len(self.settings.seeds), 'seed')}"
        wide = max(18, *(len(name) + 2 for name in self.settings.optimizers))
        lines = [head, f"{'optimizer':<{wide}}{'initial':<10}{heading:>9}  test error (%)        diverged"]
        for choice in self.choices:
            runs = self.chosen_runs(choice.optimizer, choice.initial_scale)
            tested = [100 * run.test_error for run in runs if run.test_error is not None]
            errors = [error for error in tested if math.isfinite(error)]
            rate = "none" if choice.learning_rate is None else f"{choice.learning_rate:.3g}"
            rate += "" if choice.weight_decay is None else f", {choice.weight_decay:.3g}"
            mean = "not finite" if tested else "none"
            if errors:
                mean = f"{sum(errors) / len(errors):.2f} ({min(errors):.2f} … {max(errors):.2f})"
            lost = f"{sum(choice.diverged)} of {len(choice.diverged) * len(self.settings.seeds)}"
            lines.append(
                f"{choice.optimizer:<{wide}}{choice.initial_scale:<10}{rate:>{max(9, len(heading))}}  {mean:<22}{lost}"
            )
        return "\n".join([*lines, *self.notes()])

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the comparison into a folder, which is created if needed; return the JSON file.

        Raises:
            OSError: the folder cannot be created or written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        path = place / _FILE_NAME
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a comparison from a folder of `write`.

        Raises:
            ComparisonFolderError: the folder holds no finished comparison.
            RecordError: the file is damaged.
        """
        path = Path(folder) / _FILE_NAME
        if not path.is_file():
            raise ComparisonFolderError(folder, f"no {_FILE_NAME}")
        return cls.from_json(path.read_bytes(), path)
