"""`diagnose`: derive symmetries from the graph, test them by gradients and finite moves, and report the findings."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import AnalysisError, ArgumentTypeError, ExampleInputsError, OptionError
from manifold_nets.float64 import following
from manifold_nets.groups import Partition
from manifold_nets.models import analysis_copy, draw_not_finite, is_continuous, is_meta, random_numbers
from manifold_nets.running import Inputs, run, split_inputs, to_float64
from manifold_nets.symmetry.families import certified_families, with_mixed_weights
from manifold_nets.symmetry.finite_move import FiniteMove, has_written_eps, moved_claims, moved_numbers
from manifold_nets.symmetry.gradients import (
    MOST_PASSES,
    GradientPass,
    gradient_pass,
    pass_without_values,
    replace_zeros,
    second_pass,
)
from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.joint import required_partitions, solve_jointly
from manifold_nets.symmetry.local_certificates import LocalCertificates
from manifold_nets.symmetry.low_memory import ROUNDING, low_memory_copy, low_memory_pass, widen_vectors
from manifold_nets.symmetry.low_variance import LowVariance
from manifold_nets.symmetry.module_graph import module_graph
from manifold_nets.symmetry.report import (
    ShiftSymmetry,
    SymmetryFamily,
    SymmetryReport,
    UnexplainedSymmetry,
    WeightFinding,
)
from manifold_nets.symmetry.search import NumericalSearch, searched_partitions
from manifold_nets.symmetry.shift_findings import Loss, recheck_shifts, sees_no_shift, shift_symmetries, with_shown
from manifold_nets.symmetry.shifts import ShiftStructure
from manifold_nets.symmetry.trace import TracedGraph, trace
from manifold_nets.symmetry.weight_findings import (
    NOT_SEARCHED,
    WeightFindings,
    finding_without_graph,
    integer_finding,
    natural_partitions,
    owner_of,
    qualified,
)
from manifold_nets.symmetry.weight_structure import Structure, follow_weight

__all__ = ["LARGEST_SEED", "diagnose"]

_log = logging.getLogger(__name__)

# Numpy takes seeds below 2³², and the points of the analysis are drawn from the seed and the two numbers after it.
LARGEST_SEED = 2**32 - 3
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage less often: a graph is many long-lived objects, and every full collection visits all of them."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _OBJECTS_BETWEEN_COLLECTIONS) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
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
    """Find the scale symmetries of a network's weights: which groups are scale-invariant, why, and what to do.

    Three independent methods are compared:

    - *Structure.* In the aten graph of the model in training mode, the scale of each group of entries is followed to
      the normalization that absorbs it, or to the operation that makes it matter.
    - *Certificate.* A float64 gradient tests each claim: ``Σ_G w ⊙ ∂L/∂w = 0`` by Euler's theorem (see
      `manifold_nets.symmetry.invariance`).
    - *Finite moves.* Everything that both confirm is rescaled at once by random factors, on the inputs and on ten times
      the inputs. The outputs must not change (see `manifold_nets.symmetry.finite_move`).

    Contradictions are reported with the status ``"disagreement"``. The model, its mode, buffers, gradients and the
    random state are not changed.

    Special cases:

    - `torch.export` fails, for instance on data-dependent control flow: every weight has the status ``"unknown"``,
      with the reason and the finest natural partition (filters, blocks of filters, columns, the whole tensor) that
      passes the gradient test. ``not_searched`` lists what is left out.
    - The output provably does not depend on a weight: its gradient is taken at the output of the normalization that
      absorbs it (``taken_at``), with full memory only.
    - Weights with NaN or infinity: these entries are replaced by random ones for the test, and the report names their
      groups.
    - The meta device: there are no values, so certificates have the verdict ``"no evidence"``.
    - Modes: a module in evaluation mode inside a model in training mode counts as frozen. A model in evaluation mode is
      analysed in training mode.

    Tensors that forward creates in torch's default dtype, casts, or keeps in attributes or objects are converted to
    float64 as well.

    Args:
        model: the network, in any mode, dtype and device.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or ``((…), {…})``; at least
            two examples, as batch normalization needs them.
        tolerance: largest relative certificate value of an invariant group.
        seed: random seed.
        loss: ``"cross_entropy"`` or ``"softmax"`` if the outputs are logits along axis 1, or the loss as a function of
            the outputs. Constants added to all logits of an example then count as symmetries too.
        memory: ``"full"`` makes a float64 copy of the model and takes its gradients at two points. ``"small"`` needs
            only float32 gradients and a float64 copy of one weight at a time; the tolerance is then at least the
            machine epsilon of float32, and there is no search for symmetries that the structure does not explain.

    Returns:
        A `SymmetryReport` with one finding for every parameter with at least two dimensions.

    Raises:
        ExampleInputsError: the model does not accept the inputs.
        DoublePrecisionError: the model does not run in float64.
        AnalysisError: the model cannot be copied, or backward() fails.
        UnsupportedModelError: the model is scripted or quantized, or has parameters without a shape.
        OptionError: ``tolerance`` is not a finite number above 0, ``seed`` is not an integer from 0 to 2³² − 3,
            ``memory`` is neither ``"full"`` nor ``"small"``, or ``loss`` is not a known name or does not accept the
            outputs.
        ArgumentTypeError: ``model`` is not a `torch.nn.Module`.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029, for the symmetries; Euler's theorem on homogeneous functions
        for the certificate.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> report = diagnose(net, torch.randn(4, 3, 8, 8))
        >>> [(w.name, w.status) for w in report.weights]
        [('0.weight', 'invariant'), ('4.weight', 'not invariant')]
    """
    _require_arguments(model, tolerance, seed, memory)
    tolerance = max(tolerance, ROUNDING) if memory == "small" else tolerance
    with random_numbers(seed):
        _log.info("tracing")
        network = _network(model, example_inputs, loss, seed, memory)
        graph, copy = network.graph, network.copy
        _log.info("propagating scales and computing gradients")
        if isinstance(graph, AnalysisError):
            gradients = _gradients(network, _natural_partitions(copy))
            test = InvarianceTest(gradients, tolerance, None, network.not_finite)
            return _by_gradients_alone(network, test, graph, example_inputs)
        joint, structure = solve_jointly(graph), ShiftStructure(graph, model, loss=network.logits)
        gradients = _gradients(network, required_partitions(joint, structure))
    low_variance = None if network.meta else LowVariance(graph, copy, network.inputs, seed, gradients, tolerance)
    test = InvarianceTest(gradients, tolerance, low_variance, network.not_finite)
    _log.info("testing the symmetries of the graph")
    weights, local = WeightFindings(copy, graph, test, network.variances), _local_certificates(network, gradients)
    findings = _tested_weights(weights, local, {weight.name for weight in constrained_weights(model)})
    families = certified_families(joint, test)
    shifts = shift_symmetries(structure, test)
    shifts, unexplained = _searched(network, test, structure, local, findings, families, shifts)
    if not network.meta:
        _log.info("checking finite moves")
        move = _finite_move(network, gradients, tolerance)
        findings, families, shifts = moved_claims(move, findings, families, shifts)
        findings, unexplained = moved_numbers(move, findings, unexplained, weights.alone_invariant)
    reported, families = with_mixed_weights(findings, families)
    return SymmetryReport(
        type(model).__name__, reported, tolerance, example_inputs, module_graph(graph), families, shifts, unexplained
    )


@dataclass(frozen=True)
class _Network:
    """The model under analysis: a copy, which gradients and finite moves may change, and its graph.

    Args:
        model: the user's model.
        copy: the copy.
        inputs: the inputs, in float64 with full memory.
        graph: the graph, or the error that prevented it.
        seed: random seed.
        memory: ``"full"`` or ``"small"``.
        not_finite: a mask of the entries that are not finite, for the parameters that have any.
        logits: whether the loss ignores constants added to all outputs along axis 1.
        variances: the channel variances of each batch normalization.
    """

    model: nn.Module
    copy: nn.Module
    inputs: Inputs
    graph: TracedGraph | AnalysisError
    seed: int
    memory: Literal["full", "small"]
    not_finite: Mapping[str, Tensor]
    logits: bool
    variances: dict[Any, Tensor]

    @property
    def meta(self) -> bool:
        """Whether the model is on the meta device."""
        return is_meta(self.copy)

    @property
    def is_searched(self) -> bool:
        """Whether to search for symmetries that the structure does not explain."""
        return self.memory == "full" and not self.meta and isinstance(self.graph, TracedGraph)


def _network(
    model: nn.Module, example_inputs: Any, loss: Loss | None, seed: int, memory: Literal["full", "small"]
) -> _Network:
    """Copy a model and trace the copy."""
    copy = low_memory_copy(model) if memory == "small" else analysis_copy(model)
    meta, not_finite = is_meta(copy), draw_not_finite(copy)
    inputs = _not_empty(split_inputs(example_inputs))
    if memory == "full" or meta:
        inputs = to_float64(inputs, torch.device("meta") if meta else None)
    graph = _trace(copy, inputs, meta)
    # Now, because computing gradients changes parameters of the copy.
    variances = _batch_variances(graph, copy, inputs, seed) if isinstance(graph, TracedGraph) and not meta else {}
    logits = not meta and sees_no_shift(loss, copy, inputs)
    return _Network(model, copy, inputs, graph, seed, memory, not_finite, logits, variances)


def _not_empty(inputs: Inputs) -> Inputs:
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if shapes and all(0 in shape for shape in shapes):
        raise ExampleInputsError(f"only empty tensors, of shapes {shapes}")
    return inputs


def _require_arguments(model: object, tolerance: object, seed: object, memory: object) -> None:
    """Raise an error where an argument has no meaning."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", model, "a torch.nn.Module object", "Build the network first.")
    if not (isinstance(tolerance, numbers.Real) and 0 < float(tolerance) < math.inf):
        raise OptionError("tolerance", tolerance, "a finite number above 0")
    if not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
        raise OptionError("seed", seed, f"a whole number from 0 to {LARGEST_SEED}")
    if memory not in ("full", "small"):
        raise OptionError("memory", memory, "'full' or 'small'")


