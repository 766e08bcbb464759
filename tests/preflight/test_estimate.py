"""Intervals: Wilson's against published and simulated values, shares of clustered images, totals of units."""

import math
import random

import pytest

from pipeline.preflight.estimate import Interval, exact, share, total, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_table(hits: int, trials: int, low: float, high: float) -> None:
    found = wilson(hits, trials)
    assert found.value == hits / trials
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_alike_units_is_wilsons() -> None:
    found, plain = share([(1, 10)] * 5, None), wilson(5, 50)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_images_that_fail_together_tell_less() -> None:
    together, apart = share([(10, 10), *[(0, 10)] * 9], None), share([(1, 10)] * 10, None)
    assert together.value == apart.value == 0.1
    assert together.low < apart.low
    assert together.high > apart.high


def test_the_whole_corpus_leaves_no_interval_and_nothing_tells_nothing() -> None:
    assert share([(1, 10), (0, 10)], 20) == exact(0.05)
    nothing = share([], 100)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_the_interval_of_a_share_covers_it_about_as_often_as_it_says() -> None:
    """Shards of 100 images whose own shares differ (a bad camera, a cut upload); 8 of 100 are looked at."""
    draw = random.Random(7)
    covered = 0
    for _ in range(200):
        shares = [draw.choice((0.0, 0.02, 0.02, 0.1)) for _ in range(100)]
        shards = [sum(draw.random() < p for _ in range(100)) for p in shares]
        truth = sum(shards) / 10_000
        found = share([(hits, 100) for hits in draw.sample(shards, 8)], 10_000)
        covered += found.low <= truth <= found.high
    assert covered >= 180


def test_a_total_follows_sizes_and_is_exact_when_all_is_seen() -> None:
    sample = [(10.0, 1000.0), (21.0, 2000.0), (29.0, 3000.0)]
    assert total(sample, 6000, 3) == exact(60.0)
    found = total(sample, 60_000, 30)
    assert found.value == pytest.approx(600)
    # By hand: residuals 0, 1, -1; 30 * sqrt((1 - 3 / 30) * (2 / 2) / 3) * t(2 degrees)
    error = 30 * math.sqrt(0.9 / 3) * 4.303
    assert (found.low, found.high) == pytest.approx((600 - error, 600 + error))
    assert total([(10.0, 100.0)], 1000, 10) == Interval(100.0, 50.0, 200.0)
