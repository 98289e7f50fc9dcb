"""Shifts that the structure allows, each certified; and whether a loss depends on a shift of the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.errors import OptionError
from manifold_nets.float64 import following
from manifold_nets.groups import Partition
from manifold_nets.running import Inputs, called
from manifold_nets.symmetry.generators import Direction, Generators
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.low_variance import Places
from manifold_nets.symmetry.report import Absorber, ShiftSymmetry
from manifold_nets.symmetry.rules import Absorption

__all__ = ["Direction", "Loss", "ShiftFindings", "sees_no_shift"]

# Far above the rounding of a loss in float64, far below what a shift of order one does to one that sees it.
_LOSS_ROUNDING = 1e-9
# The name of a loss of logits, or the loss as a function of what the model returns.
Loss = str | Callable[[Any], Tensor]
LOSSES = ("cross_entropy", "softmax")
_EXPECTED = "'cross_entropy', 'softmax', or a function of the model's output that returns one number"
_REFUTED = "leave it and report a bug: structure and certificate contradict each other"
_REMEDIES = {
    "dead bias": "remove it: it has no effect",
    "bias shift": "leave it, or subtract its mean: the function stays the same",
    "logit shift": "leave it, or subtract its mean: the function stays the same",
    "filter shift": "leave it, or subtract the mean of each filter: the function stays the same",
    "row shift": "leave it, or subtract the mean over the filters: the function stays the same",
    "redundant biases": "keep one of them and add the others to it",
}


def sees_no_shift(loss: Loss | None, model: nn.Module, inputs: Inputs) -> bool:
    """Whether a loss stays the same when a constant is added to all logits of an example, along axis 1.

    Raises:
        OptionError: an unknown name, or a function that does not accept the outputs.
        ExampleInputsError: the model refuses the inputs.
    """
    if loss is None:
        return False
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise OptionError("loss", loss, _EXPECTED)
        return True
    generator = torch.Generator().manual_seed(0)

    def shifted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or not leaf.is_floating_point():
            return leaf
        constants = torch.randn((leaf.shape[0], 1, *leaf.shape[2:]), generator=generator, dtype=torch.float64)
        return leaf + constants.to(leaf.device)

    with torch.no_grad(), torch.random.fork_rng(), following(model):
        outputs = called(model, inputs)
        try:
            before, after = float(loss(outputs)), float(loss(pytree.tree_map(shifted, outputs)))
        except Exception as error:
            raise OptionError("loss", error, _EXPECTED) from error
    return abs(after - before) <= _LOSS_ROUNDING * max(1.0, abs(before))


class ShiftFindings:
    """Certifies the shifts that the structure claims.

    Args:
        test: the gradient test.
        drops_samples: whether the network drops branches at random, which leaves no trace in its graph.
    """

    def __init__(self, test: InvarianceTest, drops_samples: bool) -> None:
        self.test, self.drops_samples = test, drops_samples

    def added(self, directions: list[Direction], absorptions: list[Absorption], rank: int) -> ShiftSymmetry:
        """Test shifts of parameters that are added."""
        entries = sum(len(part) for part in directions[0].values())
        kinds = {a.kind for a in absorptions}
        kind = "dead bias" if entries == 1 else "filter shift" if rank > 1 else "bias shift"
        if entries > 1 and len(directions[0]) > 1:
            kind = "redundant biases"
        elif entries > 1 and kinds and kinds <= {"softmax", "loss"}:
            kind = "logit shift"
        return self._finding(kind, Generators.of_shifts(directions, self.test.gradients.shapes), absorptions)

    def groups(
        self, name: str, partition: Partition, numbers: list[int], absorptions: list[Absorption]
    ) -> ShiftSymmetry:
        """Test constants added to groups of entries of a weight."""
        return self._finding("row shift", Generators.of_groups(name, partition, numbers, adds=True), absorptions)

    def _finding(self, kind: str, generators: Generators, absorptions: list[Absorption]) -> ShiftSymmetry:
        def excuse(asked: NDArray[np.bool_]) -> Mapping[int, Places]:
            return self._low_variance(generators, asked, absorptions)

        certificate = self.test.certificate(generators, excuse if self.test.low_variance is not None else None)
        once = list({a.node: a for a in absorptions}.values())
        absorbers = tuple(Absorber(a.op, a.module, a.kind, running_mean=a.running_mean) for a in once)
        dropped = self.drops_samples and any(a.kind == "batch" for a in absorbers)
        remedy = _REMEDIES[kind] if certificate.verdict != "not invariant" else _REFUTED
        means = [a.running_mean for a in absorbers if a.running_mean is not None]
        if remedy == _REMEDIES["dead bias"] and means:
            remedy += f" ({means[0]} is adjusted for it)"
        return ShiftSymmetry(
            kind,
            tuple(dict.fromkeys(part.parameter for part in generators.parts)),
            generators.count,
            absorbers,
            certificate,
            remedy,
            "while no branch is dropped at random" if dropped else None,
            generators,
        )

    def _low_variance(
        self, generators: Generators, asked: NDArray[np.bool_], absorptions: Sequence[Absorption]
    ) -> dict[int, Places]:
        """The shifts of channels without variance; all of them where it is not known which channels they reach."""
        places = self.test.low_variance.places(absorptions) if self.test.low_variance is not None else {}
        if not places:
            return {}
        if all(places.values()) and bool((generators.entries == 1).all()):
            (part,) = generators.parts
            channels = set().union(*places.values())
            entry = dict(zip(part.numbers.tolist(), part.groups.tolist(), strict=True))
            return {number: places for number in np.flatnonzero(asked).tolist() if entry[number] in channels}
        return dict.fromkeys(range(generators.count), places)
