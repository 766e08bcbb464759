"""The bootstrap of a report's headline figures: what of a score is summed, and the figures of each replicate's sums."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SchemaError
from pipeline.metrics.boundary import BoundaryCounts
from pipeline.metrics.classsums import ClassSums
from pipeline.metrics.confusion import ClassCounts
from pipeline.metrics.depth import FIGURES as DEPTH_FIGURES
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_replicates import FIGURES as AP_FIGURES
from pipeline.metrics.detection_replicates import WeightedAP
from pipeline.metrics.panoptic import HIGH_BITS, LOW_BITS, PanopticState
from pipeline.metrics.score import SCORE
from pipeline.report.bootstrap import Hashes, WeightedSums, hash_images, poisson_weights
from pipeline.report.figures import depth_column, detection_keys
from pipeline.report.states import DETECTIONS
from pipeline.taxonomy import Taxonomy

__all__ = ["Replicates", "detection_replicates"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PER_CLASS: Mapping[str, type[ClassSums]] = {
    "classes": ClassCounts,
    "boundary": BoundaryCounts,
    "panoptic": PanopticState,
    "boundary_panoptic": PanopticState,
}
# A depth figure of an image is a whole number of 2**-43 here, in two words as panoptic.py keeps IoUs: sums of them are
# exact in any order. What is over 2**32 counts as 2**32.
DEPTH_BITS, DEPTH_LOW_BITS, DEPTH_LIMIT = 16, 27, 2.0**32
# Predictions times replicates: tens of seconds.
PREDICTIONS_IN_ALL = 200_000_000
LEAST_REPLICATES = 100
AT_ONCE = 16


def detection_replicates(predictions: int, replicates: int) -> int:
    """How many of the replicates AP gets: fewer where there are very many predictions."""
    return min(replicates, max(LEAST_REPLICATES, PREDICTIONS_IN_ALL // max(predictions, 1)))


class Replicates:
    """Sums of scores for each replicate; memory grows with replicates and classes, and with detection records."""

    def __init__(self, taxonomy: Taxonomy, replicates: int, seed: int = 0) -> None:
        self._taxonomy = taxonomy
        self._ids = np.array(sorted(taxonomy.ids), np.int64)
        self._kind = np.array([taxonomy.by_id[category].kind for category in self._ids.tolist()])
        self._seed = seed
        self._sums = WeightedSums(replicates)
        self._hash_of: dict[str, dict[str, int]] = {name: {} for name in DETECTIONS}

    def add(self, image_ids: Sequence[str], score: pa.StructArray) -> None:
        """Add images and their scores, a column of SCORE. Raises SchemaError."""
        hash_N = hash_images(image_ids, self._seed)
        columns = dict(zip(SCORE.names, score.flatten(), strict=True))
        found = {name: column for name, column in columns.items() if column.null_count < len(column)}
        counts = {name: self._class_counts(found[name], state) for name, state in PER_CLASS.items() if name in found}
        if "depth" in found:
            counts["depth"] = _depth_counts(found["depth"])
        self._sums.add(hash_N, counts)
        for name in self._hash_of.keys() & found.keys():
            valid = found[name].is_valid().to_numpy(zero_copy_only=False)
            keys = detection_keys(found[name].drop_null())
            self._hash_of[name].update(zip(keys, hash_N[valid].tolist(), strict=True))

    def _class_counts(self, rows: pa.StructArray, state: type[ClassSums]) -> Ints:
        """(N, K * fields)."""
        row, category, sums = state.entries(rows)
        place = np.searchsorted(self._ids, category)
        if not np.array_equal(np.append(self._ids, -1)[place], category):
            strange = np.setdiff1d(category, self._ids).tolist()
            raise SchemaError(f"the scores have categories that {self._taxonomy.name} lacks: {strange[:10]}")
        count_NKF = np.zeros((len(rows), len(self._ids), len(state.FIELDS)), np.int64)
        np.add.at(count_NKF, (row, place), sums)
        return count_NKF.reshape(len(rows), -1)

    def values(self, detections: Mapping[str, Detection]) -> dict[str, Floats]:
        """The replicates of each headline figure by its path in the report; NaN where one has no evidence.

        detections: all that was added. Their figures may have fewer replicates: the first ones.
        """
        values: dict[str, Floats] = {}
        if "classes" in self._sums:
            values |= _paths("semantic", semantic_figures(self._per_class("classes")))
        if "boundary" in self._sums:
            values["boundary.mIoU"] = semantic_figures(self._per_class("boundary"))["mIoU"]
        for name in ("panoptic", "boundary_panoptic"):
            if name in self._sums:
                values |= _paths(name, panoptic_figures(self._per_class(name), self._kind))
        for name, state in detections.items():
            values |= _paths(f"detection.{name}", self._detection(state, self._hash_of[name]))
        if "depth" in self._sums:
            values |= _paths("depth", _depth_figures(self._sums.sums("depth")))
        return values

    def class_values(self) -> dict[str, Floats]:
        """The replicates of figures of each class by their path in the report, (B, K), classes ascending by id: IoU,
        accuracy, PQ, SQ and RQ."""
        values: dict[str, Floats] = {}
        if "classes" in self._sums:
            intersection, target, pred = self._per_class("classes")
            values["semantic.IoU"] = _divide(intersection, target + pred - intersection)
            values["semantic.accuracy"] = _divide(intersection, target)
        if "boundary" in self._sums:
            intersection, target, pred = self._per_class("boundary")
            values["boundary.IoU"] = _divide(intersection, target + pred - intersection)
        for name in ("panoptic", "boundary_panoptic"):
            if name in self._sums:
                weight, quality = _class_qualities(self._per_class(name))
                values |= _paths(name, {key: np.where(weight > 0, value, np.nan) for key, value in quality.items()})
        return values

    def _per_class(self, name: str) -> Ints:
        """(fields, B, K)."""
        sums = self._sums.sums(name).reshape(self._sums.replicates, len(self._ids), -1)
        by_field: Ints = np.moveaxis(sums, 2, 0)
        return by_field

    def _detection(self, state: Detection, hash_of: Mapping[str, int]) -> dict[str, Floats]:
        hash_N: Hashes = np.array([hash_of[key] for key in state.image_key], np.uint64)
        replicates = np.arange(detection_replicates(len(state.score), self._sums.replicates))
        weighted = WeightedAP(state)
        rows = [
            weighted.compute(weight_N)
            for start in range(0, len(replicates), AT_ONCE)
            for weight_N in poisson_weights(hash_N, replicates[start : start + AT_ONCE])
        ]
        return dict(zip(AP_FIGURES, np.array(rows).reshape(-1, len(AP_FIGURES)).T, strict=True))


def _paths(section: str, figures: Mapping[str, Floats]) -> dict[str, Floats]:
    return {f"{section}.{name}": values for name, values in figures.items()}


def _divide(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> Floats:
    """NaN where the denominator is 0."""
    quotient: Floats = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean(value_BK: Floats, known_BK: npt.NDArray[np.bool_]) -> Floats:
    """The mean over the classes that are known, (B,)."""
    return _divide(np.where(known_BK, value_BK, 0).sum(axis=1), known_BK.sum(axis=1))


def semantic_figures(sums: Ints) -> dict[str, Floats]:
    """What `class_figures` says, of many sums at once. sums: intersection, target and pred, (3, B, K)."""
    intersection, target, pred = sums
    union = target + pred - intersection
    iou = _divide(intersection, union)
    total = target.sum(axis=1)
    return {
        "mIoU": _mean(iou, union > 0),
        "mIoU_present": _mean(iou, target > 0),
        "fwIoU": _divide(np.where(target > 0, target * iou, 0).sum(axis=1), total),
        "pixel_accuracy": _divide(intersection.sum(axis=1), total),
        "mean_accuracy": _mean(_divide(intersection, target), target > 0),
        "dice": _mean(_divide(2 * intersection, target + pred), union > 0),
    }


def panoptic_figures(sums: Ints, kind_K: npt.NDArray[np.str_]) -> dict[str, Floats]:
    """What `PanopticState.compute` says of the groups. sums: of its fields, (5, B, K). kind_K: thing or stuff."""
    weight, per_class = _class_qualities(sums)
    groups = {"All": np.full(len(kind_K), True), "Things": kind_K == "thing", "Stuff": kind_K == "stuff"}
    return {
        f"{group}.{name}": _mean(value_BK, (weight > 0) & member_K)
        for group, member_K in groups.items()
        for name, value_BK in per_class.items()
    }


def _class_qualities(sums: Ints) -> tuple[Floats, dict[str, Floats]]:
    """tp + fp/2 + fn/2, and PQ, SQ and RQ of each class, (B, K)."""
    high, low, tp, fp, fn = sums
    iou = np.ldexp(high.astype(np.float64), -HIGH_BITS) + np.ldexp(low.astype(np.float64), -HIGH_BITS - LOW_BITS)
    weight = tp + 0.5 * fp + 0.5 * fn
    return weight, {"PQ": _divide(iou, weight), "SQ": iou / np.maximum(tp, 1), "RQ": _divide(tp, weight)}


def _depth_counts(depth: pa.StructArray) -> Ints:
    """Images and the two words of each figure, (N, 1 + 2 * figures)."""
    columns = [pc.fill_null(pc.struct_field(depth, "images"), 0).to_numpy(zero_copy_only=False)]
    for name in DEPTH_FIGURES:
        scaled = np.ldexp(np.minimum(depth_column(depth, name), DEPTH_LIMIT), DEPTH_BITS)
        high = np.floor(scaled)
        columns += [high, np.floor(np.ldexp(scaled - high, DEPTH_LOW_BITS))]
    return np.stack(columns, axis=1).astype(np.int64)


def _depth_figures(sum_BF: Ints) -> dict[str, Floats]:
    words = sum_BF[:, 1:].astype(np.float64)
    high, low = np.ldexp(words[:, ::2], -DEPTH_BITS), np.ldexp(words[:, 1::2], -DEPTH_BITS - DEPTH_LOW_BITS)
    return {name: _divide(high[:, at] + low[:, at], sum_BF[:, 0]) for at, name in enumerate(DEPTH_FIGURES)}
