"""The cells of U-Net's weight map: which pixels belong to one object, from whatever kind of target an image has.

Axes: H rows, W columns, N annotations. A cell map is int32: 1, 2, 3, ... one per object, 0 = of no object.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import TargetMismatchError
from pipeline.training.targets import mask_of, rle_texts

__all__ = ["annotation_cells", "label_cells", "segment_cells"]

PANOPTIC_VOID = 0
NONE = -1


def segment_cells(segment_HW: npt.NDArray[np.integer[Any]], is_cell: Mapping[int, bool]) -> npt.NDArray[np.int32]:
    """The cells of a panoptic map. is_cell: of every segment, by its id.

    Raises TargetMismatchError for an id of the map that `is_cell` lacks.
    """
    values, place_HW = np.unique(segment_HW, return_inverse=True)
    unknown = [value for value in values.tolist() if value != PANOPTIC_VOID and value not in is_cell]
    if unknown:
        raise TargetMismatchError(f"the target's map has ids that its JSON lacks: {unknown[:10]}")
    kept = np.array([value != PANOPTIC_VOID and is_cell[value] for value in values.tolist()], bool)
    table = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(table[place_HW.reshape(segment_HW.shape)])


def annotation_cells(annotations: Sequence[Mapping[str, Any]], *, height: int, width: int) -> npt.NDArray[np.int32]:
    """The cells of COCO annotations of one image; where several overlap, the smallest has the pixel.

    A crowd is one cell: what lies in it is no background. Annotations without a segmentation are none. Raises
    TargetMismatchError for what is no mask of that size.
    """
    texts = rle_texts([item for item in annotations if item.get("segmentation")], height=height, width=width)
    cell_HW = np.zeros((height, width), np.int32)
    area_HW = np.full((height, width), np.iinfo(np.int64).max)  # of the cell that has the pixel
    for cell, text in enumerate(texts, start=1):
        mask_HW = mask_of(text, height=height, width=width)
        area = int(mask_HW.sum())
        mask_HW &= area < area_HW
        cell_HW[mask_HW], area_HW[mask_HW] = cell, area
    return cell_HW


def label_cells(label_HW: npt.NDArray[np.integer[Any]], classes: Collection[int]) -> npt.NDArray[np.int32]:
    """The cells of a label map that says no more than the class: connected pixels of one of `classes`.

    Pixels are connected by their sides. Cells that were drawn apart stay apart that way, even where the line between
    them is one pixel wide and runs askew.
    """
    # Nodes of a graph are runs: pixels of one row in a row, of one class, or of none.
    value_HW = np.where(np.isin(label_HW, [*classes]), label_HW.astype(np.int64), NONE)
    first_HW = np.ones(value_HW.shape, bool)
    first_HW[:, 1:] = value_HW[:, 1:] != value_HW[:, :-1]
    run_HW = (np.cumsum(first_HW) - 1).reshape(value_HW.shape)
    # Edges are pairs of runs one above the other, noted where the later of the two begins.
    touching_HW = (value_HW[1:] == value_HW[:-1]) & (value_HW[1:] != NONE) & (first_HW[1:] | first_HW[:-1])
    root = _roots(int(first_HW.sum()), run_HW[:-1][touching_HW], run_HW[1:][touching_HW])
    of_class = value_HW[first_HW] != NONE
    cell = np.zeros(len(root), np.int32)
    cell[of_class] = np.unique(root[of_class], return_inverse=True)[1] + 1
    return np.asarray(cell[run_HW])


def _roots(nodes: int, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The least node of each node's connected component; edges are pairs of `one` and `other`.

    In every round each root that touches a lesser one is hung under the least of them, then all paths are made one
    step long (after Shiloach & Vishkin 1982), so that rounds are few where a flood would take one per pixel.
    """
    root = np.arange(nodes)
    while True:
        one, other = root[one], root[other]
        apart = one != other
        if not apart.any():
            return root
        one, other = one[apart], other[apart]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(root, up := root[root]):
            root = up
