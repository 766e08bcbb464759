"""A sample's encoded targets as one task needs them: decoded, checked, and in the model's label space.

Axes: H rows, W columns.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import ScoreConfig, SourceConfig
from pipeline.config_train import TargetConfig
from pipeline.errors import MissingTargetError, TargetMismatchError
from pipeline.models.spec import Task
from pipeline.scoring import target_taxonomy
from pipeline.stages.score import Scorer
from pipeline.targets import read_depth, read_instances
from pipeline.taxonomy import Taxonomy
from pipeline.taxonomy_mapping import map_taxonomy
from pipeline.training.augment import Example, make_example
from pipeline.training.targets import class_index_map, instance_masks

__all__ = ["TaskTargets"]


class TaskTargets:
    """What training and validation share: the way from a source's targets to the model's classes.

    taxonomy: the model's. Raises ConfigError where the label spaces have no class in common.
    """

    def __init__(self, config: TargetConfig, source: SourceConfig, task: Task, taxonomy: Taxonomy) -> None:
        self.config = config
        self.task = task
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
        items, target_width, target_height = read_instances(targets["instances"])
        if target_width and (target_width, target_height) != (width, height):
            raise TargetMismatchError(
                f"the target is {target_width}x{target_height} pixels, the image {width}x{height}"
            )
        categories = [item["category_id"] for item in items]
        if self._mapping is not None:
            categories = self._mapping.apply_ids(categories).tolist()
        return [
            {**item, "category_id": category}
            for item, category in zip(items, categories, strict=True)
            if category != self.taxonomy.void_id
        ]

    def example(self, image_HWC: npt.NDArray[np.uint8], targets: Mapping[str, bytes]) -> Example:
        """The image and its targets as tensors, before augmentation. Raises RowErrors for targets that do not fit."""
        if self.task == "semantic":
            index_HW = class_index_map(self.label_map(targets), self.taxonomy)
            return make_example(image_HWC, semantic_HW=index_HW)
        if self.task == "depth":
            return make_example(image_HWC, depth_HW=self.depth(targets))
        height, width = image_HWC.shape[:2]
        annotations = self.annotations(targets, height=height, width=width)
        masks = instance_masks(annotations, height=height, width=width, taxonomy=self.taxonomy)
        return make_example(image_HWC, masks_NHW=masks.masks_NHW, labels_N=masks.labels_N)


def _taxonomy_of(config: TargetConfig, source: SourceConfig) -> Taxonomy | None:
    return target_taxonomy(ScoreConfig(taxonomy=config.taxonomy), source)


def _missing(kind: str, targets: Mapping[str, bytes]) -> MissingTargetError:
    return MissingTargetError(f"expected a target of kind {kind}, got {', '.join(sorted(targets)) or 'none'}")
