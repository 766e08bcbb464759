"""Weights of mean and variance 1 that hang on the image and the replicate alone; sums that are exact; intervals."""

import hashlib
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SchemaError
from pipeline.report.bootstrap import WeightedSums, hash_images, interval, poisson_weights

NAMES = [f"shard-{n // 100:05d}.tar/{n % 100:06d}" for n in range(5000)]


def test_weights_are_poisson_and_independent() -> None:
    weight_BN = poisson_weights(hash_images(NAMES), np.arange(400)).astype(np.float64)
    size = weight_BN.size
    for count in range(6):
        share, expected = (weight_BN == count).mean(), math.exp(-1) / math.factorial(count)
        assert abs(share - expected) < 5 * math.sqrt(expected / size)
    assert abs(weight_BN.mean() - 1) < 5 / math.sqrt(size)
    assert weight_BN.max() <= 12
    # The sum over the images of a replicate is Poisson of their number: its variance over replicates is that number.
    assert weight_BN.sum(axis=1).var() / len(NAMES) == pytest.approx(1, abs=5 * math.sqrt(2 / 400))
    # As is the sum over replicates of an image.
    assert weight_BN.sum(axis=0).var() / 400 == pytest.approx(1, abs=5 * math.sqrt(2 / len(NAMES)))
    for axis, items in ((weight_BN, 400), (weight_BN.T, len(NAMES))):
        correlation = np.corrcoef(axis[:50])[np.triu_indices(50, 1)]
        assert abs(correlation).max() < 5 * math.sqrt(1 / (weight_BN.size // items))


def test_weights_hang_on_image_replicate_and_seed_alone() -> None:
    weight_BN = poisson_weights(hash_images(NAMES), np.arange(20))
    some = [7, 4000, 12]
    again = poisson_weights(hash_images([NAMES[at] for at in some]), np.array([3, 19]))
    assert again.tolist() == weight_BN[[3, 19]][:, some].tolist()
    other = poisson_weights(hash_images(NAMES, seed=1), np.arange(20))
    assert abs(np.corrcoef(weight_BN.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(other.size)


def splitmix64(state: int, count: int) -> list[int]:
    """Step by step, in Python's integers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ mixed >> 31)
    return found


def test_weights_are_splitmix64_by_the_cumulative_distribution() -> None:
    # The generator's published first numbers from the state 1234567.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little")
    assert hash_images(["a"]).tolist() == [state]
    for start in (1234567, state):
        expected = []
        for number in splitmix64(start, 3000):
            below, count = math.exp(-1), 0
            while (number >> 32) / 2**32 >= below:
                count += 1
                below += math.exp(-1) / math.factorial(count)
            expected.append(count)
        assert poisson_weights(np.array([start], np.uint64), np.arange(3000)).ravel().tolist() == expected


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
def test_any_order_and_partition_gives_the_same_sums(cuts: list[int], shuffle: random.Random) -> None:
    rng = np.random.default_rng(1)
    # From 0 to nearly 2**49, so that few of them fit into one product.
    count_NF = np.concatenate([rng.integers(0, 2**top, (60, 3)) for top in (1, 20, 40, 49)], axis=1)
    hash_N = hash_images(NAMES[:60])
    weight_BN = poisson_weights(hash_N, np.arange(7))
    expected = weight_BN.astype(object) @ count_NF.astype(object)
    order = list(range(60))
    shuffle.shuffle(order)
    sums = WeightedSums(7)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True):
        part = order[start:stop]
        sums.add(hash_N[part], {"x": count_NF[part], "y": count_NF[part, :1]})
    assert (sums.sums("x") == expected).all()
    assert (sums.sums("y") == expected[:, :1]).all()
    assert "z" not in sums


def test_counts_that_no_image_has() -> None:
    for count in (-1, 2**50):
        with pytest.raises(SchemaError, match=r"from 0 to 2\*\*49"):
            WeightedSums(2).add(hash_images(["a"]), {"x": np.array([[count]])})


def test_interval() -> None:
    low, high = interval(np.append(np.arange(1001) / 1000, np.nan)) or (0, 0)
    assert (low, high) == (pytest.approx(0.025), pytest.approx(0.975))
    assert interval(np.full(3, np.nan)) is None
    assert interval(np.zeros(0)) is None
    assert interval(np.arange(101.0), level=0.5) == [25, 75]
