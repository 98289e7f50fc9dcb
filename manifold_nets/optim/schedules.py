"""The learning-rate schedule of the paper, and weight decay that follows any schedule; for others use torch's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manifold_nets.errors import ArgumentTypeError, OptimizerStateError, OptionError

__all__ = ["BoldDriver", "CorrectedDecay", "inner_optimizer"]


class BoldDriver(LRScheduler):
    r"""Bold driver: raise the learning rates while the cost does not rise, cut them when it does.

    Call `step` once per epoch with the mean cost of that epoch. From the second epoch on,

    .. math:: η ← \begin{cases} 1.1\, η & \text{cost} ≤ \text{cost of the epoch before} \\
              0.5\, η & \text{cost rose, or is NaN or infinite.} \end{cases}

    The first epoch only sets the cost to compare with. After a cost that is not finite, the next one is compared with
    the last finite cost. Until there is a finite cost, the learning rates do not change.

    Args:
        optimizer: any torch optimizer; the learning rates of all its groups change by the same factor.
        increase: factor for an epoch whose cost did not rise, at least 1.
        decrease: factor for an epoch whose cost rose, between 0 and 1.

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
        # The base class would call step here, without a cost.
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
        """Compare the mean cost of an epoch with that of the epoch before, and set the learning rates.

        Args:
            cost: a number, or a tensor with one entry.
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


# Stored in a group of scale-invariant weights, so that it survives `load_state_dict` and `deepcopy`.
_REMEMBERED = ("initial_weight_decay", "peak_lr")


def inner_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside wrappers such as Accelerate's and DeepSpeed's, or the optimizer itself.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> inner_optimizer(optimizer) is optimizer
        True
    """
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


_WITH_PENALTY = (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Rprop)


