"""What stored runs say of robustness: width of the good learning rates, spread over seeds, effect of initial scales.

Every number comes with an interval of 95 % over the seeds. Means of paired differences have Student's; widths and
spreads, of which no formula is at hand, have those of a bootstrap: seeds are drawn with replacement, the same ones for
both optimizers of a pair, and the 2.5 % and 97.5 % quantiles are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from choices import verdict
from evidence import Runs
from numpy.typing import NDArray

from manifold_nets.comparison.measures import Sensitivity, learning_rate_sensitivity
from manifold_nets.comparison.statistics import mean_interval

__all__ = ["PAIRS", "TOLERANCES", "Finding", "Sample", "comparable", "findings_of", "sample_of", "samples_of", "tally"]

Array = NDArray[np.float64]
RESAMPLES = 400
TOLERANCES = (0.10, 1.00)
#: A recipe on spheres and what it stands against.
PAIRS = (
    ("rsgd", "sgd"),
    ("radam", "adam"),
    ("radam", "adamw"),
    ("radamw, matched", "adamw"),
    ("angular and adamw", "adamw"),
)


@dataclass(frozen=True)
class Sample:
    """The runs of an optimizer in an arm, at the weight decay that was chosen.

    Args:
        arm: name of the comparison.
        optimizer: name of the optimizer.
        scale: of the initial weights, ``"plain"`` or ``"rescaled"``.
        rates: learning rates, increasing.
        chosen: the one that validation chose; NaN where all runs diverged.
        errors: validation errors in percent, shape (rates, seeds); NaN where a run diverged.
        tests: test errors in percent at the chosen rate, shape (seeds,); NaN where a run diverged.
    """

    arm: str
    optimizer: str
    scale: str
    rates: tuple[float, ...]
    chosen: float
    errors: Array
    tests: Array

    def sensitivity(self, tolerance: float, seeds: Array | None = None) -> Sensitivity:
        """Error over the learning rates, over all seeds or over some."""
        return learning_rate_sensitivity(self.rates, self.errors if seeds is None else self.errors[:, seeds], tolerance)


def sample_of(runs: Runs, arm: str, optimizer: str, scale: str = "plain") -> Sample | None:
    """The runs of an optimizer in an arm; None where there are none, or where some are missing."""
    found = runs.of(arm, optimizer, scale)
    decays = {run.weight_decay for run in found if run.chosen} or {run.weight_decay for run in found}
    found = tuple(run for run in found if run.weight_decay == min(decays))
    rates, seeds = sorted({run.learning_rate for run in found}), sorted({run.seed for run in found})
    if not found or len(found) != len(rates) * len(seeds):
        return None
    table = {(run.learning_rate, run.seed): run for run in found}
    chosen = next((run.learning_rate for run in found if run.chosen), math.nan)
    return Sample(
        arm,
        optimizer,
        scale,
        tuple(rates),
        chosen,
        np.array([[100 * table[rate, seed].validation_error for seed in seeds] for rate in rates]),
        np.array([100 * table[chosen, seed].test_error if chosen in rates else math.nan for seed in seeds]),
    )


def samples_of(runs: Runs) -> list[Sample]:
    """All samples, in the order in which they are stored."""
    keys = dict.fromkeys((run.arm, run.optimizer, run.initial_scale) for run in runs.rows)
    return [sample for key in keys if (sample := sample_of(runs, *key)) is not None]


@dataclass(frozen=True)
class Finding:
    """One comparison of a recipe on spheres with what it stands against.

    Args:
        arm: name of the comparison, with the initial weights where they were rescaled.
        claim: ``"less tuning"``, ``"less tuning for the same error"``, ``"more stable"`` or ``"scale-free"``.
        ours: the recipe.
        theirs: the other.
        value: positive where the claim holds; in decades, in the logarithm of the ratio of standard deviations, in
            points of error.
        low: lower end of its interval.
        high: its upper end.
    """

    arm: str
    claim: str
    ours: str
    theirs: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether the interval is above zero, below, or neither."""
        return verdict(self.low, self.high, "against", "for", "open")


