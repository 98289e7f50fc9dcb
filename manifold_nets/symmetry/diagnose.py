"""`diagnose`: structure from the graph, the Euler certificate, and finite moves, and what they say together."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import AnalysisError, ArgumentTypeError, ExampleInputsError, OptionError
from manifold_nets.float64 import following
from manifold_nets.models import analysis_copy, draw_not_finite, is_continuous, is_meta, random_numbers
from manifold_nets.running import Inputs, run, split_inputs, to_float64
from manifold_nets.symmetry.demands import Demands, demanded_partitions, natural_demands
from manifold_nets.symmetry.finite_move import FiniteMove
from manifold_nets.symmetry.gradients import (
    MOST_PASSES,
    GradientPass,
    gradient_pass,
    pass_without_values,
    replace_zeros,
    second_pass,
)
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.invariance import Certifier, Loss, sees_no_shift
from manifold_nets.symmetry.joint import certified_families, solve_jointly
from manifold_nets.symmetry.judge import Judge, owner_of
from manifold_nets.symmetry.local_certificates import LocalCertificates
from manifold_nets.symmetry.low_memory import ROUNDING, low_memory_copy, low_memory_pass, widen_vectors
from manifold_nets.symmetry.low_variance import LowVariance
from manifold_nets.symmetry.mixed import with_mixed_weights
from manifold_nets.symmetry.module_graph import module_graph
from manifold_nets.symmetry.moves import has_written_eps, moved_claims, moved_numbers
from manifold_nets.symmetry.report import SymmetryReport, UnexplainedSymmetry, WeightFinding
from manifold_nets.symmetry.reverse.scales import search_unexplained, still_unexplained
from manifold_nets.symmetry.shifts import row_shifts, shift_symmetries
from manifold_nets.symmetry.shown_shifts import shown_shifts, with_shown
from manifold_nets.symmetry.structure.find import Structure, follow_weight
from manifold_nets.symmetry.trace import TracedGraph, trace
from manifold_nets.symmetry.untraced import NOT_SEARCHED, finding_without_graph, integer_finding, qualified

__all__ = ["LARGEST_SEED", "diagnose"]

# Numpy takes seeds below 2³², and the points of the analysis are drawn from the seed and the two numbers after it.
LARGEST_SEED = 2**32 - 3


@torch.inference_mode(False)  # gradients are needed
def diagnose(
    model: nn.Module,
    example_inputs: Any,
    *,
    tolerance: float = 1e-8,
    seed: int = 0,
    loss: Loss | None = None,
    memory: Literal["full", "small"] = "full",
) -> SymmetryReport:
    """Find the scale symmetries of a network's weights: which groups of entries, why, how sure, and the remedy.

    Structure comes from the aten graph of the model in training mode: the scale of each group is followed until a
    normalization absorbs it or an operation refuses it. Each claim is then checked by the Euler certificate in
    float64: ``Σ_G w ⊙ ∂L/∂w = 0`` (see `manifold_nets.symmetry.gradients`). What both confirm is carried out by
    finite amounts, all at once, on the inputs and on ten times these, and the outputs must not change (see
    `manifold_nets.symmetry.finite_move`). A contradiction is reported as a disagreement. Of a weight that
    provably no output depends on, the certificate is taken at the output of the normalization that absorbs it, and its
    ``taken_at`` says so (with full memory only). Entries that are not finite are drawn anew for the certificate, and
    the groups that they are in are named. The model, its mode, buffers, gradients and the random state are left as they
    were.

    Where `torch.export` refuses the model, as it does where control flow depends on the data, the structure is unknown:
    every weight has the status ``"unknown"``, the reason, and the certificate of its finest natural partition (filters,
    blocks of filters, columns, the whole tensor) that it calls invariant. That takes one pass, and ``not_searched``
    names what is left out. A model on the meta device has a structure but no values: the certificate has no evidence,
    and says so. A module that is in evaluation mode inside a model in training mode is analysed as it stands, frozen;
    a model in evaluation mode is analysed as if it were in training mode.

    Tensors that forward makes in torch's default dtype, casts, or keeps as attributes or inside objects follow the
    analysis in float64.

    Args:
        model: the network, in any mode, dtype and device.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or ``((…), {…})``; at least
            two examples, as batch normalization needs them.
        tolerance: largest certificate value of an invariant group, relative.
        seed: seed of the random cotangent.
        loss: ``"cross_entropy"`` or ``"softmax"`` where the outputs are logits along axis 1, or the loss itself as a
            function of the outputs: constants added to all logits of an example then are symmetries as well.
        memory: ``"full"``: a float64 copy of the model and its gradients at two points; ``"small"``: beside the model
            no more than its gradients in float32 and float64 copies of one weight at a time. The tolerance then is at
            least the machine epsilon of float32, and nothing is searched beyond what the structure explains.

    Returns:
        A `SymmetryReport`; every parameter with at least two dimensions has its finding.

    Raises:
        ExampleInputsError: the model refuses the inputs.
        DoublePrecisionError: the model cannot compute in float64.
        AnalysisError: the model cannot be copied, or its gradients cannot be taken.
        UnsupportedModelError: it is a script or quantized, or has parameters without a shape.
        OptionError: ``tolerance`` is no finite number above 0, ``seed`` no whole number from 0 to 2³² − 3, or
            ``memory`` neither of both.
        LossError: the loss is no function and no name of one, or does not accept the outputs.
        ArgumentTypeError: the model is none.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029, for the symmetries; Euler's theorem on homogeneous functions
        for the certificate.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> report = diagnose(net, torch.randn(4, 3, 8, 8))
        >>> [(w.name, w.status) for w in report.weights]
        [('0.weight', 'invariant'), ('4.weight', 'not invariant')]
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", model, "a torch.nn.Module object", "Make the network first.")
    _require_options(tolerance, seed, memory)
    tolerance = max(tolerance, ROUNDING) if memory == "small" else tolerance
    with random_numbers(seed):
        twin = low_memory_copy(model) if memory == "small" else analysis_copy(model)
        meta, not_finite = is_meta(twin), draw_not_finite(twin)
        inputs = _not_empty(split_inputs(example_inputs))
        if memory == "full" or meta:
            inputs = to_float64(inputs, torch.device("meta") if meta else None)
        graph = _trace(twin, inputs, meta)
        # The certificate comes last: it moves parameters of the twin.
        variances = _batch_variances(graph, twin, inputs, seed) if isinstance(graph, TracedGraph) and not meta else {}
        logits = not meta and sees_no_shift(loss, twin, inputs)
        if isinstance(graph, TracedGraph):
            joint, rows = solve_jointly(graph), row_shifts(graph, model, loss=logits)
            wanted = demanded_partitions(graph, joint, rows)
        else:
            wanted = natural_demands(twin)
        twice = memory == "full" and isinstance(graph, TracedGraph)
        field, again = _fields(twin, inputs, seed, wanted, logits=logits, memory=memory, twice=twice)

    def mover() -> FiniteMove:
        outward = isinstance(graph, TracedGraph) and has_written_eps(graph)
        return FiniteMove(twin, inputs, field, seed + 2, tolerance, logits=logits, outward=outward)

    if isinstance(graph, AnalysisError):
        return _by_certificate(model, twin, Certifier(field, tolerance, not_finite), graph, example_inputs)
    unexplained: tuple[UnexplainedSymmetry, ...] = ()
    constrained = {weight.name for weight in constrained_weights(model)}
    local = LocalCertificates(twin, graph, inputs, seed, MOST_PASSES - field.passes - again.passes) if again else None
    blunt = None if meta else LowVariance(graph, twin, inputs, seed, field, tolerance)
    judge = Judge(twin, graph, field, variances, tolerance, blunt, not_finite)
    findings = _by_structure(judge, local, constrained)
    families = certified_families(joint, field, tolerance, blunt, not_finite)
    shifts = shift_symmetries(graph, model, rows, field, tolerance, loss=logits, blunt=blunt)
    if again and local:
        again = replace(again, passes=again.passes + local.passes)
        unexplained = search_unexplained((field, again), findings, families, shifts, tolerance, graph)
        unexplained = _of_the_model(unexplained, not_finite)
        shown = shown_shifts(graph, model, unexplained, field, tolerance, loss=logits, blunt=blunt)
        if shown:
            shifts = with_shown(shifts, shown)
            unexplained = still_unexplained(unexplained, (field, again), shifts, shown, tolerance)
    if not meta:
        again = local = None  # their memory is what the copy takes that is moved
        move = mover()
        findings, families, shifts = moved_claims(move, findings, families, shifts)
        findings, unexplained = moved_numbers(move, findings, unexplained, judge.alone_invariant)
    told, families = with_mixed_weights(findings, families)
    return SymmetryReport(
        type(model).__name__, told, tolerance, example_inputs, module_graph(graph), families, shifts,
        unexplained,
    )  # fmt: skip


