"""Runs done, time left and the best run so far, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from manifold_nets.comparison import Progress

__all__ = ["shown_progress"]

LINE_SECONDS = 30.0


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """Give an observer of a comparison that shows a bar on a terminal, and elsewhere a line twice a minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    # Names are shown as they are, also where they look like rich's markup.
    texts = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("left", "best"))
    columns = (BarColumn(), MofNCompleteColumn(), *texts)
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("runs", total=None, left="", best="")

        def show(progress: Progress) -> None:
            bar.update(task, total=progress.total, completed=progress.done, left=_left(progress), best=_best(progress))

        yield show


class _Lines:
    def __init__(self) -> None:
        self._last = -LINE_SECONDS

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.last is not None and (now - self._last >= LINE_SECONDS or progress.done == progress.total):
            self._last = now
            click.echo(f"{progress.done} of {progress.total} runs; {_left(progress)}; {_best(progress)}", err=True)


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
