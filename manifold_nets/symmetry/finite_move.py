"""The finite move: apply all claimed symmetries by finite amounts, and check that the outputs do not change.

A derivative does not see jumps: ``h · (|h| < 4)`` has the derivative of ``h`` almost everywhere, and a rule of the
structure may be wrong in the same place. So all claims are applied at once, on the example inputs and on ten times
these: every group is multiplied by a random factor between 10⁻² and 10², together with its biases, and every shift is a
random amount of either sign between 10⁻² and 10². In training mode the outputs must not change.

The factors are powers of two, which round nothing. A symmetry therefore keeps the outputs bit for bit, in any dtype, up
to the eps of the normalizations (1e-30 here, and 1e-60 where that may matter) and to kernels that sum in another order.
Shifts are added before the factors and do round, and a network may amplify this. So a change counts only if it exceeds
the tolerance of the certificate and also ten times the effect of a relative change of 2⁻⁴² in every parameter and
input, before or after the move: about a thousand roundings, more than in a matrix product. If that effect reaches the
first digit of the outputs, as in a network that remembers its last call, there is no verdict.

If the outputs change, the claims at fault are found by bisection: claims are added one at a time, and the first one
whose addition changes the outputs is refuted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.float64 import Reading, map_tensors, tensors_in, widened
from manifold_nets.groups import Partition
from manifold_nets.models import is_continuous, other_values, random_numbers, state_kept
from manifold_nets.running import Inputs, run, to_float64
from manifold_nets.symmetry.exact_mode import NEGLIGIBLE_EPS, exact_mode
from manifold_nets.symmetry.generators import Generators, Part, single_entries
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.graph import op_name
from manifold_nets.symmetry.report import (
    Certificate,
    ShiftSymmetry,
    SymmetryFamily,
    UnexplainedSymmetry,
    WeightFinding,
)
from manifold_nets.symmetry.rules import LARGEST_EPS
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["MOST_RUNS", "FiniteMove", "Outcome", "has_written_eps", "moved_claims", "moved_numbers"]

# Largest move in decades, up and down: of the factors of groups, and of the size of shifts.
_DECADES = 2.0
# There are two moves with different factors: on the inputs, and on real-valued inputs multiplied by this.
_INPUT_FACTOR = 10.0
# The relative change of all parameters and inputs by which the conditioning is measured, and how far above counts.
_JITTER = 2.0**-42
_MARGIN = 10.0
# The eps for groups that are so small already that smaller ones would come near to the usual one. It is not taken at
# once: of a channel that is constant it makes large numbers, beside which nothing else is seen.
_SMALLER_EPS = NEGLIGIBLE_EPS**2
# The search for failing claims ends after this many forward passes, and then all uncleared claims count as failed. Four
# passes suffice if none fails.
MOST_RUNS = 40
_REMEDY = "leave it and report a bug: structure and certificate call it invariant, but moving it changes the outputs"
_NOT_INVARIANT = "leave it: its scale matters to the function"
# Their eps is made negligible, wherever it comes from.
_NORMALIZATIONS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
Found = TypeVar("Found", WeightFinding, SymmetryFamily, ShiftSymmetry)
# What is added to the groups of a parameter (True), and the binary logarithms of their factors (False).
_Steps = dict[tuple[bool, Partition], NDArray[np.float64]]


@dataclass(frozen=True)
class Outcome:
    """What the finite move says of a claim.

    Args:
        refuted: whether it changes the outputs.
        change: the largest relative change of an output; None where the move shows nothing.
    """

    refuted: bool = False
    change: float | None = None


@dataclass
class _Point:
    """Inputs, the outputs there, the claims, and what these are moved by."""

    inputs: Inputs
    before: list[Tensor]
    claims: Sequence[Generators]
    draws: list[NDArray[np.float64]]
    limits: list[float] = field(default_factory=list)
    eps: float = NEGLIGIBLE_EPS


def has_written_eps(graph: TracedGraph) -> bool:
    """Whether an operation of a network reads a constant as small as an eps."""
    return any(
        isinstance(value, float) and 0 < value <= LARGEST_EPS
        for node in graph.order
        if node.op == "call_function" and op_name(node) not in _NORMALIZATIONS
        for value in (*node.args, *node.kwargs.values())
    )


class FiniteMove:
    """Carries claims out on the copy that is analysed.

    Args:
        model_copy: the copy; it is left as it was, but for the values of its parameters, which are those of ``field``.
        inputs: its inputs.
        field: the first field, whose weights are moved.
        seed: seed of the factors, and of what the network draws.
        tolerance: largest relative change of the outputs.
        logits: whether constants along axis 1 of the outputs do not matter.
        outward: whether to make groups larger only where they cannot be made smaller as well: an eps that is written
            by hand may be out of reach.
    """

    def __init__(
        self,
        model_copy: nn.Module,
        inputs: Inputs,
        field: GradientPass,
        seed: int,
        tolerance: float,
        *,
        logits: bool = False,
        outward: bool = False,
    ) -> None:
        self.model_copy, self.seed, self.tolerance = model_copy, seed, tolerance
        self.logits, self.outward = logits, outward
        self.inputs, self.runs = to_float64(inputs), 0
        # Where moved parameters are written: to be given new memory takes as long as the move.
        self._room: dict[str, Tensor] = {}
        for name, parameter in model_copy.named_parameters():
            if parameter.dtype == torch.float64:
                parameter.data = field.weights[name]

    def outcomes(self, claims: Sequence[Generators]) -> list[Outcome]:
        """Move all claims at once, and find those that fail."""
        found = [Outcome() for _ in claims]
        most = self.runs + MOST_RUNS
        for number, (inputs, before) in enumerate(self._points if claims else ()):
            point = _Point(inputs, before, claims, [_draws(c, (self.seed, k), number) for k, c in enumerate(claims)])
            alive = [index for index, outcome in enumerate(found) if not outcome.refuted]
            if not self._settled(point, alive, found):
                for adds in (False, True):
                    if part := [index for index in alive if claims[index].adds is adds]:
                        self._search(point, part, found, most)
        return found

    @cached_property
    def _points(self) -> list[tuple[Inputs, list[Tensor]]]:
        """The inputs at which claims are moved, with the outputs: as they are, and larger ones where these work."""
        first = self._outputs(self.inputs, {})
        if first is None:
            return []
        larger = _multiplied(self.inputs, _INPUT_FACTOR)
        outputs = self._outputs(larger, {}) if larger is not None else None
        there = (self.inputs, first) if larger is None or outputs is None else (larger, outputs)
        return [(self.inputs, first), there]

    def _settled(self, point: _Point, alive: list[int], found: list[Outcome]) -> bool:
        """Whether the outputs stay the same when all claims are moved, as far as the tolerance tells."""
        changes = self._changes(point, alive)
        point.limits = [self.tolerance] * len(point.before)
        if changes is None:
            return True
        if any(change > self.tolerance for change in changes):
            return False
        for index in alive:
            found[index] = Outcome(False, max(*changes, 0.0, found[index].change or 0.0))
        return True

    def _search(self, point: _Point, alive: list[int], found: list[Outcome], most: int) -> None:
        """Find the claims that change the outputs, as many as the passes that are left allow."""
        if self._settled(point, alive, found):
            return
        before = self._outputs(point.inputs, {}, eps=_SMALLER_EPS)
        if before is not None:
            point = replace(point, before=before, eps=_SMALLER_EPS)
            if self._settled(point, alive, found):
                return
        if self.outward and not point.claims[alive[0]].adds:
            for index in alive:
                point.draws[index] = np.abs(point.draws[index])
            if self._settled(point, alive, found):
                return
        point.limits = self._limits(point, alive)
        good = 0
        while (change := self._excess(point, alive)) is not None:
            if self.runs >= most:
                for index in alive[good:]:
                    found[index] = Outcome(True, change)
                return
            bad = len(alive)
            while bad - good > 1:
                middle = (good + bad) // 2
                excess = self._excess(point, alive[:middle])
                good, bad, change = (middle, bad, change) if excess is None else (good, middle, excess)
            found[alive.pop(bad - 1)] = Outcome(True, change)

    def _excess(self, point: _Point, moved: Sequence[int]) -> float | None:
        """The largest change of an output beyond its limit; None where there is none."""
        changes = self._changes(point, moved) or []
        beyond = [change for change, limit in zip(changes, point.limits, strict=False) if not change <= limit]
        return max(beyond) if beyond else None

    def _limits(self, point: _Point, moved: Sequence[int]) -> list[float]:
        """How much each output may change: the tolerance, or what rounding may do to it before or after the move."""
        limits = [self.tolerance] * len(point.before)
        for moves in ({}, self._moves(point, moved)):
            exact = self._outputs(point.inputs, moves, eps=point.eps) if moves else point.before
            jittered = self._outputs(point.inputs, moves, _JITTER, eps=point.eps)
            if exact is None or jittered is None or not len(exact) == len(jittered) == len(limits):
                continue
            both = zip(point.before, exact, jittered, strict=True)
            noise = [_change(one, other, before) for before, one, other in both]
            # A move into what is not finite excuses nothing.
            limits = [max(a, _MARGIN * b if math.isfinite(b) else 0.0) for a, b in zip(limits, noise, strict=True)]
        return limits

    def _changes(self, point: _Point, moved: Sequence[int]) -> list[float] | None:
        """The relative change of each output when some claims are moved; None where the network refuses."""
        if not moved:
            return [0.0] * len(point.before)
        after = self._outputs(point.inputs, self._moves(point, moved), eps=point.eps)
        if after is None:
            return None
        if len(after) != len(point.before):
            return [math.inf] * len(point.before)
        return [_change(a, b, a) for a, b in zip(point.before, after, strict=True)]

    def _moves(self, point: _Point, moved: Sequence[int]) -> dict[str, _Steps]:
        """What happens to each parameter."""
        found: dict[str, _Steps] = {}
        for claim, draws in ((point.claims[index], point.draws[index]) for index in moved):
            for part in claim.parts:
                steps = found.setdefault(part.parameter, {})
                total = steps.setdefault((claim.adds, part.partition), np.zeros(part.partition.n_groups))
                np.add.at(total, part.groups, part.coefficients * draws[part.numbers])
        return found

    def _outputs(
        self, inputs: Inputs, moves: Mapping[str, _Steps], jitter: float = 0.0, *, eps: float = NEGLIGIBLE_EPS
    ) -> list[Tensor] | None:
        """The outputs of the copy with some parameters moved; None where it refuses."""
        self.runs += 1
        # Those in less than float64 are moved whenever an operation reads them.
        parameters = {name: p for name, p in self.model_copy.named_parameters() if is_continuous(p)}
        narrow = {
            id(p): (name, p) for name, p in parameters.items() if p.dtype not in (torch.float64, torch.complex128)
        }
        wide = [name for name, p in parameters.items() if id(p) not in narrow and (name in moves or jitter)]
        # Some networks differentiate in their forward pass.
        for mode in (torch.no_grad, torch.enable_grad):
            jittered = _Jitter(jitter, torch.Generator().manual_seed(self.seed))
            moved = functools.partial(self._moved, moves, jittered)
            read = Reading(narrow, moved) if narrow else None
            # As the passes of the certificate do: what the network draws is the same in all runs.
            with random_numbers(self.seed), mode(), state_kept(self.model_copy):
                values = {name: moved(name, parameters[name].data) for name in wide}
                given = map_tensors(jittered, inputs)
                try:
                    with other_values(self.model_copy, values), exact_mode(self.model_copy, read, eps=eps):
                        outputs = [output.detach().clone() for output in run(self.model_copy, given)]
                except (ExampleInputsError, DoublePrecisionError):
                    continue
            return [o - o.mean(1, keepdim=True) if self.logits and o.ndim >= 2 else o for o in outputs]
        return None

    def _moved(self, moves: Mapping[str, _Steps], jitter: _Jitter, name: str, given: Tensor) -> Tensor:
        """A parameter in float64 that is moved."""
        values = widened(given.detach()).contiguous()
        if name in moves:
            fresh = values.data_ptr() != given.data_ptr()
            room = values if fresh else self._room.setdefault(name, torch.empty_like(values))
            values = _carried_out(moves[name], values, room)
        return jitter(values)


def _carried_out(steps: _Steps, values: Tensor, room: Tensor) -> Tensor:
    """What a contiguous tensor is moved to, written to ``room``."""
    for (adds, partition), numbers in sorted(steps.items(), key=lambda step: not step[0][0]):
        by = partition.spread(torch.from_numpy(numbers if adds else np.exp2(numbers)).to(values.device))
        (torch.add if adds else torch.mul)(values.view(partition.view), by, out=room.view(partition.view))
        values = room
    return values


def _change(one: Tensor, other: Tensor, before: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest entry of the output that nothing has moved."""
    if not one.shape == other.shape == before.shape:
        return math.inf
    known = before.isfinite()
    if not bool(known.any()):
        return 0.0
    size, change = float(before[known].abs().max()), float((one - other)[known].abs().max())
    return 0.0 if change == 0 else change / size if size > 0 and math.isfinite(change) else math.inf


