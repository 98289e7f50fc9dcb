"""All continuous scale symmetries at once: groups that span several tensors, and rescalings from one layer to the next.

Every row of every weight, every bias and every affine parameter gets a scale of its own, and the columns of a weight
may undo the scales of its input. What the equations of the network leave free are its symmetries: multiply each member
by ``α ** exponent`` and the function stays. Where all exponents are positive a normalization absorbs the scale; where
columns shrink as rows grow it is a rescaling through positively homogeneous functions.

Source: the symmetries of Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029, section 2, for arbitrary graphs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.models import groups_not_finite
from manifold_nets.symmetry.gradients import EVIDENCE_FLOOR, GradientPass
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.invariance import ROUNDED
from manifold_nets.symmetry.low_variance import LowVariance, Places, told
from manifold_nets.symmetry.report import Certificate, FamilyMember, SymmetryFamily
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.structure.find import propagate
from manifold_nets.symmetry.structure.partitions import seed_label, seed_partition
from manifold_nets.symmetry.structure.scales import Ids, Label, Scales
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["JointStructure", "certified_families", "solve_jointly"]

# Larger parameters that are no linear maps get one scale along their last axis instead of one an entry.
_LARGEST_BY_ENTRY = 4096
Part = Literal["rows", "columns", "entries"]


@dataclass(frozen=True)
class _Seed:
    """The scales given to one parameter: one for each index of a part of it."""

    part: Part
    partition: Partition
    ids: Ids


@dataclass
class JointStructure:
    """The solved equations of a whole network.

    Args:
        scales: the scales of all parameters and what is left of them.
        seeds: the scales of each parameter, by name.
        columns: for each weight the form that its columns undo, one for each input channel.
        partitions: for each of these weights the partition into columns.
        absorptions: the normalizations that absorb some of them.
    """

    scales: Scales
    seeds: dict[str, _Seed]
    columns: dict[str, Ids]
    partitions: dict[str, Partition]
    absorptions: list[Absorption]

    @cached_property
    def absorbed(self) -> frozenset[int]:
        """The free scales that some normalization absorbs."""
        numbers = {n for a in self.absorptions for n in np.unique(self.scales.roots(a.ids)).tolist()}
        return frozenset(scale for n in numbers for scale in self.scales.form(n))

    def parts(self) -> Iterator[tuple[str, Part, Partition, Ids, float]]:
        """Yield every part of every parameter with its partition, the forms of its indices, and their sign."""
        for name, seed in self.seeds.items():
            yield name, seed.part, seed.partition, self.scales.roots(seed.ids), 1.0
        for name, ids in self.columns.items():
            yield name, "columns", self.partitions[name], self.scales.roots(ids), -1.0

    def symmetries(self) -> dict[int, dict[tuple[str, Part], dict[int, float]]]:
        """For each free scale the exponents of the indices of all parts, without those that stay as they are."""
        found: dict[int, dict[tuple[str, Part], dict[int, float]]] = {}
        for name, part, _, ids, sign in self.parts():
            for index, number in enumerate(ids.tolist()):
                for scale, exponent in self.scales.form(number).items():
                    found.setdefault(scale, {}).setdefault((name, part), {})[index] = sign * exponent
        return found


def solve_jointly(graph: TracedGraph, without: Collection[str] = ()) -> JointStructure:
    """Give every parameter its scales, follow them all, and return what the network demands of them.

    Args:
        graph: the network.
        without: parameters that take part in nothing: dead biases, whose scale never matters.
    """
    scales = Scales()
    seeds: dict[str, _Seed] = {}
    labels: dict[Node, Label] = {}
    for name in dict.fromkeys(graph.parameters.values()):
        sources = [node for node in graph.placeholders_of(name) if node.users]
        if not sources or name in without or not graph.is_used(name) or not tuple(sources[0].meta["val"].shape):
            continue
        part, partition, label = _seed(sources)
        ids = scales.add(partition.n_groups)
        seeds[name] = _Seed(part, partition, ids)
        labels.update({node: Label(ids[label]) for node in sources})
    columns: dict[str, Ids] = {}
    absorptions, _ = propagate(graph, labels, scales, columns)
    partitions = {name: _column_partition(graph, name) for name in columns}
    return JointStructure(scales, seeds, columns, partitions, absorptions)


def _seed(sources: list[Node]) -> tuple[Part, Partition, Ids]:
    """Which part of a parameter gets scales of its own, and the index of the scale of each entry."""
    shape = tuple(int(n) for n in sources[0].meta["val"].shape)
    roles = {role for node in sources for user in node.users if (role := _role(node, user)) is not None}
    if "rows" in roles:
        partition = seed_partition(sources)
        return "rows", partition, seed_label(partition)
    if roles == {"columns"}:
        return "columns", Partition(shape, shape, (1,)), np.arange(shape[1], dtype=np.int64)[None, :]
    entries = int(np.prod(shape))
    if len(shape) == 1 or entries <= _LARGEST_BY_ENTRY:
        partition = Partition(shape, shape, tuple(range(len(shape))))
        return "entries", partition, np.arange(entries, dtype=np.int64).reshape(shape)
    partition = Partition(shape, shape, (len(shape) - 1,))
    return "columns", partition, np.arange(shape[-1], dtype=np.int64).reshape((1,) * (len(shape) - 1) + (-1,))


def _role(node: Node, user: Node) -> str | None:
    """How an operation uses a parameter: as the rows of a linear map, as a table of columns, or neither."""
    if bound_arguments(user).get("weight") is not node:
        return None
    op = op_name(user)
    if op.startswith("conv") or op == "linear":
        return "rows"
    return "columns" if op == "embedding" else None


def _column_partition(graph: TracedGraph, name: str) -> Partition:
    """Partition of a weight into the entries that one input channel meets."""
    sources = graph.placeholders_of(name)
    shape = tuple(int(n) for n in sources[0].meta["val"].shape)
    user = next(user for node in sources for user in node.users if _role(node, user) == "rows")
    arguments = bound_arguments(user)
    if "transpose" in op_name(user) or arguments.get("transposed"):
        return Partition.filters(shape)
    groups = int(arguments.get("groups", 1) or 1)
    return Partition(shape, (groups, shape[0] // groups, *shape[1:]), (0, 2))


def certified_families(
    joint: JointStructure,
    euler: GradientPass,
    tolerance: float,
    blunt: LowVariance | None = None,
    not_finite: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[SymmetryFamily, ...]:
    """Sort the symmetries into families of the same make-up, each with the certificate of all its members.

    For a symmetry with exponents c the certificate is ``|Σ c_i Σ_i w ⊙ ∂L/∂w|`` over ``Σ |c_i| ‖w_i‖ ‖∂L/∂w_i‖``.
    Where some are refuted, ``blunt`` is asked of which of them the pass could tell nothing. Those that move entries
    which are ``not_finite`` in the model have no evidence.
    """
    # Plain lists: there is one symmetry a channel, and each reads a few numbers.
    sums: dict[tuple[str, Part], list[float]] = {}
    sizes: dict[tuple[str, Part], list[float]] = {}
    for name, part, partition, _, _ in joint.parts():
        own = euler.sums(name, partition)
        most = 0.0 if euler.silent else euler.size(name)
        sums[name, part] = own.products.tolist()
        most = most if math.isfinite(most) else math.inf
        sizes[name, part] = (own.weights.sqrt() * own.gradients.sqrt()).clamp_max(most).tolist()
        # What was drawn anew is not what the model has there.
        for index in groups_not_finite(not_finite[name], partition) if name in not_finite else ():
            sizes[name, part][index] = math.nan
    finite = (size for each in sizes.values() for size in each if math.isfinite(size))
    floor = EVIDENCE_FLOOR * max(finite, default=0.0)
    families: dict[Any, _Tally] = {}
    symmetries = joint.symmetries()
    for scale, members in symmetries.items():
        key = tuple((name, part, _common(exponents), len(exponents)) for (name, part), exponents in members.items())
        moved = [(place, index, c) for place, exponents in members.items() for index, c in exponents.items()]
        total = sum(c * sums[place][index] for place, index, c in moved)
        reach = sum(abs(c) * sizes[place][index] for place, index, c in moved)
        families.setdefault(key, _Tally()).add(scale, abs(total), reach, floor, tolerance)
    if blunt is not None and any(tally.refuted for tally in families.values()):
        places = blunt.scales(joint.scales, joint.absorptions)
        for tally in families.values():
            for scale in tally.refuted:
                for (name, _), exponents in symmetries[scale].items():
                    places.setdefault(scale, {}).update(blunt.behind(name, exponents))
            tally.excuse(places)
    partitions = {(name, part): partition for name, part, partition, _, _ in joint.parts()}
    return tuple(
        tally.family(
            [FamilyMember(*entry) for entry in key],
            [symmetries[scale] for scale in tally.scales],
            {(name, part): partitions[name, part] for name, part, *_ in key},
            absorbed=not joint.absorbed.isdisjoint(tally.scales),
        )
        for key, tally in families.items()
    )


def _common(exponents: dict[int, float]) -> float | None:
    """The exponent that all indices of a part share, or None."""
    values = set(exponents.values())
    return values.pop() if len(values) == 1 else None


@dataclass
class _Tally:
    scales: list[int] = field(default_factory=list)
    values: dict[int, float] = field(default_factory=dict)
    refuted: list[int] = field(default_factory=list)
    because: str = ""

    def add(self, scale: int, total: float, size: float, floor: float, tolerance: float) -> None:
        self.scales.append(scale)
        if not math.isfinite(size):
            self.because = "entries or gradients are not finite"
            return
        if (not size > floor and total <= floor) or tolerance * size < total <= ROUNDED * floor:
            return
        value = total / size
        self.values[scale] = value
        if not value <= tolerance:
            self.refuted.append(scale)

    def excuse(self, places: Mapping[int, Places]) -> None:
        """Take what was refuted at these scales for no evidence."""
        without = [scale for scale in self.refuted if places.get(scale)]
        self.refuted = [scale for scale in self.refuted if not places.get(scale)]
        self.values = {scale: value for scale, value in self.values.items() if scale not in without}
        self.because = "; ".join(filter(None, (self.because, told(places[scale] for scale in without))))

    def family(
        self,
        members: list[FamilyMember],
        symmetries: list[Any],
        partitions: dict[tuple[str, str], Partition],
        *,
        absorbed: bool,
    ) -> SymmetryFamily:
        exponents = [member.exponent for member in members]
        kind: Literal["scale", "rescaling"] = (
            "scale" if all(e is not None and e > 0 for e in exponents) else "rescaling"
        )
        certificate = Certificate(
            value=max(self.values.values()) if self.values else None,
            verdict="not invariant" if self.refuted else "invariant" if self.values else "no evidence",
            groups_certified=len(self.values) - len(self.refuted),
            groups_refuted=len(self.refuted),
            groups_without_evidence=len(self.scales) - len(self.values),
            because=self.because,
            silent=tuple(number for number, scale in enumerate(self.scales) if scale not in self.values),
        )
        remedy = _remedy(kind, members, certificate, absorbed=absorbed)
        return SymmetryFamily(
            kind, tuple(members), len(self.scales), certificate, remedy, absorbed, tuple(symmetries), partitions
        )  # fmt: skip


def _remedy(kind: str, members: list[FamilyMember], certificate: Certificate, *, absorbed: bool) -> str:
    if certificate.verdict == "not invariant":
        return "leave it and report it: structure and certificate contradict each other"
    if kind == "scale":
        return (
            "keep each group on a sphere" if len(members) == 1 else "keep each group on one sphere across its tensors"
        )
    if absorbed:
        return "leave it: stored statistics and eps would have to follow"
    return "balance: move to the point of the orbit with the smallest norm; the function stays"
