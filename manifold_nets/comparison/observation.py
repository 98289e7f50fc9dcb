"""Measurements during training: norms and rotation of the filters, and the memory of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifold_nets.comparison.results import LayerRecord
from manifold_nets.groups import Partition, wide


def sampled_steps(steps: int) -> frozenset[int]:
    """The steps of an epoch, counted from 0, around which rotation is measured: one in sixteen, at most four.

    Example:
        >>> sorted(sampled_steps(10)), sorted(sampled_steps(100))
        ([9], [24, 49, 74, 99])
    """
    count = max(1, min(4, steps // 16))
    return frozenset((number + 1) * steps // count - 1 for number in range(count))


class FilterWatch:
    """Norms of the filters of a model's weights, and the angles by which sampled steps turn them.

    The angle between filters u and v is 2 arcsin(‖û − v̂‖/2), which is accurate for small angles, and to three digits
    near π. A filter of norm zero, before or after, counts as not turning.

    Args:
        model: the model in training.
        partitions: the filters of each weight, by name.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> watch = FilterWatch(model, {"weight": Partition.filters((1, 2))})
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[2.0, 0.0]]))
        ...     watch.before_step()
        ...     _ = model.weight.copy_(torch.tensor([[0.0, 3.0]]))
        >>> norms = watch.after_step()
        >>> norms, round(watch.finish_epoch(norms)[0].rotation, 4)
        ([3.0], 1.5708)
    """

    def __init__(self, model: nn.Module, partitions: Mapping[str, Partition]) -> None:
        self._partitions = dict(partitions)
        places = [name.rpartition(".") for name in self._partitions]
        self._owners = [(model.get_submodule(path), leaf) for path, _, leaf in places]
        self._before: list[Tensor] = []
        self._angles = [0.0] * len(self._partitions)
        self._counts: Tensor | None = None
        self._samples = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights."""
        return tuple(self._partitions)

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the directions of all filters."""
        # A filter of norm zero has no direction: 0/0.
        self._before = [rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in self._rows()]

    @torch.no_grad()
    def after_step(self) -> list[float]:
        """Measure the angles to the filters before the step; return the mean norm of each weight's filters."""
        self._samples += 1
        if not self._partitions:
            return []
        # Only a few digits are used, so the fastest sum is good enough.
        lengths, directions = [], []
        for rows in self._rows():
            lengths.append(torch.linalg.vector_norm(rows, dim=1))
            directions.append(rows / lengths[-1].unsqueeze(1))
        moved = torch._foreach_sub(directions, self._before)
        apart = torch.cat([torch.linalg.vector_norm(each, dim=1) for each in moved])
        # The sine of half an angle is exact where it is small; where it is near 1 three digits of the angle are left.
        angles = (apart / 2).clamp_max_(1).asin_().mul_(2)
        # One sum and one transfer for all weights.
        values = torch.cat([*lengths, angles.nan_to_num_(nan=0.0)])
        if self._counts is None:
            self._counts = torch.tensor(2 * [len(each) for each in lengths], device=values.device)
        means = torch.segment_reduce(values, "mean", lengths=self._counts, unsafe=True).tolist()
        norms: list[float] = means[: len(lengths)]
        self._angles = [total + angle for total, angle in zip(self._angles, means[len(lengths) :], strict=True)]
        self._before = []
        return norms

    def finish_epoch(self, norms: list[float]) -> tuple[LayerRecord, ...]:
        """The records of an epoch: the given norms, and the mean of the angles since the last one."""
        angles = [angle / max(self._samples, 1) for angle in self._angles]
        self._angles, self._samples = [0.0] * len(self._angles), 0
        return tuple(LayerRecord(norm, angle) for norm, angle in zip(norms, angles, strict=True))

    def _rows(self) -> Iterator[Tensor]:
        # The weight is looked up each time: an optimizer may replace a parameter, or compute the weight from others.
        for (owner, leaf), partition in zip(self._owners, self._partitions.values(), strict=True):
            weight = wide(getattr(owner, leaf).detach())
            # Filters along axis 0 need no permutation, which would dominate the time for small ones.
            along_first = partition.kept == (0,) and partition.view == partition.shape
            yield weight.flatten(1) if along_first else partition.rows(weight)


def peak_memory(steps: Callable[[], None], device: str) -> int | None:
    """The peak of the bytes that tensors allocated during some steps, beyond what was allocated before.

    Args:
        steps: makes an optimizer and takes a few steps.
        device: where the tensors are: the CPU or a CUDA device.

    Returns:
        Bytes; None if the device does not report it.

    Example:
        >>> peak_memory(lambda: [torch.zeros(1000) for _ in range(3)], "cpu")
        12000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = int(torch.cuda.memory_allocated(device))
        steps()
        return int(torch.cuda.max_memory_allocated(device)) - held
    if torch.device(device).type != "cpu":
        steps()
        return None
    allocations = _Allocations()
    with allocations:
        steps()
    return allocations.most


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations return, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.held += size
        self.most = max(self.most, self.held)

        def gone(_: object) -> None:
            self.held -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
