"""Whether a report was made of a model: what it says of tensors and modules must be so there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from manifold_nets.errors import ReportMismatchError
from manifold_nets.symmetry import SymmetryReport
from manifold_nets.symmetry.report import Absorber

__all__ = ["named_tensors", "require_same_model"]

# Torch's normalizations: the eps of the operation is the attribute.
_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def require_same_model(model: nn.Module, report: SymmetryReport) -> None:
    """Raise `ReportMismatchError` where a report is of another model.

    Compared are the names and shapes of all parameters with at least two dimensions; the names of all other parameters
    and of the buffers that the report speaks of, and their shapes where it knows them; the class of the model and of
    every module that takes part in its graph; and the eps of torch's normalizations. The dtype, the device and the
    values may be others.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> report = mn.diagnose(net, torch.randn(8, 4))
        >>> require_same_model(net.double(), report)
        >>> require_same_model(nn.Sequential(net[0], nn.ReLU(), net[2]), report)
        Traceback (most recent call last):
            ...
        manifold_nets.errors.conversion.ReportMismatchError: report: it was made for Sequential, but Sequential differs
        from it in 1 (ReLU, BatchNorm1d in the report), 1.weight (missing), ...
    """
    found = (_other_weights(model, report), _other_modules(model, report), _other_tensors(model, report))
    differences = dict.fromkeys(itertools.chain(*found))
    if differences:
        raise ReportMismatchError(type(model).__name__, report.model, list(differences))


def _other_weights(model: nn.Module, report: SymmetryReport) -> Iterator[str]:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}
    reported = {weight.name: tuple(weight.shape) for weight in report.weights}
    for name in {**reported, **shapes}:
        yield from _difference(name, shapes.get(name), reported.get(name))


def _other_modules(model: nn.Module, report: SymmetryReport) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if type(model).__name__ != report.model:
        yield f"its class ({type(model).__name__}, {report.model} in the report)"
    for node in report.graph:
        # The node of a call is named after its module; operations between modules stand under other names.
        if node.module and node.name.partition(" #")[0] == node.module:
            yield from _difference(node.module, _class_name(modules.get(node.module)), node.label)
    for absorber in _absorbers(report):
        module = modules.get(absorber.module)
        if absorber.eps is not None and isinstance(module, _NORMALIZATIONS):
            yield from _difference(f"{absorber.module}.eps", module.eps, absorber.eps)


def _other_tensors(model: nn.Module, report: SymmetryReport) -> Iterator[str]:
    present = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name, shape in _spoken_of(report):
        yield from _difference(name, present.get(name), present.get(name, "present") if shape is None else shape)


def _spoken_of(report: SymmetryReport) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Names of parameters and buffers beside the weights, each with its shape or None where that is not known."""
    for family in report.families:
        yield from ((name, partition.shape) for (name, _), partition in family.partitions.items())
    for weight in report.weights:
        yield from ((along.name, None) for along in weight.scaled_along)
    for shift in report.shifts:
        yield from ((name, None) for name in shift.parameters)
    for absorber in _absorbers(report):
        names = (absorber.weight, absorber.bias, absorber.running_mean, absorber.running_var)
        yield from ((name, None) for name in names if name is not None)


def _absorbers(report: SymmetryReport) -> Iterator[Absorber]:
    for weight in report.weights:
        yield from weight.absorbers
    for shift in report.shifts:
        yield from shift.absorbers


def _class_name(module: nn.Module | None) -> str | None:
    return None if module is None else type(module).__name__


def _difference(name: str, found: Any, reported: Any) -> Iterator[str]:
    """Say in what something differs, where it does; None stands for what is missing."""
    if found == reported:
        return
    if found is None:
        yield f"{name} (missing)"
    else:
        yield f"{name} ({found}, {'not' if reported is None else reported} in the report)"
