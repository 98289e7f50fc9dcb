"""Balancing: find the smallest norm that the rescaling symmetries allow.

A rescaling multiplies some parts of the parameters by α and divides others by it, without changing the function. With
``α_s = exp(t_s)`` the squared norm is ``F(t) = Σ_b E_b exp(2 Σ_s c_bs t_s)`` over blocks b of the weights: a sum of
exponentials of linear functions, convex in all t together. A symmetry is at its minimum if ``G_s = Σ_{c > 0} c e``
equals ``S_s = Σ_{c < 0} |c| e``, over the energies e of the blocks that it rescales.

A sweep first moves every symmetry towards its own minimum, by a fraction that cannot increase F. It then takes a
Newton step in all symmetries together, which also moves whole layers against each other: single moves do this only
slowly along a chain of layers. The linear system is solved by conjugate gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.groups import Partition
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport

__all__ = ["LARGEST_IMBALANCE", "Descent", "Energies", "Rescaling", "descend", "rescaling_families", "smallest_norm"]

LARGEST_IMBALANCE = 1e-9
_SWEEPS = 100
_SOLVER_STEPS = 200
_HALVINGS = 10
# Energies that differ by at most this are equal up to rounding.
_RISE = 1 + 16 * torch.finfo(torch.float64).eps
_log = logging.getLogger(__name__)


def rescaling_families(model: nn.Module, report: SymmetryReport) -> list[tuple[SymmetryFamily, str | None]]:
    """Return every family of rescalings with the reason why it cannot be balanced, or None if it can."""
    constrained = {weight.name for weight in constrained_weights(model)}
    return [(family, _why_left(family, constrained)) for family in report.families if family.kind == "rescaling"]


@dataclass(frozen=True)
class Rescaling:
    """Factors for the symmetries of some families, as a descent found them.

    Args:
        families: the families.
        descent: the logarithms of their factors, family by family, and how they were found.
    """

    families: tuple[SymmetryFamily, ...]
    descent: Descent

    def values(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor that takes part, and its rescaled values in float64.

        Args:
            state: the tensors that take part, and perhaps others, by name; they are not changed.
        """
        for name, exponents in _exponents(self.families).items():
            value = state[name].detach().to(torch.float64, copy=True)
            for partition, found in exponents.items():
                factors = (found @ self.descent.steps).exp().to(value.device)
                value = partition.multiply(value, partition.spread(factors))
            yield name, value

    def steps_of(self, families: Sequence[SymmetryFamily]) -> Tensor:
        """The logarithms for the symmetries of other families: zeros for those that are not among its own."""
        steps = torch.split(self.descent.steps, [family.count for family in self.families])
        own = {id(family): found for family, found in zip(self.families, steps, strict=True)}
        return torch.cat([own.get(id(f), self.descent.steps.new_zeros(f.count)) for f in families])


def smallest_norm(
    families: Sequence[SymmetryFamily], state: Mapping[str, Tensor], start: Rescaling | None = None
) -> Rescaling:
    """Find the rescaling to the smallest norm; nothing is changed. A descent that does not converge is logged.

    Args:
        families: rescalings that can be balanced.
        state: at least the tensors to rescale, by name.
        start: a rescaling that was found before, for this state or another one. It is returned if it already gives the
            smallest norm, and improved otherwise, so an outdated one does no harm.
    """
    weights = [Energies.of(state[name], exponents) for name, exponents in _exponents(families).items()]
    steps = torch.zeros(sum(family.count for family in families), dtype=torch.float64, device="cpu")
    descent = descend(weights, steps if start is None or not families else start.steps_of(families))
    if not descent.converged:
        _log.warning("balance: %s", descent)
    return Rescaling(tuple(families), descent)


def _exponents(families: Sequence[SymmetryFamily]) -> dict[str, dict[Partition, Tensor]]:
    """For each parameter and each of its partitions how the symmetries of all families move the groups."""
    entries: dict[str, dict[Partition, list[tuple[int, int, float]]]] = {}
    first = 0
    for family in families:
        for part in family.generators.parts:
            columns = (part.groups, part.numbers + first, part.coefficients)
            found = entries.setdefault(part.parameter, {}).setdefault(part.partition, [])
            found.extend(zip(*(column.tolist() for column in columns), strict=True))
        first += family.count
    return {
        name: {partition: exponents_of(found, (partition.n_groups, first)) for partition, found in by.items()}
        for name, by in entries.items()
    }


