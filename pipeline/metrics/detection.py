"""AP and AR of boxes or masks, exactly as pycocotools' COCOeval has them, from match records that any number of images
fold into.

Axes beside those of schema.py: A area ranges, T IoU thresholds, R recall points, D predictions, G targets.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import SchemaError
from pipeline.metrics.detection_match import AREAS, THRESHOLDS, IouType, Objects, match

__all__ = ["AREA_NAMES", "DETECTION", "RECALLS", "THRESHOLDS", "Detection", "DetectionScores"]

AREA_NAMES = ("all", "small", "medium", "large")
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = (1, 10, 100)
# (area, limit on predictions) of the figures; COCOeval computes the other six combinations and prints none of them.
SETTINGS = ((0, 100), (1, 100), (2, 100), (3, 100), (0, 1), (0, 10))

# `image_key`, `predictions` and `targets` have one item per image: how many of the next two blocks are its own.
# `matched` and `ignored` hold bit area * 10 + threshold. `target_count` has four items, the area ranges, per category.
DETECTION = pa.struct(
    [
        ("image_key", pa.list_(pa.string())),
        ("predictions", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.int32())),
        ("category_id", pa.list_(pa.int32())),
        ("score", pa.list_(pa.float64())),
        ("matched", pa.list_(pa.int64())),
        ("ignored", pa.list_(pa.int64())),
        ("target_category_id", pa.list_(pa.int32())),
        ("target_count", pa.list_(pa.int32())),
    ]
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
COLUMNS: Mapping[str, npt.DTypeLike] = {
    "predictions": np.int32,
    "targets": np.int32,
    "category_id": np.int32,
    "score": np.float64,
    "matched": np.int64,
    "ignored": np.int64,
    "target_category_id": np.int32,
    "target_count": np.int32,
}


@dataclass(frozen=True, eq=False)
class Detection:
    """Match records of any number of images, in the order of their keys, of one kind (boxes or masks).

    COCOeval breaks ties of equal scores by the order of image ids; here the order of the keys does, whatever order and
    grouping the images came in.
    """

    image_key: tuple[str, ...]
    predictions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    category_id: npt.NDArray[np.int32]
    score: Floats
    matched: Ints
    ignored: Ints
    target_category_id: npt.NDArray[np.int32]
    target_count: npt.NDArray[np.int32]

    @classmethod
    def empty(cls) -> "Detection":
        return cls((), *(np.zeros(0, dtype) for dtype in COLUMNS.values()))

    @classmethod
    def from_image(cls, image_key: str | int, pred: Objects, target: Objects, iou_type: IouType) -> "Detection":
        """Match one image's predictions with its targets, category by category, at all thresholds and area ranges.

        `image_key` is unique among the images; an integer (a COCO image id) sorts as the number it is. Raises
        TargetMismatchError where masks differ in size, PredictError where a score is not finite.
        """
        found = match(pred, target, iou_type)
        key = f"{image_key:020d}" if isinstance(image_key, int) else image_key
        category_ids, count_GA = _count_targets(target, found.counted_GA)
        return cls(
            (key,),
            np.array([len(found.score)], np.int32),
            np.array([len(category_ids)], np.int32),
            found.category_id,
            found.score,
            found.matched,
            found.ignored,
            category_ids,
            count_GA.ravel(),
        )

    def merge(self, *others: "Detection") -> "Detection":
        """The records of all images. Raises SchemaError where two have the same key. Many at once are cheaper."""
        states = [state for state in (self, *others) if state.image_key]
        if len(states) < 2:
            return states[0] if states else self
        keys = [key for state in states for key in state.image_key]
        columns = {name: np.concatenate([getattr(state, name) for state in states]) for name in COLUMNS}
        return self._ordered(keys, columns)

    def compute(self, weights: npt.NDArray[np.integer[Any]] | None = None) -> "DetectionScores":
        """The figures; with `weights`, as if image i of `image_key` occurred weights[i] times (bootstrap, slices)."""
        order, start, stop = self._by_category
        image_weight = None if weights is None else np.asarray(weights, np.int64)
        if image_weight is not None and image_weight.shape != (len(self.image_key),):
            raise ValueError(f"expected {len(self.image_key)} weights, one for each image, got {image_weight.shape}")
        weight = None if image_weight is None else np.repeat(image_weight, self.predictions)[order]
        count_KA = self._target_counts(image_weight)
        shape = (len(SETTINGS), len(THRESHOLDS), len(self.categories))
        precision = np.full((*shape, len(RECALLS)), np.nan)
        confidence = np.full((len(THRESHOLDS), len(self.categories), len(RECALLS)), np.nan)
        recall = np.full(shape, np.nan)
        matched, ignored, score = self.matched[order], self.ignored[order], self.score[order]
        rank = self._rank[order]
        for k in range(len(self.categories)):
            part = slice(start[k], stop[k])
            for index, (area, limit) in enumerate(SETTINGS):
                if not count_KA[k, area]:
                    continue
                near = slice(None) if limit == MAX_DETECTIONS[-1] else rank[part] < limit
                curve = _Curve(
                    _bits(matched[part][near], area),
                    _bits(ignored[part][near], area),
                    None if weight is None else weight[part][near],
                    int(count_KA[k, area]),
                )
                recall[index, :, k], precision[index, :, k], at_TR = curve.compute()
                if index == 0:
                    confidence[:, k] = np.append(score[part], 0.0)[at_TR]
        return DetectionScores(
            image_count=int(len(self.image_key) if image_weight is None else image_weight.sum()),
            categories=tuple(self.categories.tolist()),
            target_count=tuple(count_KA[:, 0].tolist()),
            precision_STKR=precision,
            recall_STK=recall,
            confidence_TKR=confidence,
        )

    def image_counts(self, threshold: float = 0.5, min_score: float = 0.0) -> npt.NDArray[np.int64]:
        """True positives, false positives and missed targets of each image at one of THRESHOLDS, (images, 3) int64.

        What ranks images from worst to best, where an AP of one image would say little.
        """
        index = int(np.argmin(abs(THRESHOLDS - threshold)))
        if abs(THRESHOLDS[index] - threshold) > 1e-6:
            raise ValueError(f"threshold must be one of {THRESHOLDS.round(2).tolist()}, got {threshold}")
        bit = 1 << index
        counted = ((self.ignored & bit) == 0) & (self.score >= min_score)
        true = counted & ((self.matched & bit) != 0)
        image = np.repeat(np.arange(len(self.image_key)), self.predictions)
        target_image = np.repeat(np.arange(len(self.image_key)), self.targets)
        size = len(self.image_key)
        tp = np.bincount(image[true], minlength=size)
        fp = np.bincount(image[counted & ~true], minlength=size)
        total = np.zeros(size, np.int64)
        np.add.at(total, target_image, self.target_count[:: len(AREAS)])
        return np.stack([tp, fp, total - tp], axis=1).astype(np.int64)

    def to_row(self) -> dict[str, Any]:
        """A value of DETECTION."""
        return {"image_key": list(self.image_key), **{name: getattr(self, name).tolist() for name in COLUMNS}}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Detection":
        """The inverse of `to_row`, bit by bit. Raises SchemaError for a row that is none."""
        try:
            columns = {name: np.array(row[name], dtype) for name, dtype in COLUMNS.items()}
            return cls._ordered([str(key) for key in row["image_key"]], columns)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SchemaError(f"expected detection records: {type(error).__name__}: {error}") from error

    @classmethod
    def from_rows(cls, rows: pa.Array | pa.ChunkedArray) -> "Detection":
        """All rows of a column of DETECTION at once, without a Python object for each; nulls are left out.

        Raises SchemaError where the type differs or two rows hold the same image.
        """
        if rows.type != DETECTION:
            raise SchemaError(f"expected a column of detection records, got {rows.type}")
        whole = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
        whole = whole.drop_null()
        if isinstance(whole, pa.ChunkedArray):
            whole = whole.combine_chunks()
        flat = {field.name: values.flatten() for field, values in zip(DETECTION, whole.flatten(), strict=True)}
        columns = {name: np.asarray(flat[name].to_numpy(zero_copy_only=False), dt) for name, dt in COLUMNS.items()}
        return cls._ordered(flat["image_key"].to_pylist(), columns)

    @classmethod
    def _ordered(cls, keys: Sequence[str], columns: Mapping[str, npt.NDArray[Any]]) -> "Detection":
        """Records in the order of their keys. Raises SchemaError where they do not fit together."""
        predictions, targets = columns["predictions"], columns["targets"]
        lengths = {
            "predictions": len(keys),
            "targets": len(keys),
            **dict.fromkeys(("category_id", "score", "matched", "ignored"), int(predictions.sum())),
            "target_category_id": int(targets.sum()),
            "target_count": int(targets.sum()) * len(AREAS),
        }
        if any(columns[name].shape != (length,) for name, length in lengths.items()):
            got = {name: len(column) for name, column in columns.items()}
            raise SchemaError(f"expected detection records of {lengths}, got {got}")
        order = sorted(range(len(keys)), key=keys.__getitem__)
        ordered = tuple(keys[index] for index in order)
        twice = [key for key, following in itertools.pairwise(ordered) if key == following]
        if twice:
            raise SchemaError(f"expected each image once in detection records, got {twice[0]!r} twice")
        if ordered == tuple(keys):
            return cls(ordered, *(columns[name] for name in COLUMNS))
        image = np.array(order)
        pred_rows, target_rows = _rows_of(image, predictions), _rows_of(image, targets)
        sorted_columns = {
            "predictions": predictions[image],
            "targets": targets[image],
            **{name: columns[name][pred_rows] for name in ("category_id", "score", "matched", "ignored")},
            "target_category_id": columns["target_category_id"][target_rows],
            "target_count": columns["target_count"].reshape(-1, len(AREAS))[target_rows].ravel(),
        }
        return cls(ordered, *(sorted_columns[name] for name in COLUMNS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detection):
            return NotImplemented
        return self.image_key == other.image_key and all(
            getattr(self, name).tobytes() == getattr(other, name).tobytes() for name in COLUMNS
        )

    def __hash__(self) -> int:
        return hash((self.image_key, *(getattr(self, name).tobytes() for name in COLUMNS)))

    @functools.cached_property
    def categories(self) -> npt.NDArray[np.int32]:
        """Categories with a target that counts in some area range, ascending; others have no AP."""
        counts = self.target_count.reshape(-1, len(AREAS))
        return np.unique(self.target_category_id[counts.any(axis=1)])

    @functools.cached_property
    def _by_category(self) -> tuple[Ints, Ints, Ints]:
        """Predictions by category, then score, then image; and where each of `categories` starts and ends."""
        order = np.lexsort((-self.score, self.category_id))
        ids = self.category_id[order]
        start = np.searchsorted(ids, self.categories, "left")
        return order, start, np.searchsorted(ids, self.categories, "right")

    @functools.cached_property
    def _rank(self) -> Ints:
        """The place of each prediction among its image's and category's; they are stored in that order."""
        if not len(self.score):
            return np.zeros(0, np.int64)
        image = np.repeat(np.arange(len(self.image_key)), self.predictions)
        new = np.ones(len(image), bool)
        new[1:] = (image[1:] != image[:-1]) | (self.category_id[1:] != self.category_id[:-1])
        first = np.flatnonzero(new)
        place: Ints = np.arange(len(image)) - first[np.cumsum(new) - 1]
        return place

    def _target_counts(self, weights: Ints | None) -> Ints:
        counts = self.target_count.reshape(-1, len(AREAS)).astype(np.int64)
        if weights is not None:
            counts = counts * np.repeat(weights, self.targets)[:, None]
        total = np.zeros((len(self.categories), len(AREAS)), np.int64)
        place = np.searchsorted(self.categories, self.target_category_id)
        known = place < len(self.categories)
        known[known] = self.categories[place[known]] == self.target_category_id[known]
        np.add.at(total, place[known], counts[known])
        return total


@dataclass(frozen=True, eq=False)
class DetectionScores:
    """The 12 figures and what they are means of. NaN = no evidence. S: (area range, limit of predictions), SETTINGS.

    precision_STKR: at 101 recall points; S 0 is the PR curve over all areas with 100 predictions an image and category.
    recall_STK: the largest recall. confidence_TKR: the score at which S 0 reaches each recall point (0: it does not).
    """

    image_count: int
    categories: tuple[int, ...]
    target_count: tuple[int, ...]
    precision_STKR: Floats
    recall_STK: Floats
    confidence_TKR: Floats

    def figures(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl over all categories with targets."""
        return self._figures(slice(None))

    def per_category(self) -> dict[int, dict[str, float]]:
        """The same figures for each category with targets."""
        return {category: self._figures(slice(k, k + 1)) for k, category in enumerate(self.categories)}

    def _figures(self, k: slice) -> dict[str, float]:
        def precision(setting: int, thresholds: slice = slice(None)) -> float:
            # Thresholds, recall points, categories: the order in which COCOeval adds.
            return _mean(self.precision_STKR[setting, thresholds, k].swapaxes(1, 2))

        return {
            "AP": precision(0),
            "AP50": precision(0, slice(0, 1)),
            "AP75": precision(0, slice(5, 6)),
            **{f"AP{AREA_NAMES[area][0]}": precision(area) for area in (1, 2, 3)},
            "AR1": _mean(self.recall_STK[4, :, k]),
            "AR10": _mean(self.recall_STK[5, :, k]),
            "AR100": _mean(self.recall_STK[0, :, k]),
            **{f"AR{AREA_NAMES[area][0]}": _mean(self.recall_STK[area, :, k]) for area in (1, 2, 3)},
        }


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


