"""Statistics of a comparison, against scipy, closed forms, printed tables, and simulations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose
from scipy import stats

from manifold_nets.comparison.statistics import (
    RESAMPLES,
    all_differences,
    cliques,
    critical_difference,
    friedman,
    holm,
    mean_interval,
    paired_difference,
    rank_runs,
)
from manifold_nets.errors import OptionError

NAN, INF = float("nan"), float("inf")
EPS = float(np.finfo(np.float64).eps)


# ---- means -----------------------------------------------------------------------------------------------------------


def check_mean(values: list[float], interval: Callable = mean_interval) -> None:
    """The interval that inverts scipy's one-sample t-test: at its ends the p-value is 1 − confidence."""
    found = interval(values)
    assert found.value == pytest.approx(np.mean(values), rel=8 * EPS)
    for end in (found.low, found.high):
        assert stats.ttest_1samp(values, end).pvalue == pytest.approx(0.05, rel=1e-9)


def test_means_have_students_interval() -> None:
    values = [0.031, 0.042, 0.029, 0.055]
    check_mean(values)
    with pytest.raises(AssertionError):  # Sabotage: the confidence at which Student's quantile is the normal one, 1.96.
        check_mean(values, lambda v: mean_interval(v, 2 * stats.t.cdf(1.96, len(v) - 1) - 1))


def test_means_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    # t with 2 degrees of freedom has a closed form: t = √(2 (1−α)² / (1 − (1−α)²)).
    t = np.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    assert found.half_width == pytest.approx(t / np.sqrt(3), rel=1e-9)
    assert (found.count, found.lost, found.survivors_only) == (3, 0, False)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_diverged_runs_are_counted_and_named(bad: float) -> None:
    found = mean_interval([1.0, bad, 3.0])
    assert (found.value, found.count, found.lost, found.survivors_only) == (2.0, 2, 1, True)
    assert "2 of 3, 1 diverged" in str(found)
    alone = mean_interval([1.0, bad])
    assert (alone.value, alone.count) == (1.0, 1)
    assert np.isnan([alone.low, alone.high, alone.deviation]).all()
    none = mean_interval([bad, bad])
    assert np.isnan(none.value)
    assert str(none) == "none: all 2 diverged"
    assert str(mean_interval([])) == "none"


def coverage(n: int, interval: Callable[[np.ndarray], tuple[float, float]], trials: int) -> float:
    draws = np.random.default_rng(0).normal(2.0, 3.0, (trials, n))
    ends = np.array([interval(row) for row in draws])
    return float(((ends[:, 0] <= 2.0) & (ends[:, 1] >= 2.0)).mean())


def check_coverage(found: float, expected: float, trials: int) -> None:
    """Within four standard errors of a proportion."""
    assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / trials)


@pytest.mark.parametrize("n", [2, 5])
def test_intervals_of_means_hold_what_they_promise(n: int) -> None:
    def ours(row: np.ndarray) -> tuple[float, float]:
        found = mean_interval(row)
        return found.low, found.high

    def normal(row: np.ndarray) -> tuple[float, float]:
        half = 1.96 * row.std(ddof=1) / np.sqrt(n)
        return row.mean() - half, row.mean() + half

    check_coverage(coverage(n, ours, 2000), 0.95, 2000)
    with pytest.raises(AssertionError):  # Sabotage: the normal interval, too short for few runs.
        check_coverage(coverage(n, normal, 2000), 0.95, 2000)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "promised"), [(3, 0.73), (5, 0.84), (10, 0.90)])
def test_bootstrap_intervals_hold_what_the_documentation_says(n: int, promised: float) -> None:
    def ours(row: np.ndarray) -> tuple[float, float]:
        found = paired_difference(row, np.zeros(n), resamples=999)
        return found.low, found.high

    assert coverage(n, ours, 1500) == pytest.approx(promised, abs=0.03)
    assert coverage(n, lambda row: (row.min(), row.max()), 1500) != pytest.approx(promised, abs=0.03)


# ---- differences -----------------------------------------------------------------------------------------------------

FIRST = np.array([0.051, 0.060, 0.049, 0.081, 0.055])
SECOND = np.array([0.047, 0.052, 0.050, 0.066, 0.049])


