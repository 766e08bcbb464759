"""A prediction held against its image's targets: every metric that the pair allows, as one SCORE value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import ScoreConfig
from pipeline.errors import PredictError, RowError, TargetMismatchError
from pipeline.metrics.boundary import BoundaryCounts, panoptic_states
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth, DepthOptions
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import VOID, PanopticState, Segments
from pipeline.predictions.base import Predicted
from pipeline.segments import with_categories
from pipeline.targets import read_depth, read_instances, read_label_map, read_panoptic, read_segments
from pipeline.taxonomy import Taxonomy
from pipeline.taxonomy_mapping import TaxonomyMapping, map_taxonomy

__all__ = ["Scorer", "score_key", "unscored"]


def score_key(image_id: str, fields: Mapping[str, str]) -> str | int:
    """What orders images in detection records: the COCO image id where there is one, as COCOeval does."""
    coco_id = fields.get("coco_id", "")
    return int(coco_id) if coco_id.isdecimal() and len(coco_id) < 19 else image_id


def unscored(error: Exception) -> dict[str, Any]:
    """The SCORE value of a prediction that could not be held against its target."""
    return {"error_type": type(error).__name__, "error_message": str(error)[:2000]}


@dataclass(frozen=True)
class Scorer:
    """How one model's predictions are scored. target: the label space of the targets and of the scores.

    mapping: from the model's label space into it, None where they are the same.
    """

    options: ScoreConfig
    target: Taxonomy
    mapping: TaxonomyMapping | None
    max_pixels: int

    @classmethod
    def build(cls, options: ScoreConfig, pred: Taxonomy, target: Taxonomy, *, max_pixels: int) -> "Scorer":
        """Raises ConfigError where the label spaces have no class in common or the options do not fit them."""
        same = pred.describe()["categories"] == target.describe()["categories"]
        mapping = None
        if not same or options.merge or options.ids or options.other is not None:
            mapping = map_taxonomy(pred, target, merge=options.merge, ids=options.ids, other=options.other)
        return cls(options, target, mapping, max_pixels)

    def score(
        self, predicted: Predicted, targets: Mapping[str, bytes], *, key: str | int, width: int = 0, height: int = 0
    ) -> dict[str, Any] | None:
        """A value of SCORE, or None where the image has no target of the prediction's kind.

        width, height: of the image where the prediction knows. A target that cannot be held against the prediction is
        a value with error_type and error_message.
        """
        try:
            states = self._states(predicted, targets, key, width, height)
        except RowError as error:
            return unscored(error)
        return states or None

    def _states(
        self, predicted: Predicted, targets: Mapping[str, bytes], key: str | int, width: int, height: int
    ) -> dict[str, Any]:
        states: dict[str, Any] = {}
        if predicted.label_HW is not None:
            target_HW = self.semantic_target(targets)
            if target_HW is not None:
                states |= self._semantic(predicted.label_HW, target_HW)
        if predicted.segment_HW is not None and {"panoptic", "segments"} <= targets.keys():
            states |= self._panoptic(predicted, targets)
        if predicted.objects is not None and "instances" in targets:
            states |= self._objects(predicted.objects, targets["instances"], key, width, height)
        if predicted.depth_HW is not None and "depth" in targets:
            states |= self._depth(predicted, targets["depth"])
        return states

    def semantic_target(self, targets: Mapping[str, bytes]) -> npt.NDArray[Any] | None:
        """The label map, or else the categories of the panoptic target's segments."""
        if "semantic" in targets:
            return read_label_map(targets["semantic"], max_pixels=self.max_pixels)
        if {"panoptic", "segments"} <= targets.keys():
            segment_HW = read_panoptic(targets["panoptic"], max_pixels=self.max_pixels)
            return _segment_categories(segment_HW, read_segments(targets["segments"]), self.target)
        return None

    def _semantic(self, label_HW: npt.NDArray[Any], target_HW: npt.NDArray[Any]) -> dict[str, Any]:
        options, mapping = self.options, self.mapping
        pred_HW = label_HW if mapping is None else mapping.apply(label_HW)
        ignore = (*options.ignore, *self.target.void_ids)
        lenient = options.unknown_is_void
        confusion = Confusion.from_maps(target_HW, pred_HW, self.target, ignore=ignore, unknown_is_void=lenient)
        states = {"classes": confusion.class_counts().to_row(), "confusion": confusion.to_row()}
        if options.boundary:
            states["boundary"] = BoundaryCounts.from_maps(
                target_HW, pred_HW, self.target, ignore=ignore, unknown_is_void=lenient
            ).to_row()
        return states

    def _panoptic(self, predicted: Predicted, targets: Mapping[str, bytes]) -> dict[str, Any]:
        target_HW = read_panoptic(targets["panoptic"], max_pixels=self.max_pixels)
        target_segments = read_segments(targets["segments"])
        pred_HW, pred_segments = self._mapped_segments(predicted)
        maps = (target_HW, target_segments, pred_HW, pred_segments, self.target)
        if not self.options.boundary:
            return {"panoptic": PanopticState.from_segments(*maps).to_row()}
        panoptic, boundary = panoptic_states(*maps)
        return {"panoptic": panoptic.to_row(), "boundary_panoptic": boundary.to_row()}

    def mapped(self, predicted: Predicted, *, height: int = 0, width: int = 0) -> Predicted:
        """The prediction in the targets' label space, as it is scored. height, width: of the image, for objects.

        Raises TargetMismatchError for ids that the model's label space lacks.
        """
        if self.mapping is None:
            return predicted
        if predicted.label_HW is not None:
            predicted = replace(predicted, label_HW=self.mapping.apply(predicted.label_HW))
        if predicted.segment_HW is not None:
            segment_HW, segments = self._mapped_segments(predicted)
            predicted = replace(predicted, segment_HW=segment_HW, segments=tuple(segments))
        if predicted.objects is not None:
            predicted = replace(predicted, objects=self._mapped_objects(predicted.objects, height, width))
        return predicted

    def _mapped_segments(self, predicted: Predicted) -> tuple[npt.NDArray[Any], Segments]:
        """Segments in the target's space: unmapped ones are void, stuff of one class is one segment."""
        segment_HW, mapping = predicted.segment_HW, self.mapping
        if segment_HW is None:
            raise ValueError("expected a panoptic prediction")
        if mapping is None:
            return segment_HW, predicted.segments
        categories = mapping.apply_ids([segment["category_id"] for segment in predicted.segments]).tolist()
        named = [{"id": segment["id"], "category_id": segment["category_id"]} for segment in predicted.segments]
        return with_categories(segment_HW, named, categories, self.target)

    def _objects(self, pred: Objects, data: bytes, key: str | int, width: int, height: int) -> dict[str, Any]:
        annotations, target_width, target_height = read_instances(data)
        width, height = width or pred.width or target_width, height or pred.height or target_height
        if target_width and (width, height) != (target_width, target_height):
            raise TargetMismatchError(
                f"the target is {target_width}x{target_height} pixels, the prediction {width}x{height}"
            )
        target = Objects.from_annotations(annotations, height=height, width=width)
        unknown = sorted(set(target.category_id.tolist()) - set(self.target.ids))
        if unknown:
            raise TargetMismatchError(f"the target has categories that {self.target.name} lacks: {unknown[:10]}")
        pred = self._mapped_objects(pred, height, width)
        masked = pred.segmentation is not None and all(pred.segmentation)
        if masked and not (width and height):
            raise TargetMismatchError("neither the prediction nor the target says how large the image is")
        states: dict[str, Any] = {"bbox": Detection.from_image(key, pred, target, "bbox").to_row()}
        lacking = [not mask for mask in target.segmentation or ()]
        if masked and any(lacking) and not all(lacking):
            raise TargetMismatchError(f"{sum(lacking)} of {len(lacking)} targets have no segmentation, others have one")
        if masked and not any(lacking):
            states["segm"] = Detection.from_image(key, pred, target, "segm").to_row()
        return states

    def _mapped_objects(self, pred: Objects, height: int, width: int) -> Objects:
        kept = np.arange(len(pred))
        category_id = pred.category_id
        if self.mapping is not None:
            category_id = self.mapping.apply_ids(category_id)
            kept = np.flatnonzero(category_id != self.target.void_id)
        elif unknown := sorted(set(category_id.tolist()) - set(self.target.ids)):
            raise PredictError(f"the prediction has categories that {self.target.name} lacks: {unknown[:10]}")
        return Objects(
            height=height,
            width=width,
            category_id=category_id[kept],
            bbox_N4=None if pred.bbox_N4 is None else pred.bbox_N4[kept],
            segmentation=None if pred.segmentation is None else [pred.segmentation[at] for at in kept.tolist()],
            score=None if pred.score is None else pred.score[kept],
            area=None if pred.area is None else pred.area[kept],
        )

    def _depth(self, predicted: Predicted, data: bytes) -> dict[str, Any]:
        depth = self.options.depth
        if predicted.depth_HW is None:
            raise ValueError("expected a depth prediction")
        target_HW = read_depth(data, scale=depth.scale, invalid=depth.invalid, max_pixels=self.max_pixels)
        options = DepthOptions(
            alignment=depth.alignment, min_depth=depth.min_depth, max_depth=depth.max_depth, crop=depth.crop
        )
        return {"depth": Depth.from_image(predicted.depth_HW, target_HW, options, predicted.depth_kind).to_row()}


def _segment_categories(segment_HW: npt.NDArray[Any], segments: Segments, taxonomy: Taxonomy) -> npt.NDArray[Any]:
    """A panoptic map as a label map of its segments' categories; void where it is void."""
    try:
        categories = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
    except (KeyError, TypeError, ValueError) as error:
        raise TargetMismatchError(
            f"the target's segments need id and category_id, got {str(segments)[:200]}"
        ) from error
    values, place_HW = np.unique(segment_HW, return_inverse=True)
    unknown = [value for value in values.tolist() if value != VOID and value not in categories]
    if unknown:
        raise TargetMismatchError(f"the target's map has ids that its JSON lacks: {unknown[:10]}")
    table = np.array([categories.get(value, taxonomy.void_id) for value in values.tolist()], np.int32)
    return np.asarray(table[place_HW.reshape(segment_HW.shape)])
