"""How many pixels each pair of values of two maps shares: the one pass over pixels behind the dense metrics.

Label maps are made of long runs, so pixels are first cut where a pair changes, and only the runs are sorted and summed.
Maps that are more like noise are counted pixel by pixel.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Joint", "joint_counts"]

Integers = npt.NDArray[np.integer[Any]]
# (value of the first map, value of the second, pixels): int64 each, only those that occur.
Joint = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]

# Measured at 1024x2048: summing runs costs as much as counting pixels where a run is 10 pixels long.
RUN_PIXELS = 12
# Buffers of this many pixels stay in the cache and are allocated once: fresh pages for a whole image cost more than
# the counting.
PIECE_PIXELS = 1 << 17
# 2 * 25 + 14 = 64. Values from -1 to 2**25 - 2: every id of a panoptic PNG, and a marker. Longer runs are cut.
VALUE_BITS, RUN_BITS = 25, 14
MAX_RUN = 1 << RUN_BITS
SLOT_BITS = 14
HASH = np.uint64(0x9E3779B97F4A7C15)


def joint_counts(first_HW: Integers, second_HW: Integers) -> Joint:
    """Pixels of each pair of values. Both maps have one shape and values that fit int64."""
    first, second = np.ravel(first_HW), np.ravel(second_HW)
    if not first.size:
        return (np.zeros(0, np.int64),) * 3
    if first.dtype == second.dtype == np.uint8:
        return _count_bytes(first, second)
    changes = first[1:] != first[:-1]
    changes |= second[1:] != second[:-1]
    if np.count_nonzero(changes) * RUN_PIXELS > first.size:
        small = [_as_bytes(first), _as_bytes(second)]
        if small[0] is not None and small[1] is not None:
            (first_values, first), (second_values, second) = small[0], small[1]
            first_index, second_index, pixels = _count_bytes(first, second)
            return first_values[first_index], second_values[second_index], pixels
    changes[MAX_RUN - 1 :: MAX_RUN] = True
    starts, lengths = _runs(changes)
    return _sum_runs(first[starts].astype(np.int64), second[starts].astype(np.int64), lengths)


def _as_bytes(values: Integers) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]] | None:
    """The values that occur and each pixel's index into them, where they are few and small enough for lookup tables."""
    if values.dtype not in (np.uint8, np.uint16) and (values.min() < 0 or values.max() >= 1 << 16):
        return None
    present = np.zeros(1 << 16, np.bool_)
    present[values] = True
    found = np.flatnonzero(present)
    if len(found) > 256:
        return None
    lookup = np.zeros(1 << 16, np.uint8)
    lookup[found] = np.arange(len(found))
    return found, lookup[values]


def _count_bytes(first: Integers, second: Integers) -> Joint:
    """`joint_counts` of two flat uint8 maps, by one code of at most 16 bits per pixel."""
    # Adding 1 with wrap-around puts 255, the usual void, next to the ids, which start at 0: few ids, few bits, and the
    # counters stay in the nearest cache.
    bits = max(int((first + np.uint8(1)).max()), int((second + np.uint8(1)).max()), 1).bit_length()
    counts = np.zeros(1 << 2 * bits, np.int64)
    size = min(PIECE_PIXELS, first.size)
    byte, narrow = np.empty(size, np.uint8), np.empty(size, np.uint16)
    wide, differs = np.empty(size, np.int64), np.empty(size, np.bool_)
    run_codes, run_lengths = [], []
    for start in range(0, first.size, PIECE_PIXELS):
        stop = min(start + PIECE_PIXELS, first.size)
        codes = narrow[: stop - start]
        np.copyto(codes, np.add(first[start:stop], 1, out=byte[: len(codes)]))
        codes <<= bits
        codes |= np.add(second[start:stop], 1, out=byte[: len(codes)])
        changes = np.not_equal(codes[1:], codes[:-1], out=differs[: len(codes) - 1])
        if np.count_nonzero(changes) * RUN_PIXELS < len(codes):
            starts, lengths = _runs(changes)
            run_codes.append(codes[starts])
            run_lengths.append(lengths)
        else:
            np.copyto(wide[: len(codes)], codes)
            piece_counts = np.bincount(wide[: len(codes)])
            counts[: len(piece_counts)] += piece_counts
    if run_codes:
        # The weights are sums of whole numbers below 2**53, so float64 holds them exactly.
        sums = np.bincount(np.concatenate(run_codes), np.concatenate(run_lengths), len(counts))
        counts += sums.astype(np.int64)
    found = np.flatnonzero(counts)
    return ((found >> bits) - 1) & 255, ((found & ((1 << bits) - 1)) - 1) & 255, counts[found]


def _runs(changes: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each run starts, and its length."""
    edges = np.flatnonzero(changes)
    starts = np.empty(len(edges) + 1, np.int64)
    starts[0] = 0
    np.add(edges, 1, out=starts[1:])
    return starts, np.diff(starts, append=len(changes) + 1)


def _sum_runs(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Joint:
    """Sums the lengths of equal pairs."""
    if min(first.min(), second.min()) < -1 or max(first.max(), second.max()) + 1 >= 1 << VALUE_BITS:
        first_values, first_index = np.unique(first, return_inverse=True)
        second_values, second_index = np.unique(second, return_inverse=True)
        first, second, pixels = _sum_runs(first_index, second_index, lengths)
        return first_values[first], second_values[second], pixels
    codes = (first + 1).view(np.uint64)
    codes <<= VALUE_BITS
    codes += (second + 1).view(np.uint64)
    # A map of segments has a hundred pairs or so, which mostly fall into slots of their own (Fibonacci hashing).
    slots = ((codes * HASH) >> (64 - SLOT_BITS)).view(np.int64)
    owners = np.empty(1 << SLOT_BITS, np.uint64)
    owners[slots] = codes
    if np.array_equal(owners[slots], codes):
        sums = np.zeros(1 << SLOT_BITS, np.int64)
        np.add.at(sums, slots, lengths)
        found = np.flatnonzero(sums != 0)
        return *_unpair(owners[found]), sums[found]
    # Else sort. Pair and length share one uint64, because a plain sort is much faster than one that returns its order.
    codes <<= RUN_BITS
    codes |= (lengths - 1).astype(np.uint64)
    codes.sort()
    lengths = (codes & (MAX_RUN - 1)).astype(np.int64) + 1
    codes >>= RUN_BITS
    group = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return *_unpair(codes[group]), np.add.reduceat(lengths, group)


def _unpair(codes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    pairs = codes.astype(np.int64)
    return (pairs >> VALUE_BITS) - 1, (pairs & ((1 << VALUE_BITS) - 1)) - 1
