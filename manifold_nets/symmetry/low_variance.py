"""Channels with near-zero variance, where the gradient test sees only rounding error.

``(x − mean) / √(var + eps)`` does not depend on the scale of x if eps is negligible compared with the variance. A
constant channel, behind a ReLU that is never active or on identical inputs, has zero variance up to rounding, so even
the smallest eps is not negligible: its gradient is rounding error over √eps and gives no evidence. The variance of an
extremely small filter may also be below eps. If a certificate refutes the structure, one forward pass checks every
normalization for this; otherwise that pass is not run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from manifold_nets.errors import listed
from manifold_nets.models import other_values, state_kept
from manifold_nets.running import Inputs, to_float64
from manifold_nets.symmetry.equations import Ids, Scales
from manifold_nets.symmetry.exact_mode import NEGLIGIBLE_EPS
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["LowVariance", "Places", "describe"]

_ROUNDING = torch.finfo(torch.float64).eps
# For each normalization that has no variance somewhere, its channels, where its statistics are those of channels.
Places = dict[str, set[int]]
_CHANNELS = ("batch_norm", "instance_norm")
_NORMALIZATIONS = (*_CHANNELS, "group_norm", "layer_norm", "rms_norm")


class LowVariance:
    """Finds the scales that are absorbed by a statistic close to rounding error or eps.

    Args:
        graph: the network.
        model_copy: the copy that is analysed; its values and buffers are the same afterwards.
        inputs: its inputs.
        seed: seed of the pass whose certificates are in question.
        field: the weights of that pass.
        tolerance: largest certificate value of an invariant group: rounding and eps have to stay below it.
    """

    def __init__(
        self,
        graph: TracedGraph,
        model_copy: nn.Module,
        inputs: Inputs,
        seed: int,
        field: GradientPass,
        tolerance: float,
    ) -> None:
        self.graph, self.model_copy, self.inputs, self.seed = graph, model_copy, inputs, seed
        self.field, self.tolerance = field, tolerance

    def scales(self, scales: Scales, absorptions: Iterable[Absorption]) -> dict[int, Places]:
        """The scales that statistics without variance absorb, each with the places where these are."""
        found: dict[int, Places] = {}
        for absorption in absorptions:
            low = self._masks.get(absorption.node)
            if low is None or not low.any():
                continue
            mask, roots = _in_shape_of(absorption.ids, low), scales.roots(absorption.ids)
            for index in zip(*np.nonzero(mask), strict=True):
                channels = {int(index[1])} if absorption.op in _CHANNELS and mask.ndim > 1 else set()
                for scale in scales.form(int(roots[index])):
                    places = found.setdefault(scale, {})
                    places.setdefault(_where(absorption.module, absorption.op), set()).update(channels)
        return found

    def places(self, absorptions: Iterable[Absorption]) -> Places:
        """All places without variance among the normalizations that absorb something."""
        nodes = {absorption.node for absorption in absorptions}
        return dict(self._place(node) for node in self._low_nodes if node in nodes)

    def behind(self, parameter: str, entries: Collection[int]) -> Places:
        """The place without variance of which a parameter scales or shifts the result: its gradient is rounding too."""
        for node in self._low_nodes:
            arguments = bound_arguments(node)
            affine = [self.graph.parameter_of(arguments.get(name)) for name in ("weight", "bias")]
            where, channels = self._place(node)
            if parameter in affine and not (channels and channels.isdisjoint(entries)):
                return {where: channels.intersection(entries)}
        return {}

    @property
    def _low_nodes(self) -> list[Node]:
        return [node for node, mask in self._masks.items() if mask.any()]

    def _place(self, node: Node) -> tuple[str, set[int]]:
        """The name of a normalization, and its channels without variance where each has statistics of its own."""
        where, mask = _where(self.graph.module_of(node), op_name(node)), self._masks[node]
        if op_name(node) not in _CHANNELS:
            return where, set()
        return where, set(np.flatnonzero(mask.any(tuple(axis for axis in range(mask.ndim) if axis != 1))).tolist())

    @cached_property
    def _masks(self) -> Mapping[Node, NDArray[np.bool_]]:
        """For each normalization which of its statistics have low variance, kept with their axes."""
        found: dict[Node, NDArray[np.bool_]] = {}
        low_memory = any(
            p.is_floating_point() and p.dtype != torch.float64 for p in nn.Module.parameters(self.model_copy)
        )

        def wide(value: Any) -> Any:
            return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value

        def visit(node: Node, fetch: Any) -> Any:
            arguments = bound_arguments(node)
            if op_name(node) in _NORMALIZATIONS:
                low = self._is_low(op_name(node), wide(fetch(arguments["input"])).detach(), arguments)
                found.update({node: low} if low is not None else {})
            if not callable(node.target) or not (low_memory or "eps" in arguments):
                return None
            args, kwargs = node.args, node.kwargs
            if "eps" in arguments:
                args, kwargs = tuple({**arguments, "eps": NEGLIGIBLE_EPS}.values()), {}
            args, kwargs = map_arg(
                (args, kwargs), lambda argument: wide(fetch(argument)) if low_memory else fetch(argument)
            )
            result = node.target(*args, **kwargs)
            # What is made in float32 is read in float64, and may be written into before.
            return pytree.tree_map(wide, result) if low_memory else result

        names = [name for name, p in self.model_copy.named_parameters() if p.dtype == torch.float64]
        point = other_values(self.model_copy, {name: self.field.weights[name] for name in names})
        with torch.no_grad(), torch.random.fork_rng(), state_kept(self.model_copy), point:
            torch.manual_seed(self.seed)
            self.graph.interpret(self.model_copy, to_float64(self.inputs), visit)
        return found

    def _is_low(self, op: str, x: Tensor, arguments: Mapping[str, Any]) -> NDArray[np.bool_] | None:
        """Where eps, or the rounding of what a statistic subtracts from its input, reaches the tolerance."""
        if not x.numel():
            return None
        x, axes = _statistics(op, x, arguments)
        if op == "rms_norm":
            return np.asarray(_below_eps(x.square().mean(axes, keepdim=True), self.tolerance).cpu().numpy())
        variance = x.var(axes, unbiased=False, keepdim=True)
        rounding = _ROUNDING * x.abs().amax(axes, keepdim=True)
        low = _below_eps(variance, self.tolerance) | (self.tolerance * variance.sqrt() <= rounding)
        return np.asarray(low.cpu().numpy())


def describe(places: Iterable[Places]) -> str:
    """Say where there is no variance.

    Example:
        >>> describe([{"1 (batch_norm)": {3}}, {"1 (batch_norm)": {5}}])
        'channels 3, 5 have hardly any variance in front of 1 (batch_norm) on these inputs'
    """
    together: Places = {}
    for place in places:
        for where, channels in place.items():
            together.setdefault(where, set()).update(channels)
    parts = []
    for where, channels in together.items():
        what = "there is" if not channels else "channel" if len(channels) == 1 else "channels"
        numbers = f" {listed(map(str, sorted(channels)))} {'has' if len(channels) == 1 else 'have'}" if channels else ""
        parts.append(f"{what}{numbers} hardly any variance in front of {where} on these inputs")
    return "; ".join(parts)


def _where(module: str, op: str) -> str:
    return f"{module or 'model'} ({op})"


def _below_eps(statistic: Tensor, tolerance: float) -> Tensor:
    """Whether a mean square or variance is not so far above the eps of the pass that this is lost in it."""
    return tolerance * statistic <= NEGLIGIBLE_EPS


def _statistics(op: str, x: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
    """The input of a normalization, and the axes over which it takes one statistic."""
    if op == "batch_norm":
        return x, [axis for axis in range(x.ndim) if axis != 1]
    if op == "instance_norm":
        return x, list(range(2, x.ndim))
    if op == "group_norm":
        return x.reshape(len(x), int(arguments["num_groups"]), -1, *x.shape[2:]), list(range(2, x.ndim + 1))
    return x, list(range(-len(arguments["normalized_shape"]), 0))


def _in_shape_of(ids: Ids, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which forms meet a statistic of low variance; all of them where they do not broadcast to the statistics."""
    if mask.ndim != ids.ndim:
        return np.full(ids.shape, mask.any())
    shared = tuple(axis for axis, n in enumerate(ids.shape) if n == 1)
    try:
        return np.broadcast_to(mask.any(shared, keepdims=True), ids.shape)
    except ValueError:
        return np.full(ids.shape, mask.any())
