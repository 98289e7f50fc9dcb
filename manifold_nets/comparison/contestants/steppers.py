"""Contestants at work: torch optimizers, and optimizers of pymanopt on the full batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manifold_nets.comparison.protocols import Objective
from manifold_nets.optim import param_groups

if TYPE_CHECKING:
    from manifold_nets.pymanopt_bridge import Iteration, NetworkProblem

__all__ = ["PymanoptStepper", "TorchStepper"]


class TorchStepper:
    """A `Stepper` that has any `torch.optim.Optimizer` take its steps.

    Args:
        optimizer: one whose groups have a learning rate ``"lr"``.

    Example:
        >>> stepper = TorchStepper(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
        >>> stepper.set_learning_rate(0.5)
        >>> stepper.optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def step(self, objective: Objective) -> Tensor:
        """One gradient at the current weights, one step."""
        loss = objective()
        self.optimizer.step()
        return loss

    def set_learning_rate(self, factor: float) -> None:
        """Scale the learning rate of every group."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate


class PymanoptStepper:
    """A `Stepper` that has an optimizer of pymanopt take its steps: one iteration each, on the full batch.

    The optimizer keeps what it knows from one step to the next. After a step the model holds the point of the lowest
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
            raise RuntimeError("no objective: the loss is asked for between two steps")
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