def _gradients(network: _Network, required: Mapping[str, tuple[Partition, ...]]) -> GradientPass:
    """The gradients at the weights as they are; ``required`` are the partitions whose sums will be asked for."""
    copy, inputs, seed = network.copy, network.inputs, network.seed
    if network.meta:
        return pass_without_values(copy)
    if network.memory == "small":
        widen_vectors(copy)
        return low_memory_pass(copy, to_float64(inputs), seed, required, logits=network.logits)
    replace_zeros(copy, seed)
    found = gradient_pass(copy, inputs, seed, logits=network.logits)
    searched = {name: searched_partitions(shape) for name, shape in found.shapes.items()} if network.is_searched else {}
    return replace(found, required=required, searched=searched)


def _second(network: _Network, passes: int) -> GradientPass:
    """The gradients at a second point."""
    with random_numbers(network.seed):
        return second_pass(network.copy, network.inputs, network.seed, logits=network.logits, passes=passes)


def _local_certificates(network: _Network, gradients: GradientPass) -> LocalCertificates | None:
    """Certificates inside of the network, for weights without influence on the outputs."""
    if not network.is_searched or isinstance(network.graph, AnalysisError):
        return None
    left = MOST_PASSES - gradients.passes - 1  # one is for the second point
    return LocalCertificates(network.copy, network.graph, network.inputs, network.seed, left)


