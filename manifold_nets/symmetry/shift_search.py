"""The reverse search for shifts: constants that can be added where the structure knows of none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.certificate import EVIDENCE_FLOOR, EulerField
from manifold_nets.symmetry.shift_report import ShiftSymmetry
from manifold_nets.symmetry.spans import Span
from manifold_nets.symmetry.unexplained import UnexplainedSymmetry

__all__ = ["unexplained_shifts"]

# Blocks of filters that share a row: heads and groups of normalizations.
_MOST_BLOCKS = 64


def unexplained_shifts(
    fields: tuple[EulerField, EulerField], shifts: Iterable[ShiftSymmetry], tolerance: float
) -> list[UnexplainedSymmetry]:
    """Search for groups of entries whose gradients sum to zero at both points, without what the shifts explain."""
    known: dict[str, list[ShiftSymmetry]] = {}
    for shift in shifts:
        if len(shift.parameters) == 1 and shift.certificate.verdict == "invariant":
            known.setdefault(shift.parameters[0], []).append(shift)
    floors = tuple(
        EVIDENCE_FLOOR * max((float(g.abs().max()) for g in f.gradients.values() if g.numel()), default=0.0) for f in fields
    )
    found: list[UnexplainedSymmetry] = []
    for name in fields[0].gradients:
        gradients = tuple(euler.gradients[name] for euler in fields)
        if not gradients[0].numel() or not all(bool(g.any()) for g in gradients):
            continue
        if gradients[0].ndim == 1:
            found += _of_vector(name, gradients, floors, known.get(name, []), tolerance)
        elif gradients[0].ndim > 1:
            found += _of_tensor(name, gradients, floors, known.get(name, []), tolerance)
    return found


def _values(gradients: Iterable[Tensor], floors: Iterable[float], partition: Partition) -> Tensor:
    """Largest certificate value of each group over both points; infinite where a gradient vanishes."""
    worst = torch.zeros(partition.n_groups, dtype=torch.float64)
    for gradient, floor in zip(gradients, floors, strict=True):
        norms = partition.norms(gradient).flatten().cpu()
        sums = partition.sum(gradient).flatten().cpu().abs()
        values = sums / (norms * partition.group_size**0.5)
        worst = torch.maximum(worst, torch.where(norms > floor, values, torch.inf))
    return worst


# ---- vectors ---------------------------------------------------------------------------------------------------------


def _of_vector(
    name: str, gradients: tuple[Tensor, ...], floors: tuple[float, ...], known: list[ShiftSymmetry], tolerance: float
) -> Iterator[UnexplainedSymmetry]:
    """Entries that do nothing, then blocks of entries, interleaved ones, and all entries."""
    count = len(gradients[0])
    span = Span(direction[name] for shift in known for direction in shift.directions)
    sizes = [gradient.abs().cpu().numpy() for gradient in gradients]
    # What cancels leaves rounding; what is exactly zero was never reached and proves nothing.
    dead = np.all([(s > 0) & (s <= floor) for s, floor in zip(sizes, floors, strict=True)], axis=0)
    new = [index for index in np.flatnonzero(dead).tolist() if span.add({index: 1.0})]
    if new:
        largest = max(float(s.max()) for s in sizes)
        value = max(float(s[new].max()) for s in sizes) / largest if largest else 0.0
        yield UnexplainedSymmetry("shift", (name,), Partition((count,), (count,), (0,)), tuple(new), value)
    for index in np.flatnonzero(np.any([s <= floor for s, floor in zip(sizes, floors, strict=True)], axis=0)).tolist():
        span.add({index: 1.0})
    for blocks in (n for n in range(count - 1, 0, -1) if count % n == 0):
        size = count // blocks
        for partition in dict.fromkeys(
            (Partition((count,), (blocks, size), (0,)), Partition((count,), (size, blocks), (1,)))
        ):
            values = _values(gradients, floors, partition)
            ids = partition.group_ids()
            numbers = torch.nonzero(values <= tolerance).flatten().tolist()
            new = [n for n in numbers if span.add(dict.fromkeys(torch.nonzero(ids == n).flatten().tolist(), 1.0))]
            if new:
                yield UnexplainedSymmetry("shift", (name,), partition, tuple(new), float(values[new].max()))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _of_tensor(
    name: str, gradients: tuple[Tensor, ...], floors: tuple[float, ...], known: list[ShiftSymmetry], tolerance: float
) -> Iterator[UnexplainedSymmetry]:
    """Rows that are added to blocks of filters, constants that are added to filters, and one constant."""
    shape = tuple(gradients[0].shape)
    labels: list[Tensor] | None = None
    for partition in _shifted_together(shape):
        values = _values(gradients, floors, partition)
        numbers = torch.nonzero(values <= tolerance).flatten()
        if not len(numbers):
            continue
        labels = [label for shift in known for label in _labels(name, shape, shift)] if labels is None else labels
        explained = _following(partition, numbers, labels)
        new = [n for n in numbers.tolist() if n not in explained]
        if new:
            labels.append(_label_of(partition, new))
            yield UnexplainedSymmetry("shift", (name,), partition, tuple(new), float(values[new].max()))


def _shifted_together(shape: tuple[int, ...]) -> Iterator[Partition]:
    """Entries that may be shifted together, from fine to coarse."""
    rank = len(shape)
    for blocks in range(min(shape[0] // 2, _MOST_BLOCKS), 0, -1):
        if shape[0] % blocks == 0:
            view = (blocks, shape[0] // blocks, *shape[1:])
            yield Partition(shape, view, (0, *range(2, rank + 1)))
    if rank > 2 and shape[1] > 1:
        yield Partition(shape, shape, (0, *range(2, rank)))
    if int(np.prod(shape[1:])) > 1:
        yield Partition.filters(shape)
    yield Partition.whole(shape)


def _labels(name: str, shape: tuple[int, ...], shift: ShiftSymmetry) -> Iterator[Tensor]:
    """For each entry the number of the known shift that moves it, −1 where none does."""
    if shift.partition is not None:
        yield _label_of(shift.partition, list(shift.groups))
        return
    label = torch.full((int(np.prod(shape)),), -1, dtype=torch.int64)
    for number, direction in enumerate(shift.directions):
        label[list(direction[name])] = number
    yield label.reshape(shape)


def _label_of(partition: Partition, groups: list[int]) -> Tensor:
    ids = partition.group_ids()
    return torch.where(torch.isin(ids, torch.tensor(groups, dtype=torch.int64)), ids, -1)


def _following(partition: Partition, numbers: Tensor, labels: list[Tensor]) -> set[int]:
    """The groups that are unions of groups which are known to be shifted together."""
    drawn = torch.zeros(partition.n_groups, dtype=torch.float64)
    drawn[numbers] = 1.0 + torch.rand(len(numbers), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    marks = partition.multiply(torch.ones(partition.shape, dtype=torch.float64), partition.spread(drawn))
    explained: set[int] = set()
    for label in labels:
        moved = label.flatten() + 1
        count = torch.bincount(moved)
        means = torch.bincount(moved, weights=marks.flatten()) / count.clamp_min(1)
        means[0] = 0.0
        # Where a known shift moves entries of several marks, it follows none of them.
        differs = (means[moved].reshape(marks.shape) - marks).abs() > 1e-9
        hit = partition.sum(differs.double()).flatten()
        explained |= {n for n in numbers.tolist() if hit[n] == 0}
    return explained
