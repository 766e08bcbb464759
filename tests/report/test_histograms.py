"""Histograms: what stands in which bin, and the same whatever the order and partition."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.histograms import BINS, LogHistogram, ShareHistogram


def test_shares() -> None:
    histogram = ShareHistogram()
    assert histogram.compute() is None
    histogram.add(np.array([0, 0.049, 0.05, 0.999, 1, np.nan]))
    found = histogram.compute()
    assert found is not None
    assert found["edges"][:3] == [0, 0.05, 0.1]
    assert found["counts"] == [2, 1, *[0] * 17, 2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50), st.integers(0, 50), st.randoms(use_true_random=False))
def test_any_size(values: list[float], cut: int, shuffle: random.Random) -> None:
    whole, parts = LogHistogram(), LogHistogram()
    whole.add(np.array(values))
    shuffle.shuffle(values)
    parts.add(np.array(values[:cut]))
    parts.add(np.array([*values[cut:], np.nan]))
    found = whole.compute()
    assert found == parts.compute()
    assert found is not None
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= BINS + 1
    assert counts[0] > 0
    ratios = np.array(edges[1:]) / np.array(edges[:-1])
    assert ratios == pytest.approx(ratios[0])
    clipped = np.clip(values, 2.0**-32, None)
    # An edge is a power of two, so that a value next to it may fall on either side.
    assert abs(np.cumsum(np.histogram(clipped, edges)[0]) - np.cumsum(counts)).max() <= sum(
        np.isclose(value, edges).any() for value in clipped
    )


def test_no_values() -> None:
    histogram = LogHistogram()
    histogram.add(np.array([np.nan]))
    assert histogram.compute() is None
