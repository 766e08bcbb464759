"""A sample's encoded targets as one task needs them: decoded, checked, and in the model's label space.

Axes: H rows, W columns.
"""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import ScoreConfig, SourceConfig
from pipeline.config_train import TargetConfig
from pipeline.errors import MissingTargetError, TargetMismatchError
from pipeline.models.spec import Task
from pipeline.scoring import target_taxonomy
from pipeline.segments import with_categories
from pipeline.stages.score import Scorer
from pipeline.targets import read_depth, read_instances, read_panoptic, read_segments
from pipeline.taxonomy import Taxonomy
from pipeline.taxonomy_mapping import map_taxonomy
from pipeline.training.augment import Example, make_example
from pipeline.training.cells import annotation_cells, label_cells, segment_cells
from pipeline.training.targets import MAX_MASK_BYTES, class_index_map, instance_masks, output_labels

__all__ = ["TaskTargets"]


class TaskTargets:
    """What training and validation share: the way from a source's targets to the model's classes.

    task, taxonomy, background: the model's. Raises ConfigError where the label spaces have no class in common.
    """

    def __init__(
        self,
        config: TargetConfig,
        source: SourceConfig,
        task: Task,
        taxonomy: Taxonomy,
        *,
        background: bool = False,
    ) -> None:
        self.config = config
        self.task = task
        self.background = background
        self.taxonomy = taxonomy
        self._max_pixels = source.max_pixels
        self._own = taxonomy if task == "depth" else _taxonomy_of(config, source) or taxonomy
        same = self._own.describe()["categories"] == taxonomy.describe()["categories"]
        self._mapping = None
        if not same or config.merge or config.ids or config.other is not None:
            self._mapping = map_taxonomy(self._own, taxonomy, merge=config.merge, ids=config.ids, other=config.other)
        # It takes a panoptic target for a label map where there is no other.
        self._reader = Scorer(ScoreConfig(), self._own, None, source.max_pixels)

    def label_map(self, targets: Mapping[str, bytes]) -> npt.NDArray[Any]:
        """The semantic target in ids of the model's taxonomy, void as its `void_id`.

        Raises MissingTargetError where there is none, TargetMismatchError for ids that the targets' taxonomy lacks.
        """
        label_HW = self._reader.semantic_target(targets)
        if label_HW is None:
            raise _missing("semantic", targets)
        return self._in_model_ids(label_HW)

    def _in_model_ids(self, label_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
        void = [*self._own.void_ids, *self.config.ignore]
        if self.config.unknown_is_void:
            label_HW = np.where(np.isin(label_HW, self._own.ids), label_HW, self._own.void_id)
        if void:
            label_HW = np.where(np.isin(label_HW, void), self._own.void_id, label_HW)
        if self._mapping is not None:
            return self._mapping.apply(label_HW)
        unknown = np.setdiff1d(label_HW, self._known)
        if len(unknown):
            raise TargetMismatchError(f"expected ids of {self._own.name} or its void, got {unknown[:10].tolist()}")
        return label_HW

    @functools.cached_property
    def _known(self) -> npt.NDArray[np.int64]:
        return np.array([*self._own.ids, self._own.void_id])

    def cell_map(
        self, targets: Mapping[str, bytes], label_HW: npt.NDArray[Any], classes: Collection[int]
    ) -> npt.NDArray[np.int32]:
        """One number per object of `classes` (ids of the model's taxonomy), (H, W), 0 elsewhere.

        Objects are the segments of the panoptic target, else the instances, else what is connected in label_HW, which
        `label_map` gave. Raises TargetMismatchError.
        """
        if {"panoptic", "segments"} <= targets.keys():
            segment_HW = read_panoptic(targets["panoptic"], max_pixels=self._max_pixels)
            segments = read_segments(targets["segments"])
            is_cell = self._are_of(classes, [item["category_id"] for item in segments])
            return segment_cells(segment_HW, dict(zip((item["id"] for item in segments), is_cell, strict=True)))
        if "instances" in targets:
            height, width = label_HW.shape
            items = self._instances(targets["instances"], height=height, width=width)
            is_cell = self._are_of(classes, [item["category_id"] for item in items])
            return annotation_cells([*itertools.compress(items, is_cell)], height=height, width=width)
        return label_cells(label_HW, classes)

    def _are_of(self, classes: Collection[int], category_ids: Sequence[int]) -> list[bool]:
        """Whether categories of the targets are one of the model's classes, which may be few of them."""
        return [id_ in classes for id_ in self._in_model_ids(np.array(category_ids, np.int64)).tolist()]

    def depth(self, targets: Mapping[str, bytes]) -> npt.NDArray[np.float64]:
        """Depth in metres, (H, W), NaN where unknown. Raises MissingTargetError, TargetMismatchError."""
        if "depth" not in targets:
            raise _missing("depth", targets)
        depth = self.config.depth
        return read_depth(targets["depth"], scale=depth.scale, invalid=depth.invalid, max_pixels=self._max_pixels)

    def annotations(self, targets: Mapping[str, bytes], *, height: int, width: int) -> list[dict[str, Any]]:
        """COCO annotations in the model's categories; those that are mapped to void are left out.

        height, width: of the image. Raises MissingTargetError, TargetMismatchError.
        """
        if "instances" not in targets:
            raise _missing("instances", targets)
        items = self._instances(targets["instances"], height=height, width=width)
        categories = [item["category_id"] for item in items]
        if self._mapping is not None:
            categories = self._mapping.apply_ids(categories).tolist()
        return [
            {**item, "category_id": category}
            for item, category in zip(items, categories, strict=True)
            if category != self.taxonomy.void_id
        ]

    def _instances(self, data: bytes, *, height: int, width: int) -> Sequence[Mapping[str, Any]]:
        items, target_width, target_height = read_instances(data)
        if target_width and (target_width, target_height) != (width, height):
            raise TargetMismatchError(
                f"the target is {target_width}x{target_height} pixels, the image {width}x{height}"
            )
        return items

    def example(
        self, image_HWC: npt.NDArray[np.uint8], targets: Mapping[str, bytes], *, cells_of: Collection[int] = ()
    ) -> Example:
        """The image and its targets as tensors, before augmentation. Raises RowErrors for targets that do not fit.

        cells_of: for label maps, classes whose objects are wanted as `panoptic`, as `cell_map` gives them.
        """
        if self.task == "semantic":
            label_HW = self.label_map(targets)
            return make_example(
                image_HWC,
                semantic_HW=class_index_map(label_HW, self.taxonomy),
                panoptic_HW=self.cell_map(targets, label_HW, cells_of) if cells_of else None,
            )
        if self.task == "depth":
            return make_example(image_HWC, depth_HW=self.depth(targets))
        if self.task == "panoptic":
            masks_NHW, labels_N = self._segment_masks(targets)
        else:
            height, width = image_HWC.shape[:2]
            annotations = self.annotations(targets, height=height, width=width)
            boxes = self.task == "detection"
            masks = instance_masks(annotations, height=height, width=width, taxonomy=self.taxonomy, boxes=boxes)
            masks_NHW, labels_N = masks.masks_NHW, masks.labels_N
        labels_N = output_labels(labels_N, self.taxonomy, background=self.background)
        return make_example(image_HWC, masks_NHW=masks_NHW, labels_N=labels_N)

    def _segment_masks(self, targets: Mapping[str, bytes]) -> tuple[Tensor, Tensor]:
        """Things and stuff of the panoptic target, but for crowds and what is mapped to void: masks_NHW uint8 and ids
        of the model's taxonomy. Stuff of one class is one mask."""
        segment_HW, segments = self.panoptic(targets)
        kept = [segment for segment in segments if not segment.get("iscrowd", 0)]
        if len(kept) * segment_HW.size > MAX_MASK_BYTES:
            raise TargetMismatchError(
                f"expected masks of at most {MAX_MASK_BYTES} pixels in all, got {len(kept)} of {segment_HW.shape}"
            )
        present = set(np.unique(segment_HW).tolist())
        found = [segment for segment in kept if segment["id"] in present]
        masks_NHW = np.zeros((len(found), *segment_HW.shape), np.uint8)
        for mask_HW, segment in zip(masks_NHW, found, strict=True):
            mask_HW[:] = segment_HW == segment["id"]
        return torch.from_numpy(masks_NHW), torch.tensor([item["category_id"] for item in found], dtype=torch.int64)

    def panoptic(self, targets: Mapping[str, bytes]) -> tuple[npt.NDArray[Any], list[dict[str, Any]]]:
        """The panoptic target in ids of the model's taxonomy: segment_HW (0 = void) and its segments; stuff of one
        class is one segment. Raises MissingTargetError, TargetMismatchError."""
        if not {"panoptic", "segments"} <= targets.keys():
            raise _missing("panoptic", targets)
        segment_HW = read_panoptic(targets["panoptic"], max_pixels=self._max_pixels)
        segments = read_segments(targets["segments"])
        categories = self._in_model_ids(np.array([item["category_id"] for item in segments], np.int64)).tolist()
        return with_categories(segment_HW, segments, categories, self.taxonomy)


def _taxonomy_of(config: TargetConfig, source: SourceConfig) -> Taxonomy | None:
    return target_taxonomy(ScoreConfig(taxonomy=config.taxonomy), source)


def _missing(kind: str, targets: Mapping[str, bytes]) -> MissingTargetError:
    return MissingTargetError(f"expected a target of kind {kind}, got {', '.join(sorted(targets)) or 'none'}")
