"""Steps of only some rows of a weight: those in a sparse gradient, and all but the padding row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.padded import PaddedSphereProduct

__all__ = ["by_rows", "whole_rows"]


def whole_rows(members: Sequence[StepInput]) -> bool:
    """Whether a step needs no selection of rows."""
    return not any(m.gradient.is_sparse or isinstance(m.manifold, PaddedSphereProduct) for m in members)


@contextmanager
def by_rows(rule: Rule, members: Sequence[StepInput]) -> Iterator[list[StepInput]]:
    """Step the rows that move: yield inputs for them, then write back the copied ones.

    Rows without an entry in a sparse gradient do not change, nor do their moments, as in `torch.optim.SparseAdam`. SGD
    with momentum moves all rows, and a rule that looks at all groups together counts them, so these get dense
    gradients.
    """
    found: list[StepInput] = []
    copied: list[tuple[StepInput, Tensor, StepInput]] = []
    for member in members:
        if member.gradient.is_sparse and (not rule.by_groups or (member.second is None and member.moment is not None)):
            member = replace(member, gradient=member.gradient.to_dense())
        if not member.gradient.is_sparse and isinstance(member.manifold, PaddedSphereProduct) and rule.by_groups:
            found += [_part(member, rows, spheres) for rows, spheres in member.manifold.parts]
        elif member.gradient.is_sparse or isinstance(member.manifold, PaddedSphereProduct):
            picked = _picked(member)
            if picked is not None:
                copied.append((member, *picked))
                found.append(picked[1])
        else:
            found.append(member)
    yield found
    for member, rows, stepped in copied:
        for old, new in zip(_tensors(member), _tensors(stepped), strict=True):
            if old is not None and new is not None:
                old.index_copy_(0, rows, new)


def _tensors(member: StepInput) -> tuple[Tensor | None, ...]:
    """What of a weight a step changes."""
    return member.weight.detach(), member.moment, member.second, member.largest, member.norms


def _part(member: StepInput, rows: slice, spheres: SphereProduct) -> StepInput:
    """A run of the rows of a weight, in its own memory."""
    return _with(member, [None if x is None else x[rows] for x in _tensors(member)], member.gradient[rows], spheres)


def _with(member: StepInput, tensors: Sequence[Any], gradient: Tensor, spheres: SphereProduct) -> StepInput:
    weight, moment, second, largest, norms = tensors
    return StepInput(weight, gradient.detach(), spheres, moment, second, largest, member.dampening, member.step, norms)


def _picked(member: StepInput) -> tuple[Tensor, StepInput] | None:
    """Numbers and copies of the rows that move; None where there are none."""
    manifold, gradient = member.manifold, member.gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    else:
        rows, values = torch.arange(len(gradient), device=gradient.device), gradient
    if isinstance(manifold, PaddedSphereProduct):
        moving = rows != manifold.padding
        rows, values = rows[moving], values[moving]
    if not len(rows):
        return None
    partition = Partition.filters((len(rows), *manifold.partition.shape[1:]))
    radius = manifold.uniform_radius
    spheres = SphereProduct(partition, radius=manifold.radii[rows.cpu()] if radius is None else radius)
    tensors = [None if x is None else x.index_select(0, rows) for x in _tensors(member)]
    return rows, _with(member, tensors, values.to(member.weight.dtype), spheres)