def _why_left(family: SymmetryFamily, constrained: set[str]) -> str | None:
    if family.certificate.verdict != "invariant":
        return f"certificate {family.certificate}"
    if family.absorbed:
        return "running statistics would have to be rescaled with it"
    if len(family.parameters) < len(family.partitions):
        return "it moves rows and columns of one weight at once"
    on_spheres = [name for name in family.parameters if name in constrained]
    return f"{on_spheres[0]} is on spheres" if on_spheres else None


# ---- sums of squares over blocks -------------------------------------------------------------------------------------


def exponents_of(entries: Sequence[tuple[int, int, float]], shape: tuple[int, int]) -> Tensor:
    """The exponents with which symmetries move cells: a sparse matrix, cells by symmetries, float64 on the CPU.

    Example:
        >>> exponents = exponents_of([(0, 0, 1.0), (2, 1, -1.0)], (3, 2))
        >>> (exponents @ torch.tensor([0.5, 2.0], dtype=torch.float64)).tolist()
        [0.5, 0.0, -2.0]
    """
    cells, symmetries, powers = zip(*entries, strict=True) if entries else ((), (), ())
    indices = torch.tensor([cells, symmetries], dtype=torch.int64, device="cpu")
    values = torch.tensor(powers, dtype=torch.float64, device="cpu")
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()


@dataclass(frozen=True)
class Energies:
    """Sums of squares of a weight over the blocks that rescalings move in one piece, as a matrix.

    Rescalings with logarithms t multiply a block by ``exp(Σ_s c_s t_s)`` and its sum of squares by the square of that.
    The sums are taken once, as a matrix B: the squared norm is ``rᵀ B c`` with the factors r of its rows, as of the
    output channels of a convolution, and c of its columns, the input channels. Where the weight is not cut into rows
    and columns, B has one column, and a row for each block.

    Args:
        blocks: the sums, on the device of the weight, float64.
        exponents: how symmetries move the rows of the matrix, and below that its columns; sparse.

    Example:
        >>> rows, columns = Partition.filters((2, 3, 5)), Partition((2, 3, 5), (2, 3, 5), (1,))
        >>> moved = {rows: exponents_of([(0, 0, 1.0)], (2, 2)), columns: exponents_of([(1, 1, -1.0)], (3, 2))}
        >>> energies = Energies.of(torch.ones(2, 3, 5), moved)
        >>> energies.blocks.tolist(), tuple(energies.exponents.shape)
        ([[10.0, 5.0], [10.0, 5.0]], (4, 2))
        >>> energies.products(torch.ones(4, dtype=torch.float64)).tolist()
        [15.0, 15.0, 20.0, 10.0]
    """

    blocks: Tensor
    exponents: Tensor

    @classmethod
    def of(cls, weight: Tensor, exponents: Mapping[Partition, Tensor]) -> Energies:
        """Sum the squares of a weight over blocks.

        Args:
            weight: the weight.
            exponents: for each partition how symmetries move its groups.
        """
        sides, index = [], torch.zeros(weight.numel(), dtype=torch.int64, device=weight.device)
        for partition, found in exponents.items():
            moved, classes = _alike(found)
            sides.append(moved)
            index.mul_(len(moved)).view(partition.view).add_(partition.spread(classes.to(weight.device)))
        if len(sides) > 2 or math.prod(map(len, sides)) > weight.numel():
            numbers, index = index.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            total, rest = exponents_of([], (len(numbers), sides[0].shape[1])), numbers.cpu()
            for moved in reversed(sides):
                total, rest = total + moved.index_select(0, rest % len(moved)), rest // len(moved)
            sides = [total]
        rows, columns = [*sides, exponents_of([], (1, sides[0].shape[1]))][:2]
        squares = weight.detach().to(torch.float64, copy=True).square_().flatten()
        blocks = squares.new_zeros(len(rows) * len(columns)).index_add_(0, index, squares)
        return cls(blocks.reshape(len(rows), len(columns)), torch.cat([rows, columns]).coalesce())

    def products(self, factors: Tensor) -> Tensor:
        """``B c`` and below it ``Bᵀ r``, for the factors r of the rows and c of the columns; on the CPU."""
        rows, columns = torch.split(factors.to(self.blocks.device), list(self.blocks.shape))
        return torch.cat([self.blocks @ columns, self.blocks.T @ rows]).cpu()

    def counts(self) -> Tensor:
        """For each cell the largest number of symmetries that move one entry of it, shape (cells,)."""
        counts = torch.bincount(self.exponents.indices()[0], minlength=len(self.exponents)).double()
        rows, columns = torch.split(counts, list(self.blocks.shape))
        return torch.cat([rows + columns.max(), columns + rows.max()])


