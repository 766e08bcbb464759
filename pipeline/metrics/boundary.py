"""Boundary IoU and boundary PQ (Cheng et al., CVPR 2021), as boundary-iou-api computes them.

The boundary of a mask is what an erosion by d pixels takes away: the pixels whose square of 2d + 1 holds anything
outside the mask, the outside of the image included. d = round(0.02 * image diagonal), at least 1. A square of a map
belongs to one mask where no two neighbours in it differ, so one pass over a map gives the boundaries of all its masks.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from pipeline.metrics.classsums import ClassSums, class_sums_type
from pipeline.metrics.confusion import Ids, LabelMap, check_maps, class_figures, known_classes, pair_sums
from pipeline.metrics.joint import Joint, joint_counts
from pipeline.metrics.panoptic import VOID, PanopticState, SegmentMap, Segments
from pipeline.taxonomy import Taxonomy

__all__ = [
    "BOUNDARY",
    "BOUNDARY_RATIO",
    "BoundaryCounts",
    "boundary_distance",
    "boundary_iou",
    "mask_boundary",
    "panoptic_states",
]

Flags = npt.NDArray[np.bool_]

BOUNDARY_RATIO = 0.02
INTERIOR = -1
FIELDS = ("intersection", "target", "pred")
BOUNDARY = class_sums_type(FIELDS)
FIGURES = ("mIoU", "mIoU_present", "n", "n_present", "n_without_evidence")


@dataclass(frozen=True, eq=False)
class BoundaryCounts(ClassSums):
    """Boundary pixels per class among those whose target is not void: of both masks, the target's, the prediction's.

    The mask of a class is all of its pixels in the image.
    """

    FIELDS: ClassVar[tuple[str, ...]] = FIELDS

    @classmethod
    def from_maps(
        cls,
        target_HW: LabelMap,
        pred_HW: LabelMap,
        ids: Ids,
        *,
        ignore: Collection[int] = (),
        unknown_is_void: bool = False,
        ratio: float = BOUNDARY_RATIO,
    ) -> Self:
        """From one image's label maps; what counts and what raises is as in `Confusion.from_maps`.

        As in boundary-iou-api's panoptic part, a target's pixels beside void are boundary, and predicted boundary
        pixels in void are left out.
        """
        joint, target_edge, pred_edge = _edge_counts(target_HW, pred_HW, ratio)
        kept, pred = known_classes(joint, ids, ignore, unknown_is_void)
        target = np.where(target_edge, joint[0], INTERIOR)
        pred = np.where(pred_edge, pred, INTERIOR)
        return cls.from_entries(*pair_sums((target[kept], pred[kept], joint[2][kept])))

    def compute(self, ids: Ids = ()) -> dict[str, Any]:
        """mIoU, mIoU_present, n, n_present, n_without_evidence and per_class {id: IoU and counts} of boundaries.

        They mean what `class_figures` says; `ids` lists further classes, NaN where they have no evidence.
        """
        figures = class_figures(self, ids)
        per_class = {
            category: {key: row[key] for key in ("IoU", *FIELDS)} for category, row in figures["per_class"].items()
        }
        return {key: figures[key] for key in FIGURES} | {"per_class": per_class}


def panoptic_states(
    target_segment_HW: SegmentMap,
    target_segments: Segments,
    pred_segment_HW: SegmentMap,
    pred_segments: Segments,
    taxonomy: Taxonomy,
    *,
    ratio: float = BOUNDARY_RATIO,
) -> tuple[PanopticState, PanopticState]:
    """PQ and boundary PQ of one image in one pass; what goes in and what raises is as in `PanopticState.from_segments`.

    Boundary PQ matches by the smaller of mask IoU and boundary IoU. A boundary's area is its map's, the union leaves
    out predicted boundary pixels in void, and unmatched predictions are ignored by whole masks.
    """
    joint, target_edge, pred_edge = _edge_counts(target_segment_HW, pred_segment_HW, ratio)
    target, pred, pixels = joint
    edges = np.where(target_edge | (target == VOID), target, INTERIOR), np.where(pred_edge, pred, INTERIOR), pixels
    return (
        PanopticState.from_joint(joint, target_segments, pred_segments, taxonomy),
        PanopticState.from_joint(joint, target_segments, pred_segments, taxonomy, edges),
    )


def boundary_distance(height: int, width: int, ratio: float = BOUNDARY_RATIO) -> int:
    """d in pixels: the share `ratio` of the diagonal, rounded (halves to even), at least 1."""
    return max(1, round(ratio * math.sqrt(height * height + width * width)))


def mask_boundary(mask_HW: npt.NDArray[Any], ratio: float = BOUNDARY_RATIO) -> Flags:
    """The boundary of one binary mask, (H, W) bool."""
    inside_HW = mask_HW.astype(np.bool_)
    height, width = inside_HW.shape
    return inside_HW & ~interior(inside_HW, boundary_distance(height, width, ratio))


def boundary_iou(target_HW: npt.NDArray[Any], pred_HW: npt.NDArray[Any], ratio: float = BOUNDARY_RATIO) -> float:
    """Boundary IoU of two binary masks of one size; NaN where both are empty."""
    target, pred = mask_boundary(target_HW, ratio), mask_boundary(pred_HW, ratio)
    union = np.count_nonzero(target | pred)
    return np.count_nonzero(target & pred) / union if union else math.nan


def interior(map_HW: npt.NDArray[Any], distance: int) -> Flags:
    """Where the square of 2 * distance + 1 pixels around a pixel lies in the image and holds one value, (H, W) bool."""
    height, width = map_HW.shape
    result = np.zeros((height, width), np.bool_)
    d = distance
    if min(height, width) <= 2 * d:
        return result
    # One value everywhere: each row of the square has no change along it, and neither has its middle column.
    mixed_rows = _any_in_window((map_HW[:, 1:] != map_HW[:, :-1]).T, 2 * d).T
    mixed = _any_in_window(mixed_rows, 2 * d + 1)
    mixed |= _any_in_window(map_HW[1:, d : width - d] != map_HW[:-1, d : width - d], 2 * d)
    np.logical_not(mixed, out=result[d : height - d, d : width - d])
    return result


def _any_in_window(flags: Flags, size: int) -> Flags:
    """Whether any of `size` neighbours along the first axis is set, for each place where they fit. Each pass doubles
    the reach, so log2(size) passes do."""
    reach = 1
    while reach < size:
        step = min(reach, size - reach)
        flags = flags[:-step] | flags[step:]
        reach += step
    return flags


def _edge_counts(target_HW: LabelMap, pred_HW: LabelMap, ratio: float) -> tuple[Joint, Flags, Flags]:
    """Pixels per pair of values and per whether each side's pixel is boundary; a pair occurs up to four times."""
    check_maps(target_HW, pred_HW)
    height, width = target_HW.shape
    distance = boundary_distance(height, width, ratio)
    target, pred, pixels = joint_counts(_with_edge(target_HW, distance), _with_edge(pred_HW, distance))
    return (target >> 1, pred >> 1, pixels), (target & 1).astype(np.bool_), (pred & 1).astype(np.bool_)


def _with_edge(map_HW: LabelMap, distance: int) -> LabelMap:
    """2 * value, plus 1 on a boundary."""
    low, high = (int(map_HW.min()), int(map_HW.max())) if map_HW.size else (0, 0)
    wide = np.int16 if -(2**14) <= low <= high < 2**14 else np.int32 if -(2**30) <= low <= high < 2**30 else np.int64
    edge_HW: Flags = ~interior(map_HW, distance)
    coded_HW: LabelMap = np.left_shift(map_HW, 1, dtype=wide)
    return np.bitwise_or(coded_HW, edge_HW, out=coded_HW)
