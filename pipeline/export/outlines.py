"""Masks as outlines: rings along the edges of pixels, which an even-odd fill turns back into the very mask.

Coordinates are x, y of the corners of pixels: (0, 0) is the upper left corner of the first pixel.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["inner", "joined", "outlines", "simplified"]

Ring = npt.NDArray[np.int32]


def outlines(mask_HW: npt.NDArray[np.bool_]) -> list[tuple[Ring, bool]]:
    """The rings of a mask, each (N, 2) int32 x, y of its turns, and whether it is the edge of a hole.

    Outer rings run clockwise as seen, holes the other way. Pixels that touch at a corner alone are apart.
    """
    padded_HW = np.pad(mask_HW, 1)
    # The four pixels around each corner of the grid; a ring turns where an odd number is set, twice where two lie
    # opposite each other.
    a, b, c, d = (padded_HW[y : y + mask_HW.shape[0] + 1, x : x + mask_HW.shape[1] + 1] for y, x in CORNERS)
    odd_HW = a ^ b ^ c ^ d
    twice_HW = (a == d) & (b == c) & (a != b)
    ys, xs = np.nonzero(odd_HW | twice_HW)
    twice = twice_HW[ys, xs]
    ys, xs = np.repeat(ys, 1 + twice), np.repeat(xs, 1 + twice)
    count = len(ys)
    if not count:
        return []
    # Of a double turn, the first belongs to the edge on its left, the second to that on its right; which of them has
    # the edge above depends on the diagonal.
    second = np.zeros(count, np.int8)
    second[1:] = (ys[1:] == ys[:-1]) & (xs[1:] == xs[:-1])
    falls = a[ys, xs]
    has_twin = np.repeat(twice, 1 + twice)
    below = np.where(has_twin & ~falls, 1 - second, second)
    across = np.arange(count)
    across = np.where(across % 2 == 0, across + 1, across - 1)
    order = np.lexsort((below, ys, xs))
    down = np.empty(count, np.int64)
    down[order[0::2]], down[order[1::2]] = order[1::2], order[0::2]
    inside = d[ys, xs]
    return list(_followed(xs, ys, across.tolist(), down.tolist(), inside))


CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _followed(
    xs: npt.NDArray[np.int64],
    ys: npt.NDArray[np.int64],
    across: list[int],
    down: list[int],
    inside: npt.NDArray[np.bool_],
) -> list[tuple[Ring, bool]]:
    rings: list[tuple[Ring, bool]] = []
    seen = bytearray(len(across))
    points = np.stack([xs, ys], axis=1).astype(np.int32)
    for start in range(len(across)):
        if seen[start]:
            continue
        places: list[int] = []
        place = start
        while True:
            other = across[place]
            places += (place, other)
            seen[place] = seen[other] = 1
            place = down[other]
            if place == start:
                break
        # The first turn met is the ring's upmost, leftmost one, from which it goes right: below lies mask or hole.
        is_hole = not inside[start]
        ring = points[places]
        rings.append((ring[::-1] if is_hole else ring, is_hole))
    return rings


def inner(ring: Ring, mask_HW: npt.NDArray[np.bool_]) -> Ring:
    """A ring of `outlines` moved from the edges of pixels onto the mask's own outermost pixels, (N, 2) of their x, y.

    Fillers that draw the border too, as OpenCV's, then give the mask back, where along the edges they would add to it.
    """
    # The quarter between the two edges of a turn holds the mask's pixel, or the one that cuts into it.
    quarter = np.roll(ring, 1, axis=0) + np.roll(ring, -1, axis=0) - 2 * ring > 0
    near = ring - 1 + quarter
    height, width = mask_HW.shape
    x, y = near[:, 0], near[:, 1]
    is_inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    is_set = np.zeros(len(ring), bool)
    is_set[is_inside] = mask_HW[y[is_inside], x[is_inside]]
    return np.where(is_set[:, None], near, ring - quarter).astype(np.int32)


def joined(rings: Sequence[tuple[Ring, bool]]) -> Ring:
    """Several rings as one, by bridges of no width, for formats that have one ring for an object: (N, 2)."""
    whole = rings[0][0]
    for ring, _ in rings[1:]:
        distances = np.abs(whole - ring[0]).sum(axis=1)
        at = int(np.argmin(distances))
        whole = np.concatenate([whole[: at + 1], ring, ring[:1], whole[at:]])
    return whole


def simplified(ring: Ring, tolerance: float) -> Ring:
    """A ring of fewer points, none of the old ones farther than `tolerance` pixels from it (Douglas & Peucker 1973).

    A ring that would lose its area is given back as it is.
    """
    if tolerance <= 0 or len(ring) <= 4:
        return ring
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
    kept = np.zeros(len(closed), bool)
    kept[[0, far, len(ring)]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        start, end = closed[first], closed[last]
        between = closed[first + 1 : last] - start
        direction = end - start
        length = float(np.hypot(*direction))
        off = (
            np.abs(direction[0] * between[:, 1] - direction[1] * between[:, 0]) / length
            if length
            else np.hypot(between[:, 0], between[:, 1])
        )
        worst = int(np.argmax(off))
        if off[worst] > tolerance:
            middle = first + 1 + worst
            kept[middle] = True
            waiting += ((first, middle), (middle, last))
    slim = ring[kept[:-1]]
    return slim if len(slim) >= 3 else ring
