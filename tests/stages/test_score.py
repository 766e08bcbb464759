"""A prediction against its targets: each kind equals its metric state; mapping; what cannot be held against it."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.config import ScoreConfig
from pipeline.errors import ConfigError
from pipeline.masks import encode_depth, encode_label_map, encode_panoptic_png
from pipeline.metrics.boundary import BoundaryCounts, panoptic_states
from pipeline.metrics.confusion import ClassCounts, Confusion
from pipeline.metrics.depth import Depth, DepthOptions
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState
from pipeline.metrics.score import SCORE
from pipeline.predictions.base import Predicted
from pipeline.predictions.stored import stored
from pipeline.sources.scenes import render_scene
from pipeline.stages.score import Scorer, score_key
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy

SCENES = load_taxonomy("scenes")
VEHICLES = Taxonomy(
    "vehicles",
    "a test",
    (
        Category(3, "ground", "stuff", (1, 2, 3)),
        Category(7, "car", "thing", (4, 5, 6)),
        Category(9, "sky", "stuff", (7, 8, 9)),
    ),
)
MERGE = {"ground": ("road", "pavement")}


def png(array: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def scorer(pred: Taxonomy = SCENES, target: Taxonomy = SCENES, **options: Any) -> Scorer:
    return Scorer.build(ScoreConfig.model_validate(options), pred, target, max_pixels=1_000_000)


def semantic_targets(index: int) -> dict[str, bytes]:
    return {"semantic": png(render_scene(index).semantic_HW)}


def panoptic_targets(index: int) -> dict[str, bytes]:
    scene = render_scene(index)
    segments = [
        {"id": s.id, "category_id": s.category_id, "iscrowd": s.iscrowd, "area": s.area} for s in scene.segments
    ]
    return {
        "panoptic": encode_panoptic_png(scene.segment_HW),
        "segments": json.dumps({"segments_info": segments}).encode(),
    }


def instance_targets(index: int, **size: int) -> dict[str, bytes]:
    scene = render_scene(index)
    annotations = []
    for segment in scene.segments:
        if segment.category_id >= 5:
            rle = coco_mask.encode(np.asfortranarray(scene.segment_HW == segment.id, np.uint8))
            annotations.append(
                {
                    "id": segment.id,
                    "category_id": segment.category_id,
                    "iscrowd": segment.iscrowd,
                    "area": segment.area,
                    "bbox": [*segment.bbox],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return {"instances": json.dumps({"annotations": annotations, **size}).encode()}


def predicted_objects(index: int) -> list[dict[str, Any]]:
    """The next scene's things as if they were predicted for this one, and this one's own first thing."""
    items = json.loads(instance_targets(index)["instances"])["annotations"][:2]
    items += json.loads(instance_targets(index + 1)["instances"])["annotations"]
    return [
        {
            "category_id": item["category_id"],
            "bbox": item["bbox"],
            "rle": item["segmentation"]["counts"],
            "score": 0.9 - 0.05 * at,
        }
        for at, item in enumerate(items)
    ]


def as_row(score: dict[str, Any] | None) -> dict[str, Any]:
    """Through Arrow, as the table stores it."""
    (row,) = pa.array([score], SCORE).to_pylist()
    return row


def test_semantic_equals_its_states_and_is_lossless() -> None:
    target_HW, pred_HW = render_scene(3).semantic_HW, render_scene(4).semantic_HW
    row = as_row(scorer().score(Predicted(label_HW=pred_HW), semantic_targets(3), key="a"))
    assert Confusion.from_row(row["confusion"]) == Confusion.from_maps(target_HW, pred_HW, SCENES)
    assert ClassCounts.from_row(row["classes"]) == ClassCounts.from_maps(target_HW, pred_HW, SCENES)
    assert BoundaryCounts.from_row(row["boundary"]) == BoundaryCounts.from_maps(target_HW, pred_HW, SCENES)
    assert {key for key, value in row.items() if value is not None} == {"classes", "confusion", "boundary"}


def test_a_panoptic_target_serves_as_a_label_map() -> None:
    pred = Predicted(label_HW=render_scene(4).semantic_HW)
    assert scorer().score(pred, panoptic_targets(3), key=1) == scorer().score(pred, semantic_targets(3), key=1)


def test_panoptic_equals_its_states() -> None:
    target, pred = render_scene(3), render_scene(4)
    pred_segments = tuple({"id": s.id, "category_id": s.category_id} for s in pred.segments)
    given = Predicted(segment_HW=pred.segment_HW, segments=pred_segments)
    segments = json.loads(panoptic_targets(3)["segments"])["segments_info"]
    mask, boundary = panoptic_states(target.segment_HW, segments, pred.segment_HW, pred_segments, SCENES)
    row = as_row(scorer().score(given, panoptic_targets(3), key="a"))
    assert PanopticState.from_row(row["panoptic"]) == mask
    assert PanopticState.from_row(row["boundary_panoptic"]) == boundary
    row = as_row(scorer(boundary=False).score(given, panoptic_targets(3), key="a"))
    assert PanopticState.from_row(row["panoptic"]) == mask
    assert row["boundary_panoptic"] is None


def test_instances_equal_their_records() -> None:
    items = predicted_objects(3)
    pred = Objects.from_segments(items, height=192, width=256)
    targets = instance_targets(3)
    target = Objects.from_annotations(json.loads(targets["instances"])["annotations"], height=192, width=256)
    row = as_row(scorer().score(Predicted(objects=pred), targets, key="a", width=256, height=192))
    for kind in ("bbox", "segm"):
        assert Detection.from_row(row[kind]) == Detection.from_image("a", pred, target, kind)  # type: ignore[arg-type]
    assert Detection.from_row(row["bbox"]).image_counts()[0, 0] >= 1  # its own were found, the crowd aside


def test_depth_is_scored_as_stored() -> None:
    target_HW = render_scene(3).depth_HW
    code = encode_depth(target_HW * 1.1, "metric_m")
    row = {"width": 256, "height": 192, "depth": code}
    millimetres = (target_HW * 1000).astype(np.uint16)
    options = {"alignment": "median", "max_depth": 80.0}
    score = as_row(scorer(depth=options).score(stored(row, "depth"), {"depth": png(millimetres)}, key="a"))
    expected = Depth.from_image(
        stored(row, "depth").depth_HW,  # type: ignore[arg-type]
        np.where(millimetres == 0, np.nan, millimetres * 0.001),
        DepthOptions(alignment="median", max_depth=80.0),
    )
    assert Depth.from_row(score["depth"]) == expected
    assert expected.compute()["AbsRel"] < 0.01


def test_a_model_is_mapped_into_the_targets_space() -> None:
    own = render_scene(3).semantic_HW
    target_HW = np.full(own.shape, VEHICLES.void_id, np.uint8)
    target_HW[(own == 2) | (own == 3)] = 3
    target_HW[own == 5] = 7
    target_HW[own == 0] = 9
    mapped = scorer(SCENES, VEHICLES, merge=MERGE)
    score = mapped.score(Predicted(label_HW=own), {"semantic": png(target_HW)}, key="a")
    figures = Confusion.from_row(as_row(score)["confusion"]).compute()
    assert figures["mIoU"] == 1.0
    assert figures["n"] == 3


def test_mapped_stuff_is_one_segment_and_the_rest_void() -> None:
    scene = render_scene(3)
    segments = tuple({"id": s.id, "category_id": s.category_id} for s in scene.segments)
    mapped = scorer(SCENES, VEHICLES, merge=MERGE)
    target_HW = np.zeros(scene.segment_HW.shape, np.int32)
    info = []
    for identifier, members, category in ((1, (3000, 4000), 3), (2, (1000,), 9)):
        target_HW[np.isin(scene.segment_HW, members)] = identifier
        info.append({"id": identifier, "category_id": category})
    for s in scene.segments:
        if s.category_id == 5 and not s.iscrowd:
            target_HW[scene.segment_HW == s.id] = s.id
            info.append({"id": s.id, "category_id": 7})
    targets = {"panoptic": encode_panoptic_png(target_HW), "segments": json.dumps({"segments_info": info}).encode()}
    score = mapped.score(Predicted(segment_HW=scene.segment_HW, segments=segments), targets, key="a")
    figures = PanopticState.from_row(as_row(score)["panoptic"]).compute(VEHICLES)
    assert figures["Stuff"] == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0, "n": 2}


def test_unmapped_objects_are_left_out() -> None:
    pred = Objects.from_segments(predicted_objects(3), height=192, width=256)
    annotation = {"id": 1, "category_id": 7, "area": 16, "bbox": [0, 0, 4, 4], "iscrowd": 0}
    targets = {"instances": json.dumps({"annotations": [annotation], "width": 256, "height": 192}).encode()}
    score = as_row(scorer(SCENES, VEHICLES).score(Predicted(objects=pred), targets, key=5))
    records = Detection.from_row(score["bbox"])
    assert set(records.category_id.tolist()) == {7}
    assert len(records.category_id) == sum(item["category_id"] == 5 for item in predicted_objects(3))
    assert records.image_key == (f"{5:020d}",)


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (Predicted(label_HW=render_scene(0).semantic_HW), instance_targets(0)),
        (Predicted(objects=Objects.from_segments([], height=192, width=256)), semantic_targets(0)),
        (Predicted(depth_HW=np.ones((192, 256))), semantic_targets(0)),
        (Predicted(segment_HW=render_scene(0).segment_HW), semantic_targets(0)),
        (Predicted(label_HW=render_scene(0).semantic_HW), {}),
    ],
)
def test_no_target_of_the_kind_is_no_score(given: Predicted, targets: dict[str, bytes]) -> None:
    assert scorer().score(given, targets, key="a", width=256, height=192) is None


SMALL = Predicted(label_HW=np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    ("given", "targets", "kind", "words"),
    [
        (SMALL, semantic_targets(0), "TargetMismatchError", "256x192"),
        (SMALL, {"semantic": b"no png"}, "TargetMismatchError", "PNG"),
        (SMALL, {"semantic": png(np.full((4, 4), 99, np.uint8))}, "TargetMismatchError", "99"),
        (SMALL, {"semantic": png(np.zeros((4, 4, 3), np.uint8))}, "TargetMismatchError", "one channel"),
        (SMALL, {"panoptic": b"", "segments": b"{}"}, "TargetMismatchError", "PNG"),
        (
            Predicted(depth_HW=np.ones((2, 2))),
            {"depth": png(np.ones((4, 4), np.uint16))},
            "TargetMismatchError",
            "(4, 4)",
        ),
        (
            Predicted(objects=Objects.from_segments([], height=192, width=256)),
            instance_targets(0, width=255, height=192),
            "TargetMismatchError",
            "255x192",
        ),
        (
            Predicted(objects=Objects.from_segments([], height=9, width=9)),
            {"instances": b'{"annotations": [{"id": 1, "category_id": 77, "area": 4, "bbox": [0, 0, 2, 2]}]}'},
            "TargetMismatchError",
            "[77]",
        ),
        (
            Predicted(objects=Objects.from_segments([], height=9, width=9)),
            {"instances": b"{"},
            "TargetMismatchError",
            "JSON",
        ),
    ],
)
def test_what_cannot_be_held_against_is_said(
    given: Predicted, targets: dict[str, bytes], kind: str, words: str
) -> None:
    score = scorer().score(given, targets, key="a")
    assert score is not None
    assert score["error_type"] == kind
    assert words in score["error_message"]
    assert set(score) == {"error_type", "error_message"}


def test_target_ids_outside_the_taxonomy_may_be_void() -> None:
    target_HW = np.zeros((4, 4), np.uint8)
    target_HW[0] = 99
    lenient = scorer(unknown_is_void=True)
    score = lenient.score(SMALL, {"semantic": encode_label_map(target_HW)}, key="a")
    assert Confusion.from_row(as_row(score)["confusion"]).matrix.sum() == 12


def test_spaces_without_a_common_class_are_refused() -> None:
    with pytest.raises(ConfigError, match="no class in common"):
        scorer(load_taxonomy("ade20k150"), Taxonomy("x", "", (Category(0, "zzz", "stuff", (0, 0, 0)),)))


def test_the_key_is_the_coco_id_where_there_is_one() -> None:
    assert score_key("a.jpg", {"coco_id": "139"}) == 139
    assert score_key("a.jpg", {"coco_id": "x139"}) == "a.jpg"
    assert score_key("a.jpg", {}) == "a.jpg"
