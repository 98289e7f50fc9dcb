"""Combine structure and certificate to the finding of one weight, with a graph and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from manifold_nets.groups import Partition
from manifold_nets.symmetry.generators import Generators, Part, single_entries
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.low_variance import Places
from manifold_nets.symmetry.report import Absorber, Certificate, ScaledAlong, UnexplainedSymmetry, WeightFinding
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.trace import TracedGraph
from manifold_nets.symmetry.weight_structure import Structure

__all__ = [
    "NOT_SEARCHED",
    "UNSUPPORTED",
    "WeightFindings",
    "finding_without_graph",
    "integer_finding",
    "natural_partitions",
    "owner_of",
    "qualified",
]

NOT_SEARCHED = (
    "the model could not be traced, so each weight was tested at one point only: its filters, blocks of filters, "
    "columns, and the whole tensor. Not searched were single groups of these partitions, weights together with their "
    "biases, affine parameters of normalizations, rescalings between layers, and shifts"
)
# Without support from the structure, values must vanish to rounding and not only to the tolerance: blocks behind a
# layer scale of 1e-6 are nearly invariant.
UNSUPPORTED = 1e-2

_UNTRACED = "leave it: without a graph it is unknown what must change with it"
_COMPLEX = "it is invariant, but its entries are complex: spheres hold real weights"
_META = "no evidence: it is on the meta device and has no values"
_LOAD = "load the weights and analyse the model again"
_DISCRETE = "leave it: integers are not trained by gradients"
_REMEDIES = {
    "invariant": "keep each group on a sphere and train with a Riemannian optimizer (manifold_nets.convert)",
    "constrained": "none needed: each group is on its sphere",
    "not invariant": "leave it: its scale matters to the function",
    "unknown": "leave it, or report the operation: it has no rule, so the effect of the scale is unknown",
    "no evidence": "leave it: its gradient vanishes on these inputs; try other inputs",
    "disagreement": "leave it and report a bug: structure and certificate contradict each other",
}

# The status of a weight that is invariant by its certificate, by the strongest reason against it.
_CONTRADICTED: dict[str, str] = {"smooth": "disagreement", "cautious": "unknown", "jump": "not invariant"}
_NOT_FINITE = "re-initialize or prune the entries that are not finite: they make the outputs NaN"
_WITHOUT_INFLUENCE = "; no output depends on it, so training does not change it"


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that owns a parameter."""
    return model.get_submodule(name.rpartition(".")[0])


