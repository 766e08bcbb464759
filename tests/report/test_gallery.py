"""Pictures of single images: colours by hand, the same matches as the metrics count, and no crash on any input."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_helpers import HEIGHT, SOURCE, TASKS, TAXONOMY, WIDTH, predict, samples, scorer
from PIL import Image

from pipeline.config import DepthScoreConfig, ScoreConfig
from pipeline.errors import PredictError, UnreadableError
from pipeline.masks import encode_label_map, encode_rle
from pipeline.metrics.depth import DepthOptions
from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import Objects
from pipeline.metrics.panoptic import PanopticState
from pipeline.panels import (
    MISSED,
    PANEL,
    RIGHT,
    WRONG,
    _match_objects,
    _match_segments,
    depth_panels,
    image_panel,
    label_panels,
    object_panels,
    panoptic_panels,
)
from pipeline.predictions.base import Found, Predicted
from pipeline.preview import read_images
from pipeline.report.gallery import PANELS, Picture, collect_pictures
from pipeline.sources.base import Sample
from pipeline.sources.scenes import render_scene
from pipeline.stages.score import Scorer
from pipeline.targets import read_instances, read_panoptic, read_segments
from pipeline.taxonomy import build_taxonomy

GRAY = np.full((3, 4, 3), 100, np.uint8)
HATCH = ({96}, {130}, {96, 130})


def is_hatched(rgb_HWC: np.ndarray, mask_HW: np.ndarray) -> bool:
    return set(rgb_HWC[mask_HW].ravel().tolist()) in HATCH


def near(color: np.ndarray, wanted: tuple[int, int, int]) -> bool:
    """Of the hue that was mixed in: its channels are ordered alike."""
    return np.argsort(color.astype(int)).tolist() == np.argsort(wanted).tolist()


def test_label_errors_by_hand() -> None:
    target_HW = np.array([[0, 0, 1, 255], [0, 0, 1, 255], [5, 5, 7, 9]], np.uint8)
    pred_HW = np.array([[0, 1, 1, 3], [0, 0, 1, 255], [5, 5, 7, 7]], np.uint8)
    panels = label_panels(GRAY, target_HW, pred_HW, TAXONOMY, void=(7,))
    assert list(panels) == ["image", "target", "prediction", "error"]
    error = panels["error"]
    void_HW = np.isin(target_HW, (255, 7, 9))  # 9 is no class of the taxonomy
    assert is_hatched(error, void_HW)
    wrong_HW = np.zeros((3, 4), bool)
    wrong_HW[0, 1] = True
    assert near(error[0, 1], WRONG)
    dim = error[~wrong_HW & ~void_HW]
    assert (dim == dim[0]).all()
    assert dim.max() < 100
    assert (panels["image"] == 100).all()
    assert not (panels["target"] == panels["prediction"]).all()
    # Maps of two sizes are drawn, but not compared.
    assert "error" not in label_panels(GRAY, target_HW, pred_HW[:2], TAXONOMY)
    assert list(label_panels(None, target_HW, None, TAXONOMY)) == ["target"]


@pytest.mark.parametrize("size", [(1, 1), (7, 4000), (3000, 11), (360, 360), (719, 480)])
def test_panels_are_small_whatever_the_image_is(size: tuple[int, int]) -> None:
    height, width = size
    image_HWC = np.zeros((*size, 3), np.uint8)
    (only,) = image_panel(image_HWC).values()
    assert max(only.shape[:2]) <= PANEL
    map_HW = np.zeros(size, np.uint8)
    panels = label_panels(image_HWC[: height // 2 + 1], map_HW, map_HW, TAXONOMY)
    assert {panels[name].shape for name in ("target", "prediction", "error")} == {only.shape}
    assert only.shape[0] / only.shape[1] == pytest.approx(height / width, rel=0.5) or min(size) < 20
    assert image_panel(None) == {}


def scene_sides(index: int) -> tuple[Any, Any, Sample]:
    sample = next(sample for sample, number in samples() if number == index)
    target_HW = read_panoptic(sample.targets["panoptic"], max_pixels=10**7)
    predicted = predict("panoptic", index)
    segments = read_segments(sample.targets["segments"])
    return (target_HW, segments), (predicted.segment_HW, predicted.segments), sample


@pytest.mark.parametrize("index", [0, 3, 10])
def test_segments_are_matched_as_panoptic_quality_counts_them(index: int) -> None:
    target, pred, _ = scene_sides(index)
    state = PanopticState.from_segments(*target, *pred, TAXONOMY)
    matched_target, missed, matched_pred, wrong = _match_segments(target, pred)
    counted = [int(state.column(name).sum()) for name in ("tp", "fp", "fn")]
    assert [len(matched_pred), len(wrong), len(missed)] == counted
    assert len(matched_target) == len(matched_pred)


@given(st.data())
def test_any_segments_are_matched_as_panoptic_quality_counts_them(data: st.DataObject) -> None:
    """Crowds, void, wrong areas and segments that are not there."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = (9, 12)
    target_HW, pred_HW = (np.kron(draw.integers(0, 5, (3, 4)), np.ones((3, 3), int)) for _ in range(2))
    shift = int(draw.integers(0, 3))
    pred_HW = np.where(draw.random(shape) < 0.15, pred_HW, np.roll(target_HW, shift, axis=1))

    def listed(map_HW: np.ndarray, *, crowds: bool) -> list[dict[str, int]]:
        ids = np.unique(map_HW[map_HW > 0]).tolist()
        segments = [{"id": i, "category_id": int(draw.integers(4, 7))} for i in ids]
        for segment in segments if crowds else []:
            segment["iscrowd"] = int(draw.random() < 0.25)
            segment["area"] = int((map_HW == segment["id"]).sum()) + int(draw.integers(0, 3))
        return segments

    target, pred = (target_HW, listed(target_HW, crowds=True)), (pred_HW, listed(pred_HW, crowds=False))
    state = PanopticState.from_segments(*target, *pred, TAXONOMY)
    _, missed, matched_pred, wrong = _match_segments(target, pred)
    # Two targets can match one prediction where an area is too small; the picture has it once.
    assert [len(wrong), len(missed)] == [int(state.column(name).sum()) for name in ("fp", "fn")]
    assert len(matched_pred) <= int(state.column("tp").sum())


