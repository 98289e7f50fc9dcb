"""Joint spheres: groups of several weights that share one scale keep one joint norm.

If several weights add to one residual stream, a normalization absorbs the scale of all of them together: only
``Σ_t ‖T_t[c]‖²`` over the weights T_t can be held at R_c², not the norm of each. The weights then lie on one sphere for
each c, of which every weight holds a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from manifold_nets.errors import ConstraintError, OffManifoldError, PartitionError
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.manifold import SphereProduct

__all__ = ["JointSphere", "JointSphereMember", "by_joint_sphere", "manifolds_from_dicts"]

T = TypeVar("T")


class JointSphere:
    r"""One sphere for each group of several weights together: ``Σ_t ‖T_t[c]‖² = R_c²``.

    Points and tangent vectors are sequences of tensors in natural shape, one for each weight, in the order of `names`.
    Put as rows, group c of all weights one after the other, they form a matrix on the ordinary product of spheres
    `sphere`. The metric is ``Σ_t ⟨ξ_t, η_t⟩/R²``, as on `SphereProduct`.

    Args:
        partitions: the groups of each weight, by name; the same number in each, in the same order.
        radius: one number for all groups, or one per group.

    Raises:
        PartitionError: the weights have different numbers of groups, there is no weight, or a radius is not positive.

    Example:
        >>> joint = JointSphere({"a": Partition.filters((2, 3)), "b": Partition.filters((2, 5))}, radius=2.0)
        >>> points = joint.projx([torch.ones(2, 3), torch.ones(2, 5)])
        >>> [tuple(point.shape) for point in points], joint.norms(points)
        ([(2, 3), (2, 5)], tensor([2.0000, 2.0000], dtype=torch.float64))
        >>> joint.manifolds[0]
        JointSphereMember(2 filters of 3, radius 2, with b) manifold
    """

    def __init__(self, partitions: Mapping[str, Partition], radius: float | Sequence[float] | Tensor = 1.0) -> None:
        counts = {partition.n_groups for partition in partitions.values()}
        if len(counts) != 1:
            raise PartitionError(
                f"{sorted(counts)} groups in {', '.join(partitions) or 'no weights'}",
                "the same number of groups in each weight of a joint sphere",
                "Give every weight one group for each joint sphere.",
            )
        self.names = tuple(partitions)
        self.partitions = tuple(partitions.values())
        self.sizes = tuple(partition.group_size for partition in self.partitions)
        self.sphere = SphereProduct((counts.pop(), sum(self.sizes)), radius=radius)
        self.manifolds = tuple(JointSphereMember(self, place) for place in range(len(self.names)))

    def missing(self, places: Container[int]) -> list[str]:
        """Return the names of the weights that are not at these places."""
        return [name for place, name in enumerate(self.names) if place not in places]

    # ---- weights and rows --------------------------------------------------------------------------------------------

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the matrix whose row c holds group c of all weights, one after the other."""
        pairs = zip(self.partitions, tensors, strict=True)
        return torch.cat([partition.rows(tensor) for partition, tensor in pairs], 1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of all weights; the inverse of `join`."""
        pairs = zip(self.partitions, torch.split(rows, list(self.sizes), 1), strict=True)
        return tuple(partition.from_rows(part) for partition, part in pairs)

    # ---- points and tangent vectors ----------------------------------------------------------------------------------

    @property
    def radii(self) -> Tensor:
        """Radius of each joint group: float64, shape ``(n_groups,)``, on the CPU."""
        return self.sphere.radii

    def norms(self, points: Sequence[Tensor]) -> Tensor:
        """Joint norms ``(Σ_t ‖T_t[c]‖²)^½``: float64, shape ``(n_groups,)``, on the CPU."""
        squares = [
            partition.norms(point.detach().to(torch.float64)).flatten().cpu().square()
            for partition, point in zip(self.partitions, points, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()

    def deviations(self, points: Sequence[Tensor]) -> Tensor:
        """Relative deviation ``|norm/R − 1|`` of each joint group: float64, shape ``(n_groups,)``, on the CPU."""
        return (self.norms(points) / self.radii - 1).abs()

    def require_point(self, points: Sequence[Tensor], *, rtol: float, remedy: str | Callable[[], str]) -> None:
        """Raise `OffManifoldError` if a joint norm is off its radius by more than ``rtol``."""
        deviations = torch.nan_to_num(self.deviations(points), nan=torch.inf)
        worst = int(deviations.argmax())
        if not float(deviations[worst]) <= rtol:
            norms, radii = self.norms(points), self.radii
            raise OffManifoldError(" + ".join(self.names), worst, float(norms[worst]), float(radii[worst]), remedy)

    def refuse_degenerate(self, points: Sequence[Tensor]) -> None:
        """Raise `DegenerateGroupError` if a joint group is zero or not finite."""
        refuse_degenerate(self.norms(points), " + ".join(self.names))

    def projx(self, points: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Nearest point: all weights of a joint group are scaled by the same number."""
        return self.split(self.sphere.projx(self.join(points)))

    def proju(self, points: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Orthogonal projection on the tangent space."""
        return self.split(self.sphere.proju(self.join(points), self.join(vectors)))

    def egrad2rgrad(self, points: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Riemannian gradient ``R² g_t − ⟨T, g⟩ T_t`` from the Euclidean gradients."""
        return self.split(self.sphere.egrad2rgrad(self.join(points), self.join(gradients)))

    def retr(self, points: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Metric projection of the sums of points and vectors."""
        return self.split(self.sphere.retr(self.join(points), self.join(vectors)))

    def expmap(self, points: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Geodesic from the points in the direction of the vectors."""
        return self.split(self.sphere.expmap(self.join(points), self.join(vectors)))

    def inner(self, points: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor] | None = None) -> Tensor:
        """Inner product ``Σ_c Σ_t ⟨u_t, v_t⟩/R_c²`` of two tangent vectors, a scalar."""
        return self.sphere.inner(self.join(points), self.join(u), None if v is None else self.join(v))

    def dist(self, points: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Geodesic distance in radians, a scalar."""
        return self.sphere.dist(self.join(points), self.join(others))

    # ---- data --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return names, partitions and radii as plain data for JSON."""
        members = [{"name": n, **p.to_dict()} for n, p in zip(self.names, self.partitions, strict=True)]
        return {"members": members, "radius": self.sphere.to_dict()["radius"]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JointSphere:
        """Rebuild a joint sphere from `to_dict`."""
        return cls({m["name"]: Partition.from_dict(m) for m in data["members"]}, data["radius"])

    def __repr__(self) -> str:
        return f"JointSphere({self.sphere.partition.n_groups} across {', '.join(self.names)})"


class JointSphereMember(SphereProduct):
    """One weight's part of a `JointSphere`: its groups, and the joint radii.

    Inner products of tangent vectors cover this weight alone; add those of the other weights. Methods that depend on
    the joint norm need all weights and raise `ConstraintError` here: use `JointSphere`, `manifold_nets.joint_spheres`,
    or `manifold_nets.project` for a model. The optimizers of `manifold_nets.optim` step all weights of a joint sphere
    together.

    Args:
        joint: the joint sphere.
        place: index of the weight in it.

    Example:
        >>> joint = JointSphere({"a": Partition.filters((2, 3)), "b": Partition.filters((2, 5))})
        >>> float(joint.manifolds[0].inner(torch.ones(2, 3), torch.ones(2, 3)))
        6.0
    """

    name = "JointSphereMember"

    def __init__(self, joint: JointSphere, place: int) -> None:
        super().__init__(joint.partitions[place], radius=joint.radii)
        self.joint, self.place = joint, place

    @property
    def member(self) -> str:
        """Name that the weight had in its model when the joint sphere was made."""
        return self.joint.names[self.place]

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the other weights."""
        return tuple(name for place, name in enumerate(self.joint.names) if place != self.place)

    def to_dict(self) -> dict[str, Any]:
        """Return partition, radii and the joint sphere as plain data for JSON."""
        return {**super().to_dict(), "joint": self.joint.to_dict(), "place": self.place}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SphereProduct:
        """Rebuild the manifold of one weight, with a `JointSphere` of its own; see `manifolds_from_dicts`."""
        return JointSphere.from_dict(data["joint"]).manifolds[int(data["place"])]

    def extra_repr(self) -> str:
        """Partition, radii and the other weights, for `repr`."""
        others = ", ".join(self.others[:3]) + (f" and {len(self.others) - 3} more" if self.others[3:] else "")
        return f"{super().extra_repr()}, with {others}"

    def _need_all(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error: one weight knows only its part of the joint norm."""
        raise ConstraintError.joint(self.member, self.others)

    projx = proju = egrad2rgrad = retr = expmap = logmap = transp = _need_all
    dist = dist2 = component_dist = random_uniform = random = origin = _need_all
    deviations = require_point = refuse_degenerate = _need_all
    _check_point_on_manifold = _check_vector_on_tangent = _need_all


def by_joint_sphere(held: Iterable[tuple[SphereProduct | None, T]]) -> dict[JointSphere, dict[int, T]]:
    """Group values by the joint spheres of their manifolds, by place and in the order of the weights.

    Args:
        held: manifolds and the value for each; manifolds that are not on joint spheres are left out.

    Example:
        >>> joint = JointSphere({"a": Partition.filters((2, 3)), "b": Partition.filters((2, 5))})
        >>> list(by_joint_sphere([(joint.manifolds[1], "weight b"), (None, "bias")]).values())
        [{1: 'weight b'}]
    """
    found: dict[JointSphere, dict[int, T]] = {}
    for manifold, value in held:
        if isinstance(manifold, JointSphereMember):
            found.setdefault(manifold.joint, {})[manifold.place] = value
    return {joint: {place: members[place] for place in sorted(members)} for joint, members in found.items()}


def manifolds_from_dicts(described: Mapping[str, Mapping[str, Any]]) -> dict[str, SphereProduct]:
    """Rebuild the manifolds of a model's weights, by name; those of one joint sphere share it.

    Raises:
        PartitionError: a weight of a joint sphere is missing, or an entry contradicts itself.
    """
    found = {name: SphereProduct.from_dict(data) for name, data in described.items()}
    joints: dict[str, list[dict[int, str]]] = {}
    for name, data in described.items():
        if "joint" in data:
            alike = joints.setdefault(json.dumps(data["joint"], sort_keys=True), [])
            # Copies of a model inside another one describe their joint spheres in the same way.
            if all(data["place"] in places for places in alike):
                alike.append({})
            next(places for places in alike if data["place"] not in places)[data["place"]] = name
    for key, alike in joints.items():
        whole = json.loads(key)
        for places in alike:
            if sorted(places) != list(range(len(whole["members"]))):
                wanted = [member["name"] for member in whole["members"]]
                fault = f"only {list(places.values())} on a joint sphere"
                raise PartitionError(fault, f"all of {wanted}", "Add the missing ones.")
            joint = JointSphere.from_dict(whole)
            found.update((name, joint.manifolds[place]) for place, name in places.items())
    for name, manifold in found.items():
        if manifold.to_dict() != described[name]:
            fault = f"an entry for {name!r} with contradicting partitions"
            raise PartitionError(fault, "one partition", "Save the model again.")
    return found
