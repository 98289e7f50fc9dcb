"""The partitions, radii and dtypes that the tests of the manifold run over, and the points and vectors on them."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from manifold_nets import Partition, SphereProduct

PARTITIONS = {
    "filters": Partition.filters((6, 3, 2, 2)),
    "rows": Partition.filters((5, 7)),
    "grouped transposed filters": Partition.transposed_filters((4, 3, 3, 2), groups=2),
    "blocks": Partition.blocks((6, 2, 3), 3),
    "whole": Partition.whole((4, 5)),
    "columns": Partition((4, 5), (4, 5), (1,)),
    "one entry": Partition.filters((5, 1, 1)),
}
RADII = ("unit", "small", "one a group")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

every_sphere = pytest.mark.parametrize(
    ("partition", "radius"), [(partition, radius) for partition in PARTITIONS for radius in RADII]
)


def radius_of(kind: str, partition: Partition) -> float | list[float]:
    """Return a radius of the kind for a partition."""
    if kind == "one a group":
        return [0.3 + 0.25 * group for group in range(partition.n_groups)]
    return {"unit": 1.0, "small": 0.37}[kind]


def spheres(partition: str, radius: str) -> SphereProduct:
    """Return the product of spheres of a named partition and a named kind of radius."""
    return SphereProduct(PARTITIONS[partition], radius=radius_of(radius, PARTITIONS[partition]))


def eps(dtype: torch.dtype) -> float:
    """Return the machine epsilon."""
    return torch.finfo(dtype).eps


def noise(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return standard normal entries that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def point(sphere: SphereProduct, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return a point that depends on nothing but the arguments."""
    return sphere.projx(noise(sphere.partition.shape, torch.float64, seed)).to(dtype)


def tangent(sphere: SphereProduct, x: Tensor, length: float = 1.0, seed: int = 1) -> Tensor:
    """Return a tangent vector at ``x`` whose every group is ``length`` radians long; zero for groups of one entry."""
    wide = x.to(torch.float64)
    u = sphere.proju(wide, noise(x.shape, torch.float64, seed))
    if sphere.partition.group_size > 1:
        u = sphere.partition.multiply(u, length / sphere.group_inner(wide, u).sqrt())
    return u.to(x.dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest expected entry, in float64."""
    found, expected = found.detach().to(torch.float64), expected.detach().to(torch.float64)
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), math.ulp(0.0))