def test_panoptic_errors_by_hand() -> None:
    target_HW = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 3, 3]], np.int32)
    pred_HW = np.array([[1, 1, 9, 9], [1, 1, 9, 9], [0, 0, 0, 0]], np.int32)
    target = (target_HW, [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 6}, {"id": 3, "category_id": 1}])
    pred = (pred_HW, [{"id": 1, "category_id": 5}, {"id": 9, "category_id": 7}])
    error = panoptic_panels(GRAY, target, pred, TAXONOMY)["error"]
    assert near(error[0, 0], RIGHT)
    assert near(error[0, 3], WRONG)  # a sign where there is a person
    assert error[0, 2].tolist() == list(MISSED)  # whose outline shows through
    assert near(error[2, 3], MISSED)
    assert is_hatched(error, target_HW == 0)
    with pytest.raises(KeyError):
        panoptic_panels(GRAY, (target_HW, target[1][:1]), None, TAXONOMY)


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_objects_are_matched_as_detection_counts_them(kind: Any) -> None:
    wanted = ("tp", "fp", "fn")
    for sample, index in samples():
        annotations, _, _ = read_instances(sample.targets["instances"])
        target = Objects.from_annotations(annotations, height=HEIGHT, width=WIDTH)
        pred = predict("objects", index).objects
        assert pred is not None
        if kind == "bbox":
            target, pred = (_without_masks(side) for side in (target, pred))
        order = np.argsort(-pred.score, kind="stable")
        counts = dict(zip(wanted, map(len, _match_objects(target, pred, order)), strict=True))
        state = Detection.from_image(sample.image_id, pred, target, kind)
        assert counts == dict(zip(wanted, state.image_counts()[0].tolist(), strict=True)), index


def _without_masks(side: Objects) -> Objects:
    names = ("height", "width", "category_id", "bbox_N4", "score", "area", "crowd")
    return Objects(**{name: getattr(side, name) for name in names})


