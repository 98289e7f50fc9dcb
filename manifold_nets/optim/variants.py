"""Variants of Riemannian SGD and Adam from the literature, and the table of all optimizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from manifold_nets.errors import OptionError, ParameterGroupError, listed, near_matches
from manifold_nets.gathered import whole
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.adam import AngularAdam, RiemannianAdam
from manifold_nets.optim.backends.rule import Rule
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.param_groups import Group, constrained_of, name_of, param_groups, subgroup
from manifold_nets.optim.sgd import RiemannianSGD

__all__ = [
    "OPTIMIZERS",
    "SGDG",
    "AdamG",
    "AngularSGD",
    "ListedOptimizer",
    "ProjectedSGD",
    "ScaledMetricSGD",
    "scaled_metric_groups",
]


class _Variant(SphereOptimizer):
    """A method with options that torch's optimizer, and thus plain parameters, do not have."""

    # The option as passed to `__init__`; `defaults` keep it, also in a copy.
    _added: Mapping[str, Any] = {}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with the options of the method beside those of torch."""
        self.defaults.update(self._added)
        if "clip" in self.defaults and not param_group.setdefault("clip", self.defaults["clip"]) > 0:
            raise OptionError("clip", param_group["clip"], "a positive number, or infinity")
        if "per" in self.defaults and param_group.setdefault("per", self.defaults["per"]) not in ("sphere", "weight"):
            raise OptionError("per", param_group["per"], "'sphere' or 'weight'")
        super().add_param_group(param_group)

    def _rule(self, group: Group) -> Rule:
        clip, per_weight = group.get("clip", math.inf), group.get("per") == "weight"
        return replace(super()._rule(group), clip=clip, per_weight=per_weight)


class SGDG(_Variant, RiemannianSGD):
    r"""SGD-G: clipped gradients, steps along geodesics, and parallel transport of the momentum.

    With the Riemannian gradient ξ of a filter, clipped to the length ν, momentum μ and learning rate η,

    .. math:: \hat ξ = ξ \min(1, ν/‖ξ‖), \quad b ← μ b + (1-τ) \hat ξ, \quad w ← \exp_w(-η b),

    and b is transported in parallel. The paper stores ``-η b``, which is equivalent at a constant learning rate; here,
    as in torch, a schedule acts on the whole step. On the Grassmann manifold of lines the formulas are those of the
    sphere. Plain parameters take the steps of `torch.optim.SGD`.

    Args:
        params: preferably the groups of `manifold_nets.param_groups`.
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
        self._added = {"clip": clip}
        super().__init__(params, lr=lr, **options)


class AngularSGD(_Variant, RiemannianSGD):
    r"""Steps of fixed angle: in every step each filter turns by the learning rate, in radians.

    With the momentum b of Riemannian SGD and its direction ``e = d/‖d‖``, ``w ← exp_w(−η e)``: the length of the
    gradient has no effect. With ``per="weight"`` the filters of one weight keep their relative step lengths, and η is
    the root mean square of their angles. A filter whose direction is zero or only rounding error does not move. At a
    constant rate the steps never become small, so use a schedule. Plain parameters take the steps of `torch.optim.SGD`;
    this learning rate is seldom right for them, so give the spheres their own with
    ``manifold_nets.param_groups(model, sphere_lr=…)``.

    Args:
        params: preferably the groups of `manifold_nets.param_groups`.
        lr: η, the angle in radians.
        per: ``"sphere"`` or ``"weight"``.
        options: the other options of `RiemannianSGD`.

    References:
        The importance of the angle per step: Wan et al., *Spherical motion dynamics*, NeurIPS 2021, arXiv:2006.08419;
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
        self._added = {"per": per}
        super().__init__(params, lr=lr, **options)


class ProjectedSGD(_Variant, RiemannianSGD):
    r"""Projection-based weight normalization: a plain step, then each filter is scaled back to its norm.

    With the Euclidean gradient g and momentum b, neither of them projected,

    .. math:: b ← μ b + (1-τ) r^2 g, \quad w ← r (w - η b)/‖w - η b‖ ,

    which at radius r is the path of the unit sphere. In front of a normalization g is orthogonal to w, and the first
    step is that of `RiemannianSGD`; b does not stay tangent as w moves.

    Args:
        params: preferably the groups of `manifold_nets.param_groups`.
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


