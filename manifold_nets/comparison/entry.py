"""The one call: settings in, a finished comparison out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from manifold_nets.comparison.checks import (
    chosen_numbers,
    chosen_optimizers,
    require_contestants,
    require_device,
    require_examples,
    require_subjects,
)
from manifold_nets.comparison.choosing import choose_all
from manifold_nets.comparison.contestants import AnyOptimizer, contestant, own_contestant
from manifold_nets.comparison.crew import Crew, Member, Processes, ThisProcess
from manifold_nets.comparison.engine import Observer, Workplace, conclude, work
from manifold_nets.comparison.environment import environment
from manifold_nets.comparison.errors import FolderInUseError, SettingsError
from manifold_nets.comparison.joining import STUDY_NAME_FILE, study_name
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.models.loading import ModelSource
from manifold_nets.comparison.progress import shown_progress
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.comparison.queue import RunQueue
from manifold_nets.comparison.records import Settings
from manifold_nets.comparison.result import Comparison
from manifold_nets.comparison.starts import Starts, Subjects, packed
from manifold_nets.comparison.tasks import Task, load_task
from manifold_nets.comparison.tuning import tuned_settings, tuning_settings
from manifold_nets.files import atomic_file, resolved

__all__ = ["compare", "compare_settings"]

_SEEDS = "Write 3 for the seeds 0, 1 and 2, or [5] for one of them."


def compare(
    model: ModelSource = "mlp:100,100",
    *,
    task: str | Task = "digits",
    optimizers: AnyOptimizer | Sequence[AnyOptimizer] = ("sgd", "adam", "rsgd", "radam"),
    learning_rates: Sequence[float] = (1e-3, 1e-2, 1e-1),
    seeds: int | Sequence[int] = 3,
    epochs: int = 20,
    output: str | os.PathLike[str] | None = None,
    workers: int = 1,
    storage: str | None = None,
    progress: Observer | bool | None = None,
    report: bool = True,
    **options: Any,
) -> Comparison:
    """Compare optimizers on one task and one network, every one with the same chances.

    For each seed all contestants start from the same function, converted to spheres for those that train there, and see
    the data in the same order. Each gets the same grid of learning rates; its own is chosen by the mean validation
    error at the end of training, and only then the test data are read, once for each chosen run. Runs that diverge are
    counted as worse than all others. Killed at any moment and called again with the same arguments, it repeats at most
    the runs that were in flight, and gives the same numbers. Called again with more seeds, learning rates or optimizers
    for the same ``output``, it carries out the runs that are new, and those of a newly chosen rate whose weights are no
    longer there.

    Args:
        model: a name such as ``"mlp:100,100"``, ``"resnet:8,16"``, ``"segnet-basic"``, ``"torchvision:resnet18"`` or
            ``"file.py:callable"``, or a callable that makes a plain network with fresh weights.
        task: ``"digits"``, ``"mnist"``, ``"fashion-mnist"``, ``"idx"``, ``"camvid"``, ``"file.py:callable"``, or a
            `Task`, such as `task_from_data` makes of data loaders.
        optimizers: names; ``"file.py:NAME"`` of an optimizer class, or of a function of ``params`` and ``lr`` that
            returns an optimizer; such classes and functions themselves; or `Contestant` objects. Also one of them, or
            names separated by commas.
        learning_rates: the grid, the same for all.
        seeds: how many, or which.
        epochs: passes over the training data.
        output: folder that keeps the study, the final weights of the chosen runs, ``comparison.json`` and the report
            (``report.html``, plots, tables); nothing is kept when left out.
        workers: processes that carry out runs.
        storage: URL of a shared database (PostgreSQL, MySQL), so that `join_comparison` can help from other machines.
            Its password may be left out, and be in the environment variable ``MANIFOLD_NETS_STORAGE_PASSWORD``, or in
            the file that ``MANIFOLD_NETS_STORAGE_PASSWORD_FILE`` names.
        progress: a bar on standard error where that is a terminal, when left out; True for lines elsewhere too, False
            for nothing; or what is called with a `Progress` when a run has started or ended.
        report: whether to write the report; ``comparison.json`` is written in any case.
        options: other fields of `Settings`: ``batch_size`` (the task's own when left out), ``weight_decay``,
            ``weight_decays``, ``momentum``, ``schedule``, ``initialization``, ``early_stop``, ``subset``, ``tune_on``,
            ``tune_seeds``, ``target_error``, ``initial_scales``, ``data``, ``device``, ``threads``.

    Raises:
        SettingsError: a setting has no meaning.
        ArgumentTypeError: an argument is of another kind.
        OptimizerNameError, TaskNameError: a name is unknown.
        DifferentCommandError: the folder or the study holds another comparison; every difference is named.
        FolderInUseError: another process works in the folder.
        ContestantError: an optimizer cannot be made for the model.
        RunFailedError: a run ended without a result, for a reason other than divergence.
        MissingExtraError: Optuna is not installed, or matplotlib for the report.

    Example:
        >>> found = compare("mlp:8", optimizers=["sgd", "rsgd"], learning_rates=[0.1], seeds=1, epochs=1)
        >>> [choice.learning_rate for choice in found.choices], len(found.results)
        ([0.1, 0.1], 2)
    """
    unknown = sorted(set(options) - {field.name for field in fields(Settings)})
    if unknown:
        raise SettingsError(unknown[0], options[unknown[0]], "one of the options of Settings")
    require_subjects(model, task)
    loaded = load_task(task, data=options.get("data")) if isinstance(task, str) else task
    chosen = chosen_optimizers(optimizers)
    contestants = [_contestant(item) for item in chosen]
    options.setdefault("batch_size", loaded.batch_size)
    settings = Settings(
        task=task if isinstance(task, str) else loaded.name,
        model=model if isinstance(model, str) else f"{model.__module__}:{getattr(model, '__qualname__', 'callable')}",
        optimizers=tuple(item.name for item in contestants),
        learning_rates=chosen_numbers("learning_rates", learning_rates, float, "Write one rate as [0.1]."),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else chosen_numbers("seeds", seeds, index, _SEEDS),
        epochs=epochs,
        **options,
    )
    subjects = Subjects(loaded, model, {item.name: item for item in contestants})
    own: dict[str, Any] = {} if isinstance(task, str) else {"task": loaded}
    own |= {} if isinstance(model, str) else {"model": model}
    own |= {f"optimizer {c.name}": c for item, c in zip(chosen, contestants, strict=True) if not isinstance(item, str)}
    return compare_settings(
        settings,
        output,
        workers=workers,
        storage=storage,
        progress=progress,
        report=report,
        subjects=subjects,
        own=own,
    )


def _contestant(item: AnyOptimizer) -> Contestant:
    if isinstance(item, str):
        return contestant(item)
    return item if isinstance(item, Contestant) else own_contestant(item)


def compare_settings(
    settings: Settings,
    output: str | os.PathLike[str] | None,
    *,
    workers: int = 1,
    storage: str | None = None,
    progress: Observer | bool | None = None,
    report: bool = True,
    subjects: Subjects | None = None,
    own: Mapping[str, Any] | None = None,
) -> Comparison:
    """The same as `compare`, for settings that are at hand.

    Args:
        settings: what to compare.
        output: as in `compare`.
        workers: as in `compare`.
        storage: as in `compare`.
        progress: as in `compare`.
        report: as in `compare`.
        subjects: what the settings name; looked up when left out.
        own: those of them that other processes cannot look up; see `Subjects.named`.
    """
    if workers < 1:
        raise SettingsError("workers", workers, "at least 1")
    subjects = Subjects.named(settings, own) if subjects is None else subjects
    if settings.tune_on is not None and storage is not None:
        raise SettingsError("tune_on", settings.tune_on, "None with a shared database: tuning stays in one folder")
    # What cannot work fails before anything is written.
    require_device(settings)
    require_examples(settings, subjects)
    build_model(subjects.model, subjects.task, seed=0)
    sent = packed(workers, own or {}) if workers > 1 or storage is not None else {}
    # A study that is there has been through this, and may have all its results.
    begun = storage is None and output is not None and (Path(output) / STUDY_FILE).exists()
    starts = None if begun else require_contestants(settings, subjects)
    with contextlib.ExitStack() as stack:
        folder = _own_folder(stack, output)
        observer = stack.enter_context(shown_progress(progress))
        place = _Place(stack, subjects, sent, workers, observer, starts)
        if settings.tune_on is not None:
            settings = _tuned(place, settings, None if output is None else folder / "tuning")
        weights = folder / "weights"
        url = _IN_MEMORY if output is None else f"sqlite:///{folder / STUDY_FILE}"
        if storage is None:
            queue, member = place.carry_out(settings, url, "comparison", weights)
        else:
            name = study_name(settings, output)
            if output is not None:
                with atomic_file(folder / STUDY_NAME_FILE) as temporary:
                    temporary.write_text(name, encoding="utf-8")
            queue, member = place.carry_out(settings, storage, name, weights, shared=True)
        comparison = conclude(queue, settings, weights, member)
        if output is not None:
            comparison.write(folder)
        if output is not None and report:
            # The packages that draw are imported where they are used.
            from manifold_nets.comparison.report import write_report

            write_report(comparison, folder)
        return comparison


_IN_MEMORY = "sqlite:///:memory:"
STUDY_FILE = "study.db"


@dataclass
class _Place:
    """Carries out all runs of some settings."""

    stack: contextlib.ExitStack
    subjects: Subjects
    sent: Mapping[str, bytes]
    workers: int
    progress: Observer | None
    starts: Starts | None

    def carry_out(
        self, settings: Settings, url: str, study: str, weights: Path | None, *, shared: bool = False
    ) -> tuple[RunQueue, Callable[[], Member]]:
        """Carry out the runs that have no result; return the study, and who can repeat one of its runs."""
        queue = RunQueue(url, study)
        self.stack.callback(queue.close)
        if queue.create(settings, environment()) != settings:
            if self.starts is None:
                self.starts = require_contestants(settings, self.subjects)
            queue.extend(settings)
        if not shared:
            queue.give_up_all()
        keys = tuple(settings.run_keys())
        queue.fill(keys)
        members: list[Member] = []

        def member() -> Member:
            if not members:
                members.append(Member(settings, self.subjects, weights, self.starts))
            return members[0]

        if queue.done(keys) < len(keys):
            crew: Crew
            if self.workers == 1 and not shared:
                crew = ThisProcess(member())
            else:
                crew = Processes(self.workers, settings, self.sent, weights)
            with contextlib.closing(crew):
                work(Workplace(queue, settings, crew, shared, weights, self.progress))
        return queue, member


def _tuned(place: _Place, settings: Settings, folder: Path | None) -> Settings:
    """Choose by runs on few examples, whose comparison is kept in a folder of its own, without any test."""
    small = tuning_settings(settings)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    url = _IN_MEMORY if folder is None else f"sqlite:///{folder / STUDY_FILE}"
    queue, _ = place.carry_out(small, url, "comparison", None)
    results = queue.results()
    choices = choose_all(small, results)
    if folder is not None:
        runs = tuple(results[key] for key in small.run_keys())
        Comparison(small, runs, choices, queue.environment()).write(folder)
    return tuned_settings(settings, choices)


def _own_folder(stack: contextlib.ExitStack, output: str | os.PathLike[str] | None) -> Path:
    """The folder of a comparison, which no other process works in."""
    if output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manifold-nets-")))
    folder = resolved(output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The system takes the lock back from a process that is killed.
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
    except Timeout as error:
        raise FolderInUseError(folder) from error
    return folder
