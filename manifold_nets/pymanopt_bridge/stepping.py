"""Optimizers of pymanopt one iteration at a time."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from manifold_nets.pymanopt_bridge.manifold import Point
from manifold_nets.pymanopt_bridge.problem import NetworkProblem

__all__ = ["Iteration", "iterations"]


@dataclass(frozen=True)
class Iteration:
    """The result of an optimizer after one of its iterations.

    Args:
        number: counted from 1.
        cost: the lowest cost so far.
        point: the point with that cost.

    Example:
        >>> import pymanopt, torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> inputs, targets = torch.randn(8, 2).double(), torch.randn(8, 1).double()
        >>> problem = bridge.problem(torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss, inputs, targets)
        >>> optimizer = pymanopt.optimizers.SteepestDescent(verbosity=0, max_iterations=2)
        >>> [iteration.number for iteration in bridge.iterations(optimizer, problem)]
        [1, 2]
    """

    number: int
    cost: float
    point: Point


def iterations(
    optimizer: Any, problem: NetworkProblem, *, initial_point: Point | None = None, **options: Any
) -> Iterator[Iteration]:
    """Run an optimizer of pymanopt one iteration at a time, so that a training loop can act in between.

    The optimizer keeps its state (conjugate directions, radii, step sizes) between iterations: it runs in a thread of
    its own, which works only while the caller waits for the next iteration. Closing or deleting the iterator ends it.

    Args:
        optimizer: steepest descent, conjugate gradient or trust regions; ``verbosity=0`` keeps it from printing.
        problem: the problem to minimize.
        initial_point: starting point (default: the model's parameters).
        options: further arguments of the optimizer's ``run``.

    Yields:
        An `Iteration` after each iteration, until the optimizer stops by its own criteria.

    Raises:
        Exception: any error of the optimizer or the loss.

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
    start = problem.initial_point() if initial_point is None else initial_point
    turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[Iteration | BaseException | None] = queue.SimpleQueue()
    ended, threads = threading.Event(), torch.get_num_threads()

    def hand_over(iteration: Iteration | None = None) -> None:
        if iteration is not None:
            results.put(iteration)
        if not turns.get():
            raise _EndedError

    def work() -> None:
        try:
            torch.set_num_threads(threads)  # a setting of each thread
            _optimize(copy.copy(optimizer), problem, start, options, hand_over, ended)
            results.put(None)
        except _EndedError:
            results.put(None)
        except BaseException as error:  # noqa: BLE001  raised again where the caller waits
            results.put(error)

    thread = threading.Thread(target=work, name="pymanopt", daemon=True)
    thread.start()
    try:
        while True:
            turns.put(True)
            found = results.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                return
            yield found
    finally:
        ended.set()
        turns.put(False)
        thread.join()


class _EndedError(Exception):
    """The caller wants no more iterations."""


def _optimize(
    optimizer: Any,
    problem: NetworkProblem,
    start: Point,
    options: dict[str, Any],
    hand_over: Callable[..., None],
    ended: threading.Event,
) -> None:
    """Run an optimizer, and hand over what it has reached after each of its iterations, until the caller asks on."""
    network_cost, check = problem._network_cost, optimizer._check_stopping_criterion
    before, searched, number = network_cost.on_cost, False, 0
    hand_over()
    best = (problem.cost(start), start)  # remembered, so not counted again

    def on_cost(point: Point, cost: float) -> None:
        nonlocal best, searched
        if ended.is_set():
            raise _EndedError
        if before is not None:
            before(point, cost)
        searched = True
        if cost < best[0]:
            best = (cost, point)

    def on_check(**facts: Any) -> Any:
        nonlocal number
        # Conjugate gradient also checks before its first iteration, when no cost but that of the start is known.
        if searched:
            number += 1
            hand_over(Iteration(number, *best))
        return check(**facts)

    network_cost.on_cost, optimizer._check_stopping_criterion = on_cost, on_check
    try:
        optimizer.run(problem, initial_point=start, **options)
    finally:
        network_cost.on_cost = before