def _finite_move(network: _Network, gradients: GradientPass, tolerance: float) -> FiniteMove:
    outward = isinstance(network.graph, TracedGraph) and has_written_eps(network.graph)
    return FiniteMove(
        network.copy, network.inputs, gradients, network.seed + 2, tolerance, logits=network.logits, outward=outward
    )


def _searched(
    network: _Network,
    test: InvarianceTest,
    structure: ShiftStructure,
    local: LocalCertificates | None,
    findings: list[WeightFinding],
    families: tuple[SymmetryFamily, ...],
    shifts: tuple[ShiftSymmetry, ...],
) -> tuple[tuple[ShiftSymmetry, ...], tuple[UnexplainedSymmetry, ...]]:
    """Search for what the rules do not explain; the shifts with those that a second look explains, and the rest."""
    if local is None:
        return shifts, ()
    _log.info("searching for unexplained symmetries")
    left = MOST_PASSES - test.gradients.passes - local.passes
    search = NumericalSearch(structure.graph, test, lambda: _second(network, left))
    shifts = with_shown(shifts, recheck_shifts(structure, search.shown_shifts(shifts), test))
    return shifts, _of_the_model(search.unexplained(findings, families, shifts), network.not_finite)


def _tested_weights(
    weights: WeightFindings, local: LocalCertificates | None, constrained: set[str]
) -> list[WeightFinding]:
    """Test every weight of a traced model, those without influence on the outputs at the normalizations inside."""
    findings: dict[str, WeightFinding] = {}
    lacking: dict[str, Structure] = {}
    for name, parameter in _weights(weights.model_copy):
        if not is_continuous(parameter):
            findings[name] = integer_finding(name, parameter, owner_of(weights.model_copy, name))
            continue
        structure = follow_weight(weights.graph, name) if weights.graph.placeholders_of(name) else None
        findings[name] = qualified(weights.finding(name, structure, name in constrained), parameter)
        if local and structure is not None and weights.lacks_gradient(structure):
            lacking[name] = structure
    for name, inside in (local.fields(lacking.values()) if local else {}).items():
        found = weights.finding(name, lacking[name], name in constrained, inside)
        findings[name] = qualified(found, weights.model_copy.get_parameter(name))
    return list(findings.values())