def objects(boxes: list[list[float]], kind: int = 5, *, masks: bool = False, **more: Any) -> Objects:
    """Boxes in a picture of 40 x 30, or the masks that fill them."""
    rles = []
    for x, y, w, h in boxes:
        inside_HW = np.zeros((30, 40), bool)
        inside_HW[int(y) : int(y + h), int(x) : int(x + w)] = True
        rles.append({"size": [30, 40], "counts": encode_rle(inside_HW)})
    return Objects(
        height=30, width=40, category_id=np.full(len(boxes), kind), bbox_N4=np.array(boxes, float).reshape(-1, 4),
        segmentation=rles if masks else None, **more,
    )  # fmt: skip


@pytest.mark.parametrize("masks", [True, False])
def test_object_errors_by_hand(masks: bool) -> None:
    image_HWC = np.full((30, 40, 3), 100, np.uint8)
    target = objects([[2, 2, 8, 8], [25, 5, 10, 10]], masks=masks)
    pred = objects([[2, 2, 8, 9], [2, 20, 8, 8], [25, 5, 9, 9]], masks=masks, score=np.array([0.9, 0.6, 0.2]))
    panels = object_panels(image_HWC, target, pred, TAXONOMY, 0.5)
    error, inner = panels["error"], (lambda x, y: (y, x)) if not masks else (lambda x, y: (y + 3, x + 3))
    assert near(error[inner(2, 2)], RIGHT)
    assert near(error[inner(2, 20)], WRONG)
    assert near(error[inner(25, 5)], MISSED)  # its prediction's score is too low
    assert (panels["prediction"][5:16, 24:37] == 100).all()
    assert not (panels["target"][5:16, 24:37] == 100).all()


def test_boxes_that_are_none() -> None:
    odd = objects([[2, 2, -8, 8], [-1e9, 3, 1e12, 1e12]], score=np.array([0.9, 0.8]))
    assert list(object_panels(None, objects([]), odd, TAXONOMY, 0.5)) == ["target", "prediction", "error"]


def test_depth_errors_by_hand() -> None:
    target_HW = np.array([[2.0, 2.0, 2.0], [4.0, 8.0, np.nan]])
    pred_HW = np.array([[1.0, 2.0, 4.0], [4.0, np.nan, 3.0]])
    panels = depth_panels(None, target_HW, pred_HW, "metric_m", DepthOptions())
    error = panels["error"].astype(int)
    assert error[0, 0, 2] > error[0, 0, 0] + 80  # too near: blue
    assert error[0, 2, 0] > error[0, 2, 2] + 80  # too far: red
    assert np.ptp(error[0, 1]) < 10
    assert (error[0, 1] == error[1, 0]).all()
    assert error[1, 1, 2] > error[1, 1, 0]  # no prediction counts as the nearest depth
    unknown_HW = np.isnan(target_HW)
    assert is_hatched(panels["error"], unknown_HW)
    assert is_hatched(panels["target"], unknown_HW)
    # The same depth has the same colour on both sides.
    assert (panels["target"][1, 0] == panels["prediction"][1, 0]).all()
    with pytest.raises(PredictError):
        depth_panels(None, target_HW, np.array([[0.0, 1, 1], [1, 1, 1]]), "inverse_relative", DepthOptions())


def test_depth_is_compared_as_it_is_scored() -> None:
    """After alignment, inside the cap and the crop."""
    depth_HW = render_scene(1, width=128, height=96).depth_HW.astype(np.float64)
    depth_HW[depth_HW == 0] = np.nan
    options = DepthOptions(alignment="median", max_depth=20.0, crop="kitti_garg")
    error = depth_panels(None, depth_HW, depth_HW * 3, "metric_m", options)["error"]
    hatched_HW = np.isin(error, (96, 130)).all(axis=2)
    assert (np.ptp(error[~hatched_HW].astype(int), axis=1) < 10).all()
    assert hatched_HW[:30].all()
    assert hatched_HW[np.nan_to_num(depth_HW, nan=99) > 20].all()
    inverse = depth_panels(None, depth_HW, 1 / depth_HW, "inverse_relative", DepthOptions(max_depth=65))["error"]
    known = inverse[np.isfinite(depth_HW)].astype(int)
    assert (np.ptp(known, axis=1) < 10).all()


