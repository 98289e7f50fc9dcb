"""Optimizers of pymanopt one iteration at a time."""

from __future__ import annotations

import copy
import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from manifold_nets.pymanopt_bridge.manifold import Point
from manifold_nets.pymanopt_bridge.problem import NetworkProblem

__all__ = ["Iteration", "iterations"]


@dataclass(frozen=True)
class Iteration:
    """What an optimizer has reached after one of its iterations.

    Args:
        number: counted from 1.
        cost: the lowest cost that it has computed so far.
        point: where that was.
    """

    number: int
    cost: float
    point: Point


def iterations(
    optimizer: Any, problem: NetworkProblem, *, initial_point: Point | None = None, **options: Any
) -> Iterator[Iteration]:
    """Run an optimizer of pymanopt and stop after every iteration, so that a training loop can do things in between.

    The optimizer keeps all it knows (conjugate directions, radii, step sizes) from one iteration to the next: it runs
    in a thread of its own, which only ever works while the caller waits for the next iteration. Closing or dropping
    the iterator ends it.

    Args:
        optimizer: steepest descent, conjugate gradient or trust regions; ``verbosity=0`` keeps it from printing.
        problem: what to minimize.
        initial_point: where to start; the model's parameters when left out.
        options: further arguments of the optimizer's ``run``.

    Yields:
        An `Iteration` after each iteration, until the optimizer stops by its own criteria.

    Raises:
        Exception: whatever the optimizer or the loss raises.

    Example:
        >>> import pymanopt, torch
        >>> from manifold_nets.pymanopt_bridge import problem
        >>> model, x = torch.nn.Linear(3, 1).double(), torch.randn(20, 3, dtype=torch.float64)
        >>> regression = problem(model, torch.nn.functional.mse_loss, x, x.sum(1, keepdim=True))
        >>> optimizer = pymanopt.optimizers.ConjugateGradient(verbosity=0)
        >>> costs = [iteration.cost for iteration in iterations(optimizer, regression)]
        >>> costs == sorted(costs, reverse=True), costs[-1] < 1e-10
        (True, True)
    """
    run = _Run(optimizer, problem, problem.initial_point() if initial_point is None else initial_point, options)
    try:
        yield from run.results()
    finally:
        run.end()


class _EndedError(Exception):
    """The caller wants no more iterations."""


class _Run:
    """The thread of an optimizer, and the two queues by which it and the caller take turns."""

    def __init__(self, optimizer: Any, problem: NetworkProblem, start: Point, options: dict[str, Any]) -> None:
        self.optimizer, self.problem, self.start, self.options = copy.copy(optimizer), problem, start, options
        self.turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.found: queue.SimpleQueue[Iteration | BaseException | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.best: tuple[float, Point] = (math.inf, start)
        self.searched, self.number = False, 0
        self.threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._work, name="pymanopt", daemon=True)

    def results(self) -> Iterator[Iteration]:
        self.thread.start()
        while True:
            self.turns.put(True)
            found = self.found.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                return
            yield found

    def end(self) -> None:
        self.ended.set()
        self.turns.put(False)
        if self.thread.is_alive():
            self.thread.join()

    def _work(self) -> None:
        network_cost = self.problem._network_cost
        before, check = network_cost.on_cost, self.optimizer._check_stopping_criterion

        def on_cost(point: Point, cost: float) -> None:
            if self.ended.is_set():
                raise _EndedError
            if before is not None:
                before(point, cost)
            self.searched = True
            if cost < self.best[0]:
                self.best = (cost, point)

        def on_check(**facts: Any) -> Any:
            # Conjugate gradient also checks before its first iteration, when no cost but that of the start is known.
            if self.searched:
                self._hand_over()
            return check(**facts)

        try:
            self._wait()
            torch.set_num_threads(self.threads)  # a setting of each thread
            self.best = (self.problem.cost(self.start), self.start)  # remembered, so not counted again
            network_cost.on_cost = on_cost
            self.optimizer._check_stopping_criterion = on_check
            self.optimizer.run(self.problem, initial_point=self.start, **self.options)
            self.found.put(None)
        except _EndedError:
            self.found.put(None)
        except BaseException as error:  # noqa: BLE001  raised again where the caller waits
            self.found.put(error)
        finally:
            network_cost.on_cost = before

    def _hand_over(self) -> None:
        self.number += 1
        self.found.put(Iteration(self.number, *self.best))
        self._wait()

    def _wait(self) -> None:
        if not self.turns.get():
            raise _EndedError
