"""Measures of robustness and speed, against brute force on fine grids and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold_nets.comparison.measures import (
    Sensitivity,
    cost_ratio,
    first_at,
    learning_rate_sensitivity,
    reach,
)
from manifold_nets.errors import OptionError

NAN, INF = float("nan"), float("inf")
EPS = float(np.finfo(np.float64).eps)


def width_by_brute_force(rates: list[float], means: list[float], tolerance: float, points: int) -> float:
    """Length of the connected set around the best rate where the interpolated curve is low, counted on a fine grid."""
    logs = np.log10(rates)
    fine = np.linspace(logs[0], logs[-1], points)
    finite = np.isfinite(means)
    curve = np.interp(fine, logs, np.where(finite, means, 0.0))
    for i in range(len(rates) - 1):
        inside = (fine > logs[i]) & (fine < logs[i + 1])
        if not (finite[i] and finite[i + 1]):
            curve[inside] = INF
    curve[np.isin(fine, logs[~finite])] = INF
    best = float(np.min(np.array(means)[finite]))
    low = curve <= best * (1 + tolerance)
    centre = int(np.argmin(np.abs(fine - logs[int(np.argmin(np.where(finite, means, INF)))])))
    left = centre
    while left > 0 and low[left - 1]:
        left -= 1
    right = centre
    while right < points - 1 and low[right + 1]:
        right += 1
    return float(fine[right] - fine[left])


def check_width(
    rates: list[float], means: list[float], sensitivity: Callable[..., Sensitivity] = learning_rate_sensitivity
) -> None:
    points = 20001
    found = sensitivity(rates, [[mean] for mean in means], 0.1)
    step = np.log10(rates[-1] / rates[0]) / (points - 1)
    # The grid misses each of the two ends by less than its step, and the centre by as much.
    assert abs(found.width - width_by_brute_force(rates, means, 0.1, points)) <= 3 * step


CURVES = [
    ([1e-3, 1e-2, 1e-1, 1.0], [0.3, 0.1, 0.105, 0.5]),
    ([1e-3, 1e-2, 1e-1, 1.0], [0.10, 0.105, 0.102, 0.3]),
    ([1e-3, 1e-2, 1e-1, 1.0], [0.2, 0.1, INF, 0.1]),
    ([1e-3, 1e-2, 1e-1, 1.0], [0.1, 0.3, 0.1, 0.105]),
    ([1e-3, 3e-2, 2.0], [INF, 0.2, 0.21]),
]


@pytest.mark.parametrize(("rates", "means"), CURVES)
def test_widths_are_those_of_a_fine_grid(rates: list[float], means: list[float]) -> None:
    check_width(rates, means)
    with pytest.raises(AssertionError):  # Sabotage: another tolerance, or an interval that is nowhere cut.
        check_width(rates, means, lambda r, e, t: learning_rate_sensitivity(np.asarray(r) ** 2, e, 2 * t))


def test_a_width_by_hand() -> None:
    found = learning_rate_sensitivity([0.1, 1.0, 0.01], [[0.1], [0.2], [0.15]])
    # 0.01 above the best: a tenth of the way up to 0.2, a fifth of the way up to 0.15.
    assert found.width == pytest.approx(0.3, rel=32 * EPS)
    assert found.low == pytest.approx(10**-1.2)
    assert found.high == pytest.approx(10**-0.9)
    assert (found.rates, found.best_rate, found.best_error) == ((0.01, 0.1, 1.0), 0.1, 0.1)
    assert not found.is_lower_bound


def test_a_rate_at_which_a_run_diverged_is_no_good_rate() -> None:
    found = learning_rate_sensitivity([0.1, 1.0], [[0.2, 0.2, 0.2], [0.01, NAN, 0.01]])
    assert found.best_rate == 0.1
    assert found.errors == (0.2, INF) or found.errors == pytest.approx((0.2, INF))
    assert found.survivor_errors == pytest.approx((0.2, 0.01))
    assert found.diverged == (0, 1)
    assert (found.width, found.open_low, found.open_high) == (0, True, False)


def test_when_all_diverge_there_is_no_best() -> None:
    found = learning_rate_sensitivity([0.1, 1.0], [[NAN], [INF]])
    assert math.isnan(found.best_rate)
    assert found.width == 0
    assert str(found) == "none: runs diverged at every rate"


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_constant_errors_are_good_everywhere(level: float) -> None:
    found = learning_rate_sensitivity([0.01, 0.1, 1.0], np.full((3, 2), level))
    assert found.width == pytest.approx(2)
    assert (found.open_low, found.open_high) == (True, True)
    assert str(found) == "≥ 2.00 decades"


def test_a_single_rate_has_no_width() -> None:
    found = learning_rate_sensitivity([0.1], [[0.2]])
    assert (found.width, found.is_lower_bound) == (0, True)


@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=7),
    st.floats(1e-3, 1e3),
    st.floats(0.1, 10),
)
def test_widths_do_not_depend_on_units(means: list[float], rate_unit: float, error_unit: float) -> None:
    rates = np.logspace(-3, 0, len(means))
    one = learning_rate_sensitivity(rates, [[m] for m in means])
    other = learning_rate_sensitivity(rates * rate_unit, [[m * error_unit] for m in means])
    # A mean that is within rounding of the limit may fall on either side of it.
    limit = min(means) * 1.1
    if all(abs(m - limit) > 1e-9 for m in means):
        assert other.width == pytest.approx(one.width, abs=1e-6)
    assert one.width <= 3 + 1e-12


# ---- targets and costs -----------------------------------------------------------------------------------------------


def check_reach(found_reach: Callable = reach) -> None:
    errors = [[0.5, 0.2, 0.1], [0.2, 0.3, 0.1], [0.4, 0.4, NAN], [0.9, 0.8, 0.2]]
    passes = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [4.0, 8.0, 12.0], [1.0, 2.0, 3.0]]
    seconds = [[1.0, 2.0, 3.0], [1.5, 3.0, 4.5], [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    found = found_reach(errors, passes, seconds, 0.2)
    # First at 2, 1, never, 3 passes; at 2, 1.5, never, 6 seconds.
    assert (found.passes, found.seconds, found.reached, found.runs) == (2.5, 4.0, 3, 4)


def test_targets_by_hand() -> None:
    check_reach()
    with pytest.raises(AssertionError):  # Sabotage: the runs that never arrive are left out.
        check_reach(lambda e, p, s, t: reach(e[:2] + e[3:], p[:2] + p[3:], s[:2] + s[3:], t))


def test_targets_that_few_reach() -> None:
    found = reach([[0.5], [0.5], [0.1]], [[1.0]] * 3, [[1.0]] * 3, 0.2)
    assert (found.passes, found.seconds, found.reached) == (INF, INF, 1)
    assert str(found) == "not reached (1 of 3 runs)"
    assert first_at([], [], 0.1) == INF
    with pytest.raises(OptionError, match="one for each"):
        reach([[0.5]], [[1.0]], [[1.0, 2.0]], 0.2)
    with pytest.raises(OptionError, match="at least one"):
        reach([], [], [], 0.2)


def test_costs_are_ratios_of_medians() -> None:
    found = cost_ratio([3.0, 1.0, 2.0, NAN], [0.5, 0.5])
    assert found is not None
    assert (found.low, found.value, found.high) == (3.0, 4.0, 5.0)
    assert cost_ratio([NAN], [1.0]) is None
    assert cost_ratio([1.0], [0.0]) is None


@pytest.mark.parametrize(
    ("rates", "errors", "told"),
    [
        ([], [], "at least one"),
        ([0.1, 0.1], [[1.0], [1.0]], "each once"),
        ([0.1, -1.0], [[1.0], [1.0]], "positive"),
        ([0.1, 1.0], [[1.0]], "one row for each"),
        ([0.1], [[-1.0]], "at least 0"),
    ],
)
def test_impossible_grids_are_refused(rates: list[float], errors: list[list[float]], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        learning_rate_sensitivity(rates, errors)