def exact_bca(d: np.ndarray, confidence: float) -> tuple[float, float]:
    """Efron's BCa interval of a mean from all nⁿ samples, by his formulas 2.3 and 6.6."""
    n = len(d)
    means = np.array([np.mean(s) for s in itertools.product(d, repeat=n)])
    below = np.mean(means < d.mean() - 1e-12) + np.mean(np.abs(means - d.mean()) <= 1e-12) / 2
    z0 = stats.norm.ppf(below)
    leave_one_out = (d.sum() - d) / (n - 1)
    u = leave_one_out.mean() - leave_one_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    levels = stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def check_difference(first: np.ndarray, second: np.ndarray, compare: Callable = paired_difference) -> None:
    found = compare(first, second)
    d = first - second
    assert found.value == pytest.approx(d.mean(), rel=16 * EPS)
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    # 9999 samples estimate a quantile to a few hundredths of the spread of the means.
    slack = 0.1 * d.std() / np.sqrt(len(d))
    assert_allclose([found.low, found.high], exact_bca(d, 0.95), atol=slack)


def test_differences_match_the_exact_bootstrap_and_the_paired_test() -> None:
    check_difference(FIRST, SECOND)
    with pytest.raises(AssertionError):  # Sabotage: the second optimizer's seeds in another order.
        check_difference(FIRST, SECOND, lambda a, b: paired_difference(a, b[::-1]))


def test_differences_are_seeded_and_change_sign_with_their_sides() -> None:
    one, again = paired_difference(FIRST, SECOND), paired_difference(FIRST, SECOND)
    assert one == again
    assert one != paired_difference(FIRST, SECOND, seed=1)
    other = paired_difference(SECOND, FIRST)
    assert other.value == -one.value
    assert other.p_value == one.p_value


def test_pairs_with_a_diverged_run_are_counted() -> None:
    found = paired_difference([1.0, NAN, 3.0, 4.0], [0.5, 1.0, INF, 3.0])
    assert (found.count, found.lost_first, found.lost_second) == (2, 1, 1)
    assert found.value == 0.75
    assert "1 and 1 diverged" in str(found)
    none = paired_difference([NAN, 1.0], [1.0, NAN])
    assert none.count == 0
    assert np.isnan([none.value, none.low, none.p_value]).all()
    assert not none.differs()


def test_differences_without_spread() -> None:
    same = paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (same.value, same.p_value, same.is_constant) == (0, 1, True)
    # 0.15 − 0.10 and 0.25 − 0.20 differ by rounding; that is no evidence.
    shifted = paired_difference([0.15, 0.25, 0.35], [0.1, 0.2, 0.3])
    assert shifted.p_value == 0.25
    assert shifted.value == pytest.approx(0.05)
    # One number seen several times says nothing of how far the next one may be.
    assert np.isnan([ends for d in (same, shifted) for ends in (d.low, d.high, d.t_low, d.t_high)]).all()
    assert str(shifted) == "first − second: +0.05, p = 0.25 (n = 3)"
    one = paired_difference([0.1], [0.2])
    assert np.isnan([one.low, one.high, one.p_value]).all()
    assert not one.is_constant
    assert not paired_difference(FIRST, SECOND).is_constant


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # as R's p.adjust(c(…), "holm") has them
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.01, NAN, 0.03], [0.02, NAN, 0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], expected: list[float]) -> None:
    assert_allclose(holm(p), expected)


@given(hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1)))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(p: np.ndarray) -> None:
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(len(p) * p, 1)).all() or len(p) == 1
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


def false_alarms(adjust: Callable, trials: int = 400) -> float:
    """How often five equal optimizers are told apart."""
    draws = np.random.default_rng(0).normal(size=(trials, 5, 6))
    return float(np.mean([any(adjust(_p_values(draw)) <= 0.05) for draw in draws]))


def _p_values(draw: np.ndarray) -> np.ndarray:
    return np.array([stats.ttest_rel(a, b).pvalue for a, b in itertools.combinations(draw, 2)])


@pytest.mark.slow
def test_equal_optimizers_are_told_apart_as_rarely_as_promised() -> None:
    assert false_alarms(holm) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert false_alarms(lambda p: p) > 0.15  # Sabotage: no correction.


