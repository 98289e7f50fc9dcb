"""What structure and certificate say together of one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_nets.groups import Partition
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.graph import bound_arguments, is_region, op_name
from manifold_nets.symmetry.invariance import Certifier, Excused
from manifold_nets.symmetry.low_variance import LowVariance, Places, told
from manifold_nets.symmetry.report import Absorber, Certificate, ScaledAlong, WeightFinding
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.structure.find import Structure
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["Judge", "owner_of"]

_REMEDIES = {
    "invariant": "keep each group on a sphere and train with a Riemannian optimizer (manifold_nets.convert)",
    "constrained": "none needed: each group is on its sphere",
    "not invariant": "leave it: its scale matters to the function",
    "unknown": "leave it, or report the operation: nothing is known about its scale",
    "no evidence": "leave it: its gradient vanishes on these inputs; try other inputs",
    "disagreement": "leave it and report it: structure and certificate contradict each other",
}

# What a weight is that the certificate calls invariant, by the strongest of the reasons against it.
_CONTRADICTED: dict[str, str] = {"smooth": "disagreement", "cautious": "unknown", "jump": "not invariant"}
_NOT_FINITE = "re-initialize or prune what is not finite: it has no direction, and the network computes NaN"
_WITHOUT_INFLUENCE = "; no output depends on it: training does not move it"


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that owns a parameter."""
    return model.get_submodule(name.rpartition(".")[0])


class Judge(Certifier):
    """Puts structure and certificate of one weight side by side."""

    def __init__(
        self,
        twin: nn.Module,
        graph: TracedGraph,
        field: GradientPass,
        variances: dict[Any, Tensor],
        tolerance: float,
        blunt: LowVariance | None = None,
        not_finite: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__(field, tolerance, not_finite)
        self.twin, self.graph, self.variances, self.blunt = twin, graph, variances, blunt
        # Of weights of which structure claims nothing, the partition that the certificate calls invariant.
        self.alone_invariant: dict[str, Partition] = {}

    def lacks_gradient(self, structure: Structure) -> bool:
        """Whether the outputs tell nothing of a weight that structure calls invariant: it has no gradient at all."""
        names = [structure.name, *structure.companions]
        known = structure.partition is not None and not self.field.silent
        return known and not any(bool(self.field.gradients[name].any()) for name in names)

    def finding(
        self, name: str, structure: Structure | None, constrained: bool, inside: GradientPass | None = None
    ) -> WeightFinding:
        """Judge one weight; ``inside`` is the field at the normalizations behind it where no output depends on it."""
        shape = self.field.shapes[name]
        layer = type(owner_of(self.twin, name)).__name__
        partition = structure.partition if structure is not None else None
        if structure is None or partition is None:
            return self._without_groups(name, shape, layer, structure)
        partition = self._without_zero_groups(name, partition)
        groups = structure.group_of_scale(partition)
        if inside is None:
            certificate = self._certificate(structure, partition, groups)
        else:
            certificate = self._certificate_inside(inside, structure, partition, groups)
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
        )

    def _remedy(self, name: str, status: str, certificate: Certificate) -> str:
        if name in self.not_finite:
            return _NOT_FINITE
        if status == "no evidence" and certificate.because:
            return f"leave it: {certificate.because}; try other inputs"
        return _REMEDIES[status] + (_WITHOUT_INFLUENCE if certificate.taken_at else "")

    def _without_zero_groups(self, name: str, partition: Partition) -> Partition:
        """The whole table in place of looked-up rows where one is zero and has no direction, as a padding token's."""
        if not isinstance(owner_of(self.twin, name), nn.Embedding) or self.field.silent:
            return partition
        zero = bool((partition.norms(self.field.weights[name]) == 0).any())
        return Partition.whole(partition.shape) if zero else partition

    def _without_groups(
        self, name: str, shape: tuple[int, ...], layer: str, structure: Structure | None
    ) -> WeightFinding:
        """Judge a weight for which structure claims no groups: the certificate must not find any either.

        Where it does, that contradicts only what a derivative would have shown. Jumps and what is detached are
        invisible to it, and a rule that covers sufficient conditions only leaves the weight unknown.
        """
        seed = structure.seed if structure is not None else Partition.filters(shape)
        tried = {partition: self.alone(name, partition) for partition in (Partition.whole(shape), seed)}
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
        if any(op_name(node) == "detach" or is_region(node) for node in behind):
            certainties = {"jump" if certainty == "smooth" else certainty for certainty in certainties}
        return _CONTRADICTED[min(certainties, key=list(_CONTRADICTED).index)]

    def _certificate(self, structure: Structure, partition: Partition, groups: np.ndarray[Any, Any]) -> Certificate:
        """Certificate of each group together with the biases that are scaled along."""
        name = structure.name
        if self.field.silent:
            return self.alone(name, partition)
        own = self.field.sums(name, partition)
        sums, weight, gradient = own.products.clone(), own.weights.clone(), own.gradients.clone()
        lost = set(self.lost(name, partition))
        for bias, ids in structure.companions.items():
            entries = torch.tensor(structure.groups_of_forms(ids, groups), device=sums.device)
            kept = entries >= 0
            shape = self.field.shapes[bias]
            single_entries = Partition(shape, shape, tuple(range(len(shape))))
            single = self.field.sums(bias, single_entries)
            lost |= {int(entries[entry]) for entry in self.lost(bias, single_entries)} - {-1, -2}
            for total, values in (
                (sums, single.products),
                (weight, single.weights),
                (gradient, single.gradients),
            ):
                total.index_add_(0, entries[kept], values[kept])
        if partition.group_size == 1 and not structure.companions:
            # A group of one entry is invariant just where its gradient vanishes: compare it with the others.
            return self.verdict(sums, torch.full_like(weight, self.largest), torch.ones_like(weight))
        most = sum(self.field.size(part) for part in (name, *structure.companions))
        excused = self._excused(structure, groups) if self.blunt is not None else None
        return self.verdict(sums, weight.sqrt(), gradient.sqrt(), most, excused=excused, lost=sorted(lost))

    def _excused(self, structure: Structure, groups: np.ndarray[Any, Any]) -> Excused:
        """Which groups are absorbed by a statistic that the pass could tell nothing of."""

        def excused(asked: Tensor) -> tuple[Tensor, str]:
            found = self.blunt.scales(structure.scales, structure.absorptions) if self.blunt is not None else {}
            places: dict[int, list[Places]] = {}
            for scale, where in found.items():
                if scale < len(groups) and bool(asked[int(groups[scale])]):
                    places.setdefault(int(groups[scale]), []).append(where)
            without = torch.zeros_like(asked)
            without[list(places)] = True
            return without, told(where for several in places.values() for where in several)

        return excused

    def _certificate_inside(
        self, inside: GradientPass, structure: Structure, partition: Partition, groups: np.ndarray[Any, Any]
    ) -> Certificate:
        """Certificate at the normalizations that absorb a weight without influence on the output."""
        judge = Judge(self.twin, self.graph, inside, self.variances, self.tolerance, None, self.not_finite)
        places = dict.fromkeys(f"{a.module or 'model'} ({a.op})" for a in structure.absorptions)
        return replace(judge._certificate(structure, partition, groups), taken_at=", ".join(places))

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
