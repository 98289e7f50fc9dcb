"""How the learning rate of a run changes, and when a run may end before its last epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from manifold_nets.comparison.records import Schedule
from manifold_nets.optim import BoldDriver

__all__ = ["is_time_to_stop", "learning_rate_factor"]

_DECAY = 0.95
_STOP_FROM, _STOP_EVERY, _STOP_BACK, _STOP_BELOW = 25, 5, 4, 1e-5


def learning_rate_factor(schedule: Schedule, *, epoch: int, share: float, epochs: int, costs: Sequence[float]) -> float:
    """Return the learning rate over the one that a run began with.

    ===============  =================================================================================================
    ``constant``     1
    ``cosine``       (1 + cos(π t)) / 2, t the share of all steps that are done
    ``exponential``  0.95 to the number of epochs done
    ``bold-driver``  `manifold_nets.optim.BoldDriver`: a factor for every epoch done from the second on, 1.1 if the mean
                     cost of its steps was not above that of the epoch before, 0.5 if it was, or was NaN
    ===============  =================================================================================================

    Args:
        schedule: one of these.
        epoch: the epoch that runs, counted from 1.
        share: of its steps that are done, in [0, 1).
        epochs: of the whole run.
        costs: mean training loss of each epoch before this one.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029, for the last
        two.

    Example:
        >>> learning_rate_factor("bold-driver", epoch=4, share=0.0, epochs=9, costs=[2.0, 1.0, 1.5])
        0.55
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - 1 + share) / epochs)) / 2
    if schedule == "exponential":
        return _DECAY ** (epoch - 1)
    if schedule == "bold-driver":
        return _bold_driver(costs)
    return 1.0


def _bold_driver(costs: Sequence[float]) -> float:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    driver = BoldDriver(optimizer)
    for cost in costs:
        driver.step(cost)
    return float(optimizer.param_groups[0]["lr"])


def is_time_to_stop(costs: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether a run ends after the last of some epochs.

    From epoch 25 on: when the mean training loss of the epoch is below 1e-5 or within 1e-5 of that of the epoch before;
    in every fifth epoch also when the validation error is above that of four epochs before.

    Args:
        costs: mean training loss of each epoch.
        errors: validation error after each epoch.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.

    Example:
        >>> falling = [1 / n for n in range(1, 31)]
        >>> is_time_to_stop(falling, falling), is_time_to_stop(falling, [0.1] * 29 + [0.2])
        (False, True)
    """
    epoch = len(costs)
    if epoch < _STOP_FROM:
        return False
    if costs[-1] < _STOP_BELOW or abs(costs[-1] - costs[-2]) < _STOP_BELOW:
        return True
    return epoch % _STOP_EVERY == 0 and errors[-1] > errors[-1 - _STOP_BACK]
