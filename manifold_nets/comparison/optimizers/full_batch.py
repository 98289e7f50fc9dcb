"""Optimizers of pymanopt, which take one iteration per epoch on the full batch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from manifold_nets.comparison.optimizers.spec import Make, Objective, OptimizerSpec, Stepper
from manifold_nets.comparison.settings import Settings
from manifold_nets.optim import param_groups

if TYPE_CHECKING:
    from manifold_nets.pymanopt_bridge import Iteration, NetworkProblem

__all__ = ["PYMANOPT", "PymanoptStepper"]


class PymanoptStepper:
    """A `Stepper` around an optimizer of pymanopt: one iteration per step, on the full batch.

    The optimizer keeps its state from one step to the next. After a step the model holds the point of the lowest
    loss so far, and its batch normalizations the statistics at that point. Where the optimizer has stopped by its own
    criteria, further steps change nothing.

    Args:
        model: the network.
        optimizer: any optimizer of pymanopt that works on products of manifolds.
        weight_decay: λ; λ/2 times the squared norm of the decayed weights is added to the loss.
        options: further arguments of the optimizer's ``run``.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, *, weight_decay: float = 0.0, options: dict[str, Any] | None = None
    ) -> None:
        self._model, self._optimizer, self._options = model, optimizer, options or {}
        self._penalized = _PenalizedLoss(model, weight_decay)
        self._problem: NetworkProblem | None = None
        self._running: Iterator[Iteration] = iter(())
        self._loss = 0.0

    def step(self, objective: Objective) -> float:
        """One iteration; return the loss before it, without the penalty of weight decay.

        Args:
            objective: the loss on all training examples.
        """
        from manifold_nets import pymanopt_bridge

        self._penalized.objective = objective
        if self._problem is None:
            self._problem = pymanopt_bridge.problem(self._model, self._penalized)
            self._loss = self._problem.cost(self._problem.initial_point()) - self._penalized.penalty()
            self._running = pymanopt_bridge.iterations(self._optimizer, self._problem, **self._options)
        before = self._loss
        reached = next(self._running, None)
        if reached is not None:
            self._problem.write_back(reached.point)
            self._loss = reached.cost - self._penalized.penalty()
        self._penalized.objective = None
        return before

    def set_learning_rate(self, factor: float) -> None:
        """Do nothing: after the first iteration these optimizers choose their steps themselves."""


class _PenalizedLoss:
    """The loss of the present objective plus the penalty of weight decay.

    An object of its own: the thread of an optimizer holds it, and must not hold the stepper, with which it ends.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.objective: Objective | None = None
        self._model, self._weight_decay = model, weight_decay
        groups = param_groups(model, weight_decay=weight_decay)
        self._decayed = [name for group in groups if group["weight_decay"] > 0 for name in group["param_names"]]

    def __call__(self, model: nn.Module) -> Tensor:
        if self.objective is None:
            raise RuntimeError("no objective: the loss was evaluated between two steps")
        loss = self.objective.loss()
        for name in self._decayed:
            loss = loss + 0.5 * self._weight_decay * _tensor(model, name).square().sum()
        return loss

    def penalty(self) -> float:
        squares = (float(_tensor(self._model, name).detach().double().square().sum()) for name in self._decayed)
        return 0.5 * self._weight_decay * sum(squares)


def _tensor(model: nn.Module, name: str) -> Tensor:
    # Not `get_parameter`: during an evaluation a plain tensor stands in the place of a parameter.
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _from_pymanopt(name: str) -> Make:
    """Make an optimizer of `pymanopt.optimizers` for the full batch.

    The learning rate is the length of the first step that a line search tries, or the first radius of a trust region;
    the optimizer chooses what follows itself.

    Raises:
        MissingExtraError: when it is made and pymanopt is not installed.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        from manifold_nets import pymanopt_bridge  # noqa: F401  says what to install where pymanopt is absent

        optimizers = importlib.import_module("pymanopt.optimizers")
        line_search = importlib.import_module("pymanopt.optimizers.line_search")
        limits = {"max_iterations": 10**9, "max_cost_evaluations": 10**9, "max_time": float("inf")}
        options: dict[str, Any] = {"Delta0": rate} if name == "TrustRegions" else {}
        searchers = {"ConjugateGradient": "AdaptiveLineSearcher", "SteepestDescent": "BackTrackingLineSearcher"}
        if name in searchers:
            limits["line_searcher"] = getattr(line_search, searchers[name])(initial_step_size=rate)
        optimizer = getattr(optimizers, name)(verbosity=0, **limits)
        return PymanoptStepper(model, optimizer, weight_decay=settings.weight_decay, options=options)

    return make


_METHODS = (
    ("pymanopt-sd", "SteepestDescent", "steepest descent with line search"),
    ("pymanopt-cg", "ConjugateGradient", "nonlinear conjugate gradients with line search"),
    ("pymanopt-tr", "TrustRegions", "trust regions with exact Hessians, which are not counted as evaluations"),
)
PYMANOPT = tuple(
    OptimizerSpec(name, "converted", "full batch", "pymanopt", _from_pymanopt(kind), True, f"{text}; the full batch")
    for name, kind, text in _METHODS
)
