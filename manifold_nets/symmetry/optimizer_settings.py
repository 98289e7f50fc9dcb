"""The settings of an optimizer of torch, checked, and the rotation that they lead to in the long run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from manifold_nets.errors import OptionError

__all__ = ["DEFAULT_BETAS", "OPTIMIZERS", "OptimizerSettings"]

OPTIMIZERS = ("sgd", "adam", "adamw")
DEFAULT_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of an optimizer of torch that trains the plain network.

    Args:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: learning rate η.
        momentum: factor μ of SGD, without dampening.
        betas: decays β1 and β2 of Adam's moments.
        weight_decay: λ; an L2 penalty for SGD, decoupled for AdamW.

    Raises:
        OptionError: a value has no meaning, or is one that this optimizer does not have.

    Example:
        >>> f"{OptimizerSettings('sgd', 0.1, momentum=0.9, weight_decay=5e-4).equilibrium_rotation:.4f} radians"
        '0.0073 radians'
    """

    optimizer: str
    lr: float
    momentum: float = 0.0
    betas: tuple[float, float] = DEFAULT_BETAS
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise OptionError("optimizer", self.optimizer, "'sgd', 'adam' or 'adamw'")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError("lr", self.lr, "a finite number > 0")
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum", self.momentum, "a number from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError("betas", self.betas, "two numbers from 0 to below 1")
        if not (self.weight_decay >= 0 and self.lr * self.weight_decay < 1):
            raise OptionError("weight_decay", self.weight_decay, f"a number from 0 to below 1/lr = {1 / self.lr:g}")
        if self.optimizer == "sgd" and self.betas != DEFAULT_BETAS:
            raise OptionError("betas", self.betas, "no betas with optimizer 'sgd', which has a momentum instead")
        if self.optimizer != "sgd" and self.momentum != 0:
            raise OptionError(
                "momentum", self.momentum, f"0 with optimizer {self.optimizer!r}, which has betas instead"
            )
        if self.optimizer == "adam" and self.weight_decay != 0:
            expected = "0 with optimizer 'adam', which mixes the decay into its moments, or optimizer 'adamw'"
            raise OptionError("weight_decay", self.weight_decay, expected)

    @property
    def equilibrium_rotation(self) -> float | None:
        """Angle per step in the long run, in radians; None without weight decay.

        It is √(2ηλ/(1+μ)) for SGD and √(2ηλ(1−β1)/(1+β1)) for AdamW: Kosson et al., arXiv:2305.17212.
        """
        if self.weight_decay == 0:
            return None
        beta1 = self.betas[0]
        slow = 1 / (1 + self.momentum) if self.optimizer == "sgd" else (1 - beta1) / (1 + beta1)
        return math.sqrt(2 * self.lr * self.weight_decay * slow)

    @property
    def equilibrium_factor(self) -> float | None:
        """Sphere learning rate of the long run for AdamW, √(2ηλ); for SGD √(2ηλ(1−μ)), to be divided by the gradient.

        The gradient is that of `manifold_nets.symmetry.learning_rates.WeightRates`. None without weight decay.
        """
        if self.weight_decay == 0:
            return None
        return math.sqrt(2 * self.lr * self.weight_decay * (1 - self.momentum))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the options that the optimizer does not have."""
        own: dict[str, Any] = {"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": list(self.betas)}
        return {"optimizer": self.optimizer, "lr": self.lr, **own, "weight_decay": self.weight_decay}

    def __str__(self) -> str:
        return ", ".join(
            [self.optimizer, *(f"{name} {v}" for name, v in self.to_dict().items() if name != "optimizer")]
        )
