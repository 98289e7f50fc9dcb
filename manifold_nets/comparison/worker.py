"""The process of a worker, started by `crew.Processes`."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from typing import BinaryIO

from manifold_nets.comparison.crew import Member
from manifold_nets.comparison.records import RunKey
from manifold_nets.comparison.starts import Subjects, unpacked

__all__ = ["main"]


def main() -> None:
    """Carry out the runs that come in on standard input until the process that sends them ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task or a model prints does not get between the answers
    path, settings, own, folder = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    asked: queue.Queue[RunKey] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, asked), daemon=True).start()
    member: Member | None = None
    while True:
        key = asked.get()
        answer: object
        try:
            member = member or Member(settings, Subjects.named(settings, unpacked(own)), folder)
            answer = member.carry_out(key)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (it is raised where the run was asked for)
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _receive(source: BinaryIO, asked: queue.Queue[RunKey]) -> None:
    try:
        while True:
            asked.put(pickle.load(source))
    except (EOFError, OSError, pickle.UnpicklingError):
        # Whoever asked is gone, perhaps in the middle of a run: nobody wants its result.
        os._exit(1)
