"""The outcome of a comparison: its settings, its runs, the choices made, and where it ran."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manifold_nets.comparison.errors import ComparisonFolderError
from manifold_nets.comparison.plain import PlainRecord
from manifold_nets.comparison.records import Choice, Environment, InitialScale, RunKey, RunResult, Settings
from manifold_nets.files import atomic_file
from manifold_nets.page.markup import plural

__all__ = ["Comparison"]

FILE_NAME = "comparison.json"


@dataclass(frozen=True)
class Comparison(PlainRecord):
    """A finished comparison.

    Args:
        settings: what was compared.
        results: one for each of `Settings.run_keys`, in that order.
        choices: one for each contestant and initial scale.
        environment: versions and machine.
    """

    settings: Settings
    results: tuple[RunResult, ...]
    choices: tuple[Choice, ...]
    environment: Environment

    def contradiction(self) -> str | None:
        """See `PlainRecord`."""
        settings = self.settings
        if [result.key for result in self.results] != list(settings.run_keys()):
            return "results that are not those of the runs of its settings, in their order"
        wanted = [(name, scale) for scale in settings.initial_scales for name in settings.optimizers]
        if sorted((c.optimizer, c.initial_scale) for c in self.choices) != sorted(wanted):
            return "choices that are not one for each optimizer and initial scale"
        for chosen in self.choices:
            trials = settings.trials(chosen.optimizer, chosen.initial_scale)
            if {len(chosen.validation_errors), len(chosen.diverged)} != {len(trials)}:
                return f"a choice for {chosen.optimizer!r} that does not list {len(trials)} trials"
            if chosen.trial is not None and chosen.trial not in trials:
                return f"a choice for {chosen.optimizer!r} of {chosen.trial}, which was not tried"
        return None

    def choice(self, optimizer: str, initial_scale: InitialScale = "plain") -> Choice:
        """The learning rate chosen for a contestant.

        Raises:
            KeyError: the comparison has no such contestant or scale.
        """
        for found in self.choices:
            if (found.optimizer, found.initial_scale) == (optimizer, initial_scale):
                return found
        raise KeyError(f"no choice for {optimizer!r} with {initial_scale} initial weights")

    def chosen_runs(self, optimizer: str, initial_scale: InitialScale = "plain") -> tuple[RunResult, ...]:
        """The runs of a contestant at its chosen learning rate, one a seed; none where all runs diverged."""
        trial = self.choice(optimizer, initial_scale).trial
        return () if trial is None else self.runs(optimizer, trial[0], initial_scale, trial[1])

    def runs(
        self,
        optimizer: str,
        learning_rate: float,
        initial_scale: InitialScale = "plain",
        weight_decay: float | None = None,
    ) -> tuple[RunResult, ...]:
        """The runs of a contestant at one learning rate, and at one weight decay where that is tuned, one a seed."""
        found = self._by_key()
        seeds = self.settings.seeds
        keys = [RunKey(optimizer, learning_rate, seed, initial_scale, weight_decay) for seed in seeds]
        return tuple(found[key] for key in keys)

    def is_at_edge(self, choice: Choice) -> bool:
        """Whether a chosen learning rate is the smallest or the largest of several: a better one may lie beyond."""
        rates = self.settings.learning_rates
        return len(rates) > 1 and choice.learning_rate in (min(rates), max(rates))

    def notes(self) -> tuple[str, ...]:
        """What a reader of the tables has to know, in sentences: choices at the edge of the grid, equal optimizers, and
        test values that are not finite.
        """
        notes = []
        edge = [
            f"{choice.optimizer} ({'' if choice.initial_scale == 'plain' else 'rescaled, '}{choice.learning_rate:.3g})"
            for choice in self.choices
            if self.is_at_edge(choice)
        ]
        if edge:
            rates = "learning rate" if len(edge) == 1 else "learning rates"
            verb = "is" if len(edge) == 1 else "are"
            notes.append(f"The {rates} chosen for {', '.join(edge)} {verb} at the edge of the grid: extend it.")
        if any(choice.optimizer == "adamw" and self._decay(choice) == 0 for choice in self.choices):
            notes.append("adamw with weight decay 0 is adam: the two make the same steps.")
        return (*notes, *filter(None, map(self._not_finite, self.choices)))

    def _not_finite(self, choice: Choice) -> str:
        runs = self.chosen_runs(choice.optimizer, choice.initial_scale)
        for name, values in (("error", [run.test_error for run in runs]), ("loss", [run.test_loss for run in runs])):
            bad = sum(value is not None and not math.isfinite(value) for value in values)
            if bad:
                return (
                    f"The test {name} of {choice} is not finite in {bad} of {len(runs)} runs: the test data, or the "
                    f"outputs of the network for them, hold NaN or infinite values."
                    f"{' Such runs rank last.' if name == 'error' else ''}"
                )
        return ""

    def _decay(self, choice: Choice) -> float:
        return self.settings.weight_decay if choice.weight_decay is None else choice.weight_decay

    def _by_key(self) -> dict[RunKey, RunResult]:
        return {result.key: result for result in self.results}

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
        """Write the comparison into a folder, which is made if it does not exist; return the JSON file.

        Raises:
            OSError: the folder cannot be made or written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        path = place / FILE_NAME
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `write` wrote.

        Raises:
            ComparisonFolderError: the folder holds no finished comparison.
            RecordError: the file is damaged.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            remedy = "Name the --output folder of a comparison that has ended, or start its command again."
            raise ComparisonFolderError(folder, f"no {FILE_NAME}", "a finished comparison", remedy)
        return cls.from_json(path.read_bytes(), path)
