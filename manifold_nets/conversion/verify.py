"""Compare the outputs of two models, and check that a report belongs to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.errors import ExampleInputsError, ReportMismatchError
from manifold_nets.float64 import in_float64, widened
from manifold_nets.models import duplicate, named_tensors, random_numbers
from manifold_nets.running import output_tensors, split_inputs, to_float64
from manifold_nets.symmetry import SymmetryReport, diagnose

__all__ = ["Verification", "verify"]

_EVAL_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
# Each value is rounded once by each remedy that changes it, which cancellation magnifies a little.
_ROUNDINGS = 8
# Torch's normalizations: the eps of the operation is the attribute.
_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Verification:
    """How far the outputs of two models differ on example inputs.

    Args:
        eval_difference: largest |a − b| over largest |a|, over all outputs, in evaluation mode.
        train_difference: the same in training mode, with the same random numbers.
        float64_eval_difference: the evaluation-mode difference of float64 copies, measured only if ``eval_difference``
            is larger than rounding in the models' precision; else None.
    """

    eval_difference: float
    train_difference: float
    float64_eval_difference: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return plain data for JSON, without values that were not measured."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        wide = "" if self.float64_eval_difference is None else f" ({self.float64_eval_difference:.1e} in float64)"
        return (
            f"largest relative difference {self.eval_difference:.1e}{wide} in evaluation mode, "
            f"{self.train_difference:.1e} in training mode"
        )


def verify(model: nn.Module, other: nn.Module, example_inputs: Any, *, seed: int = 0) -> Verification:
    """Compare the outputs of two models on example inputs, in both modes; neither model is changed.

    Args:
        model: the reference.
        other: the model to compare with it.
        example_inputs: as for `diagnose`.
        seed: random seed for both models, for instance for dropout.

    Returns:
        A `Verification` with the largest relative difference ``max |a − b| / max |a|`` in each mode, over the finite
        outputs. Equal infinities and NaN in both models are no difference; otherwise they count as an infinite one.

    Raises:
        ExampleInputsError: a model does not accept the inputs.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> verify(net, net, torch.randn(4, 3)).eval_difference
        0.0
    """
    before = both_modes(model, example_inputs, seed=seed)
    return compare_outputs(before, both_modes(other, example_inputs, seed=seed))


def eval_limit(dtype: torch.dtype) -> float:
    """Largest relative difference in evaluation mode that counts as rounding, for weights of this dtype."""
    return _EVAL_LIMITS.get(dtype, 64 * torch.finfo(dtype).eps)


def both_modes(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> dict[str, list[Tensor]]:
    """Outputs of a model in evaluation and in training mode; the model and the random state are not changed.

    Raises:
        ExampleInputsError: the model does not accept the inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    outputs: dict[str, list[Tensor]] = {}
    copied = duplicate(model)
    with torch.no_grad():
        # Evaluation comes first: the forward pass in training mode moves the running statistics of the copy.
        for mode in ("eval", "train"):
            copied.train(mode == "train")
            try:
                with random_numbers(seed):
                    result = copied(*args, **kwargs)
            except Exception as error:
                raise ExampleInputsError(f"inputs that fail in {mode} mode", error) from error
            outputs[mode] = [t.detach().clone() for t in output_tensors(result) if t.is_floating_point()]
    return outputs


