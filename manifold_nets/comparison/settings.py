"""The settings of a comparison, and the runs that follow from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal, get_args

from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.json_records import JsonRecord

InitialScale = Literal["plain", "rescaled"]
Schedule = Literal["constant", "cosine", "bold-driver", "exponential"]
Initialization = Literal["default", "balanced"]
Trial = tuple[float, float | None]
"""A learning rate and a weight decay, which is None where it is that of the settings."""


@dataclass(frozen=True)
class Tuned(JsonRecord):
    """The learning rate and weight decay of an optimizer, as tuned on few examples.

    Args:
        optimizer: name of the optimizer.
        initial_scale: initial scale of its runs.
        learning_rate: the chosen one; the smallest of the grid if every run diverged.
        weight_decay: the same for weight decay; None if it was not tuned.
    """

    optimizer: str
    initial_scale: InitialScale
    learning_rate: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Settings(JsonRecord):
    """Everything that determines the results of a comparison.

    Args:
        task: name of the task, or ``file.py:callable``.
        model: name of the model, such as ``mlp:100,100``, or ``file.py:callable``.
        optimizers: names of the optimizers, in the order in which they are shown; the first is the reference.
        learning_rates: the grid, the same for every optimizer; positive.
        seeds: each determines initial weights and an order of the data.
        epochs: passes over the training data.
        batch_size: examples per step; full-batch optimizers take one step per epoch.
        weight_decay: coefficient of weight decay on the weights that are not on spheres.
        weight_decays: coefficients to tune along with the learning rate, the same for every optimizer; if empty,
            ``weight_decay`` is used.
        momentum: for the optimizers that have one.
        schedule: learning rate schedule; see `learning_rate_factor`.
        target_error: validation error for the time to target.
        initial_scales: ``"plain"`` initial weights, ``"rescaled"`` ones, or both; see `RunKey`.
        data: folder of the data, for tasks that read files.
        device: torch device.
        threads: torch threads of each run; results of different numbers differ by rounding.
        initialization: the model's own, or ``"balanced"``: filters and the columns of the classifier get norm 1 and a
            random direction, and biases are 0.
        early_stop: whether runs may end before the last epoch; see `should_stop`.
        subset: numbers of training and validation examples to use (default: all).
        tune_on: numbers of training examples, validation examples and epochs for choosing learning rate and weight
            decay; the runs on all data then use only the chosen ones. By default they are chosen by the runs on all
            data.
        tune_seeds: number of seeds to tune with, the first ones (default: all).
        tuned: the tuned values; filled in by the comparison.

    Raises:
        SettingsError: a value is invalid.

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
    schedule: Schedule = "constant"
    target_error: float = 0.05
    initial_scales: tuple[InitialScale, ...] = ("plain",)
    data: str | None = None
    device: str = "cpu"
    threads: int = 1
    weight_decays: tuple[float, ...] = ()
    initialization: Initialization = "default"
    early_stop: bool = False
    subset: tuple[int, int] | None = None
    tune_on: tuple[int, int, int] | None = None
    tune_seeds: int | None = None
    tuned: tuple[Tuned, ...] = ()

    def __post_init__(self) -> None:
        for name in ("optimizers", "learning_rates", "seeds", "initial_scales", "weight_decays"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if (not values and name != "weight_decays") or len(set(values)) != len(values):
                raise SettingsError(name, values, "at least one, each once")
        for name in ("learning_rates", "weight_decays"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name in ("subset", "tune_on"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        self._require_meaning()

    def _require_meaning(self) -> None:
        finite = math.isfinite
        names = {name: getattr(self, name) for name in ("task", "model", "optimizers")}
        printable = {
            name: all(text and text.isprintable() for text in ((texts,) if isinstance(texts, str) else texts))
            for name, texts in names.items()
        }
        trials = {len(self.trials(name, scale)) for name, scale in product(self.optimizers, self.initial_scales)}
        tune_seeds = self.tune_seeds is None or (self.tune_on is not None and 1 <= self.tune_seeds <= len(self.seeds))
        rules: tuple[tuple[str, bool, str], ...] = (
            ("learning_rates", all(finite(r) and r > 0 for r in self.learning_rates), "positive finite numbers"),
            *((name, holds, "names without control characters") for name, holds in printable.items()),
            ("seeds", all(0 <= s < 2**31 for s in self.seeds), "integers from 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("weight_decay", finite(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("schedule", self.schedule in get_args(Schedule), "constant, cosine, bold-driver or exponential"),
            ("target_error", self.target_error >= 0, "an error of at least 0"),
            ("initial_scales", set(self.initial_scales) <= {"plain", "rescaled"}, "plain, rescaled, or both"),
            ("threads", self.threads >= 1, "at least 1"),
            ("weight_decays", all(finite(d) and d >= 0 for d in self.weight_decays), "numbers of at least 0"),
            ("weight_decay", not (self.weight_decay and self.weight_decays), "0 when weight_decays is given"),
            ("initialization", self.initialization in get_args(Initialization), "default or balanced"),
            ("subset", _are_counts(self.subset, 2), "two counts of examples, at least 1"),
            ("tuned", len(trials) == 1 and 0 not in trials, "the same number of choices per optimizer and scale"),
            ("tune_seeds", tune_seeds, "at most the number of seeds, and only together with tune_on"),
            ("tune_on", _are_counts(self.tune_on, 3), "three counts: training examples, validation examples, epochs"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise SettingsError(name, getattr(self, name), expected)

    def run_keys(self) -> Iterator[RunKey]:
        """All runs, ordered by seed first and optimizer last, so that every optimizer has runs early on."""
        for seed, scale in product(self.seeds, self.initial_scales):
            grids = [self.trials(optimizer, scale) for optimizer in self.optimizers]
            for trial in zip(*grids, strict=True):
                for optimizer, (rate, decay) in zip(self.optimizers, trial, strict=True):
                    yield RunKey(optimizer, rate, seed, scale, decay)

    def trials(self, optimizer: str, initial_scale: InitialScale = "plain") -> tuple[Trial, ...]:
        """The learning rates and weight decays of an optimizer; every optimizer has the same number of them.

        Returns:
            Pairs of a learning rate and a weight decay (None if that is not tuned): the grid, or the one pair that was
            chosen on few examples.
        """
        if self.tuned:
            found = (t for t in self.tuned if (t.optimizer, t.initial_scale) == (optimizer, initial_scale))
            return tuple((t.learning_rate, t.weight_decay) for t in found)
        return tuple(product(self.learning_rates, self.weight_decays or (None,)))

    def decay_of(self, key: RunKey) -> float:
        """The weight decay of a run."""
        return self.weight_decay if key.weight_decay is None else key.weight_decay

    def of_run(self, key: RunKey) -> Settings:
        """The settings for the optimizer of a run, with the weight decay of that run."""
        return replace(self, weight_decay=self.decay_of(key), weight_decays=())

    def canonical_json(self) -> str:
        """The settings as one line of JSON; equal settings give equal strings."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def hash(self) -> str:
        """SHA-256 of `canonical_json`, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def differences(self, other: Settings) -> tuple[str, ...]:
        """Name every setting that differs from another comparison, with both values.

        Additional optimizers, learning rates or seeds are not a difference: the runs of the other comparison are runs
        of this one too. The first seed must stay the same, because its weights are analysed. Tuned values follow from
        the other settings.
        """
        return tuple(
            f"{field.name} is {getattr(other, field.name)!r} there and {getattr(self, field.name)!r} here"
            for field in fields(self)
            if field.name != "tuned" and not self._extends(other, field.name)
        )

    def _extends(self, other: Settings, name: str) -> bool:
        here, there = getattr(self, name), getattr(other, name)
        if name not in ("optimizers", "learning_rates", "seeds"):
            return bool(here == there)
        return set(here) >= set(there) and (name != "seeds" or here[0] == there[0])


def _are_counts(values: tuple[int, ...] | None, count: int) -> bool:
    return values is None or (len(values) == count and min(values) >= 1)


@dataclass(frozen=True, order=True)
class RunKey(JsonRecord):
    """Identifies a run; everything in its result follows from this and the settings.

    Args:
        optimizer: name of the optimizer.
        learning_rate: its learning rate.
        seed: seed of the initial weights and of the order of the data; both are the same for every optimizer.
        initial_scale: ``"plain"``, or ``"rescaled"``: every filter whose scale is absorbed by a normalization is
            multiplied by 10^u, u uniform on [-2, 2], before anything is converted.
        weight_decay: its weight decay if that is tuned; None if it is that of the settings.

    Example:
        >>> RunKey("rsgd", 0.1, seed=0) == RunKey("rsgd", 0.1, seed=0, initial_scale="plain")
        True
    """

    optimizer: str
    learning_rate: float
    seed: int
    initial_scale: InitialScale = "plain"
    weight_decay: float | None = None

    @property
    def trial(self) -> Trial:
        """Its learning rate and weight decay."""
        return self.learning_rate, self.weight_decay

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; without the weight decay if that is not tuned, as in older versions."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def __str__(self) -> str:
        decay = "" if self.weight_decay is None else f", weight decay {self.weight_decay:.6g}"
        rescaled = ", rescaled" if self.initial_scale == "rescaled" else ""
        return f"{self.optimizer}, learning rate {self.learning_rate:.6g}{decay}, seed {self.seed}{rescaled}"
