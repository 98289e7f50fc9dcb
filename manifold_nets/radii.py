"""The radii of the spheres of a weight: one number for all groups, or one per group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_nets.errors import PartitionError
from manifold_nets.groups import Partition, accumulation_dtype, has_values

__all__ = ["Radii"]


class Radii:
    """The radius of each group of a partition.

    They are numbers, not buffers: casting a model to half precision must not round its radii.

    Args:
        partition: the groups.
        radius: one positive number for all groups, or one per group in the order of the groups.

    Raises:
        PartitionError: the number of radii is neither one nor the number of groups, or one is not positive and finite.

    Example:
        >>> radii = Radii(Partition.filters((2, 3)), [1.0, 2.0])
        >>> radii.multiply(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    def __init__(self, partition: Partition, radius: float | Sequence[float] | Tensor) -> None:
        given = radius.detach().flatten().tolist() if isinstance(radius, Tensor) else radius
        values = tuple(float(value) for value in (given if isinstance(given, Iterable) else [given]))
        expected = f"one radius, or one for each of {partition.n_groups} groups"
        if len(values) not in (1, partition.n_groups):
            raise PartitionError(f"{len(values)} radii", expected, "Pass one of these numbers of radii.")
        for group, value in enumerate(values):
            if not (value > 0 and math.isfinite(value)):
                found = f"radius {value} for group {group}"
                raise PartitionError(found, "a positive finite number", "Use the norm of the group.")
        self.partition = partition
        self.values = values[:1] if len(set(values)) == 1 else values
        # Whether squares of the radii, and sums of such products, are far from the limits of float32.
        self.moderate = min(self.values) >= 2.0**-40 and max(self.values) <= 2.0**40
        self._spread: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def uniform(self) -> float | None:
        """The radius if all groups have the same one, else None."""
        return self.values[0] if len(self.values) == 1 else None

    @cached_property
    def squares(self) -> np.ndarray:
        """Squared radii, float64: one, or one per group, at a fixed place in memory that kernels read."""
        return np.square(self.values)

    def tensor(self) -> Tensor:
        """Return the radius of each group: float64, shape ``(n_groups,)``, on the CPU."""
        return torch.tensor(self.values, dtype=torch.float64, device="cpu").expand(self.partition.n_groups).clone()

    def factor(self, x: Tensor) -> Tensor | float:
        """Return the radii as a factor for the groups of ``x``: a number, or a tensor of ``spread_shape``."""
        if len(self.values) == 1:
            return self.values[0]
        key = (x.device, accumulation_dtype(x.dtype))
        spread = self._spread.get(key)
        if spread is None:
            # An inference tensor in the cache could not be used in training afterwards.
            with torch.inference_mode(False):
                spread = self.partition.spread(torch.tensor(self.values, device=key[0], dtype=key[1]))
            if has_values(spread):
                self._spread[key] = spread
        return spread

    def divide_twice(self, values: Tensor) -> Tensor:
        """Divide values, one per group in ``spread_shape``, by the squared radii."""
        radius = self.factor(values)
        return values if self.uniform == 1.0 else values / (radius * radius)

    def multiply_twice(self, x: Tensor) -> Tensor:
        """Multiply each group of ``x`` by the square of its radius."""
        if not self.moderate:
            return self.multiply(self.multiply(x))
        radius = self.factor(x)
        return x if self.uniform == 1.0 else self.partition.multiply(x, radius * radius)

    def divide(self, x: Tensor) -> Tensor:
        """Divide each group of ``x`` by its radius; at radius 1 this is ``x`` itself."""
        return x if self.uniform == 1.0 else self.partition.divide(x, self.factor(x))

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply each group of ``x`` by its radius; at radius 1 this is ``x`` itself."""
        return x if self.uniform == 1.0 else self.partition.multiply(x, self.factor(x))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spread": {}}

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"radius {low:g}" if low == high else f"radii {low:g}…{high:g}"
