"""Validated settings of a torch optimizer, and the equilibrium rotation per step that they lead to."""

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
    """The settings of the torch optimizer that trains the plain network.

    Args:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: learning rate η.
        momentum: factor μ of SGD, without dampening.
        betas: decays β1 and β2 of Adam's moments.
        weight_decay: λ; an L2 penalty for SGD, decoupled for AdamW.

    Raises:
        OptionError: a value is out of range, or belongs to another optimizer.

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
        name = self.optimizer
        self._require("optimizer", name in OPTIMIZERS, "'sgd', 'adam' or 'adamw'")
        self._require("lr", math.isfinite(self.lr) and self.lr > 0, "a finite number > 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        decays = self.weight_decay >= 0 and self.lr * self.weight_decay < 1
        self._require("weight_decay", decays, f"a number from 0 to below 1/lr = {1 / self.lr:g}")
        if name == "sgd":
            expected = "no betas with optimizer 'sgd', which has a momentum instead"
            self._require("betas", self.betas == DEFAULT_BETAS, expected)
        else:
            self._require("momentum", self.momentum == 0, f"0 with optimizer {name!r}, which has betas instead")
        expected = "0 with optimizer 'adam', which mixes the decay into its moments, or optimizer 'adamw'"
        self._require("weight_decay", name != "adam" or self.weight_decay == 0, expected)

    def _require(self, option: str, holds: bool, expected: str) -> None:
        if not holds:
            raise OptionError(option, getattr(self, option), expected)

    @property
    def equilibrium_rotation(self) -> float | None:
        """Rotation per step in the long run, in radians; None without weight decay.

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
        return math.sqrt(2 * self.lr * self.weight_decay * (1 - self.momentum)) or None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the options of other optimizers."""
        own: dict[str, Any] = {"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": list(self.betas)}
        return {"optimizer": self.optimizer, "lr": self.lr, **own, "weight_decay": self.weight_decay}

    def __str__(self) -> str:
        return ", ".join(
            [self.optimizer, *(f"{name} {v}" for name, v in self.to_dict().items() if name != "optimizer")]
        )