def _alike(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents of the classes of groups that every symmetry moves alike, and the class of each group."""
    moved: list[list[tuple[int, float]]] = [[] for _ in range(len(exponents))]
    for group, symmetry, power in zip(*exponents.indices().tolist(), exponents.values().tolist(), strict=True):
        moved[group].append((symmetry, power))
    numbers: dict[tuple[tuple[int, float], ...], int] = {}
    classes = [numbers.setdefault(tuple(each), len(numbers)) for each in moved]
    entries = [(number, *move) for moves, number in numbers.items() for move in moves]
    return exponents_of(entries, (len(numbers), exponents.shape[1])), torch.tensor(classes, device="cpu")


# ---- the descent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Args:
        steps: the logarithm of the factor of each symmetry, float64.
        sweeps: how often all symmetries were moved.
        imbalance: the largest ``|G_s − S_s| / (G_s + S_s)`` over the symmetries that have a minimum.
        energies: squared norm before (without any factor) and after.
    """

    steps: Tensor
    sweeps: int
    imbalance: float
    energies: tuple[float, float]

    @property
    def converged(self) -> bool:
        """Whether every symmetry is at its minimum, up to `LARGEST_IMBALANCE`."""
        return self.imbalance <= LARGEST_IMBALANCE

    def __str__(self) -> str:
        outcome = "smallest norm reached" if self.converged else "smallest norm not reached"
        return f"{outcome} after {self.sweeps} sweeps, imbalance {self.imbalance:.1e}"


def descend(weights: Sequence[Energies], start: Tensor) -> Descent:
    """Minimize the squared norm over all symmetries, starting from logarithms of their factors.

    Symmetries without a minimum, such as those of a unit without outputs, are not moved.

    Args:
        weights: the energies of each weight.
        start: logarithm of the factor of each symmetry, float64, on the CPU.

    Example:
        >>> grows, shrinks = exponents_of([(0, 0, 1.0)], (2, 1)), exponents_of([(0, 0, -1.0)], (2, 1))
        >>> weights = [Energies(torch.full((1, 1), e).double(), c) for e, c in ((16.0, grows), (1.0, shrinks))]
        >>> found = descend(weights, torch.zeros(1, dtype=torch.float64))
        >>> round(float(found.steps.exp()), 6), found.energies, found.converged
        (0.5, (17.0, 8.0), True)
    """
    problem = _Problem(weights, len(start))
    point = origin = problem.at(torch.zeros_like(start))
    if not math.isfinite(origin.energy):
        return Descent(origin.steps, 0, math.inf, (origin.energy, origin.energy))
    free = (origin.growing > 0) & (origin.shrinking > 0)
    if bool(start.any()):
        started = problem.at(torch.where(free, start, 0.0))
        point = started if started.energy <= origin.energy else origin
    sweeps = 0
    while (imbalance := point.imbalance(free)) > LARGEST_IMBALANCE and sweeps < _SWEEPS:
        sweeps += 1
        point = problem.newton(problem.separately(point, free), free)
    return Descent(point.steps, sweeps, imbalance, (origin.energy, point.energy))


@dataclass(frozen=True)
class _Point:
    """What is known at some logarithms: factors and energies of all cells, and G, S and the Hessian's diagonal."""

    steps: Tensor
    factors: Tensor
    energies: Tensor
    growing: Tensor
    shrinking: Tensor
    curvature: Tensor

    @property
    def energy(self) -> float:
        # Each entry counts in its row and in its column.
        return float(self.energies.sum()) / 2

    @property
    def slope(self) -> Tensor:
        return 2 * (self.growing - self.shrinking)

    def imbalance(self, free: Tensor) -> float:
        relative = (self.growing - self.shrinking).abs() / (self.growing + self.shrinking)
        return float(torch.where(free, relative, 0.0).max()) if len(relative) else 0.0


class _Problem:
    """The squared norm of weights, its gradient and its Hessian, with the cells of all weights one after the other."""

    def __init__(self, weights: Sequence[Energies], count: int) -> None:
        self.weights = weights
        self.exponents = torch.cat([exponents_of([], (0, count)), *(weight.exponents for weight in weights)]).coalesce()
        (cells, symmetries), powers = self.exponents.indices(), self.exponents.values()
        # For each symmetry the largest number of symmetries that move one entry together with it, and the largest
        # exponent less the smallest.
        crowd, largest, smallest = torch.zeros(3, count, dtype=torch.float64, device="cpu")
        counts = torch.cat([powers[:0], *(weight.counts() for weight in weights)])
        self.share = 1 / crowd.scatter_reduce(0, symmetries, counts[cells], "amax").clamp(min=1)
        self.reach = largest.scatter_reduce(0, symmetries, powers, "amax")
        self.reach -= smallest.scatter_reduce(0, symmetries, powers, "amin")

    def at(self, steps: Tensor) -> _Point:
        factors = (2 * (self.exponents @ steps)).exp()
        energies = factors * self._products(factors)
        powers = self.exponents.values()
        coefficients = (powers.clamp(min=0), -powers.clamp(max=0), 4 * powers.square())
        return _Point(steps, factors, energies, *(self._collected(energies, each) for each in coefficients))

    def separately(self, point: _Point, free: Tensor) -> _Point:
        """Move each symmetry towards its minimum; F does not rise.

        ``ln(S/G)`` falls by no more than twice the reach, ``max c − min c``, for each unit of t, so that the step is
        not longer than to the minimum; it reaches it where all exponents are equal in size. Where an entry is moved by
        n symmetries, each goes 1/n of its way: by Jensen's inequality F falls by at least 1/n of what they do alone.
        """
        ways = (point.shrinking / point.growing).log() / (2 * self.reach)
        return self.at(point.steps + torch.where(free & ways.isfinite(), self.share * ways, 0.0))

    def newton(self, point: _Point, free: Tensor) -> _Point:
        """Take a Newton step in all symmetries together, shortened until F does not rise; else stay."""
        direction = self._direction(point, free)
        for halving in range(_HALVINGS):
            there = self.at(point.steps + direction * 0.5**halving)
            if there.energy <= point.energy * _RISE:
                return there
        return point

    def _direction(self, point: _Point, free: Tensor) -> Tensor:
        """Solve ``H p = −∇F`` by conjugate gradients that are preconditioned by the diagonal.

        The closer the minimum, the more accurate: the residual falls to the imbalance squared, so that few steps do.
        """
        diagonal = torch.where(free, point.curvature, 1.0)
        residual = torch.where(free, -point.slope, 0.0)
        enough = min(0.1, point.imbalance(free)) * float((residual.abs() / diagonal).max())
        solution, direction = torch.zeros_like(residual), residual / diagonal
        size = float(residual @ direction)
        for _ in range(_SOLVER_STEPS):
            if float((residual.abs() / diagonal).max()) <= enough:
                break
            image = torch.where(free, self.hessian_times(point, direction), 0.0)
            curvature = float(direction @ image)
            if not curvature > 0:
                break
            solution = solution + (size / curvature) * direction
            residual = residual - (size / curvature) * image
            size, before = float(residual @ (residual / diagonal)), size
            direction = residual / diagonal + (size / before) * direction
        return solution

    def hessian_times(self, point: _Point, direction: Tensor) -> Tensor:
        """The Hessian of F times a vector: ``4 Mᵀ (e ⊙ M d + f ⊙ P (f ⊙ M d))`` with the exponents M."""
        along = self.exponents @ direction
        moved = point.energies * along + point.factors * self._products(point.factors * along)
        return 4 * self._collected(moved, self.exponents.values())

    def _products(self, factors: Tensor) -> Tensor:
        parts = torch.split(factors, [len(weight.exponents) for weight in self.weights])
        pairs = zip(self.weights, parts, strict=True)
        return torch.cat([factors[:0], *(weight.products(part) for weight, part in pairs)])

    def _collected(self, values: Tensor, powers: Tensor) -> Tensor:
        """``Mᵀ v`` with other entries in the places of the exponents: a sum over the cells of each symmetry."""
        cells, symmetries = self.exponents.indices()
        return values.new_zeros(self.exponents.shape[1]).index_add_(0, symmetries, powers * values[cells])
