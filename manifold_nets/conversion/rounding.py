"""Whether two models differ by rounding alone: the same conversion in float64.

Rounding can be magnified without bound: where it decides which of two nearly equal values a max-pooling takes and the
index is used again, or where a network is badly conditioned. Then the outputs in float32 say little about the
conversion. Two numbers say it all: how far the outputs of float64 copies are apart, of which one is converted by the
same plan, and how far the converted values are from those of that copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.conversion.verify import both_modes, compare_outputs, eval_limit
from manifold_nets.float64 import in_float64, widened
from manifold_nets.models import duplicate
from manifold_nets.running import split_inputs, to_float64

__all__ = ["WideComparison", "compare_in_float64"]

# Each value is rounded once for each remedy that changes it, and magnified a little where these cancel.
_ROUNDINGS = 8


@dataclass(frozen=True)
class WideComparison:
    """What the same conversion does in float64.

    Args:
        difference: largest relative difference of the outputs of the float64 copies, in evaluation mode.
        why_not: why more than rounding is different; None where nothing else is.
    """

    difference: float
    why_not: str | None


def compare_in_float64(
    model: nn.Module, values: Mapping[str, Tensor], example_inputs: Any, carry_out: Callable[[nn.Module], object]
) -> WideComparison:
    """Convert a float64 copy of a model and compare its outputs with the model's, and its values with given ones.

    Args:
        model: the model before the conversion.
        values: parameters and buffers after the conversion, in the precision of the model.
        example_inputs: as for `diagnose`.
        carry_out: converts a copy of the model in place.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> compare_in_float64(net, net.state_dict(), torch.randn(4, 3), lambda twin: None)
        WideComparison(difference=0.0, why_not=None)
    """
    twin: nn.Module = duplicate(model, change=widened)._apply(widened)  # type: ignore[no-untyped-call]
    inputs = to_float64(split_inputs(example_inputs))
    with in_float64():
        before = both_modes(twin, inputs)
    carry_out(twin)
    with in_float64():
        difference = compare_outputs(before, both_modes(twin, inputs)).eval_difference
    limit = eval_limit(torch.float64)
    if not difference <= limit:
        return WideComparison(difference, f"float64 copies differ by {difference:.3g}, at most {limit:.0e} expected")
    wide = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers(remove_duplicate=False))}
    wrong = [name for name, value in values.items() if not _is_rounded(value, wide.get(name))]
    if wrong:
        return WideComparison(difference, f"{wrong[0]} is not what it is in a float64 copy, rounded")
    return WideComparison(difference, None)


def _is_rounded(value: Tensor, exact: Tensor | None) -> bool:
    """Whether a tensor is another one in lower precision."""
    if exact is None or value.shape != exact.shape:
        return False
    if not value.is_floating_point():
        return bool(torch.equal(value, exact))
    limits = torch.finfo(value.dtype)
    allowed = _ROUNDINGS * limits.eps * exact.abs() + limits.tiny
    # An infinity or NaN of a mask stays what it is: no number is its rounding, and ∞ − ∞ is none.
    same = (value == exact) | (value.isnan() & exact.isnan())
    near = exact.isfinite() & ((value.double() - exact).abs() <= allowed)
    return bool((same | near).all())
