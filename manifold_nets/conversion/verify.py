"""Comparing what two models compute, in evaluation and in training mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.errors import ExampleInputsError
from manifold_nets.models import duplicate, random_numbers
from manifold_nets.running import output_tensors, split_inputs

__all__ = ["Verification", "both_modes", "compare_outputs", "eval_limit", "verify"]

_EVAL_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Verification:
    """How far two models are apart on the example inputs.

    Args:
        eval_difference: largest |a − b| over largest |a|, over all outputs, in evaluation mode.
        train_difference: the same in training mode, with the same random numbers.
        float64_eval_difference: the first one between float64 copies, where it was more than rounding should be in the
            precision of the models; None where that was not asked.
    """

    eval_difference: float
    train_difference: float
    float64_eval_difference: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return plain data for JSON, without what was not asked."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        wide = "" if self.float64_eval_difference is None else f" ({self.float64_eval_difference:.1e} in float64)"
        return (
            f"largest relative difference {self.eval_difference:.1e}{wide} in evaluation mode, "
            f"{self.train_difference:.1e} in training mode"
        )


def eval_limit(dtype: torch.dtype) -> float:
    """Largest relative difference in evaluation mode that counts as rounding, for weights of this dtype."""
    return _EVAL_LIMITS.get(dtype, 64 * torch.finfo(dtype).eps)


def both_modes(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> dict[str, list[Tensor]]:
    """Outputs of a model in evaluation and in training mode; the model and the random state are left as they were.

    Raises:
        ExampleInputsError: the model refuses the inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    outputs: dict[str, list[Tensor]] = {}
    twin = duplicate(model)
    with torch.no_grad():
        # Evaluation comes first: the forward pass in training mode moves the running statistics of the copy.
        for mode in ("eval", "train"):
            twin.train(mode == "train")
            try:
                with random_numbers(seed):
                    result = twin(*args, **kwargs)
            except Exception as error:
                raise ExampleInputsError(f"inputs that fail in {mode} mode", error) from error
            outputs[mode] = [t.detach().clone() for t in output_tensors(result) if t.is_floating_point()]
    return outputs


def compare_outputs(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> Verification:
    """Relative difference of two sets of outputs, mode by mode; infinite where they cannot be compared."""
    return Verification(_largest(before["eval"], after["eval"]), _largest(before["train"], after["train"]))


def verify(model: nn.Module, other: nn.Module, example_inputs: Any, *, seed: int = 0) -> Verification:
    """Compare what two models compute on example inputs, in both modes; neither is changed.

    Args:
        model: the reference.
        other: the model to compare with it.
        example_inputs: as for `diagnose`.
        seed: seed of the random numbers that both use, for instance for dropout.

    Returns:
        A `Verification` with the largest relative difference ``max |a − b| / max |a|`` in each mode, over the outputs
        that are numbers. Infinities and NaN in the same places are no difference; in one model only, they are an
        infinite one.

    Raises:
        ExampleInputsError: a model refuses the inputs.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> verify(net, net, torch.randn(4, 3)).eval_difference
        0.0
    """
    before = both_modes(model, example_inputs, seed=seed)
    return compare_outputs(before, both_modes(other, example_inputs, seed=seed))


def _largest(before: list[Tensor], after: list[Tensor]) -> float:
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    largest = 0.0
    for a, b in zip(before, after, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        largest = max(largest, _relative(a.double(), b.double()))
    return largest


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| over largest |a|, over the entries that are numbers in both.

    An infinity or NaN that is the same in both, as a mask leaves it in its places, is no change, though ∞ − ∞ is NaN;
    one that appears, goes away or turns its sign is an infinite change.
    """
    same = (a == b) | (a.isnan() & b.isnan())
    numbers = a.isfinite() & b.isfinite()
    if not bool((same | numbers).all()):
        return float("inf")
    a, b = a[numbers], b[numbers]
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    size, difference = float(a.abs().max()), float((a - b).abs().max())
    return difference / size if size > 0 else float("inf")