def _draws(claim: Generators, seed: tuple[int, int], number: int) -> NDArray[np.float64]:
    """The binary logarithms of the factors of a claim, whole numbers, or its constants."""
    # What goes as far as it can goes the other way at the second point.
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], claim.count) * (-1.0) ** number
    decades = np.random.default_rng((*seed, number)).uniform(-_DECADES, _DECADES, claim.count)
    if claim.adds:
        return np.asarray(signs * 10.0 ** (_DECADES if claim.far else decades))
    return np.asarray(np.round((_DECADES * signs if claim.far else decades) * math.log2(10.0)))


def _multiplied(inputs: Inputs, factor: float) -> Inputs | None:
    """Larger inputs; None where there are no real ones."""
    larger: Inputs = map_tensors(lambda x: x * factor if x.is_floating_point() else x, inputs)
    return larger if any(tensor.is_floating_point() for tensor in tensors_in(inputs)) else None


@dataclass
class _Jitter:
    """Changes every entry of real and complex tensors by a relative amount, at random."""

    size: float
    generator: torch.Generator

    def __call__(self, x: Tensor) -> Tensor:
        if not self.size or not is_continuous(x) or x.layout != torch.strided:
            return x
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
        return x * noise.mul_(self.size).add_(1).to(x.device)


def moved_claims(
    move: FiniteMove,
    findings: Sequence[WeightFinding],
    families: Sequence[SymmetryFamily],
    shifts: Sequence[ShiftSymmetry],
) -> tuple[list[WeightFinding], tuple[SymmetryFamily, ...], tuple[ShiftSymmetry, ...]]:
    """Move what structure claims and the certificate confirms, group by group; what fails is a contradiction."""
    everything: list[WeightFinding | SymmetryFamily | ShiftSymmetry] = [*findings, *families, *shifts]
    claims = {
        id(found): found.generators.without(found.certificate.no_evidence)
        for found in everything
        if found.certificate.verdict == "invariant" and found.generators.count
    }
    outcomes = dict(zip(claims, move.outcomes(list(claims.values())), strict=True))

    def moved(found: Found) -> Found:
        outcome = outcomes.get(id(found), Outcome())
        remedy = _REMEDY if outcome.refuted else found.remedy
        return replace(found, certificate=_certificate(found.certificate, outcome), remedy=remedy)

    weights = [moved(finding) for finding in findings]
    return (
        [replace(w, status="disagreement") if w.remedy == _REMEDY else w for w in weights],
        tuple(moved(family) for family in families),
        tuple(moved(shift) for shift in shifts),
    )


