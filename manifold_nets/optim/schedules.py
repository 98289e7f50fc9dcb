"""The learning-rate schedule of the paper; every other schedule is torch's own."""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["BoldDriver"]


class BoldDriver(LRScheduler):
    r"""Bold driver: raise the learning rates while the cost does not rise, cut them when it does.

    Call `step` once an epoch with the mean cost of that epoch. From the second epoch on,

    .. math:: η ← \begin{cases} 1.1\, η & \text{cost} ≤ \text{cost of the epoch before} \\
              0.5\, η & \text{cost rose, or is NaN or infinite.} \end{cases}

    The first epoch only sets the cost to compare with. A cost that is not finite is never compared with: the cost of
    the last epoch before it that had a finite one is. Until there is one, the learning rates stay.

    Args:
        optimizer: any torch optimizer; the learning rates of all its groups change alike.
        increase: factor of an epoch whose cost did not rise, at least 1.
        decrease: factor of an epoch whose cost rose, between 0 and 1.

    Raises:
        ValueError: a factor is out of range.
        TypeError: ``optimizer`` is not a torch optimizer.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029, training protocol.

    Example:
        >>> import manifold_nets as mn
        >>> optimizer = mn.optim.RiemannianSGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> schedule = mn.optim.BoldDriver(optimizer)
        >>> for cost in (3.0, 2.0, 2.5):
        ...     schedule.step(cost)
        ...     print(f"{schedule.get_last_lr()[0]:.2f}")
        1.00
        1.10
        0.55
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, increase: float = 1.1, decrease: float = 0.5) -> None:
        # The base class would step here, without a cost.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: found {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
        if not (1 <= increase < math.inf):
            raise ValueError(f"increase: found {increase}; expected a finite factor of at least 1.")
        if not 0 < decrease < 1:
            raise ValueError(f"decrease: found {decrease}; expected a factor between 0 and 1.")
        self.optimizer = optimizer
        self.increase, self.decrease = increase, decrease
        self.last_epoch = 0
        self.last_cost: float | None = None
        self._remember_rates()

    def step(self, cost: SupportsFloat) -> None:  # type: ignore[override]
        """Compare the mean cost of an epoch with that of the one before, and set the learning rates.

        Args:
            cost: a number, or a tensor of one entry.
        """
        current = float(cost)
        self.last_epoch += 1
        if self.last_epoch > 1:
            self._scale_rates(self._factor(current))
        if math.isfinite(current):
            self.last_cost = current
        self._remember_rates()

    def _factor(self, cost: float) -> float:
        if not math.isfinite(cost):
            return self.decrease
        if self.last_cost is None:
            return 1.0
        return self.increase if cost <= self.last_cost else self.decrease

    def _scale_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor

    def _remember_rates(self) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
