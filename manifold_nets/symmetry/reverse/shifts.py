"""The reverse search for shifts: constants that can be added where the structure knows of none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.gradients import EVIDENCE_FLOOR, GradientPass
from manifold_nets.symmetry.report import ShiftSymmetry, UnexplainedSymmetry
from manifold_nets.symmetry.reverse.spans import Span

__all__ = ["unexplained_shifts"]

# Blocks of filters that share a row: heads and groups of normalizations.
_MOST_BLOCKS = 64


def unexplained_shifts(
    fields: tuple[GradientPass, GradientPass],
    shifts: Iterable[ShiftSymmetry],
    tolerance: float,
    only: Container[str] | None = None,
) -> list[UnexplainedSymmetry]:
    """Search for groups of entries whose gradients sum to zero at both points, without what the shifts explain.

    All parameters are searched, or those named in ``only``.
    """
    known: dict[str, list[ShiftSymmetry]] = {}
    for shift in shifts:
        if len(shift.parameters) == 1 and shift.certificate.verdict == "invariant":
            known.setdefault(shift.parameters[0], []).append(shift)
    floors = tuple(
        EVIDENCE_FLOOR * max((float(g.abs().max()) for g in f.gradients.values() if g.numel()), default=0.0)
        for f in fields
    )
    found: list[UnexplainedSymmetry] = []
    for name in fields[0].gradients:
        if only is not None and name not in only:
            continue
        gradients = tuple(euler.gradients[name] for euler in fields)
        if not gradients[0].numel() or not all(bool(g.any()) for g in gradients):
            continue
        if gradients[0].ndim == 1:
            beside = tuple(_beside(name, euler) for euler in fields)
            found += _of_vector(name, gradients, beside, floors, known.get(name, []), tolerance)
        elif gradients[0].ndim > 1:
            found += _of_tensor(name, gradients, floors, known.get(name, []), tolerance)
    return found


def _values(totals: Iterable[Sequence[Tensor]], floors: Iterable[float], size: int, tolerance: float) -> Tensor:
    """Largest certificate value of each group over the points, from the sums of its gradients and their squares."""
    worst = torch.zeros(())
    for (sums, squares), floor in zip(totals, floors, strict=True):
        norms = squares.flatten().cpu().sqrt()
        values = sums.flatten().cpu().abs() / (norms * size**0.5)
        worst = torch.maximum(torch.where(norms > floor, values, torch.inf), worst)
        if not bool((worst <= tolerance).any()):
            break  # most are refuted at the first point
    return worst


# ---- vectors ---------------------------------------------------------------------------------------------------------


def _of_vector(
    name: str,
    gradients: tuple[Tensor, ...],
    beside: tuple[float, ...],
    floors: tuple[float, ...],
    known: list[ShiftSymmetry],
    tolerance: float,
) -> Iterator[UnexplainedSymmetry]:
    """Entries that do nothing, then blocks of entries, interleaved ones, and all entries."""
    count = len(gradients[0])
    span = Span(direction[name] for shift in known for direction in shift.directions)
    single = np.zeros(count, dtype=bool)  # entries that are in the span by themselves
    sizes = [gradient.abs().cpu().numpy() for gradient in gradients]
    for blocks in (n for n in (3, 2, 1) if count % n == 0):
        size = count // blocks
        entries = [n for block in _dead_blocks(sizes, beside, blocks) for n in range(block * size, (block + 1) * size)]
        new = [index for index in entries if span.add({index: 1.0})]
        single[entries] = True
        if new:
            value = max(float(s[new].max()) / b for s, b in zip(sizes, beside, strict=True))
            yield UnexplainedSymmetry("shift", (name,), Partition((count,), (count,), (0,)), tuple(new), value)
    for index in np.flatnonzero(np.any([s <= floor for s, floor in zip(sizes, floors, strict=True)], axis=0)).tolist():
        span.add({index: 1.0})
        single[index] = True
    for blocks in (n for n in range(count - 1, 0, -1) if count % n == 0):
        size = count // blocks
        for partition in dict.fromkeys(
            (Partition((count,), (blocks, size), (0,)), Partition((count,), (size, blocks), (1,)))
        ):
            viewed = [g.reshape(partition.view) for g in gradients]
            totals = [(g.sum(partition.reduced), (g * g).sum(partition.reduced)) for g in viewed]
            values = _values(totals, floors, size, tolerance)
            members = np.arange(count).reshape(partition.view)
            members = members if partition.kept == (0,) else members.T
            numbers = np.flatnonzero((values <= tolerance).numpy() & ~single[members].all(1)).tolist()
            new = [n for n in numbers if span.add(dict.fromkeys(members[n].tolist(), 1.0))]
            if new:
                yield UnexplainedSymmetry("shift", (name,), partition, tuple(new), float(values[new].max()))


def _beside(name: str, euler: GradientPass) -> float:
    """The largest gradient of another parameter of the same module."""
    module = name.rpartition(".")[0]
    others = [g for n, g in euler.gradients.items() if n != name and n.rpartition(".")[0] == module and g.numel()]
    return max((float(g.abs().max()) for g in others), default=0.0)


def _dead_blocks(sizes: list[NDArray[np.float64]], beside: tuple[float, ...], blocks: int) -> list[int]:
    """Blocks of which every entry has no gradient but rounding, next to one of the same module that has.

    Single entries prove nothing: whether a channel is cut off often depends on the inputs. What is exactly zero was
    not reached and proves nothing either.
    """
    found = np.ones(blocks, dtype=bool)
    for size, other in zip(sizes, beside, strict=True):
        block = size.reshape(blocks, -1)
        found &= (block <= EVIDENCE_FLOOR * other).all(1) & (block > 0).any(1)
    return np.flatnonzero(found).tolist()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _of_tensor(
    name: str, gradients: tuple[Tensor, ...], floors: tuple[float, ...], known: list[ShiftSymmetry], tolerance: float
) -> Iterator[UnexplainedSymmetry]:
    """Rows that are added to blocks of filters, constants that are added to filters, and one constant."""
    shape = tuple(gradients[0].shape)
    labels: list[Tensor] | None = None
    live = torch.ones(())
    for partition, values in _levels(gradients, floors, tolerance):
        numbers = torch.nonzero(values <= tolerance).flatten()
        if not len(numbers):
            continue
        if labels is None:
            labels = [label for shift in known for label in _labels(name, shape, shift)]
            labels += _joined(labels)
            # What was not reached at all, as rows that are not looked up, may be in a group or not.
            live = torch.stack([(g != 0).cpu() for g in gradients]).all(0)
        explained = _following(partition, numbers, labels, live)
        new = [n for n in numbers.tolist() if n not in explained]
        if new:
            labels.append(_label_of(partition, new))
            yield UnexplainedSymmetry("shift", (name,), partition, tuple(new), float(values[new].max()))


def _levels(
    gradients: tuple[Tensor, ...], floors: tuple[float, ...], tolerance: float
) -> Iterator[tuple[Partition, Tensor]]:
    """Entries that may be shifted together, from fine to coarse, with the value of each group."""
    shape = tuple(gradients[0].shape)
    rank = len(shape)
    counts = [n for n in range(1, min(shape[0] // 2, _MOST_BLOCKS) + 1) if shape[0] % n == 0]
    finest = max(counts, key=lambda n: sum(n % d == 0 for d in counts), default=1)
    # The large tensors are read once; blocks of blocks are sums of sums.
    blocks = [g.reshape(finest, shape[0] // finest, *shape[1:]) for g in gradients]
    totals = [(block.sum(1), (block * block).sum(1)) for block in blocks]
    for count in sorted((n for n in counts if finest % n == 0), reverse=True):
        view = (count, shape[0] // count, *shape[1:])
        joined = [[x.reshape(count, finest // count, *shape[1:]).sum(1) for x in pair] for pair in totals]
        yield Partition(shape, view, (0, *range(2, rank + 1))), _values(joined, floors, view[1], tolerance)
    others: list[tuple[tuple[int, ...], Partition]] = [
        (tuple(range(1, rank)), Partition.filters(shape)), (tuple(range(rank)), Partition.whole(shape))
    ]  # fmt: skip
    if rank > 2 and shape[1] > 1:
        others.insert(0, ((1,), Partition(shape, shape, (0, *range(2, rank)))))
    for axes, partition in others:
        if partition.group_size > 1:
            joined = [[g.sum(axes), (g * g).sum(axes)] for g in gradients]
            yield partition, _values(joined, floors, partition.group_size, tolerance)


def _labels(name: str, shape: tuple[int, ...], shift: ShiftSymmetry) -> Iterator[Tensor]:
    """For each entry the number of the known shift that moves it, −1 where none does."""
    if shift.partition is not None:
        yield _label_of(shift.partition, list(shift.groups))
        return
    label = torch.full((int(np.prod(shape)),), -1, dtype=torch.int64)
    for number, direction in enumerate(shift.directions):
        label[list(direction[name])] = number
    yield label.reshape(shape)


def _joined(labels: Sequence[Tensor]) -> list[Tensor]:
    """One label in place of several that move different entries: together they explain what none does alone."""
    joined = torch.full_like(labels[0], -1) if len(labels) > 1 else None
    for label in labels:
        if joined is None or bool(((joined >= 0) & (label >= 0)).any()):
            return []
        joined = torch.where(label >= 0, label + joined.max() + 1, joined)
    return [] if joined is None else [joined]


def _label_of(partition: Partition, groups: list[int]) -> Tensor:
    ids = partition.group_ids()
    return torch.where(torch.isin(ids, torch.tensor(groups, dtype=torch.int64)), ids, -1)


def _following(partition: Partition, numbers: Tensor, labels: list[Tensor], live: Tensor) -> set[int]:
    """The groups whose live entries are unions of those of groups which are known to be shifted together."""
    drawn = torch.zeros(partition.n_groups, dtype=torch.float64)
    drawn[numbers] = 1.0 + torch.rand(len(numbers), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    marks = partition.multiply(torch.ones(partition.shape, dtype=torch.float64), partition.spread(drawn)) * live
    explained: set[int] = set()
    for label in labels:
        moved = ((label + 1) * live).flatten().long()
        count = torch.bincount(moved)
        means = torch.bincount(moved, weights=marks.flatten()) / count.clamp_min(1)
        means[0] = 0.0
        # Where a known shift moves entries of several marks, it follows none of them.
        differs = (means[moved].reshape(marks.shape) - marks).abs() > 1e-9
        hit = partition.sum(differs.double()).flatten()
        explained |= {n for n in numbers.tolist() if hit[n] == 0}
    return explained
