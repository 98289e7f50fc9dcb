"""Sparse elimination against numpy's rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_nets.symmetry.reverse.spans import Span

MATRICES = st.integers(1, 7).flatmap(
    lambda width: st.lists(st.lists(st.sampled_from([0, 0, 0, 1, -1, 2]), min_size=width, max_size=width), max_size=9)
)


def check_new_directions(rows, span_of=Span):
    """A direction is new where it raises the rank."""
    span, taken = span_of(), []
    for row in rows:
        before = np.linalg.matrix_rank(np.array(taken)) if taken else 0
        taken.append(row)
        new = np.linalg.matrix_rank(np.array(taken)) > before
        assert span.add({key: float(value) for key, value in enumerate(row) if value}) == new


@given(MATRICES)
@settings(deadline=None)
def test_a_direction_is_new_where_it_raises_the_rank(rows):
    check_new_directions(rows)


def test_sabotage_an_elimination_that_forgets_is_noticed():
    class Forgetful(Span):
        def add(self, direction):
            return Span([{0: 1.0}]).add(direction)

    with pytest.raises(AssertionError):
        check_new_directions([[1, 1], [2, 2]], Forgetful)


def test_rows_that_bring_each_other_back_come_to_an_end():
    """Each row holds the pivots of the next two; every one is subtracted once, however often it comes back."""
    count = 60
    span = Span()
    for k in range(count):
        assert span.add({k: 1.0, k + 1: 1.0, k + 2: 1.0})
    assert span.add({0: 1.0})
