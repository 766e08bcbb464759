"""Panoptic quality (Kirillov et al., CVPR 2019, section 4) with the rules of COCO's panopticapi, `evaluation.py`.

A sum of IoUs in float64 depends on the order of its terms. Here it is exact instead: a float64 above 0.5 is a whole
number of 2**-53, and whole numbers add up to the same bits in any order and any partition. The number is kept as two
words, IoU = iou_high * 2**-26 + iou_low * 2**-53 with iou_low below 2**27, so that plain int64 sums hold 2**36 matches
per category, in Arrow and SQL too. `compute` rounds once, at the end. (`exact.py` sums floats of any size, as lists.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, PredictError, RowError, TargetMismatchError
from pipeline.metrics.classsums import ClassSums, class_sums_type
from pipeline.metrics.confusion import check_maps
from pipeline.metrics.joint import Joint, joint_counts
from pipeline.taxonomy import Taxonomy

__all__ = ["PANOPTIC", "PanopticState", "Segments"]

# One image's segments as COCO's panoptic JSON describes them: id, category_id, and for a target area and iscrowd.
Segments = Sequence[Mapping[str, Any]]
SegmentMap = npt.NDArray[np.integer[Any]]

VOID = 0
NO_AREA = -(2**62)
HIGH_BITS, LOW_BITS = 26, 27
FIELDS = ("iou_high", "iou_low", "tp", "fp", "fn")
PANOPTIC = class_sums_type(FIELDS)


@dataclass(frozen=True, eq=False)
class PanopticState(ClassSums):
    """Per category: matched, wrong and missed segments, and the exact sum of the matched ones' IoU in two words."""

    FIELDS: ClassVar[tuple[str, ...]] = FIELDS

    @classmethod
    def from_segments(
        cls,
        target_segment_HW: SegmentMap,
        target_segments: Segments,
        pred_segment_HW: SegmentMap,
        pred_segments: Segments,
        taxonomy: Taxonomy,
    ) -> Self:
        """From one image: maps of segment ids (0 = void) and what the JSON says of each id.

        A target's area is the JSON's, or the map's where the JSON has none; a prediction's is the map's. A target
        segment that its map lacks is a missed one. A predicted id 0 is a segment where its JSON lists it.
        Raises TargetMismatchError where sizes differ, the target's map has ids that its JSON lacks or its JSON an area
        that cannot be; PredictError where the prediction's map and JSON have not the same ids; either where an id comes
        twice or a category is unknown.
        """
        check_maps(target_segment_HW, pred_segment_HW)
        joint = joint_counts(target_segment_HW, pred_segment_HW)
        return cls.from_joint(joint, target_segments, pred_segments, taxonomy)

    @classmethod
    def from_joint(
        cls,
        joint: Joint,
        target_segments: Segments,
        pred_segments: Segments,
        taxonomy: Taxonomy,
        boundary: Joint | None = None,
    ) -> Self:
        """From pixels per pair of segment ids. boundary: the same of boundary pixels, with negative ids for interior
        ones; the IoU is then the smaller of both (boundary-iou-api, `coco_panoptic_api/evaluation.py`)."""
        target = _Side.parse(target_segments, taxonomy, "target", TargetMismatchError)
        pred = _Side.parse(pred_segments, taxonomy, "prediction", PredictError)
        overlap = _Overlap.of(joint, target, pred)
        _check_ids(target, pred, overlap)

        iou = overlap.iou(np.where(target.area == NO_AREA, overlap.target_area, target.area))
        if (iou < 0).any() or np.isinf(iou).any():
            at = np.flatnonzero(((iou < 0) | np.isinf(iou)).any(axis=1))[0]
            raise TargetMismatchError(
                f"the target's JSON gives segment {target.id[at]} an area of {target.area[at]}, "
                f"its map {overlap.target_area[at]}"
            )
        if boundary is not None:
            borders = _Overlap.of(boundary, target, pred)
            iou = np.minimum(iou, borders.iou(borders.target_area))
        same = target.category[:, None] == pred.category[None, :]
        matched = same & ~target.crowd[:, None] & (overlap.pixels > 0) & (iou > 0.5)

        # Of several crowds of one category the last counts, as in panopticapi.
        crowd_of = {int(target.category[at]): at for at in np.flatnonzero(target.crowd)}
        crowd_at = np.array([crowd_of.get(category, -1) for category in pred.category.tolist()], np.int64)
        ignorable = overlap.void + np.where(crowd_at >= 0, overlap.with_row(crowd_at), 0)
        wrong = ~matched.any(axis=0) & ~(ignorable / overlap.pred_area > 0.5)
        missed = ~matched.any(axis=1) & ~target.crowd

        matched_target, matched_pred = np.nonzero(matched)
        high, low = split_iou(iou[matched_target, matched_pred])
        categories = [target.category[matched_target], pred.category[wrong], target.category[missed]]
        sums = np.zeros((sum(map(len, categories)), len(FIELDS)), np.int64)
        sums[: len(high), 0], sums[: len(low), 1] = high, low
        sums[np.arange(len(sums)), np.repeat([2, 3, 4], [len(part) for part in categories])] = 1
        return cls.from_entries(np.concatenate(categories), sums)

    def compute(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """PQ, SQ and RQ as fractions: {"All" | "Things" | "Stuff": {PQ, SQ, RQ, n}, "per_class": {id: ...}}.

        A group's figures are means over its n categories with tp + fp + fn > 0, NaN where n is 0. per_class has every
        category of the taxonomy: PQ, SQ, RQ (NaN without evidence; SQ is 0 without matches), iou_sum, tp, fp, fn.
        Raises ConfigError where the state has categories that the taxonomy lacks.
        """
        strange = sorted(set(self.category_id.tolist()) - set(taxonomy.ids))
        if strange:
            raise ConfigError(f"expected categories of {taxonomy.name}, got {strange[:10]}")
        found = {int(category): sums for category, sums in zip(self.category_id, self.sums.tolist(), strict=True)}
        per_class = {category: _quality(*found.get(category, (0,) * len(FIELDS))) for category in sorted(taxonomy.ids)}
        groups = {"All": ("thing", "stuff"), "Things": ("thing",), "Stuff": ("stuff",)}
        figures: dict[str, Any] = {}
        for name, kinds in groups.items():
            rows = [
                row
                for category, row in per_class.items()
                if taxonomy.by_id[category].kind in kinds and not math.isnan(row["PQ"])
            ]
            figures[name] = {
                key: math.fsum(row[key] for row in rows) / len(rows) if rows else math.nan for key in ("PQ", "SQ", "RQ")
            } | {"n": len(rows)}
        return figures | {"per_class": per_class}


def split_iou(iou: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The two words of float64 values above 0.5 (see the top of this file), exact."""
    scaled = np.ldexp(iou, HIGH_BITS)
    high = np.floor(scaled)
    return high.astype(np.int64), np.ldexp(scaled - high, LOW_BITS).astype(np.int64)


def join_iou(high: int, low: int) -> float:
    """The float64 next to the sum that both words hold. Dividing whole numbers rounds once."""
    return ((high << LOW_BITS) + low) / (1 << (HIGH_BITS + LOW_BITS))


def _quality(iou_high: int, iou_low: int, tp: int, fp: int, fn: int) -> dict[str, float]:
    iou_sum = join_iou(iou_high, iou_low)
    weight = tp + 0.5 * fp + 0.5 * fn
    quality = {"PQ": math.nan, "SQ": math.nan, "RQ": math.nan}
    if weight:
        quality = {"PQ": iou_sum / weight, "SQ": iou_sum / tp if tp else 0.0, "RQ": tp / weight}
    return quality | {"iou_sum": iou_sum, "tp": tp, "fp": fp, "fn": fn}


@dataclass(frozen=True)
class _Side:
    """Segments of one side by position in their JSON, (S,) each. area: NO_AREA where the JSON has none."""

    id: npt.NDArray[np.int64]
    category: npt.NDArray[np.int64]
    area: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]

    @classmethod
    def parse(cls, segments: Segments, taxonomy: Taxonomy, name: str, error: type[RowError]) -> Self:
        try:
            rows = [(s["id"], s["category_id"], s.get("area", NO_AREA), s.get("iscrowd", 0)) for s in segments]
            table = np.array(rows, np.int64).reshape(len(rows), 4)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
            raise error(f"the {name}'s segments need id and category_id, got {str(segments)[:200]}") from cause
        ids, categories = table[:, 0].tolist(), table[:, 1].tolist()
        strange = set(categories) - taxonomy.by_id.keys()
        if strange:
            raise error(f"the {name} has categories that {taxonomy.name} lacks: {sorted(strange)[:10]}")
        if len(set(ids)) < len(ids):
            raise error(f"the {name} lists a segment id twice: {[at for at in ids if ids.count(at) > 1][:10]}")
        return cls(table[:, 0], table[:, 1], table[:, 2], table[:, 3] == 1)


@dataclass(frozen=True)
class _Overlap:
    """Pixels that segments share. pixels: (targets, preds). target_area, pred_area: of each segment in its own map.
    void: (preds,) where the target's map is 0. unlisted_*: ids of the maps that are no segments."""

    pixels: npt.NDArray[np.int64]
    target_area: npt.NDArray[np.int64]
    pred_area: npt.NDArray[np.int64]
    void: npt.NDArray[np.int64]
    unlisted_target: npt.NDArray[np.int64]
    unlisted_pred: npt.NDArray[np.int64]

    @classmethod
    def of(cls, joint: Joint, target: _Side, pred: _Side) -> Self:
        target_id, pred_id, pixels = joint
        row, column = _position(target_id, target.id), _position(pred_id, pred.id)
        shape = (len(target.id) + 1, len(pred.id) + 1)  # the last ones are for what is no segment
        # The weights are sums of whole numbers below 2**53, so float64 holds them exactly.
        table = np.bincount(row * shape[1] + column, pixels, shape[0] * shape[1]).astype(np.int64).reshape(shape)
        in_void = target_id == VOID
        void = np.bincount(column[in_void], pixels[in_void], shape[1]).astype(np.int64)
        return cls(
            pixels=table[:-1, :-1],
            target_area=table.sum(axis=1)[:-1],
            pred_area=table.sum(axis=0)[:-1],
            void=void[:-1],
            unlisted_target=target_id[row == len(target.id)],
            unlisted_pred=pred_id[column == len(pred.id)],
        )

    def iou(self, target_area: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(targets, preds). The union leaves out what the target's void covers of a prediction."""
        union = target_area[:, None] + (self.pred_area - self.void)[None, :] - self.pixels
        iou = np.zeros(union.shape)
        with np.errstate(divide="ignore"):
            np.divide(self.pixels, union, out=iou, where=self.pixels > 0)
        return iou

    def with_row(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(preds,) pixels of each prediction in the target segment at its own position `at`."""
        if not len(self.pixels):
            return np.zeros(len(at), np.int64)
        shared: npt.NDArray[np.int64] = self.pixels[at, np.arange(len(at))]
        return shared


def _position(ids: npt.NDArray[np.int64], listed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each id stands in `listed`; its length where it is not there."""
    order = np.argsort(listed)
    at = np.searchsorted(listed[order], ids)
    found = np.append(order, len(listed))[at]
    return np.where(np.append(listed, -1)[found] == ids, found, len(listed))


def _check_ids(target: _Side, pred: _Side, overlap: _Overlap) -> None:
    if (target.id <= VOID).any():
        raise TargetMismatchError(f"the target lists segment {target.id.min()}, but ids start at 1 (0 is void)")
    strange = overlap.unlisted_target[overlap.unlisted_target != VOID]
    if len(strange):
        raise TargetMismatchError(f"the target's map has ids that its JSON lacks: {np.unique(strange).tolist()[:10]}")
    strange = overlap.unlisted_pred[overlap.unlisted_pred != VOID]
    if len(strange):
        raise PredictError(f"the prediction's map has ids that its JSON lacks: {np.unique(strange).tolist()[:10]}")
    lacking = pred.id[overlap.pred_area == 0]
    if len(lacking):
        raise PredictError(f"the prediction's JSON has ids that its map lacks: {lacking.tolist()[:10]}")
