"""Agreement of two sets of predictions: figures that can be counted by hand, folded as one data set."""

import math

import numpy as np
import pytest

from pipeline.agreement import Agreement
from pipeline.errors import SchemaError, TargetMismatchError
from pipeline.masks import encode_rle
from pipeline.metrics.detection_match import Objects
from pipeline.predictions.base import Predicted
from pipeline.taxonomy import load_taxonomy

SCENES = load_taxonomy("scenes")
COCO = load_taxonomy("coco80")


def labels(*rows: list[int]) -> Predicted:
    return Predicted(label_HW=np.array(rows, np.uint8))


def objects(*boxes: tuple[int, int, int, int, int, float]) -> Predicted:
    """x1, y1, x2, y2, category, score on 8x8 pixels."""
    segments = []
    for x1, y1, x2, y2, category, score in boxes:
        mask_HW = np.zeros((8, 8), np.uint8)
        mask_HW[y1:y2, x1:x2] = 1
        box = (x1, y1, x2 - x1, y2 - y1)
        segments.append({"category_id": category, "bbox": box, "rle": encode_rle(mask_HW), "score": score})
    return Predicted(objects=Objects.from_segments(segments, height=8, width=8))


def test_label_maps_fold_as_one_data_set() -> None:
    first = Agreement.of(labels([0, 0, 0, 1]), labels([0, 0, 0, 0]), SCENES)
    second = Agreement.of(labels([1, 1, 1, 1]), labels([1, 1, 1, 1]), SCENES)
    both = first.merge(second)
    assert (both.images, both.equal) == (2, 1)
    # Class 0: 3 of 4; class 1: 4 of 5. The mean of the images' own figures would be another.
    assert both.figures(SCENES)["mIoU"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert both.loss(SCENES) == pytest.approx(1 - (3 / 4 + 4 / 5) / 2)
    assert second.merge(first) == both
    assert Agreement().merge(both) == both


def test_instances_that_overlap_are_laid_over_each_other() -> None:
    category = COCO.ids[0]
    reference = objects((0, 0, 4, 4, category, 0.9), (2, 2, 8, 8, category, 0.5))
    same = Agreement.of(reference, objects((2, 2, 8, 8, category, 0.5), (0, 0, 4, 4, category, 0.9)), COCO)
    assert same.figures(COCO)["PQ"] == 1
    missing = Agreement.of(reference, objects((0, 0, 4, 4, category, 0.9)), COCO)
    assert missing.figures(COCO)["PQ"] == pytest.approx(1 / (1 + 0.5))
    assert missing.loss(COCO) == pytest.approx(1 / 3)


def test_no_object_on_either_side_loses_nothing() -> None:
    none = Agreement.of(objects(), objects(), COCO)
    assert math.isnan(none.figures(COCO)["PQ"])
    assert none.loss(COCO) == 0
    some = Agreement.of(objects(), objects((0, 0, 4, 4, COCO.ids[0], 0.9)), COCO)
    assert some.loss(COCO) == 1


def test_depth_counts_in_its_own_units() -> None:
    depth_HW = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    for unit in (1e-4, 1.0, 1e4):
        found = Agreement.of(Predicted(depth_HW=depth_HW * unit), Predicted(depth_HW=depth_HW * unit * 1.1), SCENES)
        assert found.figures(SCENES)["AbsRel"] == pytest.approx(0.1, rel=1e-4)
    assert Agreement.of(Predicted(depth_HW=depth_HW), Predicted(depth_HW=depth_HW), SCENES).loss(SCENES) == 0
    nothing_HW = np.zeros((3, 4), np.float32)
    assert Agreement.of(Predicted(depth_HW=nothing_HW), Predicted(depth_HW=depth_HW), SCENES).loss(SCENES) == math.inf


def test_what_cannot_be_compared() -> None:
    with pytest.raises(SchemaError, match="expected a label map"):
        Agreement.of(labels([0]), Predicted(depth_HW=np.ones((1, 1), np.float32)), SCENES)
    with pytest.raises(TargetMismatchError):
        Agreement.of(labels([0, 1]), labels([0], [1]), SCENES)
