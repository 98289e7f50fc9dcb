"""Certificates inside the network, for weights that its output does not depend on.

If the output is read from a token that bypasses a branch, as the class token bypasses the last pooling of the queries
in MViT, the weights of that branch have no gradient, and the certificate at the output has no evidence. The
normalization that absorbs their scale still depends on them. So the certificate is computed there,

    value_G = |Σ_G w ⊙ ∂ℓ/∂w| / (‖w_G‖ ‖∂ℓ/∂w_G‖) ,   ℓ = ⟨v, y⟩ ,

with y the output of the normalization, its eps negligible, and v random. One pass covers all such normalizations: ℓ is
then the sum over them, and no term depends on the scale, as nothing behind one of them does.

This requires that the output provably does not depend on the weight. A vanishing gradient is no proof: it also vanishes
behind an inactive ReLU. So the weight is replaced by NaN. Every operation on a NaN returns NaN, including a product
with zero and a saturated function, except operations that compare, sort or replace it; these, and operations without a
rule, must not occur behind the weight. If all outputs are then the same, bit for bit, only selections of entries lie
between them and the weight, and they are functions of other entries.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from manifold_nets.models import other_values, state_kept
from manifold_nets.running import Inputs, output_tensors, to_float64
from manifold_nets.symmetry.exact_mode import NEGLIGIBLE_EPS
from manifold_nets.symmetry.gradients import MOST_PASSES, GradientPass, random_projection, real_fields
from manifold_nets.symmetry.graph import bound_arguments, is_in_place, op_name
from manifold_nets.symmetry.rules import RULES, VIEWS
from manifold_nets.symmetry.trace import TracedGraph
from manifold_nets.symmetry.weight_structure import Structure

__all__ = ["LocalCertificates"]

# Operations that may return a number where they read a NaN, though they depend on what is there.
_SWALLOWING = frozenset(
    "argsort bucketize copysign embedding_bag embedding_renorm fmax fmin grid_sampler grid_sampler_2d grid_sampler_3d "
    "heaviside histc index_reduce kthvalue mode msort nan_to_num nanmean nanmedian nanquantile nansum renorm "
    "scatter_reduce searchsorted sgn sign sort topk".split()
)
# What may lie behind the weight.
_HANDING_ON = {key.partition(".")[0] for key in RULES} - _SWALLOWING
# Forward passes with NaN in the place of weights: of all, and of each half.
_MOST_RUNS = 3


class LocalCertificates:
    """Takes the Euler field at the normalizations that absorb the weights which no output depends on.

    All of them are asked together: one pass forward and backward gives the field of all, one forward with NaN in the
    place of all says whether an output depends on any. Where one does, halves are asked, and what is not settled after
    `_MOST_RUNS` of these forward passes stays without a certificate.

    Args:
        model_copy: the copy that is analysed, in float64; its values and buffers are the same afterwards.
        graph: its graph.
        inputs: its inputs.
        seed: seed of the random projection.
        most_passes: how many passes forward and backward there are; three passes forward count as one.
    """

    def __init__(
        self, model_copy: nn.Module, graph: TracedGraph, inputs: Inputs, seed: int, most_passes: int = MOST_PASSES
    ) -> None:
        self.model_copy, self.graph, self.inputs = model_copy, graph, inputs
        self.seed, self.most_passes = seed, most_passes
        self.parameters = {name: p for name, p in model_copy.named_parameters() if p.is_floating_point()}
        # What was used of them, and the normalizations that are asked.
        self.passes = 0
        self._nodes: set[Node] = set()

    def fields(self, structures: Iterable[Structure]) -> dict[str, GradientPass]:
        """The field at the normalizations, for each weight that has them and that provably no output depends on."""
        candidates = {s.name: s for s in structures if self._may_be_certified(s)}
        if not candidates or self.most_passes < 1:
            return {}
        self._nodes = {absorption.node for structure in candidates.values() for absorption in structure.absorptions}
        field, outputs = self._field()
        self.passes = 1
        return dict.fromkeys(self._without_influence(candidates, outputs), field)

    def _may_be_certified(self, structure: Structure) -> bool:
        """Whether normalizations of a known eps absorb a weight, and NaN in its place would show what depends on it."""
        names = _names(structure)
        return (
            bool(structure.absorptions)
            # One that is written out has an eps that is not known here, and the test would be inexact.
            and all("eps" in bound_arguments(absorption.node) for absorption in structure.absorptions)
            and all(name in self.parameters for name in names)
            and self._behind(names) is not None
        )

    def _without_influence(self, candidates: Mapping[str, Structure], outputs: Sequence[Tensor]) -> list[str]:
        """The weights that no output depends on, on these inputs and whatever their values are."""
        found: list[str] = []
        waiting = [list(candidates)]
        runs = 0
        while waiting and runs < (_MOST_RUNS if self.most_passes > 1 else 1):
            part = waiting.pop(0)
            runs += 1
            if self._change_nothing([name for weight in part for name in _names(candidates[weight])], outputs):
                found += part
            elif len(part) > 1:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
        self.passes += runs > 1
        return found

    def _change_nothing(self, names: Sequence[str], outputs: Sequence[Tensor]) -> bool:
        """Whether all outputs are the same, bit for bit, with NaN in the place of some parameters."""
        nothing = {name: torch.full_like(self.parameters[name], math.nan) for name in names}
        try:
            # With gradients, for the same kernels as before.
            with state_kept(self.model_copy), other_values(self.model_copy, nothing), torch.enable_grad():
                found, _ = self._run()
        except RuntimeError:
            return False  # an operation that refuses NaN has read one
        # NaN, which equals nothing, makes the comparison fail.
        return 0 < len(found) == len(outputs) and all(map(torch.equal, found, outputs))

    def _run(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the copy, and of its normalizations that are asked, with the eps of these negligible."""
        inside: list[Tensor] = []

        def exactly(node: Node, fetch: Any) -> Any:
            if node not in self._nodes or not callable(node.target):
                return None
            arguments = {**bound_arguments(node), "eps": NEGLIGIBLE_EPS}
            result = node.target(*map_arg(tuple(arguments.values()), fetch))
            inside.extend(output_tensors(result))
            return result

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            outputs = output_tensors(self.graph.interpret(self.model_copy, to_float64(self.inputs), exactly))
        return [output.detach().clone() for output in outputs], inside

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

    def _field(self) -> tuple[GradientPass, list[Tensor]]:
        """Weights, and gradients of a random projection of what the normalizations return; the outputs as well."""
        device = next(iter(self.parameters.values())).device
        with state_kept(self.model_copy), torch.enable_grad():
            outputs, inside = self._run()
            loss = random_projection(inside, torch.Generator(device).manual_seed(self.seed), logits=False)
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss, list(self.parameters.values()), allow_unused=True
            )
        return GradientPass(*real_fields(self.parameters, found)), outputs


def _names(structure: Structure) -> list[str]:
    return [structure.name, *structure.companions]


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
