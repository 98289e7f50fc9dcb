"""Carrying out a comparison: claim runs, have them done, choose, read the test data, put it all together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manifold_nets.comparison.choosing import choose_all
from manifold_nets.comparison.crew import Crew, Done, Member
from manifold_nets.comparison.errors import RunFailedError
from manifold_nets.comparison.queue import RunQueue
from manifold_nets.comparison.records import Choice, RunKey, RunResult, Settings
from manifold_nets.comparison.result import Comparison
from manifold_nets.comparison.weights import kept_weights, prune_weights

__all__ = ["Progress", "Workplace", "conclude", "work"]

BEAT_SECONDS = 30.0
IDLE_SECONDS = 2.0


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Args:
        done: runs with a result.
        total: all runs.
        running: runs of this process at the moment.
        seconds_left: estimate from the runs that ended since this process started, without the time in which its
            workers got ready; None before the first.
        best: the run of the smallest final validation error that this process knows of.
        last: the result that came last; None at the start.
    """

    done: int
    total: int
    running: tuple[RunKey, ...]
    seconds_left: float | None
    best: RunResult | None
    last: RunResult | None


Observer = Callable[[Progress], None]


@dataclass
class Workplace:
    """Where runs are claimed and carried out.

    Args:
        queue: the study.
        settings: of the comparison.
        crew: who carries out runs.
        shared: whether other processes may work on the same study.
        folder: where final weights are; None where none are kept.
        observer: called when a run has started or ended.
    """

    queue: RunQueue
    settings: Settings
    crew: Crew
    shared: bool
    folder: Path | None
    observer: Observer | None = None
    results: dict[RunKey, RunResult] = field(default_factory=dict)


def work(place: Workplace) -> None:
    """Carry out runs until every run has a result.

    Raises:
        RunFailedError: a run has no result, for a reason other than divergence.
    """
    keys = tuple(place.settings.run_keys())
    known = frozenset(keys)
    _refresh(place, keys)
    clock = _Clock(place, len(keys))
    clock.tell(None)
    beaten, ended = time.monotonic(), list[Done]()
    try:
        while True:
            # Whoever has ended a run gets the next one before the result is stored: nobody waits for the disk.
            _start(place, clock, known)
            for done in ended:
                _store(place, done)
                clock.tell(done.result)
            if not place.crew.running():
                if not place.shared or _others_are_done(place, keys):
                    return
                time.sleep(IDLE_SECONDS)
            ended = place.crew.wait(BEAT_SECONDS / 2)
            if place.shared and time.monotonic() - beaten > BEAT_SECONDS:
                place.queue.beat(place.crew.running())
                place.queue.give_up_stale()
                _refresh(place, keys)  # those of others too
                clock.tell(None)
                beaten = time.monotonic()
    except BaseException:
        # Also when interrupted: what is in flight is free at once, not after the beats have stopped.
        for ticket in place.crew.running():
            place.queue.give_up(ticket)
        raise


def _refresh(place: Workplace, keys: tuple[RunKey, ...]) -> None:
    """Read the results of the study, which may also have runs of earlier or later settings."""
    stored = place.queue.results()
    place.results.update((key, stored[key]) for key in keys if key in stored)


def _start(place: Workplace, clock: _Clock, known: frozenset[RunKey]) -> None:
    while place.crew.idle() > 0:
        claimed = place.queue.claim(alone=not place.shared, among=known)
        if claimed is None:
            return
        place.crew.start(*claimed)
        place.queue.beat([claimed[0]] if place.shared else [])
        clock.tell(None)


def _store(place: Workplace, done: Done) -> None:
    place.queue.finish(done.ticket, done.result)
    place.results[done.key] = done.result
    if place.folder is not None:
        prune_weights(place.folder, place.settings, place.results, done.key)


def _others_are_done(place: Workplace, keys: tuple[RunKey, ...]) -> bool:
    place.queue.give_up_stale()
    if place.queue.done(keys) >= len(keys):
        return True
    place.queue.fill(keys)
    return False


class _Clock:
    """Tells the observer how far the comparison is."""

    def __init__(self, place: Workplace, total: int) -> None:
        self._place, self._total = place, total
        self._start, self._before = time.monotonic(), len(place.results)
        self._ready = False

    def tell(self, last: RunResult | None) -> None:
        if self._place.observer is None:
            return
        if last is not None and not self._ready:
            # What was no part of the first run was the start of its worker, which will not come again.
            self._start = max(self._start, time.monotonic() - _seconds(last))
            self._ready = True
        results = self._place.results
        ended, left = len(results) - self._before, self._total - len(results)
        seconds = (time.monotonic() - self._start) / ended * left if ended else None
        finished = [run for run in results.values() if run.validation_error is not None]
        best = min(finished, key=lambda run: (run.validation_error or 0.0, run.validation_loss or 0.0), default=None)
        running = tuple(self._place.crew.running().values())
        self._place.observer(Progress(len(results), self._total, running, seconds, best, last))


def _seconds(run: RunResult) -> float:
    trained = run.epochs[-1].seconds if run.epochs else 0.0
    return trained + run.validation_seconds + run.harness_seconds


def conclude(queue: RunQueue, settings: Settings, folder: Path, member: Callable[[], Member]) -> Comparison:
    """Choose learning rates, read the test data once for each chosen run, and put the comparison together.

    Args:
        queue: a study in which every run has a result.
        settings: of the comparison.
        folder: where final weights are; a chosen run whose weights are not there is carried out again.
        member: who does that, asked for only where it is needed.
    """
    results = queue.results()
    choices = choose_all(settings, results)
    chosen = [key for key in settings.run_keys() if _is_chosen(key, choices) and not results[key].diverged]
    tests = queue.tests(chosen)
    missing = [key for key in chosen if key not in tests]
    if missing:
        tester = member()
        for key in missing:
            error, loss = _test(tester, key, folder)
            queue.record_test(key, error, loss)
            tests[key] = (error, loss)
    tested = tuple(results[k].with_test(*tests[k]) if k in tests else results[k] for k in settings.run_keys())
    return Comparison(settings, tested, choices, queue.environment())


def _is_chosen(key: RunKey, choices: tuple[Choice, ...]) -> bool:
    trial = (key.learning_rate, key.weight_decay)
    return any((c.optimizer, c.initial_scale, c.trial) == (key.optimizer, key.initial_scale, trial) for c in choices)


def _test(member: Member, key: RunKey, folder: Path) -> tuple[float, float]:
    weights = kept_weights(folder, key)
    if weights is None:
        member.carry_out(key)
        weights = kept_weights(folder, key)
    if weights is None:
        raise RunFailedError(key, ["weights that cannot be read back"])
    scores = member.runner.scores(key, weights)
    return scores["error"], scores["loss"]
