"""Comparisons in a shared database: how their studies are called, and how other processes help."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from manifold_nets.comparison.checks import require_device
from manifold_nets.comparison.crew import Processes
from manifold_nets.comparison.engine import Observer, Workplace, work
from manifold_nets.comparison.environment import environment
from manifold_nets.comparison.errors import CodeNotAllowedError, RecordError, SettingsError
from manifold_nets.comparison.progress import shown_progress
from manifold_nets.comparison.queue import RunQueue
from manifold_nets.comparison.records import Settings
from manifold_nets.comparison.starts import Subjects, foreign_code

__all__ = ["STUDY_NAME_FILE", "join_comparison", "study_name"]

STUDY_NAME_FILE = "study-name.txt"


def join_comparison(
    storage: str,
    study: str,
    *,
    workers: int = 1,
    progress: Observer | bool | None = None,
    allow: Collection[str] = (),
) -> Settings:
    """Carry out runs of a comparison that another process started, until every run has a result.

    Whoever can write into the database can name any Python file or module of this machine as a task, a model or an
    optimizer. Only those in ``allow`` are run.

    Args:
        storage: URL of the shared database.
        study: name of the study, as the other process shows it.
        workers: processes that carry out runs.
        progress: as in `compare`.
        allow: specifications such as ``"file.py:NAME"`` whose code may be run; built-in names need none.

    Returns:
        The settings of the comparison.

    Raises:
        StorageError: the database cannot be opened or has no such study.
        CodeNotAllowedError: the study names code that is not allowed.
        ManifoldNetsError: what the study names cannot be found on this machine.
    """
    if workers < 1:
        raise SettingsError("workers", workers, "at least 1")
    queue = RunQueue(storage, study)
    with contextlib.closing(queue):
        queue.join()
        settings = queue.settings()
        refused = [spec for spec in foreign_code(settings) if spec not in allow]
        if refused:
            raise CodeNotAllowedError(study, refused)
        queue.create(settings, environment())  # refuses other versions
        require_device(settings)
        Subjects.named(settings)
        with (
            shown_progress(progress) as observer,
            contextlib.closing(Processes(workers, settings, {}, None)) as crew,
        ):
            work(Workplace(queue, settings, crew, True, None, observer))
    return settings


def study_name(settings: Settings, output: str | os.PathLike[str] | None = None) -> str:
    """The name of the study of a command in a shared database: the one that the folder began with, or a new one.

    Args:
        settings: of the command.
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