class AdamG(_Variant, RiemannianAdam):
    r"""Adam-G: Adam with clipped gradients, one second moment per filter, and steps along geodesics.

    With the Riemannian gradient ξ of a filter, clipped to the length ν, in step t,

    .. math:: \hat ξ = ξ \min(1, ν/‖ξ‖), \quad m ← β_1 m + (1-β_1) \hat ξ, \quad v ← β_2 v + (1-β_2) ‖\hat ξ‖^2, \\
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t) + ε}}, \quad w ← \exp_w(-η d),

    and m is transported in parallel. Plain parameters take the steps of `torch.optim.Adam`.

    Args:
        params: preferably the groups of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians.
        clip: ν, the largest length of a filter's Riemannian gradient; infinity for none.
        options: the other options of `RiemannianAdam`, except AMSGrad.

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

    _kind = "adam-g"

    def __init__(self, params: Any, lr: float = 0.05, *, clip: float = 0.1, **options: Any) -> None:
        for name in ("amsgrad", "per"):
            if options.get(name):
                raise OptionError(name, options[name], "no such option, as Adam-G has no such variant")
        self._added = {"clip": clip}
        super().__init__(params, lr=lr, **options)


def scaled_metric_groups(
    model: nn.Module, partitions: Mapping[str, Partition | None], *, weight_decay: float = 0.0
) -> list[Group]:
    """Return parameter groups for `ScaledMetricSGD`: the weights with scaled steps, and the rest.

    Args:
        model: a plain model.
        partitions: the groups of each weight with scaled steps, by name, as `manifold_nets.diagnose` finds them. The
            paper also scales the rows of the softmax layer: `Partition.filters` of its shape.
        weight_decay: weight decay of the other weights, as in `manifold_nets.param_groups`.

    Raises:
        OptionError: a name is not that of a weight of at least two dimensions.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> report = mn.diagnose(net, torch.randn(16, 4))
        >>> invariant = {weight.name: weight.partition for weight in report.weights if weight.status == "invariant"}
        >>> groups = mn.optim.scaled_metric_groups(net, invariant)
        >>> groups[0]["param_names"], groups[0]["partitions"]
        (['0.weight'], [{'shape': [8, 4], 'view': [8, 4], 'kept': [0]}])
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for name in partitions:
        if name not in names:
            expected = f"names of weights: {listed(sorted(names), 40)}"
            raise OptionError("partitions", name, expected, near_matches(name, names))
    wanted = {name: partition for name, partition in partitions.items() if partition is not None}
    groups: list[Group] = []
    for group in param_groups(model, weight_decay=weight_decay):
        scaled, rest = subgroup(group, wanted), subgroup(group, set(group["param_names"]).difference(wanted))
        scaled.update(weight_decay=0.0, partitions=[wanted[name].to_dict() for name in scaled["param_names"]])
        groups += [part for part in (scaled, rest) if part["params"]]
    return groups


class ScaledMetricSGD(_Variant, RiemannianSGD):
    r"""Gradient descent in the metric ⟨ξ, η⟩/‖w‖² of each filter, on plain weights, with momentum.

    .. math:: b ← μ b + (1-τ) ‖w‖ g, \quad w ← w - η ‖w‖ b ,

    without momentum the paper's ``W ← W − λ Diag(W Wᵀ) ∇W``. For a scale-invariant filter ``‖w‖ g`` is the gradient of
    its direction, which does not depend on its scale, so two networks that differ only in these scales take the same
    path of functions. Nothing fixes the norms: as the gradient is orthogonal to the filter, they grow with every step,
    and the scale of the next step with them. Parameters without a partition take the steps of `torch.optim.SGD`.

    Args:
        params: the groups of `scaled_metric_groups`; ``"partitions"`` has the `Partition.to_dict` of each parameter, or
            None.
        lr: learning rate η; on scaled weights, relative to their norm.
        options: the other options of `RiemannianSGD`; weight decay acts on the other parameters only.

    Raises:
        ParameterGroupError: a weight lies on spheres.
        DegenerateGroupError: a filter is zero or not finite, so it could not move.
        ParameterGroupError: partitions do not fit the parameters.
        OptionError: ``differentiable`` together with a partition.

    References:
        Badrinarayanan, Mishra, Cipolla, *Symmetry-invariant optimization in deep networks*, arXiv:1511.01754.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> groups = mn.optim.scaled_metric_groups(net, {"0.weight": mn.Partition.filters((8, 4))})
        >>> optimizer = mn.optim.ScaledMetricSGD(groups, lr=0.1)
        >>> net(x).square().mean().backward()
        >>> optimizer.step()
    """

    _kind = "scaled-metric"
    _on_spheres = False

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; ``"partitions"`` says which of them are scaled, and by which groups."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _require_scalable(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _spheres_of(self, group: Group) -> Iterator[tuple[int, Tensor, SphereProduct]]:
        """Yield position, weight and groups of all weights that are scaled."""
        pairs = zip(group["params"], group.get("partitions") or (), strict=False)
        for index, (parameter, data) in enumerate(pairs):
            if data is not None:
                yield index, parameter, _groups(*(tuple(data[key]) for key in ("shape", "view", "kept")))


