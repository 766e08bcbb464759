"""Which prediction takes which target in one image: COCOeval's greedy matching, all thresholds and area ranges at once.

COCOeval.evaluateImg walks thresholds, predictions and targets in three loops, once per area range. The outcome of one
(area range, threshold) does not touch another, so a set of them is one integer here, a bit for each, and only pairs
that overlap enough are looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pipeline.errors import PredictError, TargetMismatchError

__all__ = ["AREAS", "THRESHOLDS", "IouType", "Match", "Objects", "match"]

IouType = Literal["bbox", "segm"]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
MAX_PREDICTIONS = 100
# Of all outlines of one mask, in pixels: pycocotools walks them in memory, five steps to a pixel.
LONGEST_OUTLINE = 4e6
RLE_CODES = bytes(range(48, 112))  # six bits each, the highest of them: more follow (maskApi.c, rleFrString)

# A match needs no more than this, so that equal shapes match at a threshold of 1 in spite of rounding (COCOeval).
REACHED = np.minimum(THRESHOLDS, 1 - 1e-10)
AREA_BITS = np.array([((1 << len(REACHED)) - 1) << (area * len(REACHED)) for area in range(len(AREAS))], np.int64)
ALL = int(AREA_BITS.sum())
# By how many thresholds are reached: their bits in all area ranges.
REACHED_BITS = [sum(((1 << n) - 1) << (a * len(REACHED)) for a in range(len(AREAS))) for n in range(len(REACHED) + 1)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Objects:
    """Predictions or targets of one image, in the order in which they came (it breaks ties of equal scores).

    segmentation: COCO's three forms (polygons, run lengths as a list, compressed run lengths), or none: the box.
    area: of the size bins. Without it, that of the box for boxes and that of the mask for masks; where there are no
    boxes, that of the mask for both (COCO.loadRes).
    """

    height: int
    width: int
    category_id: npt.NDArray[np.int64]
    bbox_N4: npt.NDArray[np.float64] | None = None
    segmentation: Sequence[Any] | None = None
    score: npt.NDArray[np.float64] | None = None
    area: npt.NDArray[np.float64] | None = None
    crowd: npt.NDArray[np.bool_] | None = None

    @classmethod
    def from_annotations(cls, annotations: Sequence[Mapping[str, Any]], *, height: int, width: int) -> "Objects":
        """Targets of one image as COCO's instances JSON holds them. Raises TargetMismatchError for what it lacks."""
        try:
            known = all("area" in item for item in annotations)
            return cls(
                height=height,
                width=width,
                category_id=np.array([item["category_id"] for item in annotations], np.int64),
                bbox_N4=_boxes([item["bbox"] for item in annotations]),
                segmentation=[item.get("segmentation") for item in annotations],
                area=np.array([item["area"] for item in annotations], np.float64) if known else None,
                crowd=np.array([bool(item.get("iscrowd", 0)) for item in annotations], bool),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TargetMismatchError(f"expected COCO annotations: {type(error).__name__}: {error}") from error

    @classmethod
    def from_results(
        cls,
        results: Sequence[Mapping[str, Any]],
        *,
        height: int,
        width: int,
        boxed: bool | None = None,
        masked: bool = True,
    ) -> "Objects":
        """Predictions of one image from a COCO results JSON, by the rules of COCO.loadRes: where the first has a box,
        the area of boxes bins them by size, even as masks; else that of the masks does.

        boxed, masked: whether the first result of the whole file has a box and a mask; without `boxed`, the first of
        `results` tells. Raises PredictError.
        """
        try:
            if boxed is None:
                boxed = bool(results) and bool(results[0].get("bbox"))
            bbox_N4 = _boxes([item["bbox"] for item in results]) if boxed else None
            return cls(
                height=height,
                width=width,
                category_id=np.array([item["category_id"] for item in results], np.int64),
                bbox_N4=bbox_N4,
                segmentation=[item.get("segmentation") for item in results] if masked else None,
                score=np.array([item["score"] for item in results], np.float64),
                area=None if bbox_N4 is None else bbox_N4[:, 2] * bbox_N4[:, 3],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PredictError(f"expected COCO results: {type(error).__name__}: {error}") from error

    @classmethod
    def from_segments(
        cls, segments: Sequence[Mapping[str, Any]], *, height: int, width: int, masked: bool = True
    ) -> "Objects":
        """The table's `segments` of one image. Boxes are binned by their area and masks by theirs, as where their
        results are evaluated from two files. masked: False where they are boxes alone."""
        size = [height, width]
        return cls(
            height=height,
            width=width,
            category_id=np.array([item["category_id"] for item in segments], np.int64),
            bbox_N4=_boxes([item["bbox"] for item in segments]),
            segmentation=[{"size": size, "counts": item["rle"]} for item in segments] if masked else None,
            score=np.array([item["score"] for item in segments], np.float64),
        )

    def __len__(self) -> int:
        return len(self.category_id)

    def rles(self) -> list[Mapping[str, Any]]:
        """Compressed run lengths. Raises TargetMismatchError for what is no mask of the image's size."""
        try:
            return self._rles()
        except TargetMismatchError:
            raise
        except Exception as error:
            raise TargetMismatchError(f"expected COCO masks: {type(error).__name__}: {error}") from error

    def _rles(self) -> list[Mapping[str, Any]]:
        if self.segmentation is None or any(not item for item in self.segmentation):
            if self.bbox_N4 is None:
                raise TargetMismatchError("expected masks or boxes, got objects with neither")
            given = self.segmentation or [None] * len(self)
            boxes = [[[x, y, x, y + h, x + w, y + h, x + w, y]] for x, y, w, h in self.bbox_N4.tolist()]
            return [self._rle(item or box) for item, box in zip(given, boxes, strict=True)]
        return [self._rle(item) for item in self.segmentation]

    def _rle(self, item: Any) -> Mapping[str, Any]:
        if isinstance(item, Mapping):
            if list(item["size"]) != [self.height, self.width]:
                raise TargetMismatchError(f"expected a mask of {[self.height, self.width]}, got {list(item['size'])}")
            if not isinstance(item["counts"], list):
                _check_counts(item["counts"])
                return item
            compressed: Mapping[str, Any] = coco_mask.frPyObjects(item, self.height, self.width)
            return compressed
        _check_outlines(item)
        merged: Mapping[str, Any] = coco_mask.merge(coco_mask.frPyObjects(item, self.height, self.width))
        return merged

    def shapes(self, iou_type: IouType) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
        """Boxes (N, 4) or run lengths (N objects), and the areas that bin them."""
        if iou_type == "bbox" and self.bbox_N4 is not None:
            boxes_N4 = self.bbox_N4
            return boxes_N4, boxes_N4[:, 2] * boxes_N4[:, 3] if self.area is None else self.area
        rles = np.empty(len(self), object)
        rles[:] = self.rles()
        area = self.area
        if area is None:
            # pycocotools' area refuses more than 255 at once under numpy 2 (an array of uint8 with their number).
            parts = [coco_mask.area(rles[at : at + 255].tolist()) for at in range(0, len(rles), 255)]
            area = np.concatenate([np.zeros(0), *parts])
        if iou_type == "segm":
            return rles, area
        return np.asarray(coco_mask.toBbox(rles.tolist()), np.float64).reshape(-1, 4), area


@dataclass(frozen=True, eq=False)
class Match:
    """One image's records, by category and then score; bit area * 10 + threshold. counted_GA: targets that count."""

    category_id: npt.NDArray[np.int32]
    score: npt.NDArray[np.float64]
    matched: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.int64]
    counted_GA: npt.NDArray[np.bool_]


def match(pred: Objects, target: Objects, iou_type: IouType) -> Match:
    """Match predictions to targets of their category, best score first.

    Raises TargetMismatchError where masks differ in size, PredictError where a score is not finite.
    """
    if (pred.height, pred.width) != (target.height, target.width):
        raise TargetMismatchError(
            f"expected predictions of {target.width}x{target.height} as the target's, got {pred.width}x{pred.height}"
        )
    score = pred.score if pred.score is not None else np.zeros(len(pred))
    if len(pred) and (pred.score is None or not np.isfinite(score).all()):
        raise PredictError("expected a finite score for each prediction")
    kept = _best(pred.category_id, score)
    pred_shapes, pred_area = pred.shapes(iou_type)
    target_shapes, target_area = target.shapes(iou_type)
    crowd = target.crowd if target.crowd is not None else np.zeros(len(target), bool)
    outside_GA = _outside(target_area) | crowd[:, None]
    category = pred.category_id[kept]
    pairs = _overlaps(pred_shapes[kept], category, target_shapes, target.category_id, crowd)
    matched, ignored = _assign(len(kept), pairs, (outside_GA @ AREA_BITS).tolist(), crowd.tolist())
    outside = _outside(pred_area[kept]) @ AREA_BITS
    return Match(category.astype(np.int32), score[kept], matched, ignored | (outside & ~matched), ~outside_GA)


def _check_counts(counts: str | bytes) -> None:
    """pycocotools reads on past the end of a string whose last number is cut."""
    codes = counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
    if codes.translate(None, RLE_CODES) or not codes or (codes[-1] - RLE_CODES[0]) & 32:
        raise TargetMismatchError(f"expected run lengths as COCO compresses them, got {counts[:40]!r}")


def _check_outlines(polygons: Sequence[Sequence[float]]) -> None:
    arrays = [np.asarray(polygon, np.float64) for polygon in polygons]
    # Half as many edges as numbers, none longer than from -max to max: nearly always that is enough to know.
    if sum(points.size * np.abs(points).max() for points in arrays) <= LONGEST_OUTLINE:
        return
    length = 0.0
    for points in arrays:
        points_N2 = points[: points.size // 2 * 2].reshape(-1, 2)
        length += float(np.abs(points_N2 - np.roll(points_N2, 1, axis=0)).max(axis=1).sum())
    if not length <= LONGEST_OUTLINE:  # NaN as well
        raise TargetMismatchError(f"expected outlines of at most {LONGEST_OUTLINE:.0e} pixels, got {length:.3g}")


def _boxes(boxes: list[Any]) -> npt.NDArray[np.float64]:
    return np.array(boxes, np.float64).reshape(len(boxes), 4)


def _best(category: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """By category and score, at most 100 of each category; equal scores stay in the order in which they came."""
    order = np.lexsort((-score, category))
    if len(order) <= MAX_PREDICTIONS:
        return order
    ids = category[order]
    return order[np.arange(len(order)) - np.searchsorted(ids, ids) < MAX_PREDICTIONS]


def _outside(area: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    outside: npt.NDArray[np.bool_] = (area[:, None] < AREAS[:, 0]) | (area[:, None] > AREAS[:, 1])
    return outside


Pairs = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]


def _overlaps(
    pred_shapes: npt.NDArray[Any],
    category: npt.NDArray[np.int64],
    target_shapes: npt.NDArray[Any],
    target_category: npt.NDArray[np.int64],
    crowd: npt.NDArray[np.bool_],
) -> Pairs:
    """(prediction, target, IoU) of one category that reach the lowest threshold; pycocotools computes the IoU."""
    iou_DG = np.zeros((len(category), len(target_category)))
    if not iou_DG.size:
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    if pred_shapes.ndim == 2:
        # All categories at once: a box costs less than a call.
        iou_DG = coco_mask.iou(pred_shapes, target_shapes, crowd.astype(np.uint8))
        iou_DG = np.where(category[:, None] == target_category, iou_DG, 0.0)
    else:
        for found in set(category.tolist()) & set(target_category.tolist()):
            rows, columns = np.flatnonzero(category == found), np.flatnonzero(target_category == found)
            block = coco_mask.iou(
                pred_shapes[rows].tolist(), target_shapes[columns].tolist(), crowd[columns].astype(np.uint8)
            )
            iou_DG[rows[:, None], columns] = block
    rows, columns = np.nonzero(iou_DG >= REACHED[0])
    return rows, columns, iou_DG[rows, columns]


def _assign(
    size: int, pairs: Pairs, ignorable: list[int], crowd: list[bool]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """matched and ignored bits of each prediction. `ignorable`: the bits in which each target does not count.

    A prediction takes the target of the largest IoU, the last of equals; one that counts goes before one that does not;
    a target is taken once, a crowd any number of times (COCOeval.evaluateImg).
    """
    rows, columns, iou = pairs
    order = np.lexsort((-columns, -iou, rows))
    reached = np.searchsorted(REACHED, iou, "right")
    candidates: dict[int, list[tuple[int, int]]] = {}
    for row, column, count in zip(rows[order].tolist(), columns[order].tolist(), reached[order].tolist(), strict=True):
        candidates.setdefault(row, []).append((column, REACHED_BITS[count]))
    free = [ALL] * len(ignorable)
    matched, ignored = [0] * size, [0] * size
    for row, near in candidates.items():
        wanted, taken_ignored = ALL, 0
        for column, bits in near:
            take = bits & wanted & free[column] & ~ignorable[column]
            free[column] ^= take
            wanted ^= take
        for column, bits in near:
            take = bits & wanted & ignorable[column]
            if not crowd[column]:
                take &= free[column]
                free[column] ^= take
            wanted ^= take
            taken_ignored |= take
        matched[row] = ALL ^ wanted
        ignored[row] = taken_ignored
    return np.array(matched, np.int64), np.array(ignored, np.int64)
