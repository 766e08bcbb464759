"""The metric states of any number of images, and the sections of a report that they give."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SchemaError
from pipeline.metrics.boundary import BoundaryCounts
from pipeline.metrics.confusion import ClassCounts, Confusion
from pipeline.metrics.depth import RATIO_EDGES, Depth
from pipeline.metrics.detection import RECALLS, THRESHOLDS, Detection, DetectionScores
from pipeline.metrics.panoptic import PanopticState
from pipeline.metrics.score import SCORE
from pipeline.taxonomy import Taxonomy

__all__ = ["DETECTIONS", "States", "headline"]

DETECTIONS = ("bbox", "segm")
SCORE_BINS = 20
# What of a section says more than its figures.
DETAILS = {"per_class", "confusion", "pr_curve", "scores", "per_pixel", "histogram", "delta_curve"}


def headline(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section's figures alone."""
    return {
        name: headline(value) if isinstance(value, Mapping) else value
        for name, value in section.items()
        if name not in DETAILS
    }


class States:
    """The states of the scores that were added; memory grows with classes, and with detection records.

    confusion: keep the matrix of each class pair too.
    """

    def __init__(self, taxonomy: Taxonomy, *, confusion: bool) -> None:
        self._taxonomy = taxonomy
        self._confusion = Confusion.empty(taxonomy) if confusion else None
        self._classes = ClassCounts.empty()
        self._boundary = BoundaryCounts.empty()
        self._panoptic = {name: PanopticState.empty() for name in ("panoptic", "boundary_panoptic")}
        self._depth = Depth.empty()
        self._detections: dict[str, list[Detection]] = {name: [] for name in DETECTIONS}
        self._found: set[str] = set()

    def add(self, score: pa.StructArray) -> None:
        """Add rows, a column of SCORE. Raises SchemaError where they do not fit the label space or one another."""
        if score.type != SCORE:
            raise SchemaError(f"expected a column of scores, got {score.type}"[:500])
        columns = dict(zip(SCORE.names, score.flatten(), strict=True))
        found = {name for name, column in columns.items() if column.null_count < len(column)}
        self._found |= found
        if "classes" in found:
            self._classes = self._classes.merge(ClassCounts.from_rows(columns["classes"]))
        if "confusion" in found and self._confusion is not None:
            self._confusion = self._confusion.merge(Confusion.from_rows(columns["confusion"], self._taxonomy))
        if "boundary" in found:
            self._boundary = self._boundary.merge(BoundaryCounts.from_rows(columns["boundary"]))
        for name in self._panoptic.keys() & found:
            self._panoptic[name] = self._panoptic[name].merge(PanopticState.from_rows(columns[name]))
        for name in self._detections.keys() & found:
            self._detections[name].append(Detection.from_rows(columns[name]))
        if "depth" in found:
            self._depth = self._depth.merge(Depth.from_rows(columns["depth"]))

    def detections(self) -> dict[str, Detection]:
        """All records of each kind that any row has. Raises SchemaError where an image stands in two rows."""
        return {
            name: Detection.empty().merge(*parts) for name, parts in self._detections.items() if name in self._found
        }

    def sections(self, detections: Mapping[str, Detection]) -> dict[str, Any]:
        """The sections of the report, those of which there is a score. detections: `detections()`."""
        taxonomy, found = self._taxonomy, self._found
        sections: dict[str, Any] = {}
        if "classes" in found:
            sections["semantic"] = _named(self._classes.compute(taxonomy), taxonomy)
            if self._confusion is not None and "confusion" in found:
                sections["semantic"]["confusion"] = _matrix(self._confusion, taxonomy)
        if "boundary" in found:
            sections["boundary"] = _named(self._boundary.compute(taxonomy), taxonomy)
        for name, state in self._panoptic.items():
            if name in found:
                sections[name] = _named(state.compute(taxonomy), taxonomy, kinds=True)
        if detections:
            sections["detection"] = {name: _detection(state, taxonomy) for name, state in detections.items()}
        if "depth" in found:
            sections["depth"] = _depth(self._depth)
        return sections


def _named(figures: Mapping[str, Any], taxonomy: Taxonomy, *, kinds: bool = False) -> dict[str, Any]:
    """per_class by the id as text, as JSON has it, with the class's name."""
    per_class = {}
    for category, row in figures["per_class"].items():
        known = taxonomy.by_id.get(category)
        if known is None:
            raise SchemaError(f"the scores have a category {category} that {taxonomy.name} lacks")
        kind = {"kind": known.kind} if kinds else {}
        per_class[str(category)] = {"name": known.name} | kind | row
    return {**figures, "per_class": per_class}


def _matrix(state: Confusion, taxonomy: Taxonomy) -> dict[str, Any]:
    names = [taxonomy.by_id[category].name for category in state.ids]
    return {"ids": list(state.ids), "names": names, "matrix": state.matrix.tolist()}


def _detection(state: Detection, taxonomy: Taxonomy) -> dict[str, Any]:
    scores = state.compute()
    counts = dict(zip(scores.categories, scores.target_count, strict=True))
    per_class = {category: row | {"targets": counts[category]} for category, row in scores.per_category().items()}
    named = _named({"per_class": per_class}, taxonomy)
    return scores.figures() | named | {"pr_curve": _curves(scores), "scores": _score_bins(state)}


def _curves(scores: DetectionScores) -> dict[str, Any]:
    """Precision at each recall point, all areas, the mean over categories with targets."""
    precision_TKR = scores.precision_STKR[0]
    known_TKR = precision_TKR[:, ~np.isnan(precision_TKR).all(axis=(0, 2))]
    if not known_TKR.shape[1]:
        known_TKR = np.full((len(THRESHOLDS), 1, len(RECALLS)), np.nan)
    precision_TR = known_TKR.mean(axis=1)
    curves = {"0.5": precision_TR[0], "0.75": precision_TR[5], "mean": precision_TR.mean(axis=0)}
    return {
        "recall": RECALLS.tolist(),
        "precision": {name: curve_R.tolist() for name, curve_R in curves.items()},
    }


def _score_bins(state: Detection) -> dict[str, list[float] | list[int]]:
    """Predictions by score, right and wrong at IoU 0.5; those that count as neither are left out."""
    counted, right = (state.ignored & 1) == 0, (state.matched & 1) == 1
    edges = [n / SCORE_BINS for n in range(SCORE_BINS + 1)]
    score = np.clip(state.score, 0, 1)
    return {
        "edges": edges,
        "tp": np.histogram(score[counted & right], edges)[0].tolist(),
        "fp": np.histogram(score[counted & ~right], edges)[0].tolist(),
    }


def _depth(state: Depth) -> dict[str, Any]:
    threshold, share = state.delta_curve()
    return {
        **state.compute(),
        "images": state.images,
        "pixels": state.pixels,
        "pixels_without_prediction": state.pixels_without_prediction,
        "images_without_evidence": state.images_without_evidence,
        "per_pixel": state.compute_pixels(),
        "histogram": {
            "edges": RATIO_EDGES.tolist(),
            "counts": list(state.log_ratio[1:-1]),
            "below": state.log_ratio[0],
            "above": state.log_ratio[-1],
        },
        "delta_curve": {"threshold": threshold.tolist(), "share": share.tolist()},
    }
