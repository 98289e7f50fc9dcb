"""The contestants by name, in one table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import OptimizerNameError
from manifold_nets.comparison.protocols import Contestant, Objective, Stepper
from manifold_nets.comparison.records import Settings
from manifold_nets.optim import RiemannianAdam, RiemannianSGD, param_groups

__all__ = ["CONTESTANTS", "TorchStepper", "contestant"]


class TorchStepper:
    """A `Stepper` that has any `torch.optim.Optimizer` take its steps.

    Args:
        optimizer: one whose groups have a learning rate ``"lr"``.
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


def _torch(build: Callable[[nn.Module, float, Settings], torch.optim.Optimizer]) -> Callable[..., Stepper]:
    return lambda model, rate, settings: TorchStepper(build(model, rate, settings))


def _sgd(model: nn.Module, rate: float, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, momentum=settings.momentum, weight_decay=settings.weight_decay)


def _adam(model: nn.Module, rate: float, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate, weight_decay=settings.weight_decay)


def _rsgd(model: nn.Module, rate: float, settings: Settings) -> torch.optim.Optimizer:
    return RiemannianSGD(param_groups(model, weight_decay=settings.weight_decay), rate, momentum=settings.momentum)


def _radam(model: nn.Module, rate: float, settings: Settings) -> torch.optim.Optimizer:
    return RiemannianAdam(param_groups(model, weight_decay=settings.weight_decay), rate)


CONTESTANTS = {
    found.name: found
    for found in (
        Contestant("sgd", "plain", "sgd", "torch", _torch(_sgd)),
        Contestant("adam", "plain", "adam", "torch", _torch(_adam)),
        Contestant("rsgd", "converted", "sgd", "manifold_nets", _torch(_rsgd)),
        Contestant("radam", "converted", "adam", "manifold_nets", _torch(_radam)),
    )
}


def contestant(name: str) -> Contestant:
    """Return the contestant of a name.

    Raises:
        OptimizerNameError: there is none.

    Example:
        >>> contestant("rsgd").form
        'converted'
    """
    if name not in CONTESTANTS:
        raise OptimizerNameError(name, CONTESTANTS)
    return CONTESTANTS[name]