def bootstrap(statistic: Callable[[Array], float], seeds: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of a statistic of seeds that are drawn with replacement; NaN for fewer than 3."""
    if seeds < 3:
        return math.nan, math.nan
    draw = np.random.default_rng(0)
    values = np.array([statistic(draw.integers(seeds, size=seeds)) for _ in range(RESAMPLES)])
    values = values[np.isfinite(values)]
    if len(values) < RESAMPLES / 2:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def width_finding(ours: Sample, theirs: Sample) -> Finding:
    """How many decades wider the learning rates are whose error is within 10 % of the best of the same optimizer."""

    def difference(seeds: Array) -> float:
        return ours.sensitivity(TOLERANCES[0], seeds).width - theirs.sensitivity(TOLERANCES[0], seeds).width

    count = ours.errors.shape[1]
    return _finding("less tuning", ours, theirs, difference(np.arange(count)), *bootstrap(difference, count))


def target_finding(ours: Sample, theirs: Sample) -> Finding:
    """How many decades wider the learning rates are whose error is within 10 % of the best of both.

    An optimizer whose best is poor is as poor over a wide range, which `width_finding` counts in its favour.
    """

    def difference(seeds: Array) -> float:
        target = (1 + TOLERANCES[0]) * min(sample.sensitivity(0.0, seeds).best_error for sample in (ours, theirs))
        return width_at(ours, target, seeds) - width_at(theirs, target, seeds)

    count = ours.errors.shape[1]
    found = difference(np.arange(count))
    return _finding("less tuning for the same error", ours, theirs, found, *bootstrap(difference, count))


def width_at(sample: Sample, target: float, seeds: Array) -> float:
    """Decades of learning rates with at most some error, around the best; 0 where the best is above it."""
    best = sample.sensitivity(0.0, seeds).best_error
    if not best <= target:
        return 0.0
    return sample.sensitivity(target / best - 1 if best > 0 else 0.0, seeds).width


def spread_finding(ours: Sample, theirs: Sample) -> Finding:
    """Logarithm of the ratio of the standard deviations of the test errors, theirs over ours."""

    def ratio(seeds: Array) -> float:
        deviations = [np.nanstd(sample.tests[seeds], ddof=1) for sample in (theirs, ours)]
        return float(np.log(deviations[0] / deviations[1])) if min(deviations) > 0 else math.nan

    count = len(ours.tests)
    return _finding("more stable", ours, theirs, ratio(np.arange(count)), *bootstrap(ratio, count))


def comparable(plain: Sample, rescaled: Sample) -> bool:
    """Whether both have runs with the rate that was chosen without other initial scales."""
    return plain.chosen in plain.rates and plain.chosen in rescaled.rates


def scale_costs(plain: Sample, rescaled: Sample) -> Array:
    """Points of validation error that each seed loses to other initial scales, at the rate chosen without them."""
    rows = [sample.errors[sample.rates.index(plain.chosen)] for sample in (rescaled, plain)]
    return np.asarray(rows[0] - rows[1])


def scale_finding(ours: tuple[Sample, Sample], theirs: tuple[Sample, Sample]) -> Finding:
    """How many points of error less other initial scales cost, seed by seed; diverged runs are left out."""
    differences = scale_costs(*theirs) - scale_costs(*ours)
    found = mean_interval(differences)
    return _finding("scale-free", ours[0], theirs[0], found.value, found.low, found.high)


def _finding(claim: str, ours: Sample, theirs: Sample, value: float, low: float, high: float) -> Finding:
    arm = ours.arm + (", rescaled" if ours.scale == "rescaled" else "")
    return Finding(arm, claim, ours.optimizer, theirs.optimizer, value, low, high)


def findings_of(samples: Iterable[Sample]) -> list[Finding]:
    """All comparisons of `PAIRS` that the samples allow."""
    found = {(sample.arm, sample.optimizer, sample.scale): sample for sample in samples}
    findings = []
    for arm, scale in dict.fromkeys((sample.arm, sample.scale) for sample in found.values()):
        for pair in PAIRS:
            ours, theirs = (found.get((arm, name, scale)) for name in pair)
            if ours is None or theirs is None or ours.rates != theirs.rates or len(ours.tests) != len(theirs.tests):
                continue
            if len(ours.rates) >= 3:
                findings += [width_finding(ours, theirs), target_finding(ours, theirs)]
            findings.append(spread_finding(ours, theirs))
            pairs = [(plain, found.get((arm, plain.optimizer, "rescaled"))) for plain in (ours, theirs)]
            known = [(plain, other) for plain, other in pairs if other is not None and comparable(plain, other)]
            if scale == "plain" and len(known) == len(pairs):
                findings.append(scale_finding(*known))
    return findings


def tally(findings: Iterable[Finding], claim: str) -> str:
    """In how many comparisons a claim holds, fails, or stays open.

    Example: ``holds in 3 of 10 comparisons, fails in 1, stays open in 6``.
    """
    verdicts = [finding.verdict for finding in findings if finding.claim == claim]
    counts = {kind: verdicts.count(kind) for kind in ("for", "against", "open")}
    return (
        f"holds in {counts['for']} of {len(verdicts)} comparisons, fails in {counts['against']}, "
        f"stays open in {counts['open']}"
    )