def moved_numbers(
    move: FiniteMove,
    findings: Sequence[WeightFinding],
    unexplained: Sequence[UnexplainedSymmetry],
    alone: Mapping[str, Partition],
) -> tuple[list[WeightFinding], tuple[UnexplainedSymmetry, ...]]:
    """Move what only the numbers call invariant, as far as it goes; of what fails the structure is right.

    Args:
        move: carries it out.
        findings: of weights, of which structure claims something or not.
        unexplained: what the search found.
        alone: the partition of each weight that the certificate calls invariant, and the structure does not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in move.model_copy.named_parameters()}
    doubted = [number for number, w in enumerate(findings) if w.name in alone and w.certificate.verdict == "invariant"]
    partitions = [alone[findings[n].name] for n in doubted]
    claims = [
        Generators.of_groups(findings[n].name, partition, range(partition.n_groups), far=True).without(
            findings[n].certificate.no_evidence
        )
        for n, partition in zip(doubted, partitions, strict=True)
    ]
    claims += [_of_unexplained(found, shapes) for found in unexplained]
    outcomes = move.outcomes(claims)
    weights = list(findings)
    for number, outcome in zip(doubted, outcomes, strict=False):
        found, certificate = weights[number], _certificate(weights[number].certificate, outcome)
        weights[number] = replace(found, certificate=certificate)
        if outcome.refuted and found.status == "disagreement":
            weights[number] = replace(weights[number], status="not invariant", remedy=_NOT_INVARIANT)
    kept = zip(unexplained, outcomes[len(doubted) :], strict=True)
    return weights, tuple(found for found, outcome in kept if not outcome.refuted)


def _certificate(certificate: Certificate, outcome: Outcome) -> Certificate:
    if not outcome.refuted:
        return replace(certificate, moved=outcome.change)
    return replace(
        certificate, verdict="not invariant", groups_certified=0, moved=outcome.change,
        groups_refuted=certificate.groups_refuted + certificate.groups_certified,
    )  # fmt: skip


def _of_unexplained(found: UnexplainedSymmetry, shapes: Mapping[str, tuple[int, ...]]) -> Generators:
    generators = Generators.of_groups(
        found.parameters[0], found.partition, found.groups, adds=found.kind == "shift", far=True
    )
    parts = list(generators.parts)
    ids = found.partition.group_ids()
    for name in found.parameters[1:]:
        # The entries of the vector belong to slices of the tensor, and each slice to one group.
        slices = (ids.movedim(axis, 0).flatten(1) if ids.ndim > 1 else ids[:, None] for axis in range(ids.ndim))
        of_entry = next(s[:, 0] for s in slices if s.shape[0] == shapes[name][0] and bool((s == s[:, :1]).all()))
        for number, group in enumerate(found.groups):
            entries = np.flatnonzero(of_entry.numpy() == group)
            numbers = np.full(len(entries), number)
            parts.append(Part(name, single_entries(shapes[name]), entries, numbers, np.ones(len(entries))))
    return replace(generators, parts=tuple(parts))
