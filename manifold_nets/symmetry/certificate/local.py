"""A certificate inside the network, for weights that its output does not depend on.

Where a token that the output is read from bypasses a branch, as the class token bypasses the last pooling of the
queries in MViT, the weights of that branch have no gradient at all: the Euler certificate at the output has no
evidence. The normalization by which the structure proves their invariance still sees them. There the certificate is
taken instead,

    value_G = |Σ_G w ⊙ ∂ℓ/∂w| / (‖w_G‖ ‖∂ℓ/∂w_G‖) ,   ℓ = ⟨v, y⟩ ,

with y the output of the normalization, its eps negligible, and v random.

That is done only where the output provably does not depend on the weight. A gradient that vanishes is no proof: behind
an inactive ReLU it vanishes as well. So the weight is replaced by NaN. Whatever operation reads a NaN returns one, a
product with zero and a saturated function included, except those that compare, sort or replace it: these, and those
that no rule describes, must not occur behind the weight. Where all outputs then are what they were, bit for bit,
nothing but selections of entries lies between them and the weight, and they are functions of other entries.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from manifold_nets.symmetry.certificate.euler import NEGLIGIBLE_EPS, EulerField, random_projection
from manifold_nets.symmetry.network.graph import (
    Inputs,
    TracedGraph,
    bound_arguments,
    is_in_place,
    op_name,
    output_tensors,
    to_float64,
)
from manifold_nets.symmetry.structure.find import Structure
from manifold_nets.symmetry.structure.rules import RULES, VIEWS, Absorption

__all__ = ["LocalCertificates"]

# Operations that may return a number where they read a NaN, though they depend on what is there.
_SWALLOWING = frozenset(
    "argsort bucketize copysign fmax fmin heaviside histc kthvalue mode msort nan_to_num nanmean nanmedian nanquantile "
    "nansum searchsorted sgn sign sort topk".split()
)
# What may lie behind the weight; copies have no rule, as scales are followed through the tensor that they write into.
_HANDING_ON = (RULES.keys() | {"copy"}) - _SWALLOWING


class LocalCertificates:
    """Takes the Euler field at the normalizations that absorb a weight which no output depends on.

    Args:
        twin: the copy that is analysed, in float64; its values and buffers are the same afterwards.
        graph: its graph.
        inputs: its inputs.
        seed: seed of the random projection.
    """

    def __init__(self, twin: nn.Module, graph: TracedGraph, inputs: Inputs, seed: int) -> None:
        self.twin, self.graph, self.inputs, self.seed = twin, graph, inputs, seed
        self.parameters = {name: p for name, p in twin.named_parameters() if p.is_floating_point()}

    def field(self, structure: Structure) -> EulerField | None:
        """The field at the normalizations of a weight; None where an output may depend on it, or nothing absorbs it."""
        absorptions = [a for a in structure.absorptions if "eps" in bound_arguments(a.node)]
        # One that is written out has an eps that is not known here, and would blunt the certificate.
        if not absorptions or len(absorptions) < len(structure.absorptions):
            return None
        names = [structure.name, *structure.companions]
        real = all(name in self.parameters for name in names)
        return self._field_at(absorptions) if real and self.is_without_influence(names) else None

    def is_without_influence(self, names: Sequence[str]) -> bool:
        """Whether no output depends on these parameters, on these inputs and whatever their values are."""
        behind = self._behind(names)
        if behind is None or not self._outputs:
            return False
        try:
            with self._poisoned(names):
                found = self._run()
        except RuntimeError:
            return False  # an operation that refuses NaN has read one
        return len(found) == len(self._outputs) and all(
            torch.equal(now, then) for now, then in zip(found, self._outputs, strict=True)
        )

    @cached_property
    def _outputs(self) -> list[Tensor]:
        """All outputs of the copy as it stands; NaN, which equals nothing, makes every comparison fail."""
        return self._run()

    def _run(self) -> list[Tensor]:
        with torch.no_grad():
            return [output.clone() for output in output_tensors(self._interpret(lambda node, fetch: None))]

    def _interpret(self, visit: Any) -> Any:
        buffers = {name: buffer.detach().clone() for name, buffer in self.twin.named_buffers()}
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                return self.graph.interpret(self.twin, to_float64(self.inputs), visit)
        finally:
            with torch.no_grad():
                for name, buffer in self.twin.named_buffers():
                    buffer.copy_(buffers[name])

    @contextmanager
    def _poisoned(self, names: Sequence[str]) -> Iterator[None]:
        saved = {name: self.parameters[name].data for name in names}
        try:
            for name, values in saved.items():
                self.parameters[name].data = torch.full_like(values, math.nan)
            yield
        finally:
            for name, values in saved.items():
                self.parameters[name].data = values

    def _behind(self, names: Sequence[str]) -> set[Node] | None:
        """All operations behind parameters; None where one of them may return a number though it reads a NaN."""
        waiting = [node for name in names for node in self.graph.placeholders_of(name)]
        found: set[Node] = set()
        while waiting:
            node = waiting.pop()
            if node in found or node.op == "output":
                continue
            if node.op == "call_function" and not _hands_on_nan(node):
                return None
            found.add(node)
            waiting.extend(node.users)
            while is_in_place(node) or (node.op == "call_function" and op_name(node) in VIEWS and _is_written(node)):
                # What is written into a view is read wherever the tensor behind it is.
                node = node.all_input_nodes[0]
                waiting.append(node)
        return found

    def _field_at(self, absorptions: Sequence[Absorption]) -> EulerField:
        """Weights, and gradients of a random projection of what some normalizations return."""
        nodes = {absorption.node for absorption in absorptions}
        results: list[Tensor] = []

        def visit(node: Node, fetch: Any) -> None:
            if node in nodes and callable(node.target):
                arguments = {**bound_arguments(node), "eps": NEGLIGIBLE_EPS}
                results.extend(output_tensors(node.target(*map_arg(tuple(arguments.values()), fetch))))

        device = next(iter(self.parameters.values())).device
        with torch.enable_grad():
            self._interpret(visit)
            loss = random_projection(results, torch.Generator(device).manual_seed(self.seed), logits=False)
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(self.parameters.values()), allow_unused=True
            )
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        slopes = {
            name: torch.zeros((), dtype=torch.float64, device=device).expand(weight.shape) if slope is None else slope
            for (name, weight), slope in zip(weights.items(), found, strict=True)
        }
        return EulerField(weights, slopes)


def _hands_on_nan(node: Node) -> bool:
    """Whether an operation with a rule returns NaN in every entry that depends on one that it reads."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    if node.target is operator.getitem:
        return isinstance(value, Tensor)
    known = not node.all_input_nodes or op_name(node) in _HANDING_ON
    return isinstance(node.target, torch._ops.OpOverload) and known


def _is_written(node: Node) -> bool:
    """Whether something is written into the result of a view, or into a view of it."""
    return any(
        (is_in_place(user) and user.all_input_nodes[0] is node)
        or (user.op == "call_function" and op_name(user) in VIEWS and _is_written(user))
        for user in node.users
    )
