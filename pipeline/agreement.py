"""How far one set of predictions agrees with another's of the same images: counts of each image, folded over all."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pipeline.errors import SchemaError
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth
from pipeline.metrics.depth_align import DepthOptions
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState, Segments
from pipeline.predictions.base import Predicted
from pipeline.taxonomy import Category, Taxonomy

__all__ = ["Agreement"]

# Errors are taken in units of each image's median depth: what a relative depth is measured in says nothing.
NEAREST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A mergeable state. images: compared. equal: of those, the ones that are the same to the last pixel.

    confusion: of label maps, rows are the reference's. panoptic: of segments, or of instances laid over each other with
    the surest on top. depth: of depth maps, errors in medians of the reference. Each is None where no image has such a
    prediction.
    """

    images: int = 0
    equal: int = 0
    confusion: Confusion | None = None
    panoptic: PanopticState | None = None
    depth: Depth | None = None

    @classmethod
    def of(cls, reference: Predicted, other: Predicted, taxonomy: Taxonomy) -> "Agreement":
        """One image's two predictions. Raises SchemaError where they are not of the same kind, TargetMismatchError
        where they are not of the same size."""
        confusion = panoptic = depth = None
        equal = True
        if reference.label_HW is not None:
            other_HW = _there(other.label_HW, "label map")
            confusion = Confusion.from_maps(reference.label_HW, other_HW, taxonomy, unknown_is_void=True)
            equal = equal and np.array_equal(reference.label_HW, other_HW)
        if reference.segment_HW is not None or reference.objects is not None:
            segments, other_segments = _segments(reference), _segments(other)
            panoptic = PanopticState.from_segments(
                *_filled(*segments, taxonomy), *_filled(*other_segments, taxonomy), _with_nothing(taxonomy)
            )
            equal = equal and np.array_equal(segments[0], other_segments[0]) and segments[1] == other_segments[1]
        if reference.depth_HW is not None:
            other_HW = _there(other.depth_HW, "depth map")
            depth = _depth(reference.depth_HW, other_HW)
            equal = equal and np.array_equal(reference.depth_HW, other_HW, equal_nan=True)
        return cls(images=1, equal=int(equal), confusion=confusion, panoptic=panoptic, depth=depth)

    def merge(self, other: "Agreement") -> "Agreement":
        """The state of both parts' images together."""
        return Agreement(
            images=self.images + other.images,
            equal=self.equal + other.equal,
            confusion=_merged(self.confusion, other.confusion),
            panoptic=_merged(self.panoptic, other.panoptic),
            depth=_merged(self.depth, other.depth),
        )

    def figures(self, taxonomy: Taxonomy) -> dict[str, float]:
        """mIoU (over the classes of either side), PQ, AbsRel (over all pixels), whichever there are; NaN without
        evidence. The reference is taken as the target."""
        found: dict[str, float] = {}
        if self.confusion is not None:
            found["mIoU"] = float(self.confusion.compute()["mIoU"])
            found["pixel_accuracy"] = float(self.confusion.compute()["pixel_accuracy"])
        if self.panoptic is not None:
            each = self.panoptic.compute(_with_nothing(taxonomy))["per_class"]
            known = [each[category]["PQ"] for category in taxonomy.ids if not math.isnan(each[category]["PQ"])]
            found["PQ"] = math.fsum(known) / len(known) if known else math.nan
        if self.depth is not None:
            found["AbsRel"] = float(self.depth.compute_pixels()["AbsRel"])
        return found

    def loss(self, taxonomy: Taxonomy) -> float:
        """What is lost, 0 where nothing is: the largest of 1 - mIoU, 1 - PQ and AbsRel. A figure without evidence (not
        an object in any image) loses nothing where the predictions are the same, and all where they are not."""
        figures = self.figures(taxonomy)
        losses = [1 - figures[name] for name in ("mIoU", "PQ") if name in figures]
        losses += [figures["AbsRel"]] if "AbsRel" in figures else []
        unknown = 0.0 if self.equal == self.images else math.inf
        return max((unknown if math.isnan(loss) else max(loss, 0.0) for loss in losses), default=unknown)


def _there(value: npt.NDArray[Any] | None, what: str) -> npt.NDArray[Any]:
    if value is None:
        raise SchemaError(f"expected a {what} to compare with another, got none")
    return value


def _merged(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return one.merge(other)


def _segments(predicted: Predicted) -> tuple[npt.NDArray[Any], Segments]:
    """A map of segment ids and its segments; objects that overlap are laid over each other, the surest on top."""
    if predicted.segment_HW is not None:
        return predicted.segment_HW, [{"id": s["id"], "category_id": s["category_id"]} for s in predicted.segments]
    objects = predicted.objects
    if objects is None:
        raise SchemaError("expected segments or objects to compare with others, got neither")
    return _laid_over(objects)


def _laid_over(objects: Objects) -> tuple[npt.NDArray[np.int32], Segments]:
    segment_HW = np.zeros((objects.height, objects.width), np.int32)
    if not len(objects):
        return segment_HW, []
    scores = objects.score if objects.score is not None else np.zeros(len(objects))
    rles = objects.rles()
    for at in np.argsort(scores, kind="stable").tolist():
        segment_HW[coco_mask.decode(rles[at]).astype(bool)] = at + 1
    seen = np.unique(segment_HW).tolist()
    categories = objects.category_id.tolist()
    return segment_HW, [{"id": value, "category_id": categories[value - 1]} for value in seen if value]


def _with_nothing(taxonomy: Taxonomy) -> Taxonomy:
    """With a class for pixels that no segment has. In an annotation they are unknown and forgive what is predicted
    there; in a prediction they say that there is nothing."""
    nothing = Category(max(taxonomy.ids) + 1, "nothing", "stuff", (0, 0, 0))
    return replace(taxonomy, categories=(*taxonomy.categories, nothing))


def _filled(
    segment_HW: npt.NDArray[Any], segments: Segments, taxonomy: Taxonomy
) -> tuple[npt.NDArray[np.int64], Segments]:
    empty_HW = segment_HW == 0
    if not empty_HW.any():
        return segment_HW.astype(np.int64), segments
    nothing = max((int(segment["id"]) for segment in segments), default=0) + 1
    filled_HW = np.where(empty_HW, nothing, segment_HW).astype(np.int64)
    return filled_HW, [*segments, {"id": nothing, "category_id": max(taxonomy.ids) + 1}]


def _depth(reference_HW: npt.NDArray[np.floating[Any]], other_HW: npt.NDArray[np.floating[Any]]) -> Depth:
    known = np.isfinite(reference_HW)
    unit = float(np.median(np.abs(reference_HW[known]))) if known.any() else 0.0
    unit = unit or 1.0
    options = DepthOptions(min_depth=NEAREST)
    # Both are held against each other as they are: for the metric, values are metres.
    return Depth.from_image(other_HW / unit, np.where(known, reference_HW / unit, np.nan), options, "metric_m")
