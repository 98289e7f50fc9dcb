"""Relatives of Riemannian SGD and Adam: other published ways to step on products of spheres."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from manifold_nets.errors import OptionError
from manifold_nets.gathered import local_part
from manifold_nets.optim.executions.workspace import Workspace
from manifold_nets.optim.membership import Group
from manifold_nets.optim.pieces import pieces
from manifold_nets.optim.radam import RiemannianAdam
from manifold_nets.optim.rsgd import RiemannianSGD
from manifold_nets.optim.rules.coefficients import Coefficients, Moments
from manifold_nets.optim.rules.members import Member
from manifold_nets.optim.rules.products import Tangential, tangential
from manifold_nets.optim.rules.updates import write_
from manifold_nets.optim.rules.variants import angular_rate, clip_factor, geodesic_coefficients, projected_coefficients

__all__ = ["SGDG", "AdamG", "AngularSGD", "ProjectedSGD"]


class _MomentumOptimizer(RiemannianSGD):
    """Methods with one moment: a subclass says what its coefficients are."""

    _options: dict[str, Any]

    def _coefficients(self, found: Tangential, moments: Moments, group: Group) -> Coefficients:
        raise NotImplementedError

    def _parts(self, group: Group, members: Sequence[Member]) -> Iterator[Member]:
        """Yield what is stepped at once: whole groups, whose coefficients do not depend on other groups."""
        for member in members:
            yield from (piece for _, piece in pieces(member))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with the options of the method beside those of torch."""
        _complete(param_group, self._options, self.defaults)
        super().add_param_group(param_group)

    def _step_members(self, group: Group, members: Sequence[Member]) -> None:
        momentum = group["momentum"]
        follow, ahead = (momentum, 1.0) if group["nesterov"] else (1.0, 0.0)
        for member in self._parts(group, members):
            space = Workspace(member.manifold, member.weight)
            w, g = space.open(member.weight), space.read(member.gradient)
            b = None if member.moment is None else space.open(member.moment)
            found = tangential(w, g, b, space.spheres, maximize=group["maximize"], sharp=True)
            moments = Moments(momentum, 1.0 - member.dampening, follow, ahead)
            if momentum == 0:
                moments = Moments(0.0, 0.0, 0.0, 1.0)
            write_(w, g, b, space.spheres, self._coefficients(found, moments, group), maximize=group["maximize"])
            space.close()


class SGDG(_MomentumOptimizer):
    r"""SGD-G: clipped gradients, geodesics, and momentum carried along them in parallel.

    With the Riemannian gradient ξ of a filter, clipped to the length ν, momentum μ and learning rate η,

    .. math:: \hat ξ = ξ \min(1, ν/‖ξ‖), \quad b ← μ b + (1-τ) \hat ξ, \quad w ← \exp_w(-η b),

    and b is transported in parallel. The original keeps ``-η b``, which is the same at a constant learning rate; here,
    as in torch, a schedule acts on the whole step. On the Grassmann manifold of lines the formulas are those of the
    sphere. Plain parameters take the steps of `torch.optim.SGD`.

    Args:
        params: best the groups of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians per unit of momentum.
        clip: ν, the largest length of a filter's Riemannian gradient; infinity for none.
        options: the other options of `RiemannianSGD`.

    References:
        Cho, Lee, *Riemannian approach to batch normalization*, NeurIPS 2017, arXiv:1709.09603, algorithm 2.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = mn.optim.SGDG([weight], lr=0.2, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> sphere.check_point_on_manifold(weight)
        True
    """

    def __init__(self, params: Any, lr: float = 0.2, *, clip: float = 0.1, **options: Any) -> None:
        self._options = {"clip": _positive("clip", clip)}
        super().__init__(params, lr=lr, **options)

    def _coefficients(self, found: Tangential, moments: Moments, group: Group) -> Coefficients:
        factor = clip_factor(found, group["clip"])
        clipped = moments._replace(take=moments.take * factor, ahead=moments.ahead * factor)
        return geodesic_coefficients(found, clipped, float(group["lr"]))


