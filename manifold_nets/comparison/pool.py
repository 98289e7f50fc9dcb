"""Run executors: in this process, or a pool of worker processes that end with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from manifold_nets.comparison.errors import RunFailedError
from manifold_nets.comparison.experiment import Experiment, unpacked
from manifold_nets.comparison.final_weights import keep_weights
from manifold_nets.comparison.initial_models import InitialModels
from manifold_nets.comparison.results import RunResult
from manifold_nets.comparison.run import Runner
from manifold_nets.comparison.settings import RunKey, Settings

__all__ = ["CompletedRun", "Executor", "InProcessExecutor", "ProcessPool", "Worker", "worker_main"]

ATTEMPTS = 3
# Ctrl-C reaches all processes of a terminal. Workers leave it to the process that started them, which ends them, and do
# so before they import anything, which takes seconds.
_WORKER = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from manifold_nets.comparison.pool import worker_main; worker_main()"
)


@dataclass(frozen=True)
class CompletedRun:
    """A run that has ended.

    Args:
        run_id: under which it was claimed.
        key: which run.
        result: its result.
    """

    run_id: int
    key: RunKey
    result: RunResult


class Executor(Protocol):
    """Carries out runs, some at the same time."""

    def idle(self) -> int:
        """How many more runs could be started now."""
        ...

    def running(self) -> dict[int, RunKey]:
        """The runs that were started and have not ended, by id."""
        ...

    def start(self, run_id: int, key: RunKey) -> None:
        """Start a run."""
        ...

    def wait(self, seconds: float) -> list[CompletedRun]:
        """Wait until a run ends, at most this long; return those that have ended.

        Raises:
            RunFailedError: a run has no result.
        """
        ...

    def close(self) -> None:
        """End everything."""
        ...


class Worker:
    """Carries out runs and keeps their final weights, in whichever process.

    Args:
        settings: of the comparison.
        experiment: what they name; looked up when left out.
        folder: where final weights are written; nowhere when left out.
        initial_models: of these settings and this experiment, if they are already made.
    """

    def __init__(
        self,
        settings: Settings,
        experiment: Experiment | None,
        folder: Path | None,
        initial_models: InitialModels | None = None,
    ) -> None:
        if initial_models is None or initial_models.settings != settings:
            initial_models = InitialModels(experiment or Experiment.from_settings(settings), settings)
        self.initial_models = initial_models
        self.runner = Runner(initial_models, settings)
        self.runner.prepare()
        self._folder = folder

    def run(self, key: RunKey) -> RunResult:
        """Carry out a run and write its final weights."""
        result, weights = self.runner.run(key)
        if self._folder is not None and not result.diverged:
            keep_weights(self._folder, key, weights)
        return result


class InProcessExecutor:
    """Carries out one run at a time, in this process, while it is waited for.

    Args:
        worker: that carries it out.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started: dict[int, RunKey] = {}

    def idle(self) -> int:
        """One, unless a run was started."""
        return 1 - len(self._started)

    def running(self) -> dict[int, RunKey]:
        """The run that was started."""
        return dict(self._started)

    def start(self, run_id: int, key: RunKey) -> None:
        """Remember what to carry out."""
        self._started[run_id] = key

    def wait(self, seconds: float) -> list[CompletedRun]:
        """Carry it out, however long it takes."""
        done = []
        for run_id, key in self._started.items():
            try:
                done.append(CompletedRun(run_id, key, self._worker.run(key)))
            except (Exception, SystemExit) as error:
                raise RunFailedError(key, [f"{type(error).__name__}: {error}"]) from error
        self._started.clear()
        return done

    def close(self) -> None:
        """Forget the run that was started."""
        self._started.clear()


class ProcessPool:
    """Worker processes with their own torch threads, as many as the settings say, which end with this process.

    Args:
        count: number of processes.
        settings: of the comparison.
        own: the task, the model and the optimizers that cannot be looked up by name, `packed`.
        folder: where final weights are written; nowhere when left out.
    """

    def __init__(self, count: int, settings: Settings, own: Mapping[str, bytes], folder: Path | None) -> None:
        self._start_message = pickle.dumps((list(sys.path), settings, dict(own), folder))
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

    def start(self, run_id: int, key: RunKey) -> None:
        """Send a run to a process that has none."""
        self._send(next(process for process in self._processes if process not in self._busy), run_id, key)

    def wait(self, seconds: float) -> list[CompletedRun]:
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
        process = _Process(self._start_message, self._threads, self._answers)
        self._processes.append(process)
        return process

    def _send(self, process: _Process, run_id: int, key: RunKey) -> None:
        self._busy[process] = (run_id, key)
        process.write(pickle.dumps(key))

    def _ended(self, process: _Process, answer: Any) -> list[CompletedRun]:
        run_id, key = self._busy.pop(process, (-1, None))
        if answer is not None and key is not None:
            if isinstance(answer, str):
                raise RunFailedError(key, [answer])
            return [CompletedRun(run_id, key, answer)]
        self._processes.remove(process)
        status, fresh = process.end(), self._add_process()
        if key is not None:
            self._lost[key] = self._lost.get(key, 0) + 1
            if self._lost[key] >= ATTEMPTS:
                raise RunFailedError(key, [f"a process that ended with status {status}, {ATTEMPTS} times"])
            self._send(fresh, run_id, key)
        return []


class _Process:
    """A worker process: runs go to its standard input, results come from its standard output."""

    def __init__(self, start_message: bytes, threads: int, answers: queue.Queue[tuple[_Process, Any]]) -> None:
        command = [sys.executable, "-c", _WORKER]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
        self._listener = threading.Thread(target=self._listen, args=(answers,), daemon=True)
        self._listener.start()
        self.write(start_message)

    def write(self, message: bytes) -> None:
        pipe = self._popen.stdin
        # Where the process has ended, the listener notices it.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.write(message)
                pipe.flush()

    def end(self) -> int:
        self._popen.kill()
        status = self._popen.wait()
        self._listener.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            # What was not written yet is lost with the process.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return status

    def _listen(self, answers: queue.Queue[tuple[_Process, Any]]) -> None:
        pipe = self._popen.stdout
        try:
            while pipe is not None:
                answers.put((self, pickle.load(pipe)))
        except (EOFError, OSError, pickle.UnpicklingError):
            answers.put((self, None))


def worker_main() -> None:
    """Carry out the runs that come in on standard input until the process that sends them ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task or a model prints does not get between the answers
    path, settings, own, folder = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    received: queue.Queue[RunKey] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, received), daemon=True).start()
    worker: Worker | None = None
    while True:
        key = received.get()
        answer: object
        try:
            worker = worker or Worker(settings, Experiment.from_settings(settings, unpacked(own)), folder)
            answer = worker.run(key)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (it is raised where the run was sent from)
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _receive(source: BinaryIO, received: queue.Queue[RunKey]) -> None:
    try:
        while True:
            received.put(pickle.load(source))
    except (EOFError, OSError, pickle.UnpicklingError):
        # The sender is gone, perhaps in the middle of a run: nobody wants its result.
        os._exit(1)
