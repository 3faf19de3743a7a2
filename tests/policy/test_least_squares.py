# SPDX-License-Identifier: Apache-2.0
"""Coefficients are the best of those that are not below 0."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy.least_squares import non_negative

pytestmark = pytest.mark.cpu

VALUES = st.integers(-20, 20).map(lambda n: n / 10)


@st.composite
def equations(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Sums of up to three features over rows, with a part on the diagonal that keeps features apart."""
    size = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(VALUES, min_size=size + 1, max_size=size + 1), min_size=1, max_size=6))
    gram = [[sum(row[i] * row[j] for row in rows) + 0.3 * (i == j) for j in range(size)] for i in range(size)]
    return gram, [sum(row[i] * row[size] for row in rows) for i in range(size)]


@settings(max_examples=300, deadline=None)
@given(case=equations())
def test_no_small_change_is_better(case):
    """Raising or lowering a coefficient wins nothing; one that is 0 could only win below 0."""
    gram, moments = case
    found = non_negative(gram, moments)
    for row, moment, k in zip(gram, moments, found, strict=True):
        slope = sum(value * other for value, other in zip(row, found, strict=True)) - moment
        assert k >= 0
        assert slope >= -1e-9 and (k == 0 or slope <= 1e-9)


def test_worked_examples():
    """One below 0 is held at 0 and the other fitted alone; nothing is left where all would be below 0."""
    assert [2.0, 1.0] == pytest.approx(non_negative([[1.0, 0.5], [0.5, 1.0]], [2.5, 2.0]))
    assert [1.0, 0.0] == non_negative([[1.0, 0.5], [0.5, 1.0]], [1.0, 0.0])
    assert [0.0, 0.0] == non_negative([[1.0, 0.5], [0.5, 1.0]], [-1.0, -2.0])


def test_features_that_are_alike_are_told_apart_by_none():
    """Twice the same feature: one of the two takes all."""
    assert [0.0, 3.0] == sorted(non_negative([[1.0, 1.0], [1.0, 1.0]], [3.0, 3.0]))