@functools.lru_cache(maxsize=4096)
def _groups(shape: tuple[int, ...], view: tuple[int, ...], kept: tuple[int, ...]) -> SphereProduct:
    """Return the groups of a scaled weight in the form in which a step takes them; their radii count for nothing."""
    return SphereProduct(Partition(shape, view, kept))


def _require_scalable(group: Group, number: int) -> None:
    for index, _, _ in constrained_of(group):
        found = "ScaledMetricSGD, which would move it off its spheres"
        expected = "an optimizer that steps on spheres, such as manifold_nets.optim.RiemannianSGD"
        raise ParameterGroupError.on_spheres(name_of(group, number, index), found, expected)
    partitions = group.get("partitions")
    if partitions and len(partitions) != len(group["params"]):
        found = f"{len(partitions)} partitions for {len(group['params'])} parameters"
        raise ParameterGroupError(f"group {number}", found, "one for each (None for others), or none at all")
    for index, (weight, data) in enumerate(zip(group["params"], partitions or (), strict=False)):
        if data is None:
            continue
        name, partition = name_of(group, number, index), Partition.from_dict(data)
        if tuple(weight.shape) != partition.shape:
            raise ParameterGroupError(name, f"shape {tuple(weight.shape)}", f"the partition's, {partition.shape}")
        if group["differentiable"]:
            raise OptionError("differentiable", True, f"False, as {name} is scaled")
        if weight.device.type != "meta":
            refuse_degenerate(partition.norms(whole(weight)), name)


@dataclass(frozen=True)
class ListedOptimizer:
    """One row of the table of optimizers.

    Args:
        kind: the class.
        weights: the weights that it steps: ``"spheres"``, in the groups of `manifold_nets.param_groups`, or ``"plain"``
            ones, in those of `manifold_nets.optim.scaled_metric_groups`.
        adaptive: whether it is a variant of Adam; otherwise of SGD.
        source: its source in the literature.
        options: options to pass in addition to parameters, learning rate and, for variants of SGD, momentum.

    Example:
        >>> row = OPTIMIZERS["rsgd"]
        >>> row.kind.__name__, row.weights, row.adaptive
        ('RiemannianSGD', 'spheres', False)
    """

    kind: type[SphereOptimizer]
    weights: Literal["spheres", "plain"]
    adaptive: bool
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: Optimizers by the names that the command line gives them.
OPTIMIZERS: Mapping[str, ListedOptimizer] = {
    "rsgd": ListedOptimizer(RiemannianSGD, "spheres", False, "arXiv:1511.01029, arXiv:1111.5280"),
    "radam": ListedOptimizer(RiemannianAdam, "spheres", True, "arXiv:1810.00760"),
    "sgd-g": ListedOptimizer(SGDG, "spheres", False, "arXiv:1709.09603"),
    "adam-g": ListedOptimizer(AdamG, "spheres", True, "arXiv:1709.09603"),
    "angular": ListedOptimizer(AngularSGD, "spheres", False, "arXiv:2305.17212"),
    "angular-adam": ListedOptimizer(AngularAdam, "spheres", True, "arXiv:2305.17212, arXiv:2606.16899"),
    "pbwn": ListedOptimizer(ProjectedSGD, "spheres", False, "arXiv:1710.02338"),
    "sm": ListedOptimizer(ScaledMetricSGD, "plain", False, "arXiv:1511.01754"),
}
