"""What can be said of a weight without a graph, and of a weight without values that a sphere could hold.

Where `torch.export` refuses a model the structure is unknown: nothing says why a group is invariant, nor what would
have to change with it. The Euler certificate needs no graph: it answers for the partitions that a layer suggests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from manifold_nets.groups import Partition
from manifold_nets.symmetry.invariance import Certifier
from manifold_nets.symmetry.report import Certificate, UnexplainedSymmetry, WeightFinding

__all__ = ["NOT_SEARCHED", "UNSUPPORTED", "finding_without_graph", "integer_finding", "natural_partitions", "qualified"]

NOT_SEARCHED = (
    "the model could not be traced, so each weight was tested at one point only, by its filters, blocks of filters, "
    "columns, and as a whole. Single groups of these partitions, weights together with their biases, biases and scales "
    "of normalizations, rescalings between layers, and shifts were not searched"
)
# What no structure supports has to vanish to rounding, not only to the tolerance: blocks behind a layer scale of 1e-6
# are nearly invariant.
UNSUPPORTED = 1e-2

_UNTRACED = "leave it: without its graph nothing says what would have to change along with it"
_COMPLEX = "it is invariant, but its entries are complex: spheres hold real weights"
_META = "no evidence: it is on the meta device and has no values"
_LOAD = "give the model its values and analyse it again"
_DISCRETE = "leave it: integers are not trained by gradients"


def natural_partitions(module: nn.Module, shape: Sequence[int]) -> Iterator[Partition]:
    """Partitions that the owner of a weight suggests, from fine to coarse.

    The filters (output channels of a transposed convolution are not its rows), blocks of consecutive filters such as
    attention heads and the groups of a group normalization, the slices along the second axis, and the whole tensor.

    Example:
        >>> [p.n_groups for p in natural_partitions(nn.Linear(5, 6), (6, 5))]
        [6, 3, 2, 5, 1]
    """
    shape = tuple(shape)
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and len(shape) > 2:
        yield Partition.transposed_filters(shape, module.groups)
    elif shape[0] == 1 and len(shape) > 2 and not isinstance(module, nn.modules.conv._ConvNd):
        yield Partition(shape, shape, (1,))  # a leading axis to be multiplied along, as that of examples
    else:
        yield Partition.filters(shape)
        for count in range(shape[0] // 2, 1, -1):
            if shape[0] % count == 0:
                yield Partition.blocks(shape, count)
        if shape[0] > 1 < shape[1]:
            yield Partition(shape, shape, (1,))
    if shape[0] > 1:
        yield Partition.whole(shape)


def finding_without_graph(
    name: str, parameter: Tensor, module: nn.Module, certifier: Certifier, why: str
) -> tuple[WeightFinding, UnexplainedSymmetry | None]:
    """Judge a weight by its certificate alone, and return the groups that it calls invariant as well.

    Args:
        name: the parameter.
        parameter: its value.
        module: the module that owns it.
        certifier: reads the certificate.
        why: why there is no graph.
    """
    first: Certificate | None = None
    found: UnexplainedSymmetry | None = None
    reason = f"its structure is unknown: {why}"
    for partition in natural_partitions(module, parameter.shape):
        certificate = certifier.alone(name, partition)
        first = first or certificate
        if certificate.verdict == "invariant":
            first = certificate
            if certificate.value is not None and certificate.value <= UNSUPPORTED * certifier.tolerance:
                groups = certifier.with_evidence(name, partition)
                found = UnexplainedSymmetry("scale", (name,), partition, groups, certificate.value)
            reason += f"; the certificate finds it invariant: {partition}"
            break
    return _left(name, parameter, module, reason, _UNTRACED, first), found


def integer_finding(name: str, parameter: Tensor, module: nn.Module) -> WeightFinding:
    """Say of an integer parameter that it has no continuous symmetry."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return _left(name, parameter, module, f"its entries are of type {dtype}: no scale acts on them", _DISCRETE, None)


def qualified(finding: WeightFinding, parameter: Tensor) -> WeightFinding:
    """Say of a complex parameter that no sphere holds it, and of one on the meta device why there is no evidence."""
    if parameter.is_complex() and finding.partition is not None:
        return replace(finding, status="unknown", broken_by=_COMPLEX, remedy="leave it: it is complex")
    if parameter.is_meta:
        return replace(finding, broken_by=finding.broken_by or _META, remedy=_LOAD)
    return finding


def _left(
    name: str, parameter: Tensor, module: nn.Module, reason: str, remedy: str, certificate: Certificate | None
) -> WeightFinding:
    return WeightFinding(
        name=name,
        shape=tuple(parameter.shape),
        layer=type(module).__name__,
        status="unknown",
        partition=None,
        filters_per_group=0,
        absorbers=(),
        scaled_along=(),
        certificate=certificate or Certificate(None, "no evidence", 0, 0, 0),
        broken_by=reason,
        remedy=remedy,
    )
