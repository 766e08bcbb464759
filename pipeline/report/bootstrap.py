"""Bootstrap over images without keeping images: what a figure would have been on other images of the same kind.

A replicate takes each image 0, 1, 2, ... times, by Poisson(1): the limit of drawing as many images as there are with
replacement (Chamandy et al. 2012, "Estimating uncertainty for massive data streams"). How often is a function of
(seed, image_id, replicate) alone, so no order, partition or cluster changes a replicate, and an image has the same
weights in two runs: the difference of both runs' replicates is a paired bootstrap. Sums per replicate are all that is
kept, and they are whole numbers, so adding them is exact.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import SchemaError

__all__ = ["LEVEL", "WeightedSums", "hash_images", "interval", "poisson_weights"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]

LEVEL = 0.95
# Images at once: their weights (replicates, images) stay near the cache.
IMAGES = 1024
# float64 holds whole numbers below this, and so sums of them in any order.
EXACT = 1 << 53

# Steps of the cumulative distribution of Poisson(1) in 2**32: a weight is the number of steps at or below a random
# uint32. The next one is nearer to 1 than 2**-32.
STEPS = np.array(
    [math.floor(2**32 * math.exp(-1) * sum(1 / math.factorial(n) for n in range(k + 1))) for k in range(12)]
)
MAX_WEIGHT = len(STEPS)


def hash_images(image_ids: Iterable[str], seed: int = 0) -> Hashes:
    """64 bits of each image_id and the seed (blake2b), the start of its own sequence of random numbers."""
    salt = seed.to_bytes(hashlib.blake2b.SALT_SIZE, "little")
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, salt=salt).digest() for name in image_ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def poisson_weights(hash_N: Hashes, replicate_B: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """How often each replicate takes each image, (B, N): Poisson(1) of mean 1, independent of one another.

    Item b of an image's sequence is splitmix64 (Steele et al. 2014) at step b; its upper 32 bits choose the weight.
    """
    step_B1 = (replicate_B.astype(np.uint64) + np.uint64(1))[:, None] * np.uint64(0x9E3779B97F4A7C15)
    mixed_BN = hash_N + step_B1
    mixed_BN ^= mixed_BN >> 30
    mixed_BN *= np.uint64(0xBF58476D1CE4E5B9)
    mixed_BN ^= mixed_BN >> 27
    mixed_BN *= np.uint64(0x94D049BB133111EB)
    mixed_BN ^= mixed_BN >> 31
    uniform_BN = (mixed_BN >> 32).astype(np.uint32)
    weight_BN = np.zeros(uniform_BN.shape, np.uint8)
    for step in STEPS:
        weight_BN += uniform_BN >= step
    return weight_BN


class WeightedSums:
    """Sums of whole numbers over images, one for each replicate: what figures of replicates are made of."""

    def __init__(self, replicates: int) -> None:
        self.replicates = replicates
        self._sums: dict[str, Ints] = {}

    def add(self, hash_N: Hashes, counts: Mapping[str, Ints]) -> None:
        """Add images. counts: (N, F) by name, not negative, the same F for a name at every call.

        Raises SchemaError for counts of one image beyond 2**49.
        """
        for name, count_NF in counts.items():
            if name not in self._sums:
                self._sums[name] = np.zeros((self.replicates, count_NF.shape[1]), np.int64)
            if count_NF.size and (count_NF.min() < 0 or int(count_NF.max()) * MAX_WEIGHT >= EXACT):
                raise SchemaError(f"expected counts of an image from 0 to 2**49, got {count_NF.max()} in {name}")
        replicate_B = np.arange(self.replicates)
        for start in range(0, len(hash_N), IMAGES):
            part = slice(start, start + IMAGES)
            weight_BN = poisson_weights(hash_N[part], replicate_B).astype(np.float64)
            for name, count_NF in counts.items():
                self._add(self._sums[name], weight_BN, count_NF[part])

    def _add(self, sum_BF: Ints, weight_BN: Floats, count_NF: Ints) -> None:
        occurs_F = np.flatnonzero(count_NF.any(axis=0))
        if not len(occurs_F):
            return
        count_NF = count_NF[:, occurs_F]
        # As many images in one product as keep its sums exact: mostly all of them.
        images = max(1, (EXACT - 1) // (MAX_WEIGHT * int(count_NF.max())))
        for start in range(0, len(count_NF), images):
            part = slice(start, start + images)
            sum_BF[:, occurs_F] += (weight_BN[:, part] @ count_NF[part].astype(np.float64)).astype(np.int64)

    def sums(self, name: str) -> Ints:
        """(B, F) of what was added under a name."""
        return self._sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sums


def interval(value_B: Floats, level: float = LEVEL) -> list[float] | None:
    """The percentile interval of a figure's replicates; None where no replicate has evidence for it."""
    known = value_B[~np.isnan(value_B)]
    if not len(known):
        return None
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(known, [tail, 100 - tail]).tolist()
    return [low, high]
