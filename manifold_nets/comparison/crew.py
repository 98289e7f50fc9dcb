"""Who carries out runs: this process, or several that end with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from manifold_nets.comparison.errors import RunFailedError
from manifold_nets.comparison.records import RunKey, RunResult, Settings
from manifold_nets.comparison.starts import Starts, Subjects
from manifold_nets.comparison.training import Runner
from manifold_nets.comparison.weights import keep_weights

__all__ = ["Crew", "Done", "Member", "Processes", "ThisProcess"]

ATTEMPTS = 3
# Ctrl-C reaches all processes of a terminal. Workers leave it to the one that started them, which ends them, and do so
# before they import anything, which takes seconds.
_WORKER = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from manifold_nets.comparison.worker import main; main()"
)


@dataclass(frozen=True)
class Done:
    """A run that has ended.

    Args:
        ticket: under which it was claimed.
        key: which run.
        result: its result.
    """

    ticket: int
    key: RunKey
    result: RunResult


class Crew(Protocol):
    """Carries out runs, some at the same time."""

    def idle(self) -> int:
        """How many more runs could be started now."""
        ...

    def running(self) -> dict[int, RunKey]:
        """The runs that were started and have not ended, by ticket."""
        ...

    def start(self, ticket: int, key: RunKey) -> None:
        """Start a run."""
        ...

    def wait(self, seconds: float) -> list[Done]:
        """Wait until a run ends, at most so long; return those that have ended.

        Raises:
            RunFailedError: a run has no result.
        """
        ...

    def close(self) -> None:
        """End everything."""
        ...


class Member:
    """One that carries out runs, in whichever process.

    Args:
        settings: of the comparison.
        subjects: what they name; looked up when left out.
        folder: where final weights are written; nowhere when left out.
        starts: of these settings and subjects, where they are at hand.
    """

    def __init__(
        self, settings: Settings, subjects: Subjects | None, folder: Path | None, starts: Starts | None = None
    ) -> None:
        if starts is None or starts.settings != settings:
            starts = Starts(Subjects.named(settings) if subjects is None else subjects, settings)
        self.starts = starts
        self.runner = Runner(self.starts, settings)
        self.runner.prepare()
        self._folder = folder

    def carry_out(self, key: RunKey) -> RunResult:
        """Carry out a run and write its final weights."""
        result, weights = self.runner.run(key)
        if self._folder is not None and not result.diverged:
            keep_weights(self._folder, key, weights)
        return result


class ThisProcess:
    """A crew of one in this process: a run is carried out while it is waited for.

    Args:
        member: who does it.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._started: deque[tuple[int, RunKey]] = deque()

    def idle(self) -> int:
        """One, unless a run was started."""
        return 1 - len(self._started)

    def running(self) -> dict[int, RunKey]:
        """The run that was started."""
        return dict(self._started)

    def start(self, ticket: int, key: RunKey) -> None:
        """Remember what to do."""
        self._started.append((ticket, key))

    def wait(self, seconds: float) -> list[Done]:
        """Do it, however long it takes."""
        if not self._started:
            return []
        ticket, key = self._started[0]
        try:
            result = self._member.carry_out(key)
        except (Exception, SystemExit) as error:
            raise RunFailedError(key, [f"{type(error).__name__}: {error}"]) from error
        self._started.clear()
        return [Done(ticket, key, result)]

    def close(self) -> None:
        """Nothing is left over."""
        self._started.clear()


class Processes:
    """A crew of processes of their own, each with torch's threads as the settings say, which end with this one.

    Args:
        count: how many.
        settings: of the comparison.
        own: the task, the model and the optimizers that cannot be looked up by name, `packed`.
        folder: where final weights are written; nowhere when left out.
    """

    def __init__(self, count: int, settings: Settings, own: Mapping[str, bytes], folder: Path | None) -> None:
        self._order = pickle.dumps((list(sys.path), settings, dict(own), folder))
        self._threads = settings.threads
        self._busy: dict[_Process, tuple[int, RunKey]] = {}
        self._answers: queue.Queue[tuple[_Process, Any]] = queue.Queue()
        self._lost: dict[RunKey, int] = {}
        self._processes: list[_Process] = []
        try:
            for _ in range(count):
                self._add_process()
        except BaseException:
            self.close()
            raise

    def idle(self) -> int:
        """Processes without a run."""
        return len(self._processes) - len(self._busy)

    def running(self) -> dict[int, RunKey]:
        """The runs of the others."""
        return dict(self._busy.values())

    def start(self, ticket: int, key: RunKey) -> None:
        """Send a run to a process that has none."""
        process = next(process for process in self._processes if process not in self._busy)
        self._busy[process] = (ticket, key)
        process.send(key)

    def wait(self, seconds: float) -> list[Done]:
        """Wait for answers; a run whose process ended is carried out again by a new one."""
        if not self._busy:
            return []
        try:
            arrived = [self._answers.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._answers.empty():
            arrived.append(self._answers.get())
        return [done for process, answer in arrived for done in self._ended(process, answer)]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.end()
        self._processes.clear()
        self._busy.clear()

    def _add_process(self) -> _Process:
        process = _Process(self._order, self._threads, self._answers)
        self._processes.append(process)
        return process

    def _ended(self, process: _Process, answer: Any) -> list[Done]:
        ticket, key = self._busy.pop(process, (-1, None))
        if answer is not None and key is not None:
            if isinstance(answer, str):
                raise RunFailedError(key, [answer])
            return [Done(ticket, key, answer)]
        self._processes.remove(process)
        code = process.end()
        if key is None:
            self._add_process()
            return []
        self._lost[key] = self._lost.get(key, 0) + 1
        if self._lost[key] >= ATTEMPTS:
            raise RunFailedError(key, [f"a process that ended with status {code}, {ATTEMPTS} times"])
        fresh = self._add_process()
        self._busy[fresh] = (ticket, key)
        fresh.send(key)
        return []


class _Process:
    """A worker: runs go to its standard input, results come from its standard output."""

    def __init__(self, order: bytes, threads: int, answers: queue.Queue[tuple[_Process, Any]]) -> None:
        command = [sys.executable, "-c", _WORKER]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
        self._listener = threading.Thread(target=self._listen, args=(answers,), daemon=True)
        self._listener.start()
        self._write(order)

    def send(self, key: RunKey) -> None:
        self._write(pickle.dumps(key))

    def end(self) -> int:
        self._popen.kill()
        code = self._popen.wait()
        self._listener.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                # What could not be written any more is lost with the process.
                with contextlib.suppress(OSError):
                    pipe.close()
        return code

    def _write(self, message: bytes) -> None:
        pipe = self._popen.stdin
        if pipe is None:
            return
        try:
            pipe.write(message)
            pipe.flush()
        except OSError:
            # It has ended; whoever listens notices and does what is to be done.
            return

    def _listen(self, answers: queue.Queue[tuple[_Process, Any]]) -> None:
        pipe = self._popen.stdout
        try:
            while pipe is not None:
                answers.put((self, pickle.load(pipe)))
        except (EOFError, OSError, pickle.UnpicklingError):
            answers.put((self, None))
