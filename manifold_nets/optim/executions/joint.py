"""Steps of weights that lie on one sphere together: as one matrix whose rows are the joint groups.

Row c of the matrix holds group c of all weights, so that the inner products of a step run over all of them, and its
coefficients are the same for all. Every execution steps the matrix as it steps any weight on a product of spheres; the
weights, gradients and moments are gathered before and written back after. Each weight keeps a state of its own, in
which the second moments are the joint ones.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from manifold_nets.errors import JointSphereError
from manifold_nets.gathered import is_sharded
from manifold_nets.joint_sphere import JointSphere, JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.rules.members import Member

__all__ = ["in_motion", "joined", "require_together"]


def require_together(
    params: Sequence[Tensor], manifolds: Sequence[SphereProduct | None], *, rtol: float, remedy: str
) -> None:
    """Raise where some weight of a joint sphere is missing, sharded, or off the sphere.

    Raises:
        JointSphereError: the parameters lack a weight of a joint sphere.
        OffManifoldError: the joint norms are not the radii.
        DegenerateGroupError: a joint group is zero or not finite.
    """
    found: dict[JointSphere, dict[int, Tensor]] = {}
    for weight, manifold in zip(params, manifolds, strict=True):
        if isinstance(manifold, JointSphereMember):
            found.setdefault(manifold.joint, {})[manifold.place] = weight
    for joint, weights in found.items():
        missing = [name for place, name in enumerate(joint.names) if place not in weights]
        if missing:
            present = [joint.names[place] for place in sorted(weights)]
            raise JointSphereError(present[0], missing, f"a parameter group without {', '.join(missing)}")
        points = [weights[place] for place in range(len(joint.names))]
        if any(is_sharded(point) for point in points):
            raise JointSphereError(joint.names[0], joint.names[1:], "sharded weights")
        if len({(point.dtype, point.device) for point in points}) > 1:
            raise JointSphereError(joint.names[0], joint.names[1:], "different dtypes or devices")
        if points[0].device.type != "meta":
            joint.refuse_degenerate(points)
            joint.require_point(points, rtol=rtol, remedy=remedy)


def in_motion(manifolds: Sequence[SphereProduct | None], places: Container[int]) -> set[JointSphere]:
    """Return the joint spheres of which a weight in one of these places has a gradient; missing ones count as zero."""
    # What is asked first costs nothing, and holds for almost all.
    other = [(place, m) for place, m in enumerate(manifolds) if m is not None and type(m) is not SphereProduct]
    return {m.joint for place, m in other if isinstance(m, JointSphereMember) and place in places}


@contextmanager
def joined(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Make one member of all weights of each joint sphere for the time of a step, then write what became of it.

    Args:
        members: weights of one parameter group; of a joint sphere all or none.
    """
    parts: dict[JointSphere, dict[int, Member]] = {}
    together: list[Member] = []
    for member in members:
        if isinstance(member.manifold, JointSphereMember):
            parts.setdefault(member.manifold.joint, {})[member.manifold.place] = member
        else:
            together.append(member)
    wholes = {joint: _whole(joint, [found[k] for k in range(len(joint.names))]) for joint, found in parts.items()}
    yield [*together, *wholes.values()]
    for joint, whole in wholes.items():
        _write_back(joint, [parts[joint][k] for k in range(len(joint.names))], whole)


def _whole(joint: JointSphere, members: Sequence[Member]) -> Member:
    first = members[0]
    moments = [member.moment for member in members if member.moment is not None]
    second = None
    if first.second is not None:
        second = (_column(first.second[0]), None if first.second[1] is None else _column(first.second[1]))
    return Member(
        joint.join([member.weight.detach() for member in members]),
        joint.join([member.gradient.detach() for member in members]),
        joint.sphere,
        joint.join(moments) if moments else None,
        second,
        first.dampening,
        first.step,
    )


def _column(values: Tensor) -> Tensor:
    return values.clone().reshape(-1, 1)


def _write_back(joint: JointSphere, members: Sequence[Member], whole: Member) -> None:
    for member, point in zip(members, joint.split(whole.weight), strict=True):
        member.weight.detach().copy_(point)
    if whole.moment is not None:
        for member, moment in zip(members, joint.split(whole.moment), strict=True):
            if member.moment is not None:
                member.moment.copy_(moment)
    for member in members:
        for old, new in zip(_second(member), _second(whole), strict=True):
            old.copy_(new.reshape(old.shape))


def _second(member: Member) -> list[Tensor]:
    return [] if member.second is None else [moment for moment in member.second if moment is not None]