ROWS = [{"image_id": f"row {n}", "value": n / 10} for n in range(3)]
SAMPLES = [sample for sample, _ in samples()][:3]


def found(kind: str, sample: Sample) -> Found:
    index = SAMPLES.index(sample)
    return Found(name=sample.image_id, predicted=predict(kind, index), width=WIDTH, height=HEIGHT)


def decoded(picture: Picture) -> dict[str, np.ndarray]:
    shown = {}
    for name, data, mime in picture.panels:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, mime) == ("WEBP", "image/webp")
            shown[name] = np.asarray(image.convert("RGB")).astype(int)
    return shown


@pytest.mark.parametrize("kind", TASKS)
def test_pictures_of_every_kind(kind: str) -> None:
    places = [(SAMPLES[2], 1), (SAMPLES[0], 2)]
    gone, first, second = collect_pictures(ROWS, places, lambda sample: found(kind, sample), scorer())
    assert (gone.caption, gone.value, gone.panels) == ("row 0", 0.0, ())
    assert "not in the source" in gone.note
    assert (first.caption, first.value, first.note) == ("row 1", 0.1, "")
    for picture, index in ((first, 2), (second, 0)):
        shown = decoded(picture)
        assert tuple(shown) == PANELS
        assert {rgb.shape for rgb in shown.values()} == {(270, 360, 3)}
        image_HWC = render_scene(index, seed=SOURCE.seed, width=WIDTH, height=HEIGHT).image_HWC
        assert np.abs(shown["image"] - np.asarray(Image.fromarray(image_HWC).resize((360, 270)))).mean() < 8
        assert sum(len(panel.data) for panel in picture.panels) < 100_000


