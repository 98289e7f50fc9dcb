"""The entry points: run a comparison of optimizers, or help another process to run one."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from filelock import FileLock, Timeout
from torch import nn

from manifold_nets.comparison.errors import CodeNotAllowedError, FolderInUseError, RecordError, SettingsError
from manifold_nets.comparison.experiment import Experiment, InitialModels, foreign_code, require_device
from manifold_nets.comparison.models import ModelSource
from manifold_nets.comparison.optimizers import AnyOptimizer, OptimizerSpec, optimizer_spec
from manifold_nets.comparison.pool import Executor, InProcessExecutor, ProcessPool, packed
from manifold_nets.comparison.results import Comparison, environment
from manifold_nets.comparison.run import Runner
from manifold_nets.comparison.scheduler import Observer, Scheduler, conclude, shown_progress
from manifold_nets.comparison.selection import choose_all, tuned_settings, tuning_settings
from manifold_nets.comparison.settings import Settings
from manifold_nets.comparison.tasks import Task, load_task
from manifold_nets.errors import ArgumentTypeError, MissingExtraError, listed
from manifold_nets.files import atomic_file, resolved

if TYPE_CHECKING:
    from manifold_nets.comparison.store import RunStore

STUDY_FILE, STUDY_NAME_FILE = "study.db", "study-name.txt"
_SEEDS = "Write 3 for the seeds 0, 1 and 2, or [5] for seed 5 alone."

Number = TypeVar("Number", int, float)


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
    """Compare optimizers on one task and one network, under the same conditions for each.

    For each seed all optimizers start from the same function, converted to spheres for those that train there, and see
    the data in the same order. Each gets the same grid of learning rates. One rate is chosen for it by the mean
    validation error at the end of training; only then are the test data used, once for each chosen run. Diverged runs
    count as worse than all others. If the process is killed, the same call resumes it: at most the runs in flight are
    repeated, and the numbers are the same. With more seeds, learning rates or optimizers and the same ``output``, only
    the new runs are carried out, and those of a newly chosen rate whose weights were deleted.

    Args:
        model: a name such as ``"mlp:100,100"``, ``"resnet:8,16"``, ``"torchvision:resnet18"`` or
            ``"file.py:callable"``, or a callable that builds a plain network with fresh weights.
        task: ``"digits"``, ``"mnist"``, ``"fashion-mnist"``, ``"idx"``, ``"file.py:callable"``, or a `Task`, for
            instance from `task_from_data`.
        optimizers: names; ``"file.py:NAME"`` of an optimizer class, or of a function of ``params`` and ``lr`` that
            returns an optimizer; such classes and functions themselves; or `OptimizerSpec` objects. A single one of
            these, or a string of names separated by commas, is accepted too.
        learning_rates: the grid, the same for every optimizer.
        seeds: the number of seeds, or a list of them.
        epochs: passes over the training data.
        output: folder for the study, the final weights of the chosen runs, ``comparison.json`` and the report
            (``report.html``, plots, tables). Nothing is kept without it.
        workers: number of processes that carry out runs.
        storage: URL of a shared database (PostgreSQL, MySQL), so that `join_comparison` can help from other machines.
            The password can be in the environment variable ``MANIFOLD_NETS_STORAGE_PASSWORD`` instead, or in the file
            named by ``MANIFOLD_NETS_STORAGE_PASSWORD_FILE``.
        progress: by default, a bar on standard error if that is a terminal; True prints lines elsewhere too; False
            prints nothing; a function is called with a `Progress` when a run starts or ends.
        report: whether to write the report; ``comparison.json`` is always written.
        options: other fields of `Settings`: ``batch_size`` (default: the task's own), ``weight_decay``,
            ``weight_decays``, ``momentum``, ``schedule``, ``initialization``, ``early_stop``, ``subset``, ``tune_on``,
            ``tune_seeds``, ``target_error``, ``initial_scales``, ``data``, ``device``, ``threads``.

    Raises:
        SettingsError: a setting is invalid.
        ArgumentTypeError: an argument has the wrong type.
        OptimizerNameError, TaskNameError: a name is unknown.
        DifferentCommandError: the folder or the study holds another comparison; the message lists the differences.
        FolderInUseError: another process is running a comparison in the folder.
        OptimizerBuildError: an optimizer cannot be built for the model.
        RunFailedError: a run failed for a reason other than divergence.
        MissingExtraError: SQLAlchemy is not installed, or matplotlib for the report.

    Example:
        >>> found = compare("mlp:8", optimizers=["sgd", "rsgd"], learning_rates=[0.1], seeds=1, epochs=1)
        >>> [choice.learning_rate for choice in found.choices], len(found.results)
        ([0.1, 0.1], 2)
    """
    unknown = sorted(set(options) - {field.name for field in fields(Settings)})
    if unknown:
        raise SettingsError(unknown[0], options[unknown[0]], "one of the options of Settings")
    _require_types(model, task)
    loaded = load_task(task, data=options.get("data")) if isinstance(task, str) else task
    given = _listed_optimizers(optimizers)
    specs = [optimizer_spec(item) for item in given]
    options.setdefault("batch_size", loaded.batch_size)
    settings = Settings(
        task=task if isinstance(task, str) else loaded.name,
        model=model if isinstance(model, str) else f"{model.__module__}:{getattr(model, '__qualname__', 'callable')}",
        optimizers=tuple(spec.name for spec in specs),
        learning_rates=_numbers("learning_rates", learning_rates, float, "Write one rate as [0.1]."),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else _numbers("seeds", seeds, index, _SEEDS),
        epochs=epochs,
        **options,
    )
    parts: dict[str, tuple[object, object]] = {"task": (task, loaded), "model": (model, model)}
    parts |= {f"optimizer {spec.name}": (item, spec) for item, spec in zip(given, specs, strict=True)}
    own = {name: part for name, (source, part) in parts.items() if not isinstance(source, str)}
    experiment = Experiment(loaded, model, {spec.name: spec for spec in specs})
    how: dict[str, Any] = {"workers": workers, "storage": storage, "progress": progress, "report": report}
    return compare_settings(settings, output, **how, experiment=experiment, own=own)


def _require_types(model: object, task: object) -> None:
    if isinstance(model, nn.Module) or not (isinstance(model, str) or callable(model)):
        remedy = "Every run starts from fresh weights: pass the class or function that builds the network."
        raise ArgumentTypeError("model", model, "a name, or a callable that builds a network", remedy)
    if not isinstance(task, (str, Task)):
        raise ArgumentTypeError("task", task, "a name or a Task", "Make a Task of your data with task_from_data.")


def _listed_optimizers(optimizers: object) -> tuple[AnyOptimizer, ...]:
    """The optimizers of an argument that may be one, several, or names separated by commas.

    Example:
        >>> _listed_optimizers("sgd, rsgd")
        ('sgd', 'rsgd')
    """
    if isinstance(optimizers, str):
        return tuple(name.strip() for name in optimizers.split(","))
    one = isinstance(optimizers, OptimizerSpec) or callable(optimizers) or not isinstance(optimizers, Iterable)
    found: tuple[Any, ...] = (optimizers,) if one else tuple(cast(Iterable[Any], optimizers))
    for item in found:
        if not (isinstance(item, (str, OptimizerSpec)) or callable(item)):
            expected, remedy = "names, optimizer classes or OptimizerSpecs", "Write them as ['sgd', 'rsgd']."
            raise ArgumentTypeError("optimizers", item, expected, remedy)
    return found


def _numbers(
    argument: str, values: Iterable[Number], kind: Callable[[Number], Number], remedy: str
) -> tuple[Number, ...]:
    """The numbers of an argument, converted to one kind."""
    try:
        if isinstance(values, str):
            raise TypeError("a string is not a sequence of numbers")
        return tuple(map(kind, values))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(argument, values, "a sequence of numbers", remedy) from error


def compare_settings(
    settings: Settings,
    output: str | os.PathLike[str] | None,
    *,
    workers: int = 1,
    storage: str | None = None,
    progress: Observer | bool | None = None,
    report: bool = True,
    experiment: Experiment | None = None,
    own: Mapping[str, Any] | None = None,
) -> Comparison:
    """Like `compare`, for a `Settings` object.

    Args:
        settings: what to compare.
        output: as in `compare`.
        workers: as in `compare`.
        storage: as in `compare`.
        progress: as in `compare`.
        report: as in `compare`.
        experiment: the objects that the settings name (default: looked up).
        own: those of them that other processes cannot look up; see `Experiment.from_settings`.
    """
    _require_workers(workers)
    experiment = experiment or Experiment.from_settings(settings, own)
    if settings.tune_on is not None and storage is not None:
        raise SettingsError("tune_on", settings.tune_on, "None, as tune_on does not work with a shared database")
    experiment.check(settings)
    sent = packed(workers, own or {}) if workers > 1 or storage is not None else {}
    # An existing study has passed this check, and may already have all its results.
    begun = storage is None and output is not None and (Path(output) / STUDY_FILE).exists()
    initial_models = None if begun else InitialModels.checked(experiment, settings)
    with contextlib.ExitStack() as stack:
        folder = _own_folder(stack, output)
        observer = stack.enter_context(shown_progress(progress))
        local = _Local(stack, experiment, sent, workers, observer, initial_models)
        if settings.tune_on is not None:
            settings = _tuned(local, settings, folder / "tuning")
        url, name = _url(folder), "comparison"
        if storage is not None:
            url, name = storage, study_name(settings, output)
            if output is not None:
                with atomic_file(folder / STUDY_NAME_FILE) as temporary:
                    temporary.write_text(name, encoding="utf-8")
        store, runner = local.carry_out(settings, url, name, folder / "weights", shared=storage is not None)
        comparison = conclude(store, settings, runner)
        if output is not None:
            comparison.write(folder)
            if report:
                # This import needs an extra.
                from manifold_nets.comparison.report import write_report

                write_report(comparison, folder)
        return comparison


@dataclass
class _Local:
    """Carries out all runs of some settings in this process or with workers on this machine."""

    stack: contextlib.ExitStack
    experiment: Experiment
    sent: Mapping[str, bytes]
    workers: int
    observer: Observer | None
    initial_models: InitialModels | None

    def carry_out(
        self, settings: Settings, url: str, study: str, weights: Path | None, *, shared: bool = False
    ) -> tuple[RunStore, Callable[[], Runner]]:
        """Carry out the runs that have no result; return the study, and what makes a runner that can repeat a run."""
        store = self.stack.enter_context(contextlib.closing(_open_store(url, study)))
        if store.create(settings, environment()) != settings:
            self.initial_models = self.initial_models or InitialModels.checked(self.experiment, settings)
            store.extend(settings)
        if not shared:
            store.mark_failed(store.running())
        keys = tuple(settings.run_keys())
        store.add_missing(keys)

        @cache
        def runner() -> Runner:
            made = self.initial_models
            if made is None or made.settings != settings:
                made = InitialModels(self.experiment, settings)
            return Runner(made, settings, weights)

        if store.count_done(keys) < len(keys):
            alone = self.workers == 1 and not shared
            executor: Executor = (
                InProcessExecutor(runner()) if alone else ProcessPool(self.workers, settings, self.sent, weights)
            )
            with contextlib.closing(executor):
                Scheduler(store, settings, executor, shared, weights, self.observer).run()
        return store, runner


def _tuned(local: _Local, settings: Settings, folder: Path) -> Settings:
    """Tune by runs on few examples: a comparison in a folder of its own that reads no test data."""
    small = tuning_settings(settings)
    folder.mkdir(exist_ok=True)
    store, _ = local.carry_out(small, _url(folder), "comparison", None)
    results = store.results()
    choices = choose_all(small, results)
    Comparison(small, tuple(results[key] for key in small.run_keys()), choices, store.environment()).write(folder)
    return tuned_settings(settings, choices)


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / STUDY_FILE}"


def _open_store(url: str, study: str) -> RunStore:
    try:
        from manifold_nets.comparison.store import RunStore
    except ModuleNotFoundError as error:
        raise MissingExtraError("SQLAlchemy", "comparisons", "compare") from error
    return RunStore(url, study)


def _require_workers(workers: int) -> None:
    if workers < 1:
        raise SettingsError("workers", workers, "at least 1")


def _own_folder(stack: contextlib.ExitStack, output: str | os.PathLike[str] | None) -> Path:
    """The folder of a comparison, locked against other processes."""
    if output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manifold-nets-")))
    folder = resolved(output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The system releases the lock of a killed process.
        stack.enter_context(FileLock(folder / ".lock", timeout=0))
    except Timeout as error:
        raise FolderInUseError(folder, "another process that runs a comparison in this folder") from error
    return folder


def join_comparison(
    storage: str,
    study: str,
    *,
    workers: int = 1,
    progress: Observer | bool | None = None,
    allow: Collection[str] = (),
) -> Settings:
    """Help to run a comparison that another process started, until every run has a result.

    Anyone who can write to the database can name any Python file or module on this machine as a task, a model or an
    optimizer. Only those in ``allow`` are run.

    Args:
        storage: URL of the shared database.
        study: name of the study, as the other process shows it.
        workers: number of processes that carry out runs.
        progress: as in `compare`.
        allow: specifications such as ``"file.py:NAME"`` whose code may be run; built-in names are always allowed.

    Returns:
        The settings of the comparison.

    Raises:
        StorageError: the database cannot be opened or has no such study.
        CodeNotAllowedError: the study names code that is not allowed.
        ManifoldNetsError: something that the study names cannot be found on this machine.

    Example:
        >>> join_comparison("sqlite:////gone/runs.db", "comparison")
        Traceback (most recent call last):
        manifold_nets.comparison.errors.StorageError: sqlite:////gone/runs.db: found unable to open database file; ...
    """
    _require_workers(workers)
    with contextlib.closing(_open_store(storage, study)) as store:
        settings = store.settings()
        refused = [spec for spec in foreign_code(settings) if spec not in allow]
        if refused:
            flags = " ".join(f"--allow {shlex.quote(spec)}" for spec in refused)
            remedy = f"If you trust it, start the worker with {flags} (in Python allow={list(refused)!r})."
            found = f"{listed(refused)}, which is code on this machine that the worker may not run"
            raise CodeNotAllowedError(f"study {study}", found, remedy=remedy)
        store.create(settings, environment())  # refuses other versions
        require_device(settings)
        Experiment.from_settings(settings)
        with (
            shown_progress(progress) as observer,
            contextlib.closing(ProcessPool(workers, settings, {}, None)) as pool,
        ):
            Scheduler(store, settings, pool, True, None, observer).run()
    return settings


def study_name(settings: Settings, output: str | os.PathLike[str] | None = None) -> str:
    """Return the name of a comparison's study in a shared database: the one stored in its folder, or a new one.

    Args:
        settings: settings of the comparison.
        output: its folder.

    Raises:
        RecordError: the file with the name is damaged.

    Example:
        >>> settings = Settings(optimizers=("sgd",), learning_rates=(0.1,), seeds=(0,), epochs=1)
        >>> study_name(settings) == f"manifold-nets-{settings.hash()[:12]}"
        True
    """
    begun = None if output is None else Path(output) / STUDY_NAME_FILE
    if begun is not None and begun.is_file():
        name = begun.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch("manifold-nets-[0-9a-f]{12}", name):
            raise RecordError(str(begun), repr(name[:40]), "the name of a study, such as 'manifold-nets-0123456789ab'")
        return name
    return f"manifold-nets-{settings.hash()[:12]}"
