"""Steps inside a graph that the user compiles: one operation of the graph for each parameter group.

The compiler sees which weights change and which gradients are read. What else belongs to a step (states, learning
rate, which backend to take) is looked up when the operation runs, in the optimizer itself; so a schedule compiles
nothing anew, and a compiled step is the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["register", "standing_in", "step_group_"]

_optimizers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(optimizer: object) -> int:
    """Return the number by which a graph refers to an optimizer; it does not keep it alive.

    Example:
        >>> class Stepper: ...
        >>> stepper = Stepper()
        >>> register(stepper) < register(stepper)
        True
    """
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def _step(weights: list[Tensor], gradients: list[Tensor], places: list[int], optimizer: int, group: int) -> None:
    _optimizers[optimizer]._step_places(group, dict(zip(places, zip(weights, gradients, strict=True), strict=True)))


# An operation of torch's own, so that the graph has no break: what it changes is declared. Releases before torch 2.7
# cannot read a schema off annotations that are texts, as in this file.
_operation: Callable[..., None] = torch.library.custom_op(
    "manifold_nets::step_group_",
    mutates_args=("weights",),
    schema="(Tensor(a!)[] weights, Tensor[] gradients, SymInt[] places, SymInt optimizer, SymInt group) -> ()",
)(_step)


def step_group_(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], places: Iterable[int], optimizer: int, group: int
) -> None:
    """Step the parameters of a group that have gradients, in place.

    Args:
        weights: the parameters, or the tensors that hold their values in the graph; changed in place.
        gradients: their gradients; only read.
        places: where they stand in the group.
        optimizer: what `register` gave.
        group: number of the group.
    """
    _operation(list(weights), list(gradients), list(places), optimizer, group)


@contextmanager
def standing_in(given: Mapping[Tensor, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let parameters have the values and gradients of other tensors, and give the new values to these at the end.

    In a graph the values of a parameter may be held by a copy, while others still read its own.

    Example:
        >>> parameter, values = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
        >>> with torch.no_grad(), standing_in({parameter: (values, torch.ones(2))}):
        ...     _ = parameter.add_(parameter.grad)
        >>> parameter.data, values
        (tensor([1., 1.]), tensor([1., 1.]))
    """
    kept = []
    for parameter, (values, gradient) in given.items():
        apart = parameter.data_ptr() != values.data_ptr()
        kept.append((parameter, values, parameter.grad, parameter.detach().clone() if apart else None))
        if apart:
            parameter.detach().copy_(values)
        parameter.grad = gradient
    try:
        yield
    finally:
        for parameter, values, former, own in kept:
            parameter.grad = former
            if own is not None:
                values.copy_(parameter.detach())
                parameter.detach().copy_(own)