class CorrectedDecay:
    r"""Tie the weight decay of scale-invariant weights to the learning-rate schedule (AdamC, SGDC).

    Before every step, in each group of scale-invariant weights and in no other,

    .. math:: λ_t = λ\, η_t / η_{max}, \qquad \text{so that a step decays by } η_t λ_t = λ\, η_t² / η_{max}.

    A scale-invariant weight of norm n grows by its steps and shrinks by its decay,
    n² ← (1 − η_t λ_t)² n² + η_t² ‖g‖², g ⟂ w. The two balance at ‖g‖²/n² = 2λ_t/η_t. With a constant λ this ratio
    rises as the rate falls, and the gradient with it, most of all at the end of a cosine. With λ_t proportional to η_t
    it is 2λ/η_max throughout: the equilibrium does not move, and a step turns the weight by η_t ‖g‖/n = η_t
    √(2λ/η_max), an angle that follows the schedule. For AdamW, whose step is η_t times a vector of nearly constant
    length, the equilibrium n² = η_t C/(2λ_t) does not move either. Other weights keep their decay.

    A hook of the optimizer sets the decay before each step, whatever changed the learning rate. An optimizer without
    such hooks needs a call of `step` after each step of its scheduler. A deep copy of the optimizer has its groups but
    no hooks, as in torch, and needs a CorrectedDecay of its own, which continues from the copied state.

    Args:
        optimizer: ``torch.optim.SGD``, ``AdamW``, or another one whose decay is η λ w, with groups of
            ``param_groups(model, report=…)``; also inside the wrapper of Accelerate or DeepSpeed.
        max_lr: η_max. The default is that of ``OneCycleLR``, or the rate that the scheduler started from, which is the
            largest one for torch's schedulers with factors of at most 1, including warm-ups and cosines. Pass it for
            ``CyclicLR``, and for ``LambdaLR``, ``MultiplicativeLR`` and others with factors above 1: without it, a rate
            above the present η_max becomes the new one, and the decay is too large until then.

    Raises:
        ArgumentTypeError: the optimizer has no group of scale-invariant weights.
        OptionError: ``max_lr`` is not positive, or the optimizer is an Adam that adds the decay to the gradient, to
            which none of this applies.

    References:
        Defazio, arXiv:2506.02285.

    Example:
        >>> import manifold_nets as mn
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> groups = mn.param_groups(net, report=mn.diagnose(net, torch.randn(8, 4)), weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1)
        >>> decay = mn.optim.CorrectedDecay(optimizer)
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.step()
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.05, 0.1, 0.0]
    """

    def __init__(self, optimizer: Any, *, max_lr: float | None = None) -> None:
        if max_lr is not None and not 0 < max_lr < math.inf:
            raise OptionError("max_lr", max_lr, "a finite learning rate > 0")
        self.optimizer = inner_optimizer(optimizer)
        self._max_lr = max_lr
        if not any(True for _ in self._groups()):
            raise ArgumentTypeError(
                "optimizer", optimizer, "an optimizer with a group of scale-invariant weights",
                "Build it from manifold_nets.param_groups(model, report=manifold_nets.diagnose(model, inputs), "
                "weight_decay=…). Without such a group the report has no weight that is scale-invariant by itself, "
                "and there is nothing to correct; weights that share one scale are not in it.",
            )  # fmt: skip
        for group in self._groups():
            # Adam, NAdam and RAdam say it; in others of torch the decay is always a penalty.
            if not group.get("decoupled_weight_decay", not isinstance(self.optimizer, _WITH_PENALTY)):
                raise OptionError("decoupled_weight_decay", False, "True, as in torch.optim.AdamW")
        self.step()
        self._last_state: dict[str, Any] = {}
        hooked = hasattr(self.optimizer, "register_step_pre_hook")
        self._hook = self.optimizer.register_step_pre_hook(self._before_step) if hooked else None

    def step(self) -> None:
        """Set the weight decay for the present learning rates."""
        for group in self._groups():
            rate = float(group["lr"])
            if "initial_weight_decay" not in group:
                group["initial_weight_decay"] = group["weight_decay"]
                group["peak_lr"] = float(self._max_lr or group.get("max_lr") or group.get("initial_lr") or rate)
            group["peak_lr"] = max(group["peak_lr"], rate)
            share = rate / group["peak_lr"] if group["peak_lr"] else 0.0
            group["weight_decay"] = share * group["initial_weight_decay"]

    def remove(self) -> None:
        """Remove the hook and restore the initial decay of the groups."""
        if self._is_at_work():
            self._last_state = self.state_dict()
        if self._hook is not None:
            self._hook.remove()
        for group in self._groups():
            group["weight_decay"] = group.get("initial_weight_decay", group["weight_decay"])
            for name in _REMEMBERED:
                group.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return λ and η_max of each group of scale-invariant weights; after `remove`, the last ones."""
        if not self._is_at_work():
            return copy.deepcopy(self._last_state)
        return {"groups": [{name: group[name] for name in _REMEMBERED} for group in self._groups()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load λ and η_max, and set the decay for the present learning rates.

        Raises:
            OptimizerStateError: the state has another number of groups, or this object was removed.
        """
        if not self._is_at_work():
            remedy = "Make a new CorrectedDecay of the optimizer, and load the state into that."
            raise OptimizerStateError("CorrectedDecay", "an object after remove()", "an active one", remedy)
        groups, saved = list(self._groups()), state_dict["groups"]
        if len(groups) != len(saved):
            found = f"{len(saved)} groups of scale-invariant weights"
            remedy = "Load the state of an optimizer with the same groups."
            raise OptimizerStateError("CorrectedDecay", found, f"{len(groups)}", remedy)
        for group, values in zip(groups, saved, strict=True):
            group.update({name: values[name] for name in _REMEMBERED})
        self.step()

    def _is_at_work(self) -> bool:
        return all(name in group for group in self._groups() for name in _REMEMBERED)

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.optimizer.param_groups if group.get("scale_invariant"))

    def _before_step(self, *_: object) -> None:
        self.step()
