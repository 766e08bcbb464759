"""Panoptic maps whose categories become others: void, merged stuff, things that stay apart."""

import numpy as np
import torch

from pipeline.config import ScenesSource
from pipeline.config_train import TargetConfig
from pipeline.segments import with_categories
from pipeline.sources.base import Sample
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy
from pipeline.training.task_targets import TaskTargets

SPACE = Taxonomy("t", "here", (Category(3, "sky", "stuff", (0, 0, 0)), Category(8, "car", "thing", (0, 0, 0))))


def test_stuff_is_merged_and_the_unknown_is_void() -> None:
    segment_HW = np.array([[1, 1, 2, 0], [3, 4, 5, 5]], np.int32)
    segments = [{"id": id_, "category_id": 0} for id_ in (1, 2, 3, 4, 5)]
    found_HW, kept = with_categories(segment_HW, segments, [3, 8, 3, 8, 70], SPACE)
    assert found_HW.tolist() == [[1, 1, 2, 0], [1, 4, 0, 0]]
    assert kept == [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 8}, {"id": 4, "category_id": 8}]
    assert segment_HW.tolist() == [[1, 1, 2, 0], [3, 4, 5, 5]]


def test_panoptic_targets_become_masks() -> None:
    """Every pixel that is not void lies in exactly the mask of its segment."""
    source = ScenesSource(format="scenes", count=6, width=96, height=72)
    opened, scenes = open_source(source), load_taxonomy("scenes")
    targets = TaskTargets(TargetConfig(), source, "panoptic", scenes)
    samples = [item for unit in opened.plan() for item in opened.read(unit, ()) if isinstance(item, Sample)]
    assert len(samples) == 6
    for index, sample in enumerate(samples):
        scene = render_scene(index, seed=source.seed, width=96, height=72)
        example = targets.example(scene.image_HWC, sample.targets)
        whole = [item for item in scene.segments if not item.iscrowd]
        masks_NHW = torch.as_tensor(example["masks"]).bool().numpy()
        assert example["labels"].tolist() == [item.category_id for item in whole]
        for mask_HW, item in zip(masks_NHW, whole, strict=True):
            np.testing.assert_array_equal(mask_HW, scene.segment_HW == item.id)
