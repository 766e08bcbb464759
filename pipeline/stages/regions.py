"""Label maps without small regions."""

import heapq
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.models.extras import import_extra

__all__ = ["dissolve_small_regions"]

Index = npt.NDArray[np.integer[Any]]
STEPS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (1, -1))}


def dissolve_small_regions(index_HW: Index, *, min_area: int, connectivity: int = 8) -> Index:
    """Connected regions of fewer than `min_area` pixels take the label that surrounds them most.

    That is the label of most pairs of neighbouring pixels across the border; the lowest of equals. The smallest region
    goes first (of equals that of the lowest label), what it has become part of counts as one region, and so on until
    none is too small; a map of one region stays. connectivity: 4 or 8 neighbours of a pixel. Raises ConfigError where
    scipy is missing.
    """
    region_HW, label_R = _regions(index_HW, connectivity)
    areas = np.bincount(region_HW.ravel(), minlength=len(label_R))
    if len(areas) < 2 or areas.min() >= min_area:
        return index_HW
    merged = _merge(label_R.tolist(), areas.tolist(), _borders(region_HW, areas < min_area, connectivity), min_area)
    return np.asarray(merged, index_HW.dtype)[region_HW]


def _regions(index_HW: Index, connectivity: int) -> tuple[npt.NDArray[np.int64], Index]:
    """The number of each pixel's region, and each region's label."""
    ndimage = import_extra("scipy.ndimage", "classic")
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    region_HW = np.zeros(index_HW.shape, np.int64)
    labels: list[int] = []
    for label in np.unique(index_HW).tolist():
        mask_HW = index_HW == label
        numbered_HW, count = ndimage.label(mask_HW, structure)
        region_HW[mask_HW] = numbered_HW[mask_HW] - 1 + len(labels)
        labels += [label] * count
    return region_HW, np.asarray(labels)


def _borders(
    region_HW: npt.NDArray[np.int64], small_R: npt.NDArray[np.bool_], connectivity: int
) -> dict[int, Counter[int]]:
    """Of each small region, how many pairs of neighbouring pixels it has with each other region."""
    height, width = region_HW.shape
    count = len(small_R)
    codes = []
    for down, right in STEPS[connectivity]:
        left = max(0, -right)
        one = region_HW[: height - down, left : width - max(0, right)].ravel()
        other = region_HW[down:, left + right : width + min(0, right)].ravel()
        across = one != other
        one, other = one[across], other[across]
        codes += [one[small_R[one]] * count + other[small_R[one]], other[small_R[other]] * count + one[small_R[other]]]
    pairs, pixels = np.unique(np.concatenate(codes), return_counts=True)
    borders: dict[int, Counter[int]] = {}
    for pair, pixel_pairs in zip(pairs.tolist(), pixels.tolist(), strict=True):
        borders.setdefault(pair // count, Counter())[pair % count] = pixel_pairs
    return borders


def _merge(labels: list[int], areas: list[int], borders: dict[int, Counter[int]], min_area: int) -> list[int]:
    """The label that each region ends with."""
    parents = list(range(len(labels)))

    def root(region: int) -> int:
        while parents[region] != region:
            parents[region] = parents[parents[region]]
            region = parents[region]
        return region

    queue = [(areas[region], region) for region in borders]
    heapq.heapify(queue)
    while queue:
        area, region = heapq.heappop(queue)
        if parents[region] != region or areas[region] != area:
            continue  # it was merged since
        around: Counter[int] = Counter()
        for neighbour, pixel_pairs in borders[region].items():
            if root(neighbour) != region:
                around[root(neighbour)] += pixel_pairs
        by_label: Counter[int] = Counter()
        for neighbour, pixel_pairs in around.items():
            by_label[labels[neighbour]] += pixel_pairs
        if not by_label:
            continue
        label = min(by_label, key=lambda candidate: (-by_label[candidate], candidate))
        joined = [neighbour for neighbour in around if labels[neighbour] == label]
        largest = max(joined, key=lambda neighbour: (areas[neighbour], -neighbour))
        for other in [region, *joined]:
            if other != largest:
                parents[other] = largest
                areas[largest] += areas[other]
                if largest in borders:
                    borders[largest].update(borders.get(other, Counter()))
        if areas[largest] < min_area:
            heapq.heappush(queue, (areas[largest], largest))
    return [labels[root(region)] for region in range(len(labels))]