def compare_outputs(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> Verification:
    """Relative difference of two sets of outputs in each mode; infinite if they cannot be compared."""
    differences = []
    for mode in ("eval", "train"):
        pairs = list(zip(before[mode], after[mode], strict=False))
        if [t.shape for t in before[mode]] != [t.shape for t in after[mode]]:
            differences.append(float("inf"))
        else:
            differences.append(max((_relative(a.double(), b.double()) for a, b in pairs), default=0.0))
    return Verification(*differences)


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| over largest |a|, over the entries that are finite in both.

    An infinity or NaN that is the same in both, for instance from a mask, is no difference, although ∞ − ∞ is NaN. One
    that appears, vanishes or changes sign is an infinite difference.
    """
    same = (a == b) | (a.isnan() & b.isnan())
    numbers = a.isfinite() & b.isfinite()
    if not bool((same | numbers).all()):
        return float("inf")
    if bool(same.all()):
        return 0.0
    a, b = a[numbers], b[numbers]
    size, difference = float(a.abs().max()), float((a - b).abs().max())
    return difference / size if size > 0 else float("inf")


# ---- the same conversion in float64 ----------------------------------------------------------------------------------


def compare_in_float64(
    model: nn.Module, values: Mapping[str, Tensor], example_inputs: Any, carry_out: Callable[[nn.Module], object]
) -> tuple[float, str | None]:
    """Convert a float64 copy of a model; compare its outputs with the model's, and its values with given ones.

    Networks can magnify rounding without bound: if it decides which of two nearly equal values a max-pooling picks and
    the index is used again, or if the network is badly conditioned. Then float32 outputs say little about the
    conversion. Two other measures do: the difference between the outputs of a float64 copy before and after the same
    conversion, and the difference between the given values and those of the converted copy.

    Args:
        model: the model before the conversion.
        values: parameters and buffers after the conversion, in the precision of the model.
        example_inputs: as for `diagnose`.
        carry_out: converts a copy of the model in place.

    Returns:
        The largest relative difference of the outputs of the float64 copies in evaluation mode, and a description of
        what differs by more than rounding; None if nothing does.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> compare_in_float64(net, net.state_dict(), torch.randn(4, 3), lambda copied: None)
        (0.0, None)
    """
    copied: nn.Module = duplicate(model, change=widened)._apply(widened)  # type: ignore[no-untyped-call]
    inputs = to_float64(split_inputs(example_inputs))
    with in_float64():
        before = both_modes(copied, inputs)
    carry_out(copied)
    with in_float64():
        difference = compare_outputs(before, both_modes(copied, inputs)).eval_difference
    limit = eval_limit(torch.float64)
    if not difference <= limit:
        return difference, f"float64 copies differ by {difference:.3g}, more than {limit:.0e}"
    wide = named_tensors(copied)
    wrong = [name for name, value in values.items() if not _is_rounded(value, wide.get(name))]
    return difference, f"{wrong[0]} differs from its value in a float64 copy by more than rounding" if wrong else None


def _is_rounded(value: Tensor, exact: Tensor | None) -> bool:
    """Whether a tensor equals another one rounded to its precision."""
    if exact is None or value.shape != exact.shape:
        return False
    if not value.is_floating_point():
        return bool(torch.equal(value, exact))
    limits = torch.finfo(value.dtype)
    allowed = _ROUNDINGS * limits.eps * exact.abs() + limits.tiny
    # An infinity or NaN of a mask must stay the same: no finite value rounds to it, and ∞ − ∞ is NaN.
    same = (value == exact) | (value.isnan() & exact.isnan())
    near = exact.isfinite() & ((value.double() - exact).abs() <= allowed)
    return bool((same | near).all())


# ---- whether a report is of a model ----------------------------------------------------------------------------------


def report_of(model: nn.Module, report_or_example_inputs: Any) -> SymmetryReport:
    """Return the given report, or diagnose the model with the given example inputs.

    Raises:
        ReportMismatchError: the report belongs to another model.
    """
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    require_same_model(model, report)
    return report


def require_same_model(model: nn.Module, report: SymmetryReport) -> None:
    """Raise `ReportMismatchError` if a report belongs to another model.

    It compares the names and shapes of all parameters with at least two dimensions; the names, and shapes where known,
    of all other parameters and buffers in the report; the class of the model and of every module in its graph; and the
    eps of torch's normalizations. Dtype, device and values may differ.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> report = mn.diagnose(net, torch.randn(8, 4))
        >>> require_same_model(net.double(), report)
        >>> require_same_model(nn.Sequential(net[0], nn.ReLU(), net[2]), report)
        Traceback (most recent call last):
            ...
        manifold_nets.errors.ReportMismatchError: report: it was made for Sequential, but Sequential differs
        from it in 1 (ReLU, BatchNorm1d in the report), 1.weight (missing), ...
    """
    differences = []
    for name, found, reported in _compared(model, report):
        if found is None and reported is not None:
            differences.append(f"{name} (missing)")
        elif found != reported:
            differences.append(f"{name} ({found}, {'not' if reported is None else reported} in the report)")
    if differences:
        raise ReportMismatchError(type(model).__name__, report.model, list(dict.fromkeys(differences)))


def _compared(model: nn.Module, report: SymmetryReport) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each compared item, its value in the model and its value in the report; None if absent."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}
    reported = {weight.name: tuple(weight.shape) for weight in report.weights}
    for name in {**reported, **shapes}:
        yield name, shapes.get(name), reported.get(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    yield "its class", type(model).__name__, report.model
    for node in report.graph:
        # The node of a call is named after its module; operations between modules stand under other names.
        if node.module and node.name.partition(" #")[0] == node.module:
            module = modules.get(node.module)
            yield node.module, None if module is None else type(module).__name__, node.label
    tensors = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    named: list[str] = [name for shift in report.shifts for name in shift.parameters]
    named += [along.name for weight in report.weights for along in weight.scaled_along]
    absorbers = [a for weight in report.weights for a in weight.absorbers]
    for absorber in absorbers + [a for shift in report.shifts for a in shift.absorbers]:
        layer = modules.get(absorber.module)
        if absorber.eps is not None and isinstance(layer, _NORMALIZATIONS):
            yield f"{absorber.module}.eps", layer.eps, absorber.eps
        tensors_of = (absorber.weight, absorber.bias, absorber.running_mean, absorber.running_var)
        named += [name for name in tensors_of if name is not None]
    for family in report.families:
        yield from ((name, tensors.get(name), p.shape) for (name, _), p in family.partitions.items())
    yield from ((name, "present" if name in tensors else None, "present") for name in named)