def test_pictures_come_from_a_source() -> None:
    rows = [
        {"image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position, "value": None}
        for sample in SAMPLES[::-1]
    ]
    by_id = {sample.image_id: index for index, sample in enumerate(SAMPLES)}

    def find(sample: Sample) -> Found:
        return Found(name="", predicted=predict("labels", by_id[sample.image_id]))

    pictures = collect_pictures(rows, read_images(SOURCE, rows), find, scorer())
    assert [picture.caption for picture in pictures] == [row["image_id"] for row in rows]
    assert all(len(picture.panels) == 4 and not picture.note for picture in pictures)


def changed(sample: Sample, **more: Any) -> Sample:
    names = ("image_id", "shard_id", "position", "image", "targets", "fields", "error")
    return Sample(**{name: getattr(sample, name) for name in names} | more)


def one(sample: Sample, kind: str = "labels", answer: Found | str | None = "", by: Scorer | None = None) -> Picture:
    prediction = found(kind, SAMPLES[0]) if isinstance(answer, str) else answer
    (picture,) = collect_pictures(ROWS[:1], [(sample, 0)], lambda _: prediction, by or scorer())
    return picture


BROKEN_TARGETS: Mapping[str, Mapping[str, bytes]] = {
    "labels": {"semantic": b"no png"},
    "panoptic": {**SAMPLES[0].targets, "segments": json.dumps({"segments_info": [{"id": 1}]}).encode()},
    "objects": {"instances": json.dumps({"annotations": [{"bbox": "x"}]}).encode()},
    "depth": {"depth": encode_label_map(np.zeros((3, 3), np.uint8))},
}


@pytest.mark.parametrize("kind", TASKS)
def test_what_cannot_be_read_is_left_out_and_said(kind: str) -> None:
    whole = ["image", "target", "prediction", "error"]
    lost = one(changed(SAMPLES[0], image=b"", error=UnreadableError("it is gone")), kind)
    assert ([panel.name for panel in lost.panels], lost.note) == (whole[1:], "no image: it is gone")
    assert "no image: " in one(changed(SAMPLES[0], image=b"x"), kind).note
    alone = one(changed(SAMPLES[0], image=b""), kind)  # a source of targets alone
    assert ([panel.name for panel in alone.panels], alone.note) == (whole[1:], "")
    assert [panel.name for panel in one(changed(SAMPLES[0], targets={}), kind).panels] == ["image", "prediction"]
    broken = one(changed(SAMPLES[0], targets=BROKEN_TARGETS[kind]), kind)
    assert {"image", "prediction"} <= {panel.name for panel in broken.panels}
    assert "error" not in {panel.name for panel in broken.panels}
    assert broken.note or kind == "depth"
    for answer, note in (
        (None, "no prediction"),
        (Found(name="", error=PredictError("it broke"), error_stage="decode"), "no prediction: it broke"),
    ):
        without = one(SAMPLES[0], kind, answer)
        assert ([panel.name for panel in without.panels], without.note) == (["image"], note)
    assert collect_pictures(ROWS[:1], [(SAMPLES[0], 0)], lambda _: found(kind, SAMPLES[0]), None)[0].panels[1:] == ()


def test_predictions_that_do_not_fit() -> None:
    for predicted in (
        Predicted(label_HW=np.full((5, 7), 200, np.uint8)),
        Predicted(label_HW=np.zeros((0, 0), np.uint8)),
        Predicted(segment_HW=np.ones((5, 7), np.int32), segments=()),
        Predicted(segment_HW=np.ones((HEIGHT, WIDTH), np.int32), segments=({"id": 1, "category_id": 300},)),
        Predicted(objects=objects([[1, 1, 3, 3]], 300, score=np.array([0.9]))),
        Predicted(objects=objects([[1, 1, 3, 3]], score=np.array([np.nan]))),
        Predicted(depth_HW=np.full((HEIGHT, WIDTH), np.inf)),
        Predicted(depth_HW=np.zeros((2, 3))),
    ):
        picture = one(SAMPLES[0], answer=Found(name="", predicted=predicted))
        assert {"image", "target"} <= {panel.name for panel in picture.panels}, picture
        assert len(picture.note) <= 300


def test_predictions_are_mapped_as_they_are_scored() -> None:
    """A model that calls a car a vehicle and knows no signs: drawn in the targets' colours."""
    other = build_taxonomy(
        {
            "name": "other",
            "source": "this test",
            "categories": [
                {"id": 40 + c.id, "name": "vehicle" if c.name == "car" else c.name, "kind": c.kind, "color": [1, 2, 3]}
                for c in TAXONOMY.categories
                if c.name != "sign"
            ],
        },
        "here",
    )
    options = ScoreConfig(merge={"car": ("vehicle",)}, depth=DepthScoreConfig())
    mapped = Scorer.build(options, other, TAXONOMY, max_pixels=10**7)
    scene = render_scene(0, seed=SOURCE.seed, width=WIDTH, height=HEIGHT)
    assert 7 in scene.semantic_HW
    known_HW = (scene.semantic_HW != 255) & (scene.semantic_HW != 7)
    label_HW = np.where(known_HW, scene.semantic_HW + 40, 255).astype(np.uint8)
    shown = decoded(one(SAMPLES[0], answer=Found(name="", predicted=Predicted(label_HW=label_HW)), by=mapped))
    near_HW = known_HW[::4, ::4]
    difference_HW = np.abs(shown["prediction"] - shown["target"]).max(axis=2)
    rows, columns = np.indices(near_HW.shape) * 270 // 72
    assert np.median(difference_HW[rows.clip(0, 269), columns.clip(0, 359)][near_HW]) < 6
    segments = tuple({"id": s.id, "category_id": s.category_id + 40} for s in scene.segments if s.category_id != 7)
    segment_HW = np.where(np.isin(scene.segment_HW, [s["id"] for s in segments]), scene.segment_HW, 0)
    predicted = Predicted(segment_HW=segment_HW, segments=segments)
    assert one(SAMPLES[0], answer=Found(name="", predicted=predicted), by=mapped).note == ""
    cars = objects([[1, 1, 3, 3]], 45, score=np.array([0.9]))
    assert one(SAMPLES[0], answer=Found(name="", predicted=Predicted(objects=cars)), by=mapped).note == ""