@dataclass(frozen=True)
class _Curve:
    """Precision over recall of one category and area range: predictions by score, all thresholds at once."""

    matched_TD: npt.NDArray[np.bool_]
    ignored_TD: npt.NDArray[np.bool_]
    weight_D: Ints | None
    target_count: int

    def compute(self) -> tuple[Floats, Floats, Ints]:
        """recall_T, precision_TR and the prediction at which each recall point is reached (D where it is not)."""
        thresholds, size = self.matched_TD.shape
        true_TD = self.matched_TD & ~self.ignored_TD
        false_TD = ~self.matched_TD & ~self.ignored_TD
        weight_D = 1 if self.weight_D is None else self.weight_D
        hits_TD = np.cumsum(true_TD * weight_D, axis=1)
        precision_TD = hits_TD / (np.cumsum(false_TD * weight_D, axis=1) + hits_TD + np.spacing(1))
        envelope_TD = np.zeros((thresholds, size + 1))
        envelope_TD[:, :size] = np.maximum.accumulate(precision_TD[:, ::-1], axis=1)[:, ::-1]
        # How many hits a recall point takes, by the float comparison hits / targets >= point that COCOeval makes.
        needed_R = np.searchsorted(np.arange(self.target_count + 1) / self.target_count, RECALLS, "left")
        # One search for all thresholds: each row's counts are lifted above the row before it.
        recall_T = hits_TD[:, -1] if size else np.zeros(thresholds, np.int64)
        row_T1 = np.arange(thresholds)[:, None]
        lift_T1 = row_T1 * (max(int(recall_T.max()), self.target_count) + 1)
        reached_TR = np.searchsorted((hits_TD + lift_T1).ravel(), needed_R + lift_T1, "left") - row_T1 * size
        at_TR = np.minimum(reached_TR, size)
        return recall_T / self.target_count, np.take_along_axis(envelope_TD, at_TR, axis=1), at_TR


def _bits(packed: Ints, area: int) -> npt.NDArray[np.bool_]:
    shift = np.arange(len(THRESHOLDS))[:, None] + area * len(THRESHOLDS)
    bits: npt.NDArray[np.bool_] = ((packed >> shift) & 1).astype(bool)
    return bits


def _count_targets(
    target: Objects, counted_GA: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    ids, place = np.unique(target.category_id, return_inverse=True)
    count = np.zeros((len(ids), len(AREAS)), np.int32)
    np.add.at(count, place, counted_GA)
    return ids.astype(np.int32), count


def _rows_of(image: npt.NDArray[np.intp], count: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """Where the items of images lie, image after image, in an array that holds `count` items of each."""
    ends = np.cumsum(count, dtype=np.intp)
    taken = count[image].astype(np.intp)
    begins = np.repeat((ends - count)[image], taken)
    within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
    rows: npt.NDArray[np.intp] = begins + within
    return rows
