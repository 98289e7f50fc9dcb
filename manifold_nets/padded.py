"""Spheres of the rows of an embedding, with one zero row for the padding index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct

__all__ = ["PaddedSphereProduct", "padding_of", "rows_of_embedding"]


class PaddedSphereProduct(SphereProduct):
    """The rows of a matrix on spheres, except one that stays zero: the padding row of an embedding.

    Points and tangent vectors have zeros in that row, so it does not count in distances and norms.

    Args:
        shape: shape of the weight, or its `Partition` into rows.
        padding: index of the zero row.
        radius: one number for all rows, or one per row; the one of the zero row is ignored.

    Example:
        >>> sphere = PaddedSphereProduct((4, 3), 0)
        >>> sphere.random_uniform().norm(dim=1).round(decimals=4)
        tensor([0., 1., 1., 1.])
    """

    name = "PaddedSphereProduct"

    def __init__(
        self, shape: Sequence[int] | Partition, padding: int, *, radius: float | Sequence[float] | Tensor = 1.0
    ) -> None:
        partition = shape if isinstance(shape, Partition) else Partition.filters(shape)
        super().__init__(partition, radius=radius)
        self.padding = padding
        # The rows before and behind it, each with spheres of their own: an optimizer steps these.
        ends = [(first, last) for first, last in ((0, padding), (padding + 1, partition.n_groups)) if first < last]
        uniform = self.uniform_radius
        self.parts = tuple(
            (
                slice(first, last),
                SphereProduct(
                    Partition.filters((last - first, *partition.shape[1:])),
                    radius=self.radii[first:last] if uniform is None else uniform,
                ),
            )
            for first, last in ends
        )

    def to_dict(self) -> dict[str, Any]:
        """Return partition, radii and padding row as plain data for JSON."""
        return {**super().to_dict(), "padding": self.padding}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SphereProduct:
        """Rebuild a manifold from `to_dict`."""
        return cls(Partition.from_dict(data), int(data["padding"]), radius=data["radius"])

    def extra_repr(self) -> str:
        """Partition, radii and padding row, for `repr`."""
        return f"{super().extra_repr()}, row {self.padding} zero"

    # For computations, the zero row is replaced by a fixed row of the right norm, which has no effect on results.

    def _filled(self, x: Tensor) -> Tensor:
        radius = float(self.radii[self.padding])
        return x.index_fill(0, self._row(x), radius / math.sqrt(self.partition.group_size))

    def _cleared(self, x: Tensor) -> Tensor:
        return x.index_fill(0, self._row(x), 0.0)

    def _row(self, x: Tensor) -> Tensor:
        return torch.tensor([self.padding], device=x.device)

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: each row is scaled to its radius, and the padding row is zero."""
        self.require_shape(x)
        return self._cleared(super().projx(self._filled(x)))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection on the tangent space; see `SphereProduct.proju`."""
        self.require_shape(x, u)
        return super().proju(self._filled(x), self._cleared(u))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Metric projection of ``x + u``; see `SphereProduct.retr`."""
        self.require_shape(x, u)
        return self._cleared(super().retr(self._filled(x), self._cleared(u)))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x``; see `SphereProduct.expmap`."""
        self.require_shape(x, u)
        return self._cleared(super().expmap(self._filled(x), self._cleared(u)))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Tangent vector whose geodesic reaches ``y``; see `SphereProduct.logmap`."""
        self.require_shape(x, y)
        return self._cleared(super().logmap(self._filled(x), self._filled(y)))

    def component_dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Angle between the rows of two points, in radians; 0 for the padding row."""
        self.require_shape(x, y)
        return super().component_dist(self._filled(x), self._filled(y))

    def refuse_degenerate(self, x: Tensor, name: str) -> None:
        """Raise `DegenerateGroupError` if a row other than the padding row is zero or not finite."""
        self.require_shape(x)
        super().refuse_degenerate(self._filled(x), name)

    def deviations(self, x: Tensor) -> Tensor:
        """Relative deviation of each row from its radius; for the padding row, its norm."""
        found = super().deviations(x)
        found[self.padding] = x.detach()[self.padding].double().norm().cpu()
        return found

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        norm = float(u.detach()[self.padding].double().norm())
        if norm > atol:
            return False, f"row {self.padding} of `u`, the padding row, has norm {norm:.6g} instead of 0"
        return super()._check_vector_on_tangent(self._filled(x), u, atol=atol, rtol=rtol)

    def _found_and_expected(self, x: Tensor, group: int) -> tuple[float, float]:
        found, expected = super()._found_and_expected(x, group)
        return found, 0.0 if group == self.padding else expected


SphereProduct._kinds["padding"] = PaddedSphereProduct


def padding_of(module: nn.Module, leaf: str = "weight") -> int | None:
    """Return the index of the row that an embedding keeps zero; None if there is none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and leaf == "weight":
        return module.padding_idx
    return None


def rows_of_embedding(module: nn.Embedding | nn.EmbeddingBag) -> SphereProduct:
    """Return the unit spheres of the rows of an embedding.

    Example:
        >>> rows_of_embedding(nn.Embedding(5, 3, padding_idx=-1))
        PaddedSphereProduct(5 filters of 3, radius 1, row 4 zero) manifold
    """
    partition, padding = Partition.filters((module.num_embeddings, module.embedding_dim)), padding_of(module)
    return SphereProduct(partition) if padding is None else PaddedSphereProduct(partition, padding)