def _natural_partitions(model: nn.Module) -> dict[str, tuple[Partition, ...]]:
    """For each weight of a network without a graph the partitions that its layer suggests, without sums of these."""
    found = {}
    for name, parameter in _weights(model):
        first, *others = natural_partitions(owner_of(model, name), parameter.shape)
        found[name] = (first, *(p for p in others if p.kept == (1,)))
    return found


def _by_gradients_alone(
    network: _Network, test: InvarianceTest, refusal: AnalysisError, example_inputs: Any
) -> SymmetryReport:
    """Report what the gradients say where there is no graph."""
    findings, found = [], []
    for name, parameter in _weights(network.copy):
        owner = owner_of(network.copy, name)
        if not is_continuous(parameter):
            findings.append(integer_finding(name, parameter, owner))
            continue
        finding, invariant = finding_without_graph(name, parameter, owner, test, refusal.why)
        findings.append(finding)
        found += [invariant] if invariant is not None else []
    return SymmetryReport(
        type(network.model).__name__, tuple(findings), test.tolerance, example_inputs,
        unexplained=_of_the_model(tuple(found), test.not_finite), not_searched=NOT_SEARCHED,
    )  # fmt: skip


def _of_the_model(
    found: tuple[UnexplainedSymmetry, ...], not_finite: Mapping[str, Tensor]
) -> tuple[UnexplainedSymmetry, ...]:
    """Without what was found of parameters of which some entries are not those of the model."""
    return tuple(one for one in found if not_finite.keys().isdisjoint(one.parameters))


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def _trace(model_copy: nn.Module, inputs: Inputs, meta: bool) -> TracedGraph | AnalysisError:
    """Export the model, or say why not; where that fails because the model refuses the inputs, raise that instead."""
    try:
        return trace(model_copy, inputs)
    except AnalysisError as refusal:
        if not meta:
            with torch.no_grad(), following(model_copy):
                run(model_copy, inputs)
        return refusal


def _batch_variances(graph: TracedGraph, model_copy: nn.Module, inputs: Inputs, seed: int) -> dict[Any, Tensor]:
    """Batch variance of every channel in front of every batch normalization, on the example inputs."""
    found: dict[Any, Tensor] = {}
    normalizations = {node for node in graph.order if op_name(node) == "batch_norm"}
    if not normalizations:
        return found

    def visit(node: torch.fx.Node, fetch: Any) -> None:
        if node in normalizations:
            z = fetch(bound_arguments(node)["input"])
            found[node] = z.var([axis for axis in range(z.ndim) if axis != 1], unbiased=False)

    with torch.no_grad():
        torch.manual_seed(seed)
        try:
            graph.interpret(model_copy, inputs, visit)
        except Exception:  # an index of a token that is out of range, for instance
            with following(model_copy):
                run(model_copy, inputs)  # the model's own code says better where it fails
            raise
    return found