def _not_empty(inputs: Inputs) -> Inputs:
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if shapes and all(0 in shape for shape in shapes):
        raise ExampleInputsError(f"nothing but empty tensors, of shapes {shapes}")
    return inputs


def _require_options(tolerance: object, seed: object, memory: object) -> None:
    """Raise `OptionError` where an option has no meaning."""
    if not (isinstance(tolerance, numbers.Real) and 0 < float(tolerance) < math.inf):
        raise OptionError("tolerance", tolerance, "a finite number above 0")
    if not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
        raise OptionError("seed", seed, f"a whole number from 0 to {LARGEST_SEED}")
    if memory not in ("full", "small"):
        raise OptionError("memory", memory, "'full' or 'small'")


def _fields(
    twin: nn.Module,
    inputs: Inputs,
    seed: int,
    wanted: Demands,
    *,
    logits: bool,
    memory: Literal["full", "small"],
    twice: bool,
) -> tuple[GradientPass, GradientPass | None]:
    """The Euler field, and the one at a second point where that is asked for."""
    if is_meta(twin):
        return pass_without_values(twin), None
    if memory == "small":
        widen_vectors(twin)
        return low_memory_pass(twin, to_float64(inputs), seed, wanted, logits=logits), None
    replace_zeros(twin, seed)
    field = replace(gradient_pass(twin, inputs, seed, logits=logits), wanted=wanted)
    return field, second_pass(twin, inputs, seed, logits=logits) if twice else None


