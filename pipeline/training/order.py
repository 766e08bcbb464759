"""The order of an epoch: which image is at which place, a function of (seed, epoch, plan) alone.

It knows nothing of workers: they share the batches of one sequence, so any number of them learns from the same batches,
and a run may be resumed with another number. Nothing is drawn from a generator, nothing has to be stored.

Axes: N images of a group.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "Group", "own_places", "part_range"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive images of an epoch, whose units are read together. first: place of its first image in the epoch.

    unit_N: index of each image's unit in the plan. position_N: the image's position in it.
    """

    first: int
    unit_N: Ints
    position_N: Ints


class EpochOrder:
    """Units in random order, cut into groups of at least `shuffle_images` images (the last may have fewer), and the
    images of each group in random order: as far as a stream can be shuffled, and exactly where there is one group.

    rows: (shard_id, number of images) of each unit.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], *, seed: int, epoch: int, shuffle_images: int) -> None:
        self._rows = [count for _, count in rows]
        self._keys = [_key(seed, epoch, shard_id) for shard_id, _ in rows]
        self.images = sum(self._rows)
        self._groups: list[list[int]] = [[]]
        size = 0
        for unit in sorted(range(len(rows)), key=lambda unit: (self._keys[unit], rows[unit][0])):
            if size >= shuffle_images:
                self._groups.append([])
                size = 0
            self._groups[-1].append(unit)
            size += self._rows[unit]
        sizes = [sum(self._rows[unit] for unit in units) for units in self._groups]
        self._firsts = [*itertools.accumulate(sizes[:-1], initial=0)]

    def steps(self, batch_images: int) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return -(-self.images // batch_images)

    def groups_from(self, start: int) -> range:
        """Numbers of the groups from that of place `start` on; those before it cost nothing."""
        first = bisect.bisect_right(self._firsts, start) - 1 if start < self.images else len(self._groups)
        return range(first, len(self._groups))

    def group(self, number: int) -> Group:
        """A group by its number in the epoch."""
        first, units = self._firsts[number], self._groups[number]
        unit_N = np.repeat(np.array(units, np.int64), [self._rows[unit] for unit in units])
        position_N = np.concatenate([np.arange(self._rows[unit], dtype=np.int64) for unit in units])
        key_N = np.repeat(np.array([self._keys[unit] for unit in units], np.uint64), [self._rows[u] for u in units])
        # Keys of two images are the same once in 2**64; then the order of the units decides, the same for all.
        order_N = np.argsort(_mixed(key_N, position_N), kind="stable")
        return Group(first, unit_N[order_N], position_N[order_N])


def part_range(count: int, part: int, parts: int) -> range:
    """The part's share of `count` things in a row: contiguous, as even as can be, the first parts never the smaller."""
    return range(-(-count * part // parts), -(-count * (part + 1) // parts))


def own_places(group: Group, images: int, batch_images: int, worker: int, workers: int, first_step: int = 0) -> Ints:
    """Which images of a group are one worker's: indices into it, ascending.

    Batch k is the epoch's places from k * batch_images on; each worker has its `part_range` of it. images: of the
    whole epoch. Batches before `first_step` are nobody's.
    """
    place_N = group.first + np.arange(len(group.unit_N))
    step_N = place_N // batch_images
    size_N = np.minimum(batch_images, images - step_N * batch_images)
    worker_N = (place_N - step_N * batch_images) * workers // size_N
    return np.flatnonzero((worker_N == worker) & (step_N >= first_step))


def _key(seed: int, epoch: int, shard_id: str) -> int:
    digest = hashlib.blake2b(json.dumps([seed, epoch, shard_id]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(key_N: npt.NDArray[np.uint64], position_N: Ints) -> npt.NDArray[np.uint64]:
    """A random-looking number for each position under each key: the output function of SplitMix64 (Steele et al. 2014,
    doi:10.1145/2660193.2660195). Unlike a generator's permutation it is the same in every version of NumPy."""
    mixed = key_N + (position_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