class WeightFindings:
    """Combines structure and certificate of each weight.

    Args:
        model_copy: the copy that is analysed.
        graph: its graph.
        test: the gradient test.
        variances: the batch variances in front of each batch normalization.
    """

    def __init__(
        self, model_copy: nn.Module, graph: TracedGraph, test: InvarianceTest, variances: Mapping[Any, Tensor]
    ) -> None:
        self.model_copy, self.graph, self.test, self.variances = model_copy, graph, test, variances
        # Of weights of which structure claims nothing, the partition that the certificate calls invariant.
        self.alone_invariant: dict[str, Partition] = {}

    def lacks_gradient(self, structure: Structure) -> bool:
        """Whether the outputs tell nothing of a weight that structure calls invariant: it has no gradient at all."""
        gradients, names = self.test.gradients, [structure.name, *structure.companions]
        known = structure.partition is not None and not gradients.without_values
        return known and not any(bool(gradients.gradients[name].any()) for name in names)

    def finding(
        self, name: str, structure: Structure | None, constrained: bool, inside: GradientPass | None = None
    ) -> WeightFinding:
        """Judge one weight; ``inside`` is the field at the normalizations behind it where no output depends on it."""
        shape = self.test.gradients.shapes[name]
        layer = type(owner_of(self.model_copy, name)).__name__
        partition = structure.partition if structure is not None else None
        if structure is None or partition is None:
            return self._without_groups(name, shape, layer, structure)
        partition = self._without_zero_groups(name, partition)
        groups = structure.group_of_scale(partition)
        generators = self._generators(structure, partition, groups)
        certificate = self._certificate(structure, generators, groups, inside)
        status = {"invariant": "constrained" if constrained else "invariant", "not invariant": "disagreement"}.get(
            certificate.verdict, certificate.verdict
        )
        return WeightFinding(
            name=name,
            shape=shape,
            layer=layer,
            status=status,
            partition=partition,
            filters_per_group=structure.seed.n_groups // partition.n_groups,
            absorbers=tuple(self._absorber(structure, a, groups) for a in structure.absorptions),
            scaled_along=tuple(
                ScaledAlong(bias, structure.groups_of_forms(ids, groups)) for bias, ids in structure.companions.items()
            ),
            certificate=certificate,
            broken_by=None,
            remedy=self._remedy(name, status, certificate),
            finer_groups=structure.count if structure.count > partition.n_groups else 0,
            generators=generators,
        )

    def _remedy(self, name: str, status: str, certificate: Certificate) -> str:
        if name in self.test.not_finite:
            return _NOT_FINITE
        if status == "no evidence" and certificate.because:
            return f"leave it: {certificate.because}; try other inputs"
        return _REMEDIES[status] + (_WITHOUT_INFLUENCE if certificate.taken_at else "")

    def _without_zero_groups(self, name: str, partition: Partition) -> Partition:
        """The whole table in place of looked-up rows where one is zero and has no direction, as a padding token's."""
        if not isinstance(owner_of(self.model_copy, name), nn.Embedding) or self.test.gradients.without_values:
            return partition
        zero = bool((partition.norms(self.test.gradients.weights[name]) == 0).any())
        return Partition.whole(partition.shape) if zero else partition

    def _without_groups(
        self, name: str, shape: tuple[int, ...], layer: str, structure: Structure | None
    ) -> WeightFinding:
        """Judge a weight for which structure claims no groups: the certificate must not find any either.

        Where it does, that contradicts only what a derivative would have shown. Jumps and what is detached are
        invisible to it, and a rule that covers sufficient conditions only leaves the weight unknown.
        """
        seed = structure.seed if structure is not None else Partition.filters(shape)
        tried = {partition: self.test.of_partition(name, partition) for partition in (Partition.whole(shape), seed)}
        certificate = tried[seed]
        for partition, found in tried.items():
            if found.verdict == "invariant":
                certificate, self.alone_invariant[name] = found, partition
        if structure is None:
            reason, unknown, free = "the parameter does not occur in the graph", False, 0
        else:
            reason = "; ".join(str(because) for because in structure.breaks[:3])
            unknown = any(because.unknown for because in structure.breaks)
            free = sum(len(members) for members in structure.free)
            if free:
                reason = f"{free} of {structure.seed.n_groups} filters are free, the others are not: {reason}"
        status = "unknown" if unknown else "not invariant"
        if certificate.verdict == "invariant" and not unknown:
            status = self._contradicted(structure)
        elif certificate.verdict == "no evidence":
            status = "no evidence"
        return WeightFinding(
            name, shape, layer, status, None, 0, (), (), certificate, reason, self._remedy(name, status, certificate),
            free_filters=free,
        )  # fmt: skip

    def _contradicted(self, structure: Structure | None) -> str:
        """The status of a weight that structure refuses and the certificate calls invariant."""
        if structure is None:
            return "disagreement"
        certainties = {because.certainty for because in structure.breaks}
        behind = self.graph.flow.behind(self.graph.placeholders_of(structure.name))
        if any(op_name(node) == "detach" for node in behind):
            certainties = {"jump" if certainty == "smooth" else certainty for certainty in certainties}
        return _CONTRADICTED[min(certainties, key=list(_CONTRADICTED).index)]

    def _generators(self, structure: Structure, partition: Partition, groups: NDArray[np.int64]) -> Generators:
        """The scales of the groups of a partition, each together with the biases that are scaled along."""
        numbers = np.arange(partition.n_groups)
        parts = [Part(structure.name, partition, numbers, numbers, np.ones(len(numbers)))]
        for bias, ids in structure.companions.items():
            of_entry = np.array(structure.groups_of_forms(ids, groups))
            entries = np.flatnonzero(of_entry >= 0)
            shape = self.test.gradients.shapes[bias]
            parts.append(Part(bias, single_entries(shape), entries, of_entry[entries], np.ones(len(entries))))
        return Generators(tuple(parts), partition.n_groups)

    def _certificate(
        self, structure: Structure, generators: Generators, groups: NDArray[np.int64], inside: GradientPass | None
    ) -> Certificate:
        """Certificate at the outputs, or at the normalizations that absorb a weight without influence on these."""
        if inside is not None:
            test = InvarianceTest(inside, self.test.tolerance, None, self.test.not_finite)
            places = dict.fromkeys(f"{a.module or 'model'} ({a.op})" for a in structure.absorptions)
            return replace(test.certificate(generators), taken_at=", ".join(places))
        low_variance = self.test.low_variance
        if low_variance is None:
            return self.test.certificate(generators)

        def excuse(asked: NDArray[np.bool_]) -> dict[int, Places]:
            found: dict[int, Places] = {}
            for scale, where in low_variance.scales(structure.scales, structure.absorptions).items():
                if scale < len(groups) and asked[groups[scale]]:
                    places = found.setdefault(int(groups[scale]), {})
                    for place, channels in where.items():
                        places.setdefault(place, set()).update(channels)
            return found

        return self.test.certificate(generators, excuse)

    def _absorber(self, structure: Structure, absorption: Absorption, groups: np.ndarray[Any, Any]) -> Absorber:
        args = bound_arguments(absorption.node)
        running = absorption.running_mean
        per_channel = absorption.kind in ("batch", "instance")
        variances = self.variances.get(absorption.node)
        return Absorber(
            op=absorption.op,
            module=absorption.module,
            kind=absorption.kind,
            eps=args.get("eps"),
            weight=self.graph.parameter_of(args.get("weight")),
            bias=self.graph.parameter_of(args.get("bias")),
            running_mean=running,
            running_var=absorption.running_var,
            calls=self.graph.uses_of_buffer(running),
            groups=structure.groups_of_forms(absorption.ids, groups) if per_channel else (),
            variances=tuple(variances.tolist()) if variances is not None and absorption.kind == "batch" else (),
        )


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
    name: str, parameter: Tensor, module: nn.Module, test: InvarianceTest, why: str
) -> tuple[WeightFinding, UnexplainedSymmetry | None]:
    """Judge a weight by its certificate alone; also return the groups that are invariant by it.

    Args:
        name: the parameter.
        parameter: its value.
        module: the module that owns it.
        test: tests the groups.
        why: why there is no graph.
    """
    first: Certificate | None = None
    found: UnexplainedSymmetry | None = None
    reason = f"its structure is unknown: {why}"
    for partition in natural_partitions(module, parameter.shape):
        certificate = test.of_partition(name, partition)
        first = first or certificate
        if certificate.verdict == "invariant":
            first = certificate
            if certificate.value is not None and certificate.value <= UNSUPPORTED * test.tolerance:
                groups = test.with_evidence(name, partition)
                found = UnexplainedSymmetry("scale", (name,), partition, groups, certificate.value)
            reason += f"; the certificate finds it invariant: {partition}"
            break
    return _left(name, parameter, module, reason, _UNTRACED, first), found


def integer_finding(name: str, parameter: Tensor, module: nn.Module) -> WeightFinding:
    """The finding of an integer parameter, which has no continuous symmetry."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return _left(name, parameter, module, f"its entries are {dtype}: they have no continuous scale", _DISCRETE, None)


def qualified(finding: WeightFinding, parameter: Tensor) -> WeightFinding:
    """Explain in the finding that spheres cannot hold complex weights, and that meta tensors give no evidence."""
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