def test_all_pairs_are_compared_and_corrected_together() -> None:
    runs = {"a": FIRST, "b": SECOND, "c": FIRST + np.array([0.0, 0.001, -0.001, 0.002, 0.0])}
    found = all_differences(runs)
    assert [(d.first, d.second) for d in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert_allclose([d.adjusted_p for d in found], holm([d.p_value for d in found]))
    assert all(d.adjusted_p >= d.p_value for d in found)
    assert all_differences({"a": FIRST}) == ()


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_put_diverged_runs_last_and_share_ties() -> None:
    found = rank_runs([[0.1, NAN, 0.2, INF], [0.1, 0.1, 0.3, 0.2]])
    assert found.tolist() == [[1, 3.5, 2, 3.5], [1.5, 1.5, 4, 3]]


def check_friedman(table: np.ndarray, test: Callable = friedman) -> None:
    expected = stats.friedmanchisquare(*table.T)
    found = test(table)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert_allclose(found.mean_ranks, stats.rankdata(table, axis=1).mean(axis=0))


@pytest.mark.parametrize("levels", [3, 1000])
def test_friedmans_test_is_that_of_scipy_with_and_without_ties(levels: int) -> None:
    table = np.random.default_rng(levels).integers(0, levels, (7, 4)).astype(float)
    check_friedman(table)
    with pytest.raises(AssertionError):  # Sabotage: ranks over all runs, not within blocks.
        check_friedman(table, lambda t: friedman(stats.rankdata(t).reshape(t.shape).T))


def test_friedmans_test_at_its_ends() -> None:
    equal = friedman([[1, 1, 1], [2, 2, 2]])
    assert (equal.statistic, equal.p_value, equal.mean_ranks) == (0, 1, (2, 2, 2))
    perfect = friedman([[1, 2, 3]] * 5)
    assert perfect.statistic == pytest.approx(10)  # n(k − 1), its largest value
    with pytest.raises(OptionError, match="two blocks"):
        friedman([[1.0, 2.0]])


# Demšar (2006), table 5a: critical values of the two-tailed Nemenyi test.
NEMENYI = {
    0.05: [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164],
    0.10: [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920],
}


def check_table(difference: Callable[[int, int, float], float]) -> None:
    for significance, row in NEMENYI.items():
        for k, q in enumerate(row, start=2):
            # The table is rounded down in places: 2.3437 stands as 2.343.
            assert difference(k, 10, significance) / np.sqrt(k * (k + 1) / 60) == pytest.approx(q, abs=1e-3)


def test_critical_differences_are_those_of_the_printed_table() -> None:
    check_table(critical_difference)
    with pytest.raises(AssertionError):  # Sabotage: the quantile without the division by √2.
        check_table(lambda k, n, s: critical_difference(k, n, s) * np.sqrt(2))


@pytest.mark.parametrize("arguments", [(1, 5), (3, 1), (3, 5, 0.0), (3, 5, 1.0)])
def test_impossible_critical_differences_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="expected"):
        critical_difference(*arguments)


def check_cliques(ranks: list[float], difference: float, found: tuple[tuple[int, ...], ...]) -> None:
    """By brute force: all sets of at least two whose ranks are close, without those within another."""
    places = range(len(ranks))
    close = [
        set(s)
        for size in range(2, len(ranks) + 1)
        for s in itertools.combinations(places, size)
        if max(ranks[i] for i in s) - min(ranks[i] for i in s) <= difference
    ]
    largest = [s for s in close if not any(s < other for other in close)]
    assert sorted(map(sorted, largest)) == sorted(map(sorted, found))


@given(st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5]), min_size=1, max_size=7), st.floats(0.1, 4))
def test_cliques_are_the_largest_close_sets(ranks: list[float], difference: float) -> None:
    check_cliques(ranks, difference, cliques(ranks, difference))


def test_sabotage_a_clique_too_large_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_cliques([1.0, 2.0, 3.0], 1.0, cliques([1.0, 2.0, 3.0], 2.0))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: mean_interval([[1.0, 2.0]]), "one dimension"),
        (lambda: mean_interval(["a"]), "numbers"),
        (lambda: mean_interval([1.0], confidence=95), "between 0 and 1"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "2, one for each"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: rank_runs([]), "optimizers"),
    ],
)
def test_bad_input_is_named(call: Callable, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        call()


def test_the_bootstrap_has_many_samples() -> None:
    assert RESAMPLES >= 9999
