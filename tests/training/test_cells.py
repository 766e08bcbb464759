"""Cells from every kind of target: as a flood fill, as the scene was painted, as pycocotools draws outlines."""

import io
import itertools
import json
from typing import Any

import numpy as np
import pytest
from border_helpers import flood_fill, same_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline.config import ScenesSource
from pipeline.config_train import TargetConfig
from pipeline.errors import TargetMismatchError
from pipeline.masks import encode_panoptic_png, encode_rle
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy
from pipeline.training.cells import annotation_cells, label_cells, segment_cells
from pipeline.training.task_targets import TaskTargets

Array = np.ndarray[Any, Any]
SCENES = load_taxonomy("scenes")
CAR, PERSON, SIGN = 5, 6, 7
KINDS = ("semantic", "panoptic", "instances")
SOURCE = ScenesSource(format="scenes", count=4, seed=2, width=128, height=96, targets=KINDS)

MAPS = arrays.arrays(
    st.sampled_from([np.uint8, np.uint16, np.int64]),
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.sampled_from([0, 1, 2, 255]),
    fill=st.nothing(),
)


@settings(deadline=None, max_examples=100)
@given(MAPS, st.sets(st.sampled_from([0, 1, 2, 9])))
def test_label_cells_are_a_flood_fills(label_HW: Array, classes: set[int]) -> None:
    found_HW = label_cells(label_HW, classes)
    assert found_HW.dtype == np.int32
    np.testing.assert_array_equal(found_HW, flood_fill(label_HW, classes))


@pytest.mark.parametrize("share", [0.3, 0.5927, 0.9])
def test_cells_that_wind_through_the_image(share: float) -> None:
    """At 0.5927 random pixels just hang together: the longest way round."""
    label_HW = (np.random.default_rng(3).random((150, 170)) < share).astype(np.uint8)
    np.testing.assert_array_equal(label_cells(label_HW, {1}), flood_fill(label_HW, {1}))


def test_a_line_askew_keeps_cells_apart_and_classes_do_not_grow_together() -> None:
    label_HW = np.ones((5, 7), np.uint8)
    label_HW[range(5), range(1, 6)] = 0
    assert sorted(np.unique(label_cells(label_HW, {1})).tolist()) == [0, 1, 2]
    halves_HW = np.array([[1, 1, 2, 2]], np.uint8)
    assert label_cells(halves_HW, {1, 2}).tolist() == [[1, 1, 2, 2]]
    assert label_cells(halves_HW, {2}).tolist() == [[0, 0, 1, 1]]


def test_no_pixel_has_no_cell() -> None:
    assert label_cells(np.zeros((3, 4), np.uint8), {1}).tolist() == [[0] * 4] * 3
    assert label_cells(np.ones((3, 4), np.uint8), ()).tolist() == [[0] * 4] * 3


def test_segments_that_are_cells_are_numbered() -> None:
    segment_HW = np.array([[0, 7000, 7000], [3000, 9, 9001]], np.int32)
    is_cell = {7000: True, 3000: False, 9: True, 9001: True, 12: True}
    found_HW = segment_cells(segment_HW, is_cell)
    assert found_HW.tolist() == [[0, 2, 2], [0, 1, 3]]
    assert found_HW.dtype == np.int32
    with pytest.raises(TargetMismatchError, match=r"ids that its JSON lacks: \[9\]"):
        segment_cells(segment_HW, {7000: True, 3000: False, 9001: True})


def annotation(segmentation: Any, **fields: Any) -> dict[str, Any]:
    return {"category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": segmentation} | fields


def rle(mask_HW: Any) -> dict[str, Any]:
    return {"size": [4, 6], "counts": encode_rle(np.asarray(mask_HW, np.uint8))}


