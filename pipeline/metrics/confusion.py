"""Semantic segmentation: pixels of each class pair, and IoU, accuracy and Dice from them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PredictError, SchemaError, TargetMismatchError
from pipeline.metrics.classsums import ClassSums, class_sums_type, flat_lists, ratio
from pipeline.metrics.joint import Joint, joint_counts
from pipeline.taxonomy import Taxonomy

__all__ = ["CLASS_COUNTS", "CONFUSION", "ClassCounts", "Confusion", "class_figures"]

LabelMap = npt.NDArray[np.integer[Any]]
Ids = Taxonomy | Sequence[int]
FIELDS = ("intersection", "target", "pred")
UNKNOWN = -1

CLASS_COUNTS = class_sums_type(FIELDS)
# `ids` are the label space; the other lists are the cells of the matrix that are not 0. pred = -1: no id of the space.
CONFUSION = pa.struct(
    [
        ("ids", pa.list_(pa.int32())),
        ("target", pa.list_(pa.int32())),
        ("pred", pa.list_(pa.int32())),
        ("pixels", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, eq=False)
class ClassCounts(ClassSums):
    """Pixels per class among those whose target is not void: both, in the target, in the prediction.

    The compact form of one image. `target` counts pixels that are predicted as void or unknown, so their sum over
    classes is at least that of `pred`; the difference is what was predicted as nothing of the label space.
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
    ) -> Self:
        """As `Confusion.from_maps`, which says what counts and what raises."""
        return cls.from_entries(*pair_sums(_classes(target_HW, pred_HW, ids, ignore, unknown_is_void)))

    def compute(self, ids: Ids = ()) -> dict[str, Any]:
        """`class_figures`; `ids` lists further classes, which show as NaN where they have no evidence."""
        return class_figures(self, ids)


