"""Run executors: in this process, or in a pool of worker processes that end with it."""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, cast

from manifold_nets.comparison.errors import RunFailedError, SettingsError
from manifold_nets.comparison.experiment import Experiment, InitialModels
from manifold_nets.comparison.results import RunResult
from manifold_nets.comparison.run import Runner
from manifold_nets.comparison.settings import RunKey, Settings
from manifold_nets.errors import MissingExtraError

ATTEMPTS = 3
# Ctrl-C reaches all processes of a terminal. Workers leave it to the process that started them, which ends them, and do
# so before they import anything, which takes seconds.
_WORKER = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from manifold_nets.comparison.pool import worker_main; worker_main()"
)


class InProcessExecutor:
    """Carries out one run at a time, in this process, during `wait`.

    Args:
        runner: carries out the runs.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._started: dict[int, RunKey] = {}

    def idle(self) -> int:
        """How many more runs could be started now."""
        return 1 - len(self._started)

    def running(self) -> dict[int, RunKey]:
        """The runs that were started and have not ended, by id."""
        return dict(self._started)

    def start(self, run_id: int, key: RunKey) -> None:
        """Remember what to carry out."""
        self._started[run_id] = key

    def wait(self, seconds: float) -> list[tuple[int, RunResult]]:
        """Carry out the run; return ids and results of the runs that have ended.

        Raises:
            RunFailedError: the run has no result.
        """
        done = []
        for run_id, key in self._started.items():
            try:
                done.append((run_id, self._runner.run(key)))
            except (Exception, SystemExit) as error:
                raise RunFailedError(f"run {key}", f"{type(error).__name__}: {error}") from error
        self._started.clear()
        return done

    def close(self) -> None:
        """Forget the run that was started."""
        self._started.clear()


class ProcessPool:
    """Worker processes, each with the number of torch threads in the settings, which end with this process.

    Args:
        count: number of processes.
        settings: settings of the comparison.
        own: the task, the model and the optimizers that cannot be looked up by name, `packed`.
        folder: where final weights are written; None to keep none.
    """

    def __init__(self, count: int, settings: Settings, own: Mapping[str, bytes], folder: Path | None) -> None:
        start_message = pickle.dumps((list(sys.path), settings, dict(own), folder))
        self._processes = [_Process(start_message, settings.threads) for _ in range(count)]
        self._idle = list(self._processes)
        # A thread for each process waits for its answer.
        self._threads = ThreadPoolExecutor(count)
        self._busy: dict[Future[RunResult], tuple[_Process, int, RunKey]] = {}

    def idle(self) -> int:
        """Processes without a run."""
        return len(self._idle)

    def running(self) -> dict[int, RunKey]:
        """The runs of the others."""
        return {run_id: key for _, run_id, key in self._busy.values()}

    def start(self, run_id: int, key: RunKey) -> None:
        """Send a run to a process that has none."""
        process = self._idle.pop()
        self._busy[self._threads.submit(process.run, key)] = process, run_id, key

    def wait(self, seconds: float) -> list[tuple[int, RunResult]]:
        """Wait for answers."""
        done = []
        for future in wait(self._busy, seconds, FIRST_COMPLETED).done:
            result = future.result()
            process, run_id, _ = self._busy.pop(future)
            self._idle.append(process)
            done.append((run_id, result))
        return done

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.end()
        self._busy.clear()


Executor = InProcessExecutor | ProcessPool


class _Process:
    """A worker process: it reads runs from standard input and writes results to standard output."""

    def __init__(self, start_message: bytes, threads: int) -> None:
        self._start_message, self._variables = start_message, {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._lock, self._closed = threading.Lock(), False
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-c", _WORKER]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._variables)
        self._unsent = self._start_message

    def run(self, key: RunKey) -> RunResult:
        """Carry out a run in the worker; if that dies, repeat it in a new one.

        Raises:
            RunFailedError: the run has no result.
        """
        status = 0
        for _ in range(ATTEMPTS):
            try:
                requests, answers = cast(BinaryIO, self._popen.stdin), cast(BinaryIO, self._popen.stdout)
                requests.write(self._unsent + pickle.dumps(key))
                requests.flush()
                self._unsent = b""
                answer: RunResult | str = pickle.load(answers)
            except (EOFError, OSError, pickle.UnpicklingError):
                status = self.end()
                with self._lock:
                    if self._closed:
                        break
                    self._start()
                continue
            if isinstance(answer, str):
                raise RunFailedError(f"run {key}", answer)
            return answer
        raise RunFailedError(f"run {key}", f"a process that ended with status {status}, {ATTEMPTS} times")

    def kill(self) -> None:
        """Kill the process and do not replace it."""
        with self._lock:
            self._closed = True
            self._popen.kill()

    def end(self) -> int:
        """End the process; return its status."""
        self._popen.kill()
        self._popen.communicate()  # what was not written yet is lost with it
        return self._popen.returncode


def worker_main() -> None:
    """Carry out the runs that arrive on standard input until the sending process ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task or a model prints does not get between the answers
    path, settings, own, folder = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    received: queue.Queue[RunKey] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, received), daemon=True).start()
    runner: Runner | None = None
    while True:
        key = received.get()
        answer: object
        try:
            if runner is None:
                experiment = Experiment.from_settings(settings, unpacked(own))
                runner = Runner(InitialModels(experiment, settings), settings, folder)
            answer = runner.run(key)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (it is raised where the run was sent from)
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _receive(source: BinaryIO, received: queue.Queue[RunKey]) -> None:
    try:
        while True:
            received.put(pickle.load(source))
    except (EOFError, OSError, pickle.UnpicklingError):
        # The sender is gone, perhaps in the middle of a run; its result is not needed.
        os._exit(1)


def packed(workers: int, own: Mapping[str, Any]) -> dict[str, bytes]:
    """Pickle the objects that other processes cannot look up, one at a time, so that an error can name one.

    Functions and classes of the running script, which no other process can import, are pickled by value.

    Args:
        workers: number of processes, for the error.
        own: see `Experiment.from_settings`.

    Raises:
        SettingsError: an object cannot be pickled; the message names it.
        MissingExtraError: cloudpickle is not installed.
    """
    try:
        cloudpickle = importlib.import_module("cloudpickle") if own else pickle
    except ModuleNotFoundError as error:
        raise MissingExtraError("cloudpickle", "several workers", "compare") from error
    pieces = {}
    for name, piece in own.items():
        try:
            pieces[name] = cloudpickle.dumps(piece)
        except Exception as error:
            why = f"cannot be pickled ({type(error).__name__}: {error})"
            remedy = "1, or a file.py:NAME in its place, which each worker imports itself"
            raise SettingsError("workers", f"{workers}, with {name}, which {why}", remedy) from error
    return pieces


def unpacked(own: Mapping[str, bytes]) -> dict[str, Any]:
    """The inverse of `packed`, in a worker.

    Raises:
        RuntimeError: an object cannot be unpickled here; the message names it.
    """
    found = {}
    for name, piece in own.items():
        try:
            found[name] = pickle.loads(piece)
        except Exception as error:
            raise RuntimeError(
                f"{name} cannot be unpickled in a worker ({type(error).__name__}: {error}). Use one worker, or pass it "
                "as file.py:NAME."
            ) from error
    return found