def test_annotations_are_painted_with_the_smallest_on_top() -> None:
    """An outline, run lengths in both of their forms, a crowd, and what has no mask."""
    whole_HW, corner_HW = np.zeros((4, 6)), np.zeros((4, 6))
    whole_HW[:, :4], corner_HW[:2, 2:5] = 1, 1
    given = [
        annotation(rle(whole_HW)),
        annotation(rle(corner_HW), iscrowd=1),
        annotation([[0, 0, 2, 0, 2, 1, 0, 1]]),
        annotation({"size": [4, 6], "counts": [23, 1]}),
        annotation([]),
    ]
    expected = [[3, 3, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 4]]
    assert annotation_cells(given, height=4, width=6).tolist() == expected
    for order in itertools.permutations(given):
        assert same_partition(annotation_cells(order, height=4, width=6), np.array(expected))
    assert not annotation_cells([], height=4, width=6).any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (annotation({"size": [6, 4], "counts": rle(np.ones((4, 6)))["counts"]}), r"expected a mask of \[4, 6\]"),
        (annotation({"size": [4, 6], "counts": "05"}), "masks of 6x4"),
        (annotation({"size": [4, 6], "counts": "é"}), "expected run lengths"),
        (annotation({"size": [4, 6], "counts": "0000000000000"}), "masks of 6x4"),
        (annotation("text"), "expected COCO masks"),
    ],
)
def test_what_is_no_mask_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetMismatchError, match=message):
        annotation_cells([bad], height=4, width=6)


def samples() -> list[Any]:
    source = open_source(SOURCE)
    return [sample for unit in source.plan() for sample in source.read(unit, ()) if hasattr(sample, "image")]


def test_every_target_of_a_scene_has_its_things_as_cells() -> None:
    targets = TaskTargets(TargetConfig(), SOURCE, "semantic", SCENES)
    things = 0
    for index, sample in enumerate(samples()):
        scene = render_scene(index, seed=2, width=128, height=96)
        category_HW = scene.segment_HW // 1000 - 1
        for classes in ({CAR, PERSON, SIGN}, {PERSON}):
            expected_HW = np.where(np.isin(category_HW, [*classes]), scene.segment_HW, 0)
            things += len(np.unique(expected_HW)) - 1
            for kinds in (("semantic", "panoptic", "segments"), ("semantic", "instances"), (*KINDS, "segments")):
                given = {kind: data for kind, data in sample.targets.items() if kind in kinds}
                assert len(given) == len(kinds)
                found_HW = targets.cell_map(given, targets.label_map(given), classes)
                assert same_partition(found_HW, expected_HW)
            alone = {"semantic": sample.targets["semantic"]}
            found_HW = targets.cell_map(alone, targets.label_map(alone), classes)
            np.testing.assert_array_equal(found_HW, flood_fill(scene.semantic_HW, classes))
    assert things > 20


FINE = Taxonomy(
    "fine",
    "a test",
    tuple(
        Category(number, name, kind, (0, 0, 0))
        for number, name, kind in ((1, "car", "thing"), (2, "lorry", "thing"), (7, "sky", "stuff"))
    ),
    void_ids=(0,),
)


def png(array: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_cells_are_of_the_models_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of the targets become one of the model's, and stay two objects where the target says so."""
    monkeypatch.setattr("pipeline.training.task_targets.target_taxonomy", lambda score, source: FINE)
    config = TargetConfig.model_validate({"merge": {"car": ["car", "lorry"]}, "unknown_is_void": True})
    targets = TaskTargets(config, SOURCE, "semantic", SCENES)
    label_HW = np.array([[1, 1, 2, 2, 7, 1]], np.uint8)
    segment_HW = np.array([[11, 11, 12, 12, 13, 14]], np.int32)
    categories = {11: 1, 12: 2, 13: 7, 14: 99}
    given = {
        "semantic": png(label_HW),
        "panoptic": encode_panoptic_png(segment_HW),
        "segments": json.dumps([{"id": id_, "category_id": number} for id_, number in categories.items()]).encode(),
    }
    own_HW = targets.label_map(given)
    assert own_HW.tolist() == [[CAR, CAR, CAR, CAR, 0, CAR]]
    assert targets.cell_map(given, own_HW, {CAR}).tolist() == [[1, 1, 2, 2, 0, 0]]
    assert targets.cell_map({"semantic": given["semantic"]}, own_HW, {CAR}).tolist() == [[1, 1, 1, 1, 0, 2]]
    strict = TaskTargets(TargetConfig(), SOURCE, "semantic", SCENES)
    with pytest.raises(TargetMismatchError, match="99"):
        strict.cell_map(given, own_HW, {CAR})
