"""Gradient descent in the scaled metric: invariant to the scales of filters without keeping them anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.errors import SelectionError
from manifold_nets.groups import Partition, accumulation_dtype, refuse_degenerate
from manifold_nets.optim.executions.pieces import cuts
from manifold_nets.optim.grouping import param_groups
from manifold_nets.optim.membership import Group, name_of
from manifold_nets.optim.rsgd import RiemannianSGD

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
        DegenerateGroupError: a filter is zero or not finite: it could not move.

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
        for index, (weight, data) in enumerate(zip(group["params"], _partitions(group), strict=True)):
            if data is not None and weight.device.type != "meta":
                norms = Partition.from_dict(data).norms(weight.detach())
                try:
                    refuse_degenerate(norms, name_of(group, len(self.param_groups) - 1, index))
                except Exception:
                    self.param_groups.pop()
                    raise

    def _step_plain(self, group: Group) -> None:
        scaled = {id(p): data for p, data in zip(group["params"], _partitions(group), strict=True) if data is not None}
        rest = [p for p in group["params"] if id(p) not in scaled]
        if rest:
            super()._step_plain({**group, "params": rest})
        for weight in group["params"]:
            if id(weight) in scaled and weight.grad is not None:
                self._step_scaled(group, weight, weight.grad, Partition.from_dict(scaled[id(weight)]))

    @torch.no_grad()
    def _step_scaled(self, group: Group, weight: Tensor, gradient: Tensor, partition: Partition) -> None:
        buffer, fresh = None, False
        if group["momentum"] != 0:
            state = self.state[weight]
            fresh = state.get("momentum_buffer") is None
            if fresh:
                state["momentum_buffer"] = torch.zeros_like(weight, requires_grad=False)
            buffer = state["momentum_buffer"]
        for rows, _, part in cuts(partition):
            held = None if buffer is None else buffer[rows]
            self._step_part(group, weight.detach()[rows], gradient[rows], held, part, fresh=fresh)

    def _step_part(
        self,
        group: Group,
        weight: Tensor,
        gradient: Tensor,
        buffer: Tensor | None,
        partition: Partition,
        *,
        fresh: bool,
    ) -> None:
        dtype = accumulation_dtype(weight.dtype)
        w, g = weight.to(dtype), gradient.to(dtype)
        norms = partition.norms(w)
        direction = slope = partition.multiply(-g if group["maximize"] else g, norms)
        if buffer is not None:
            momentum, dampening = group["momentum"], 0.0 if fresh else group["dampening"]
            moment = momentum * buffer.to(dtype) + (1 - dampening) * slope
            buffer.copy_(moment)
            direction = slope + momentum * moment if group["nesterov"] else moment
        weight.copy_(w - partition.multiply(direction, norms * float(group["lr"])))


def _partitions(group: Group) -> list[Any]:
    return group.get("partitions") or [None] * len(group["params"])