class AngularSGD(_MomentumOptimizer):
    r"""Steps measured as angles: in every step each filter turns by the learning rate, in radians.

    With the momentum b of Riemannian SGD and its direction ``e = d/‖d‖``, ``w ← exp_w(−η e)``: the length of a gradient
    decides nothing. With ``per="weight"`` the filters of one weight keep their proportions, and it is the root mean
    square of their angles that is η. A filter whose direction is zero stays where it is. Under a constant rate such
    steps never become small: use a schedule. Plain parameters take the steps of `torch.optim.SGD`, for which this
    learning rate is seldom right: give them their own with ``manifold_nets.param_groups(model, sphere_lr=…)``.

    Args:
        params: best the groups of `manifold_nets.param_groups`.
        lr: η, the angle in radians.
        per: ``"sphere"`` or ``"weight"``.
        options: the other options of `RiemannianSGD`.

    References:
        The angle per step as what matters: Wan et al., *Spherical motion dynamics*, NeurIPS 2021, arXiv:2006.08419;
        Kosson, Messmer, Jaggi, *Rotational equilibrium*, ICML 2024, arXiv:2305.17212.

    Example:
        >>> import geoopt, torch, manifold_nets as mn
        >>> sphere = mn.SphereProduct((1, 2))
        >>> weight = geoopt.ManifoldParameter(torch.tensor([[1.0, 0.0]]), manifold=sphere)
        >>> optimizer = mn.optim.AngularSGD([weight], lr=torch.pi / 2)
        >>> (5 * weight[0, 1]).backward()
        >>> optimizer.step()
        >>> weight.data.round(decimals=4) + 0.0
        tensor([[ 0., -1.]])
    """

    def __init__(self, params: Any, lr: float = 1e-2, *, per: str = "sphere", **options: Any) -> None:
        if per not in ("sphere", "weight"):
            raise OptionError("per", per, "'sphere' or 'weight'")
        self._options = {"per": per}
        super().__init__(params, lr=lr, **options)

    def _parts(self, group: Group, members: Sequence[Member]) -> Iterator[Member]:
        return iter(members) if group["per"] == "weight" else super()._parts(group, members)

    def _coefficients(self, found: Tangential, moments: Moments, group: Group) -> Coefficients:
        rate = angular_rate(found, moments, float(group["lr"]), per_weight=group["per"] == "weight")
        return geodesic_coefficients(found, moments, rate)


class ProjectedSGD(_MomentumOptimizer):
    r"""Projection-based weight normalization: a plain step, then each filter back to its norm.

    With the Euclidean gradient g and momentum b, of which nothing is projected,

    .. math:: b ← μ b + (1-τ) r^2 g, \quad w ← r (w - η b)/‖w - η b‖ ,

    at radius r the path of the unit sphere. Behind a normalization g is orthogonal to w, and the first step is that of
    `RiemannianSGD`; b does not stay tangent as w moves on.

    Args:
        params: best the groups of `manifold_nets.param_groups`.
        lr: learning rate η.
        options: the other options of `RiemannianSGD`.

    References:
        Huang, Liu, Lang, Li, *Projection based weight normalization for deep neural networks*, arXiv:1710.02338.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = mn.optim.ProjectedSGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> sphere.check_point_on_manifold(weight)
        True
    """

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        self._options = {}
        super().__init__(params, lr=lr, **options)

    def _coefficients(self, found: Tangential, moments: Moments, group: Group) -> Coefficients:
        return projected_coefficients(found, moments, float(group["lr"]))


class AdamG(RiemannianAdam):
    r"""Adam-G: Adam with clipped gradients, one second moment a filter, and geodesics.

    With the Riemannian gradient ξ of a filter, clipped to the length ν, in step t,

    .. math:: \hat ξ = ξ \min(1, ν/‖ξ‖), \quad m ← β_1 m + (1-β_1) \hat ξ, \quad v ← β_2 v + (1-β_2) ‖\hat ξ‖^2, \\
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t) + ε}}, \quad w ← \exp_w(-η d),

    and m is transported in parallel. Plain parameters take the steps of `torch.optim.Adam`.

    Args:
        params: best the groups of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians.
        clip: ν, the largest length of a filter's Riemannian gradient; infinity for none.
        options: the other options of `RiemannianAdam`; AMSGrad is not defined.

    References:
        Cho, Lee, *Riemannian approach to batch normalization*, NeurIPS 2017, arXiv:1709.09603, algorithm 3.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = mn.optim.AdamG([weight], lr=0.05)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> sphere.check_point_on_manifold(weight)
        True
    """

    def __init__(self, params: Any, lr: float = 0.05, *, clip: float = 0.1, **options: Any) -> None:
        if options.get("amsgrad"):
            raise OptionError("amsgrad", True, "False, as Adam-G has no such variant")
        self._options = {"clip": _positive("clip", clip)}
        super().__init__(params, lr=lr, **options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with the options of the method beside those of torch."""
        _complete(param_group, self._options, self.defaults)
        super().add_param_group(param_group)

    def _step_members(self, group: Group, members: Sequence[Member]) -> None:
        rule = self._rule(group)
        for _, member in itertools.chain.from_iterable(map(pieces, members)):
            if member.moment is None or member.second is None:
                continue
            space = Workspace(member.manifold, member.weight)
            w, g, m = space.open(member.weight), space.read(member.gradient), space.open(member.moment)
            found = tangential(w, g, m, space.spheres, maximize=rule.maximize, sharp=True)
            factor, step = clip_factor(found, group["clip"]), member.step
            second = local_part(member.second[0]).lerp_(factor * factor * found.gg, 1 - rule.beta2)
            scale = 1 / (1 - rule.keep**step) / (second / (1 - rule.beta2**step) + rule.eps).sqrt()
            moments = Moments(rule.keep, (1 - rule.keep) * factor, scale, 0.0)
            move = geodesic_coefficients(found, moments, float(rule.lr))
            write_(w, g, m, space.spheres, move, maximize=rule.maximize)
            space.close()


def _complete(param_group: Group, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Give a group, and the defaults that a state dict shows, the options that torch's optimizer does not know."""
    for name, value in options.items():
        defaults.setdefault(name, value)
        param_group.setdefault(name, value)
        if name == "clip":
            _positive(name, param_group[name])


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise OptionError(name, value, "a positive number, or infinity")
    return value