@dataclass(frozen=True, eq=False)
class Confusion:
    """The whole matrix. ids: (K,) ascending. matrix: (K, K + 1) int64 pixels, rows target, columns pred.

    The last column counts pixels that are predicted as void or as an id outside the label space: they count against
    the class of the target, as any other wrong class would. Pixels whose target is void are not in it.
    """

    ids: tuple[int, ...]
    matrix: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        self.matrix.flags.writeable = False

    @classmethod
    def empty(cls, ids: Ids) -> Self:
        """The identity of `merge` in one label space."""
        known = tuple(sorted(_ids(ids)))
        return cls(known, np.zeros((len(known), len(known) + 1), np.int64))

    @classmethod
    def from_maps(
        cls,
        target_HW: LabelMap,
        pred_HW: LabelMap,
        ids: Ids,
        *,
        ignore: Collection[int] = (),
        unknown_is_void: bool = False,
    ) -> Self:
        """From one image's label maps (any integer type).

        ids: the label space; a taxonomy's `void_id` is void, plain ids have no void besides `ignore`.
        ignore: further values of the target that are void. An id of the label space among them is no class any more:
        its pixels are left out, and predicting it elsewhere counts as unknown.
        unknown_is_void: take a target id outside the label space as void, instead of raising.
        Raises TargetMismatchError where sizes differ or the target has unknown ids, PredictError where the prediction
        is no label map.
        """
        empty = cls.empty(ids)
        target, pred, pixels = _classes(target_HW, pred_HW, ids, ignore, unknown_is_void)
        known = np.array(empty.ids, np.int64)
        column = np.where(pred >= 0, np.searchsorted(known, pred), len(known))
        matrix = np.zeros(empty.matrix.shape, np.int64)
        np.add.at(matrix, (np.searchsorted(known, target), column), pixels)
        return cls(empty.ids, matrix)

    def merge(self, other: Self) -> Self:
        """The state of both parts' images together. Raises SchemaError for another label space."""
        if self.ids != other.ids:
            raise SchemaError(f"expected a confusion matrix of the same ids, got {self.ids} and {other.ids}"[:500])
        return type(self)(self.ids, self.matrix + other.matrix)

    def class_counts(self) -> ClassCounts:
        """What IoU needs of it, per class."""
        square = self.matrix[:, :-1]
        sums = np.stack([np.diagonal(square), self.matrix.sum(axis=1), square.sum(axis=0)], axis=1)
        return ClassCounts.from_entries(np.array(self.ids, np.int64), sums)

    def compute(self) -> dict[str, Any]:
        """`class_figures` of every class of the label space."""
        return self.class_counts().compute(self.ids)

    def to_row(self) -> dict[str, Any]:
        """Plain values of `CONFUSION`; `from_row` gives the same state back."""
        rows, columns = np.nonzero(self.matrix)
        names = np.array([*self.ids, UNKNOWN], np.int64)
        return {
            "ids": list(self.ids),
            "target": names[rows].tolist(),
            "pred": names[columns].tolist(),
            "pixels": self.matrix[rows, columns].tolist(),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        try:
            empty = cls.empty(row["ids"])
            known = np.array(empty.ids, np.int64)
            target, pred = np.array(row["target"], np.int64), np.array(row["pred"], np.int64)
            if not (np.isin(target, known).all() and np.isin(pred, [*known, UNKNOWN]).all()):
                raise ValueError(f"cells must be of the ids {empty.ids}")
            matrix = np.zeros(empty.matrix.shape, np.int64)
            column = np.where(pred >= 0, np.searchsorted(known, pred), len(known))
            np.add.at(matrix, (np.searchsorted(known, target), column), np.array(row["pixels"], np.int64))
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(f"expected a row of ids, target, pred and pixels, got {str(row)[:100]}") from error
        return cls(empty.ids, matrix)

    @classmethod
    def from_rows(cls, rows: pa.Array | pa.ChunkedArray, ids: Ids) -> Self:
        """All rows of a column of CONFUSION merged, without a Python object per row; null rows count as empty.

        ids: their label space. Raises SchemaError for a column of another type and for rows of other ids.
        """
        if rows.type != CONFUSION:
            raise SchemaError(f"expected a column of confusion matrices, got {rows.type}")
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.combine_chunks()
        rows = rows.drop_null()
        lists = {name: flat_lists(pc.struct_field(rows, name)) for name in CONFUSION.names}
        if any(items.null_count for _, items in lists.values()):
            raise SchemaError("expected confusion matrices without nulls")
        if any(not np.array_equal(lists["target"][0], lists[name][0]) for name in ("pred", "pixels")):
            raise SchemaError("expected as many targets, preds and pixels in each confusion matrix")
        space, target, pred, pixels = (items.to_numpy(zero_copy_only=False) for _, items in lists.values())
        empty = cls.empty(ids)
        known = np.array(empty.ids, np.int64)
        if len(space) != len(rows) * len(known) or (space.reshape(len(rows), len(known)) != known).any():
            raise SchemaError(f"expected confusion matrices of {empty.ids}, got {np.unique(space).tolist()}"[:500])
        if not (np.isin(target, known).all() and np.isin(pred, [*known, UNKNOWN]).all()):
            raise SchemaError(f"expected cells of {empty.ids}"[:500])
        matrix = np.zeros(empty.matrix.shape, np.int64)
        column = np.where(pred >= 0, np.searchsorted(known, pred), len(known))
        np.add.at(matrix, (np.searchsorted(known, target), column), pixels)
        return cls(empty.ids, matrix)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self.ids == other.ids and np.array_equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash((self.ids, self.matrix.tobytes()))


def pair_sums(joint: Joint) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Entries of intersection, target and pred from pixels per pair of ids; negative ids are of no class."""
    target, pred, pixels = joint
    zero = np.zeros_like(pixels)
    sums = np.concatenate(
        [
            np.stack([np.where(target == pred, pixels, 0), pixels, zero], axis=1),
            np.stack([zero, zero, pixels], axis=1),
        ]
    )
    category_id = np.concatenate([target, pred])
    known = category_id >= 0
    return category_id[known], sums[known]


def class_figures(counts: ClassSums, ids: Ids) -> dict[str, Any]:
    """Figures from pixels per class, all of them fractions; NaN where there is nothing to divide by.

    mIoU: mean IoU over the `n` classes that are in the target or predicted; one that is only predicted scores 0.
    mIoU_present: over the `n_present` classes in the target (as detectron2's SemSegEvaluator).
    fwIoU: IoU weighted by the class's share of target pixels. pixel_accuracy: target pixels that are right.
    mean_accuracy: mean recall over the classes in the target. dice: mean over the `n` classes.
    n_without_evidence: classes that are NaN. per_class: by id, with IoU, dice, accuracy and the counts.
    """
    category_id = np.union1d(counts.category_id, np.array(_ids(ids), np.int64))
    sums = np.zeros((len(category_id), len(FIELDS)), np.int64)
    sums[np.searchsorted(category_id, counts.category_id)] = counts.sums
    intersection, target, pred = sums.T
    union = target + pred - intersection
    iou, dice = ratio(intersection, union), ratio(2 * intersection, target + pred)
    accuracy = ratio(intersection, target)
    present = target > 0
    total = int(target.sum())
    return {
        "mIoU": _mean(iou[union > 0]),
        "mIoU_present": _mean(iou[present]),
        "fwIoU": math.fsum(target[present] * iou[present]) / total if total else math.nan,
        "pixel_accuracy": int(intersection.sum()) / total if total else math.nan,
        "mean_accuracy": _mean(accuracy[present]),
        "dice": _mean(dice[union > 0]),
        "n": int((union > 0).sum()),
        "n_present": int(present.sum()),
        "n_without_evidence": int((union == 0).sum()),
        "per_class": {
            int(category): {
                "IoU": float(iou[at]),
                "dice": float(dice[at]),
                "accuracy": float(accuracy[at]),
                "intersection": int(intersection[at]),
                "target": int(target[at]),
                "pred": int(pred[at]),
            }
            for at, category in enumerate(category_id)
        },
    }


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Correctly rounded, so that it does not hang on the order of the classes."""
    return math.fsum(values) / len(values) if len(values) else math.nan


def _ids(ids: Ids) -> tuple[int, ...]:
    return ids.ids if isinstance(ids, Taxonomy) else tuple(ids)


def _classes(target_HW: LabelMap, pred_HW: LabelMap, ids: Ids, ignore: Collection[int], unknown_is_void: bool) -> Joint:
    """Pixels per pair of classes: target an id, pred an id or UNKNOWN."""
    check_maps(target_HW, pred_HW)
    target, pred, pixels = joint_counts(target_HW, pred_HW)
    kept, pred = known_classes((target, pred, pixels), ids, ignore, unknown_is_void)
    return target[kept], pred[kept], pixels[kept]


def check_maps(target_HW: LabelMap, pred_HW: LabelMap) -> None:
    """Raises TargetMismatchError or PredictError where they are not two integer maps of one size."""
    if target_HW.ndim != 2 or target_HW.dtype.kind not in "iu":
        raise TargetMismatchError(f"expected target_HW of integers, got {target_HW.dtype} {target_HW.shape}")
    if pred_HW.ndim != 2 or pred_HW.dtype.kind not in "iu":
        raise PredictError(f"expected pred_HW of integers, got {pred_HW.dtype} {pred_HW.shape}")
    if target_HW.shape != pred_HW.shape:
        height, width = target_HW.shape
        raise TargetMismatchError(
            f"the target is {width}x{height} pixels, the prediction {pred_HW.shape[1]}x{pred_HW.shape[0]}"
        )


def known_classes(
    joint: Joint, ids: Ids, ignore: Collection[int], unknown_is_void: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which pairs have a target that counts, and the predictions with UNKNOWN for ids outside the label space."""
    target, pred, pixels = joint
    void = np.array([*ignore, *([ids.void_id] if isinstance(ids, Taxonomy) else [])], np.int64)
    known = np.setdiff1d(np.array(_ids(ids), np.int64), void)
    kept = ~np.isin(target, void)
    strange = kept & ~np.isin(target, known)
    if strange.any():
        if not unknown_is_void:
            found = np.unique(target[strange]).tolist()
            raise TargetMismatchError(
                f"the target has ids outside the label space: {found[:10]} ({int(pixels[strange].sum())} pixels); "
                f"known are {known.tolist()[:20]}, void {sorted(set(void.tolist()))}"
            )
        kept &= ~strange
    return kept, np.where(np.isin(pred, known), pred, UNKNOWN)
