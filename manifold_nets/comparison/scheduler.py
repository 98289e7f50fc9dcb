"""Run a comparison: claim runs, carry them out, select, read the test data, and show the progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifold_nets.comparison.errors import StorageError
from manifold_nets.comparison.pool import Executor
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.run import Runner
from manifold_nets.comparison.selection import choose_all, prune_weights
from manifold_nets.comparison.settings import RunKey, Settings

if TYPE_CHECKING:
    from manifold_nets.comparison.store import RunStore

HEARTBEAT_SECONDS = 30.0
IDLE_SECONDS = 2.0
LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Progress:
    """The progress of a comparison.

    Args:
        done: runs with a result.
        total: all runs.
        running: runs in progress in this process.
        seconds_left: estimate from the runs that ended since this process started, without the start-up time of its
            workers; None before the first.
        best: the run with the smallest final validation error that this process knows of.
        last: the latest result; None at the start.

    Example:
        >>> Progress(done=3, total=12, running=(), seconds_left=90.0, best=None, last=None).done
        3
    """

    done: int
    total: int
    running: tuple[RunKey, ...]
    seconds_left: float | None
    best: RunResult | None
    last: RunResult | None


Observer = Callable[[Progress], None]


@dataclass
class Scheduler:
    """Claims the runs of a study and has them carried out until every run has a result.

    Args:
        store: the study.
        settings: settings of the comparison.
        executor: carries out the runs.
        shared: whether other processes may work on the same study.
        folder: where final weights are; None if none are kept.
        observer: called when a run has started or ended.
    """

    store: RunStore
    settings: Settings
    executor: Executor
    shared: bool
    folder: Path | None
    observer: Observer | None = None

    def __post_init__(self) -> None:
        self.keys = tuple(self.settings.run_keys())
        self.results: dict[RunKey, RunResult] = {}
        self._start_time, self._before, self._ready = time.monotonic(), 0, False

    def run(self) -> None:
        """Carry out runs until every run has a result.

        Raises:
            RunFailedError: a run failed for a reason other than divergence.
        """
        self._refresh()
        self._start_time, self._before = time.monotonic(), len(self.results)
        self.report(None)
        try:
            self._loop()
        except BaseException:
            # Also when interrupted: runs in flight are released at once, not after their heartbeats have stopped.
            with suppress(StorageError):  # the database may be what failed
                self.store.mark_failed(self.executor.running())
            raise

    def report(self, last: RunResult | None) -> None:
        """Report the progress to the observer."""
        if self.observer is None:
            return
        if last is not None and not self._ready:
            # Time that was not part of the first run was the start-up of its worker, which happens only once.
            self._start_time = max(self._start_time, time.monotonic() - _seconds(last))
            self._ready = True
        ended, left = len(self.results) - self._before, len(self.keys) - len(self.results)
        seconds = (time.monotonic() - self._start_time) / ended * left if ended else None
        finished = [run for run in self.results.values() if run.validation_error is not None]
        best = min(finished, key=lambda run: (run.validation_error or 0.0, run.validation_loss or 0.0), default=None)
        running = tuple(self.executor.running().values())
        self.observer(Progress(len(self.results), len(self.keys), running, seconds, best, last))

    def _loop(self) -> None:
        beaten, ended = time.monotonic(), list[tuple[int, RunResult]]()
        while True:
            # An idle executor gets the next run before the last result is stored, so it does not wait for the disk.
            self._start_runs()
            for run_id, result in ended:
                self._record(run_id, result)
            if not self.executor.running():
                if not self.shared or self._others_are_done():
                    return
                time.sleep(IDLE_SECONDS)
            ended = self.executor.wait(HEARTBEAT_SECONDS / 2)
            if self.shared and time.monotonic() - beaten > HEARTBEAT_SECONDS:
                self.store.heartbeat(self.executor.running())
                self.store.mark_stale_failed()
                self._refresh()  # with the results of others
                self.report(None)
                beaten = time.monotonic()

    def _refresh(self) -> None:
        """Read the results of the study, which may also have runs of earlier or later settings."""
        stored = self.store.results()
        self.results.update((key, stored[key]) for key in self.keys if key in stored)

    def _start_runs(self) -> None:
        known = frozenset(self.keys)
        while self.executor.idle() > 0:
            claimed = self.store.claim(alone=not self.shared, among=known)
            if claimed is None:
                return
            self.executor.start(*claimed)
            if self.shared:
                self.store.heartbeat([claimed[0]])
            self.report(None)

    def _record(self, run_id: int, result: RunResult) -> None:
        self.store.finish(run_id, result)
        self.results[result.key] = result
        if self.folder is not None:
            prune_weights(self.folder, self.settings, self.results, result.key)
        self.report(result)

    def _others_are_done(self) -> bool:
        self.store.mark_stale_failed()
        if self.store.count_done(self.keys) >= len(self.keys):
            return True
        self.store.add_missing(self.keys)
        return False


def _seconds(run: RunResult) -> float:
    trained = run.epochs[-1].seconds if run.epochs else 0.0
    return trained + run.validation_seconds + run.harness_seconds


def conclude(store: RunStore, settings: Settings, runner: Callable[[], Runner]) -> Comparison:
    """Choose learning rates, read the test data once for each chosen run, and build the comparison.

    Args:
        store: a study in which every run has a result.
        settings: settings of the comparison.
        runner: makes the runner that reads the test data, if they were not read before.
    """
    results = store.results()
    choices = choose_all(settings, results)
    runs = [results[key] for key in settings.run_keys()]
    chosen = [run.key for run in runs if not run.diverged and any(choice.chose(run.key) for choice in choices)]
    tests = store.tests(chosen)
    for key in (key for key in chosen if key not in tests):
        tests[key] = runner().test(key)
        store.record_test(key, *tests[key])
    tested = tuple(run.with_test(*tests[run.key]) if run.key in tests else run for run in runs)
    return Comparison(settings, tested, choices, store.environment())


# ---- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def shown_progress(progress: Observer | bool | None) -> Iterator[Observer | None]:
    """Give the progress observer of a comparison, which writes to standard error.

    Args:
        progress: the observer itself; True for a bar on a terminal and a line twice a minute elsewhere; None for the
            bar only; False for nothing.
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
        yield _line_writer() if progress else None
        return
    # Names are shown as they are, also where they look like rich's markup.
    texts = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("left", "best"))
    with Bar(BarColumn(), MofNCompleteColumn(), *texts, console=console, transient=True) as bar:
        task = bar.add_task("runs", total=None, left="", best="")

        def show(now: Progress) -> None:
            bar.update(task, total=now.total, completed=now.done, left=_left_text(now), best=_best_text(now))

        yield show


def _line_writer() -> Observer:
    written = -LINE_SECONDS

    def write(progress: Progress) -> None:
        nonlocal written
        now = time.monotonic()
        if progress.last is not None and (now - written >= LINE_SECONDS or progress.done == progress.total):
            written = now
            left, best = _left_text(progress), _best_text(progress)
            sys.stderr.write(f"{progress.done} of {progress.total} runs; {left}; {best}\n")
            sys.stderr.flush()

    return write


def _left_text(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "time left unknown"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def _best_text(progress: Progress) -> str:
    if progress.best is None or progress.best.validation_error is None:
        return "no finished run yet"
    return f"best validation error {100 * progress.best.validation_error:.2f} % ({progress.best.key})"
