"""Gradient descent in the scaled metric: invariant to the scales of filters without keeping them anywhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from manifold_nets.errors import OptionError, ParameterGroupError, SelectionError, SphereOptionError
from manifold_nets.groups import Partition, accumulation_dtype, refuse_degenerate
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.executions.choice import run
from manifold_nets.optim.executions.masters import master_of, write_masters
from manifold_nets.optim.grouping import param_groups
from manifold_nets.optim.membership import Group, constrained_of, name_of
from manifold_nets.optim.rsgd import RiemannianSGD
from manifold_nets.optim.rules.members import Rule
from manifold_nets.optim.rules.methods import MethodRule

__all__ = ["ScaledMetricSGD", "scaled_metric_groups"]


def scaled_metric_groups(
    model: nn.Module, partitions: Mapping[str, Partition | None], *, weight_decay: float = 0.0
) -> list[Group]:
    """Return parameter groups for `ScaledMetricSGD`: weights whose groups of entries are scaled, and the rest.

    Args:
        model: a plain model.
        partitions: for the name of each weight that is to be scaled its groups, as `manifold_nets.diagnose` finds them;
            the paper scales the rows of the softmax layer too: `Partition.filters` of its shape.
        weight_decay: weight decay of the other weights, as in `manifold_nets.param_groups`.

    Raises:
        SelectionError: a name is none of the model's weights of at least two dimensions.

    Example:
        >>> import manifold_nets as mn
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
            raise SelectionError("partitions", name, sorted(names))
    groups: list[Group] = []
    for group in param_groups(model, weight_decay=weight_decay):
        members = list(zip(group["params"], group["param_names"], strict=True))
        for wanted in (True, False):
            part = [(p, name) for p, name in members if (partitions.get(name) is not None) == wanted]
            if not part:
                continue
            groups.append({**group, "params": [p for p, _ in part], "param_names": [name for _, name in part]})
            if wanted:
                found = [partitions[name] for _, name in part]
                groups[-1].update(weight_decay=0.0, partitions=[p.to_dict() for p in found if p is not None])
    return groups


class ScaledMetricSGD(RiemannianSGD):
    r"""Gradient descent in the metric ⟨ξ, η⟩/‖w‖² of each filter, on plain weights, with momentum.

    .. math:: b ← μ b + (1-τ) ‖w‖ g, \quad w ← w - η ‖w‖ b ,

    without momentum the paper's ``W ← W − λ Diag(W Wᵀ) ∇W``. For a scale-invariant filter ``‖w‖ g`` is the gradient of
    the direction, which its scale does not change; two networks that differ in their scales take the same path of
    functions. Nothing holds the norms: as the gradient is orthogonal to the filter, they grow with every step, and the
    scale of the next step with them. Parameters without a partition take the steps of `torch.optim.SGD`.

    Args:
        params: the groups of `scaled_metric_groups`; ``"partitions"`` holds what `Partition.to_dict` gives, or None,
            for each parameter.
        lr: learning rate η: on scaled weights relative to their norm.
        options: the other options of `RiemannianSGD`; weight decay acts on the other parameters only.

    Raises:
        SphereOptionError: a weight lies on spheres.
        DegenerateGroupError: a filter is zero or not finite: it could not move.
        ParameterGroupError: partitions do not fit the parameters.
        OptionError: ``differentiable`` beside a partition.

    References:
        Badrinarayanan, Mishra, Cipolla, *Symmetry-invariant optimization in deep networks*, arXiv:1511.01754.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> groups = mn.optim.scaled_metric_groups(net, {"0.weight": mn.Partition.filters((8, 4))})
        >>> optimizer = mn.optim.ScaledMetricSGD(groups, lr=0.1)
        >>> net(x).square().mean().backward()
        >>> optimizer.step()
    """

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; ``"partitions"`` says which of them are scaled, and by which groups."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _require_scalable(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _rule(self, group: Group) -> Rule:
        return MethodRule("scaled-metric", group["lr"], group["momentum"], group["nesterov"], group["maximize"])

    def _spheres_of(self, group: Group) -> Iterator[tuple[int, Tensor, SphereProduct]]:
        """Yield position, weight and groups of all weights that no step of torch's moves."""
        places = {id(parameter): index for index, parameter in enumerate(group["params"])}
        yield from ((places[id(parameter)], parameter, _groups(*key)) for parameter, key in _scaled(group))

    def _step_plain(self, group: Group) -> None:
        """Step scaled weights by their rule, and the others as torch does."""
        # A compiled graph hands in some of a group's parameters: partitions are found by parameter, not by place.
        groups_of = {id(p): _groups(*key) for live in self.param_groups for p, key in _scaled(live)}
        rest = [p for p in group["params"] if id(p) not in groups_of]
        if rest:
            super()._step_plain({**group, "params": rest})
        members, masters = [], {}
        for weight in group["params"]:
            groups = groups_of.get(id(weight))
            if groups is None or weight.grad is None:
                continue
            state, point = self.state[weight] if group["momentum"] != 0 else {}, weight
            if group["master_weights"] and accumulation_dtype(weight.dtype) != weight.dtype:
                state = self.state[weight]
                point = masters[weight] = master_of(weight, state)
            members.append(self._member(group, state, point, weight.grad, groups))
        if members:
            options = {"foreach": group["foreach"], "fused": group["fused"], "compiled": group["compile"]}
            with torch.no_grad():
                run(self._rule(group), members, **options)
                write_masters(masters)


def _scaled(group: Group) -> list[tuple[Tensor, tuple[tuple[int, ...], ...]]]:
    """Return the scaled weights of a group, with what their partitions are made of."""
    found = zip(group["params"], group.get("partitions") or (), strict=False)
    return [(p, tuple(tuple(data[key]) for key in ("shape", "view", "kept"))) for p, data in found if data is not None]


@functools.lru_cache(maxsize=4096)
def _groups(shape: tuple[int, ...], view: tuple[int, ...], kept: tuple[int, ...]) -> SphereProduct:
    """Return the groups of a scaled weight in the form in which a step takes them; their radii count for nothing."""
    return SphereProduct(Partition(shape, view, kept))


def _require_scalable(group: Group, number: int) -> None:
    for index, _, _ in constrained_of(group):
        found = "ScaledMetricSGD, which would move it off them"
        expected = "an optimizer that steps on spheres, such as manifold_nets.optim.RiemannianSGD"
        raise SphereOptionError(name_of(group, number, index), found, expected)
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
            whole = getattr(weight, "full_tensor", None)
            refuse_degenerate(partition.norms((whole() if whole is not None else weight).detach()), name)
