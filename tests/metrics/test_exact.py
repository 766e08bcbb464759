"""Exact sums: equal to the sum of fractions, whatever the order and the grouping, and lossless as a row."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.metrics.exact import EXACT_SUM, ExactSum, exact_sums

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)
VALUES = st.lists(FINITE, max_size=30)
LAW = settings(deadline=None)  # the first call into Arrow is slow


def fraction(total: ExactSum) -> Fraction:
    return Fraction(total.mantissa) * Fraction(2) ** total.exponent


@LAW
@given(VALUES)
@example([1e300, 1.0, -1e300])
@example([5e-324, -1e300, 1e300, 2.2e-308])
@example([0.0, -0.0])
@example([0.1] * 30)
def test_is_the_exact_sum(values: list[float]) -> None:
    total = ExactSum.of(values)
    assert fraction(total) == sum((Fraction(value) for value in values), Fraction(0))
    assert total.compute() == math.fsum(values)
    assert total.mantissa % 2 or total == ExactSum.empty()


@LAW
@given(VALUES, st.integers(1, 10**12))
def test_divides_once_and_rounds_correctly(values: list[float], count: int) -> None:
    assert ExactSum.of(values).divide(count) == float(sum((Fraction(v) for v in values), Fraction(0)) / count)


def test_nothing_over_nothing_is_no_evidence() -> None:
    assert math.isnan(ExactSum.empty().divide(0))
    assert ExactSum.empty().compute() == 0.0


@LAW
@given(st.lists(VALUES, max_size=6), st.randoms(use_true_random=False))
def test_any_partition_and_order_is_the_same_value(parts: list[list[float]], random) -> None:
    flat = [value for part in parts for value in part]
    expected = ExactSum.of(flat)
    random.shuffle(parts)
    total = ExactSum.empty()
    for part in parts:
        random.shuffle(part)
        total = total.merge(ExactSum.of(part))
    assert total == expected


@LAW
@given(VALUES, VALUES, VALUES)
def test_laws(first: list[float], second: list[float], third: list[float]) -> None:
    a, b, c = ExactSum.of(first), ExactSum.of(second), ExactSum.of(third)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(ExactSum.empty()) == a == ExactSum.empty().merge(a)


@LAW
@given(st.lists(VALUES, max_size=5))
def test_rows_are_lossless(parts: list[list[float]]) -> None:
    sums = [ExactSum.of(part) for part in parts]
    column = pa.array([total.to_row() for total in sums], EXACT_SUM)
    assert [ExactSum.from_row(row) for row in column.to_pylist()] == sums
    # A whole column folds at once, without a Python object for each row.
    folded = ExactSum.of(column.flatten().to_numpy())
    assert folded == ExactSum.of([value for part in parts for value in part])


def test_a_row_is_readable() -> None:
    assert ExactSum.of([0.25]).to_row() == [0.25]
    assert ExactSum.empty().to_row() == []
    assert ExactSum.of([1.0, 2.0**-60]).to_row() == [1.0, 2.0**-60]
    assert ExactSum.of([0.1] * 10).to_row()[0] == 1.0


@LAW
@given(st.lists(st.tuples(st.integers(0, 4), FINITE), max_size=40))
def test_sums_by_index(pairs: list[tuple[int, float]]) -> None:
    index = np.array([i for i, _ in pairs], np.int32)
    values = np.array([v for _, v in pairs], np.float64)
    expected = [ExactSum.of([v for i, v in pairs if i == k]) for k in range(5)]
    assert exact_sums(index, values, 5) == expected


def test_many_values_at_once() -> None:
    values = np.random.default_rng(0).random(200_000)
    assert ExactSum.of(values).compute() == math.fsum(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_finite_values(bad: float) -> None:
    for values in ([bad], [1.0, bad]):
        with pytest.raises(ValueError, match="finite"):
            ExactSum.of(values)


def test_bad_indices() -> None:
    for index in ([-1, 0], [0, 2], [0]):
        with pytest.raises(ValueError, match="expected"):
            exact_sums(np.array(index), np.ones(2), 2)
