"""Relatives of Riemannian SGD and Adam: other published ways to step on products of spheres."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from manifold_nets.errors import OptionError
from manifold_nets.optim.membership import Group
from manifold_nets.optim.radam import RiemannianAdam
from manifold_nets.optim.rsgd import RiemannianSGD
from manifold_nets.optim.rules.members import Rule
from manifold_nets.optim.rules.methods import MethodRule

__all__ = ["SGDG", "AdamG", "AngularSGD", "ProjectedSGD"]


class _MomentumOptimizer(RiemannianSGD):
    """Methods with one moment: a subclass names its rule and the options that it adds to those of torch."""

    _kind: str
    # What `__init__` was given; `defaults` keep it, also in a copy.
    _options: Mapping[str, Any] = {}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with the options of the method beside those of torch."""
        _complete(param_group, self._options, self.defaults)
        super().add_param_group(param_group)

    def _rule(self, group: Group) -> Rule:
        return MethodRule(
            self._kind,
            group["lr"],
            group["momentum"],
            group["nesterov"],
            group["maximize"],
            clip=group.get("clip", math.inf),
            per_weight=group.get("per") == "weight",
        )


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

    _kind = "sgd-g"

    def __init__(self, params: Any, lr: float = 0.2, *, clip: float = 0.1, **options: Any) -> None:
        self._options = {"clip": clip}
        super().__init__(params, lr=lr, **options)


class AngularSGD(_MomentumOptimizer):
    r"""Steps measured as angles: in every step each filter turns by the learning rate, in radians.

    With the momentum b of Riemannian SGD and its direction ``e = d/‖d‖``, ``w ← exp_w(−η e)``: the length of a gradient
    decides nothing. With ``per="weight"`` the filters of one weight keep their proportions, and it is the root mean
    square of their angles that is η. A filter whose direction is zero, or nothing but rounding, stays where it is.
    Under a constant rate such steps never become small: use a schedule. Plain parameters take the steps of
    `torch.optim.SGD`, for which this learning rate is seldom right: give them their own with
    ``manifold_nets.param_groups(model, sphere_lr=…)``.

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

    _kind = "angular"

    def __init__(self, params: Any, lr: float = 1e-2, *, per: str = "sphere", **options: Any) -> None:
        self._options = {"per": per}
        super().__init__(params, lr=lr, **options)


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

    _kind = "projected"

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)


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

    _options: Mapping[str, Any] = {}

    def __init__(self, params: Any, lr: float = 0.05, *, clip: float = 0.1, **options: Any) -> None:
        if options.get("amsgrad"):
            raise OptionError("amsgrad", True, "False, as Adam-G has no such variant")
        self._options = {"clip": clip}
        super().__init__(params, lr=lr, **options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with the options of the method beside those of torch."""
        _complete(param_group, self._options, self.defaults)
        super().add_param_group(param_group)

    def _rule(self, group: Group) -> Rule:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        options = {"maximize": group["maximize"], "beta2": beta2, "eps": group["eps"], "clip": group["clip"]}
        return MethodRule("adam-g", group["lr"], beta1, **options)


def _complete(param_group: Group, options: Mapping[str, Any], defaults: dict[str, Any]) -> None:
    """Give a group, and the defaults that a state dict shows, the options that torch's optimizer does not know."""
    defaults.update(options)
    for name in ("clip", "per"):
        if name in defaults:
            param_group.setdefault(name, defaults[name])
            _CHECKS[name](name, param_group[name])


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise OptionError(name, value, "a positive number, or infinity")
    return value


def _sphere_or_weight(name: str, value: str) -> str:
    if value not in ("sphere", "weight"):
        raise OptionError(name, value, "'sphere' or 'weight'")
    return value


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {"clip": _positive, "per": _sphere_or_weight}
