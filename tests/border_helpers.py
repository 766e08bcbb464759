"""U-Net's weight map and connected components as one would write them down, for tests of what makes them fast."""

from collections.abc import Collection
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def weight_formula(cell_HW: Array, class_weight_HW: Array, *, w0: float, sigma: float) -> Array:
    """w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) by the distances of every pixel to every pixel of every cell."""
    weight_HW = np.array(class_weight_HW, np.float64)
    places_P2 = np.argwhere(cell_HW == 0)
    nearest = []
    for cell in np.unique(cell_HW[cell_HW != 0]):
        apart_PQ2 = places_P2[:, None] - np.argwhere(cell_HW == cell)[None]
        nearest.append(np.sqrt((apart_PQ2**2).sum(-1)).min(1))
    if len(nearest) >= 2 and len(places_P2):
        d1_P, d2_P = np.sort(nearest, axis=0)[:2]
        weight_HW[tuple(places_P2.T)] += w0 * np.exp(-((d1_P + d2_P) ** 2) / (2 * sigma**2))
    return weight_HW


def flood_fill(label_HW: Array, classes: Collection[int]) -> Array:
    """1, 2, 3, ... for what is connected by pixels' sides within one class, in the order of first pixels."""
    height, width = label_HW.shape
    cell_HW = np.zeros((height, width), np.int32)
    cells = 0
    for start in np.argwhere(np.isin(label_HW, [*classes])).tolist():
        if cell_HW[tuple(start)]:
            continue
        cells += 1
        waiting = [start]
        while waiting:
            y, x = waiting.pop()
            if cell_HW[y, x] or label_HW[y, x] != label_HW[tuple(start)]:
                continue
            cell_HW[y, x] = cells
            around = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            waiting += [(row, column) for row, column in around if 0 <= row < height and 0 <= column < width]
    return cell_HW


def same_partition(one_HW: Array, other_HW: Array) -> bool:
    """Whether two maps tell the same cells apart, whatever they number them by; 0 is no cell in both."""
    if not np.array_equal(one_HW == 0, other_HW == 0):
        return False
    pairs = np.unique(np.stack([one_HW.ravel(), other_HW.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)