def _by_structure(judge: Judge, local: LocalCertificates | None, constrained: set[str]) -> list[WeightFinding]:
    """Judge every weight of a traced model, those without influence on the outputs at the normalizations inside."""
    findings: dict[str, WeightFinding] = {}
    silent: dict[str, Structure] = {}
    for name, parameter in _weights(judge.twin):
        if not is_continuous(parameter):
            findings[name] = integer_finding(name, parameter, owner_of(judge.twin, name))
            continue
        structure = follow_weight(judge.graph, name) if judge.graph.placeholders_of(name) else None
        findings[name] = qualified(judge.finding(name, structure, name in constrained), parameter)
        if local and structure is not None and judge.lacks_gradient(structure):
            silent[name] = structure
    for name, inside in (local.fields(silent.values()) if local else {}).items():
        found = judge.finding(name, silent[name], name in constrained, inside)
        findings[name] = qualified(found, judge.twin.get_parameter(name))
    return list(findings.values())


def _by_certificate(
    model: nn.Module, twin: nn.Module, certifier: Certifier, refusal: AnalysisError, example_inputs: Any
) -> SymmetryReport:
    """Report what the certificate says where there is no graph."""
    findings, found = [], []
    for name, parameter in _weights(twin):
        owner = owner_of(twin, name)
        if not is_continuous(parameter):
            findings.append(integer_finding(name, parameter, owner))
            continue
        finding, invariant = finding_without_graph(name, parameter, owner, certifier, refusal.why)
        findings.append(finding)
        found += [invariant] if invariant is not None else []
    return SymmetryReport(
        type(model).__name__, tuple(findings), certifier.tolerance, example_inputs,
        unexplained=_of_the_model(tuple(found), certifier.not_finite), not_searched=NOT_SEARCHED,
    )  # fmt: skip


def _of_the_model(
    found: tuple[UnexplainedSymmetry, ...], not_finite: Mapping[str, Tensor]
) -> tuple[UnexplainedSymmetry, ...]:
    """Without what was found of parameters of which some entries are not those of the model."""
    return tuple(one for one in found if not_finite.keys().isdisjoint(one.parameters))


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def _trace(twin: nn.Module, inputs: Inputs, meta: bool) -> TracedGraph | AnalysisError:
    """Export the model, or say why not; where that fails because the model refuses the inputs, raise that instead."""
    try:
        return trace(twin, inputs)
    except AnalysisError as refusal:
        if not meta:
            with torch.no_grad(), following(twin):
                run(twin, inputs)
        return refusal


def _batch_variances(graph: TracedGraph, twin: nn.Module, inputs: Inputs, seed: int) -> dict[Any, Tensor]:
    """Batch variance of every channel in front of every batch normalization, on the example inputs."""
    found: dict[Any, Tensor] = {}

    def visit(node: torch.fx.Node, fetch: Any) -> None:
        if op_name(node) == "batch_norm":
            z = fetch(bound_arguments(node)["input"])
            found[node] = z.var([axis for axis in range(z.ndim) if axis != 1], unbiased=False)

    with torch.no_grad():
        torch.manual_seed(seed)
        try:
            graph.interpret(twin, inputs, visit)
        except Exception:  # an index of a token that is out of range, for instance
            with following(twin):
                run(twin, inputs)  # the model's own code says better where it fails
            raise
    return found
