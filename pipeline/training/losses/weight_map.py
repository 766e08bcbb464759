"""U-Net's weight map: pixels between cells that nearly touch count more, so that the borders between them are learned.

Axes: H rows, W columns.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["boundary_weight_map"]

# A border term under this is left out: of a weight of 1 it is a rounding of float32.
SMALLEST_TERM = 1e-7
FAR = np.float32(np.inf)


def boundary_weight_map(
    instance_HW: npt.NDArray[np.integer[Any]],
    class_weight_HW: npt.NDArray[np.floating[Any]] | None = None,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
) -> npt.NDArray[np.float32]:
    """w(x) = w_c(x) + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015, arXiv:1505.04597, eq. 2), float32.

    instance_HW: one id per cell, 0 = background. class_weight_HW: w_c, which balances the classes; 1 by default.
    w0, sigma (pixels): the paper's values by default. d1, d2: exact Euclidean distances in pixels from a background
    pixel's centre to the nearest pixel of the nearest and of the second nearest cell. Cells' own pixels, and images
    with fewer than two cells, have w_c alone: it is the background between cells that the paper wants to be learned.

    It runs on the CPU, where samples are augmented. Its cost grows with the cells' bounding boxes.
    """
    if instance_HW.ndim != 2:
        raise ValueError(f"expected instance_HW of two axes, got {instance_HW.shape}")
    if class_weight_HW is None:
        weight_HW = np.ones(instance_HW.shape, np.float32)
    else:
        weight_HW = np.array(np.broadcast_to(class_weight_HW, instance_HW.shape), np.float32)
    if w0 > SMALLEST_TERM:
        reach = math.floor(sigma * math.sqrt(2 * math.log(w0 / SMALLEST_TERM)))
        near_HW, second_HW = _two_nearest(instance_HW, reach)
        term_HW = w0 * np.exp(-((near_HW + second_HW) ** 2) / (2 * sigma * sigma))
        np.add(weight_HW, term_HW, out=weight_HW, where=instance_HW == 0)
    return weight_HW


def _two_nearest(
    instance_HW: npt.NDArray[np.integer[Any]], reach: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Distances to the nearest and the second nearest cell where they are at most `reach`, else infinity or farther."""
    near_HW = np.full(instance_HW.shape, FAR)
    second_HW = np.full(instance_HW.shape, FAR)
    boxes = _bounding_boxes(instance_HW)
    for cell, (rows, columns) in boxes if len(boxes) > 1 else ():
        around = _grown(rows, reach, instance_HW.shape[0]), _grown(columns, reach, instance_HW.shape[1])
        distance = _distance(instance_HW[around] == cell, reach)
        near, second = near_HW[around], second_HW[around]
        np.minimum(second, np.maximum(near, distance), out=second)
        np.minimum(near, distance, out=near)
    return near_HW, second_HW


def _bounding_boxes(instance_HW: npt.NDArray[np.integer[Any]]) -> list[tuple[int, tuple[slice, slice]]]:
    """Each cell's id with its rows and columns."""
    rows_N, columns_N = np.nonzero(instance_HW)
    cells, which_N = np.unique(instance_HW[rows_N, columns_N], return_inverse=True)
    low = np.full((2, len(cells)), np.iinfo(np.int64).max)
    high = np.full((2, len(cells)), -1)
    for axis, place_N in enumerate((rows_N, columns_N)):
        np.minimum.at(low[axis], which_N, place_N)
        np.maximum.at(high[axis], which_N, place_N)
    return [
        (int(cell), (slice(low[0, at], high[0, at] + 1), slice(low[1, at], high[1, at] + 1)))
        for at, cell in enumerate(cells)
    ]


def _grown(span: slice, reach: int, size: int) -> slice:
    return slice(max(0, span.start - reach), min(size, span.stop + reach))


def _distance(cell_HW: npt.NDArray[np.bool_], reach: int) -> npt.NDArray[np.float32]:
    """The exact Euclidean distance to the nearest pixel of a mask where it is at most `reach`; farther away, an upper
    bound or infinity.

    Separable (Saito & Toriwaki 1994): first along columns, where the nearest pixel is the last one passed from either
    end, then the least of (vertical distance)^2 + dx^2 over columns up to `reach` away.
    """
    height, width = cell_HW.shape
    row_H1 = np.arange(height)[:, None]
    above_HW = row_H1 - np.maximum.accumulate(np.where(cell_HW, row_H1, -height * 2), axis=0)
    below_HW = np.minimum.accumulate(np.where(cell_HW, row_H1, height * 3)[::-1], axis=0)[::-1] - row_H1
    vertical_HW = np.minimum(above_HW, below_HW).astype(np.float32)
    vertical_HW[vertical_HW > height] = FAR
    squared_HW = vertical_HW**2
    best_HW = squared_HW.copy()
    for dx in range(1, min(reach, width - 1) + 1):
        shifted_HW = squared_HW + np.float32(dx * dx)
        np.minimum(best_HW[:, dx:], shifted_HW[:, :-dx], out=best_HW[:, dx:])
        np.minimum(best_HW[:, :-dx], shifted_HW[:, dx:], out=best_HW[:, :-dx])
    return np.asarray(np.sqrt(best_HW), np.float32)
