"""Runs done, time left and the best run so far, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from manifold_nets.comparison.engine import Observer, Progress

__all__ = ["shown_progress"]

LINE_SECONDS = 30.0


@contextmanager
def shown_progress(progress: Observer | bool | None) -> Iterator[Observer | None]:
    """Give the observer of a comparison.

    Args:
        progress: the observer itself; True for a bar on a terminal, and elsewhere a line twice a minute; None for the
            bar alone; False for nothing.
    """
    if progress is False or callable(progress):
        yield progress or None
        return
    # Imported where it is used: the package itself needs no terminal.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines() if progress else None
        return
    # Names are shown as they are, also where they look like rich's markup.
    texts = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("left", "best"))
    columns = (BarColumn(), MofNCompleteColumn(), *texts)
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("runs", total=None, left="", best="")

        def show(told: Progress) -> None:
            bar.update(task, total=told.total, completed=told.done, left=_left(told), best=_best(told))

        yield show


class _Lines:
    def __init__(self) -> None:
        self._last = -LINE_SECONDS

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.last is not None and (now - self._last >= LINE_SECONDS or progress.done == progress.total):
            self._last = now
            sys.stderr.write(f"{progress.done} of {progress.total} runs; {_left(progress)}; {_best(progress)}\n")
            sys.stderr.flush()


def _left(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "time left unknown"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def _best(progress: Progress) -> str:
    if progress.best is None or progress.best.validation_error is None:
        return "no finished run yet"
    return f"best validation error {100 * progress.best.validation_error:.2f} % ({progress.best.key})"
