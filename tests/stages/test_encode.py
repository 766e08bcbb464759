"""Predictions as columns: instances against torchvision's pasting and pycocotools, in little memory."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.masks import decode_depth, decode_label_map, decode_rle, encode_rle
from pipeline.models.spec import Instances, Prediction, Quality
from pipeline.rows import PREDICTIONS
from pipeline.stages.encode import encode, encode_instances


def instances(boxes: list[tuple[float, float, float, float]], seed: int = 0, side: int = 28) -> Instances:
    rng = np.random.default_rng(seed)
    count = len(boxes)
    # Smooth blobs, as a mask head gives them, and not white noise.
    coarse = torch.from_numpy(rng.random((count, 1, 5, 5), np.float32))
    masks = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0] if count else coarse[:, 0]
    return Instances(
        boxes_N4=np.array(boxes, np.float32).reshape(count, 4),
        scores_N=np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
        category_ids_N=rng.integers(1, 90, count),
        masks_NMM=masks.numpy(),
    )


def reference(found: Instances, width: int, height: int) -> list[dict[str, object]]:
    pasted = paste_masks_in_image(
        torch.from_numpy(found.masks_NMM)[:, None], torch.from_numpy(found.boxes_N4), (height, width)
    )
    segments = []
    for mask_1HW, score, category in zip(pasted, found.scores_N, found.category_ids_N, strict=True):
        rle = coco_mask.encode(np.asfortranarray((mask_1HW[0] > 0.5).numpy().astype(np.uint8)))
        if coco_mask.area(rle):
            segments.append(
                {
                    "id": len(segments) + 1,
                    "category_id": int(category),
                    "score": float(score),
                    "area": int(coco_mask.area(rle)),
                    "bbox": tuple(coco_mask.toBbox(rle).tolist()),
                    "rle": rle["counts"].decode(),
                }
            )
    return segments


COORDINATE = st.floats(-30, 90, width=32)
BOX = st.tuples(COORDINATE, COORDINATE, st.floats(0, 80, width=32), st.floats(0, 80, width=32)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@given(st.lists(BOX, min_size=1, max_size=6), st.integers(1, 70), st.integers(1, 70), st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_segments_are_torchvisions_masks(boxes: list[tuple[float, ...]], width: int, height: int, seed: int) -> None:
    found = instances(boxes, seed)  # type: ignore[arg-type]
    # Boxes outside of the image make torchvision's own pasting raise; ours drops them.
    inside = [max(x1, 0) < min(x2 + 1, width) and max(y1, 0) < min(y2 + 1, height) for x1, y1, x2, y2 in grown(found)]
    kept = Instances(
        boxes_N4=found.boxes_N4[inside],
        scores_N=found.scores_N[inside],
        category_ids_N=found.category_ids_N[inside],
        masks_NMM=found.masks_NMM[inside],
    )
    assert encode_instances(found, width=width, height=height) == reference(kept, width, height)


def grown(found: Instances) -> list[list[int]]:
    """Boxes as torchvision pastes them: grown with the one-pixel border of the mask, truncated to whole pixels."""
    x1, y1, x2, y2 = torch.from_numpy(found.boxes_N4).unbind(1)
    half_width, half_height, x, y = (x2 - x1) * 0.5, (y2 - y1) * 0.5, (x2 + x1) * 0.5, (y2 + y1) * 0.5
    side = found.masks_NMM.shape[-1]
    half_width, half_height = half_width * (side + 2) / side, half_height * (side + 2) / side
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], 1).to(torch.int64).tolist()


@pytest.mark.parametrize("boxes", [[], [(500.0, 500.0, 600.0, 600.0)], [(-90.0, 5.0, -50.0, 9.0)]])
def test_nothing_inside_gives_no_segments(boxes: list[tuple[float, float, float, float]]) -> None:
    assert encode_instances(instances(boxes), width=40, height=30) == []


def test_masks_without_a_pixel_are_dropped_and_ids_stay_dense() -> None:
    found = instances([(2, 2, 20, 20), (5, 5, 30, 25), (0, 0, 9, 9)])
    found.masks_NMM[:] = 1
    found.masks_NMM[1] = 0
    segments = encode_instances(found, width=40, height=30)
    assert [segment["id"] for segment in segments] == [1, 2]
    assert [segment["category_id"] for segment in segments] == found.category_ids_N[[0, 2]].tolist()


def test_a_full_mask_is_its_box() -> None:
    found = instances([(10, 5, 30, 25)])
    found.masks_NMM[:] = 1
    (segment,) = encode_instances(found, width=64, height=48)
    mask_HW = decode_rle(segment["rle"], width=64, height=48)
    assert segment["area"] == mask_HW.sum() == pytest.approx(400, rel=0.12)
    assert segment["bbox"] == pytest.approx((10, 5, 20, 20), abs=1.1)


def test_masks_of_other_sides_and_overlapping_ones() -> None:
    boxes = [(1.5, 1.5, 40.2, 30.7), (10.0, 10.0, 50.0, 28.0)]
    for side in (1, 14, 56):
        found = instances(boxes, side=side)
        assert encode_instances(found, width=60, height=40) == reference(found, 60, 40)


def test_a_hundred_masks_of_full_hd_need_one_canvas() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1600, 100), rng.uniform(0, 800, 100)
    found = instances(list(zip(x, y, x + 300, y + 260, strict=True)))
    encode_instances(found, width=64, height=48)
    tracemalloc.start()
    segments = encode_instances(found, width=1920, height=1080)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(segments) > 90
    assert peak < 4 * 1920 * 1080


@pytest.mark.parametrize("form", ["png", "zstd"])
def test_columns_fit_the_table(form: str) -> None:
    rng = np.random.default_rng(0)
    label_HW = rng.integers(0, 21, (30, 40)).astype(np.uint8)
    depth_HW = rng.random((30, 40)).astype(np.float32)
    quality = Quality(0.5, 0.25, 0.125)
    found = instances([(2, 2, 30, 20)])
    columns = {
        **encode(Prediction(label_HW=label_HW, quality=quality), form, width=40, height=30),  # type: ignore[arg-type]
        **encode(Prediction(instances=found), form, width=40, height=30),  # type: ignore[arg-type]
        **encode(Prediction(depth_HW=depth_HW, depth_kind="relative"), form, width=40, height=30),  # type: ignore[arg-type]
    }
    assert set(columns) == {"semantic", "quality", "segments", "depth"}
    schema = pa.schema([PREDICTIONS.field(name) for name in columns])
    (row,) = pa.Table.from_pylist([columns], schema=schema).to_pylist()
    np.testing.assert_array_equal(
        decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=40, height=30), label_HW
    )
    np.testing.assert_allclose(decode_depth(row["depth"], width=40, height=30), depth_HW, atol=1e-5)
    assert row["depth"]["kind"] == "relative"
    assert row["quality"] == {"mean_max_probability": 0.5, "mean_entropy": 0.25, "low_confidence_share": 0.125}
    assert [segment["rle"] for segment in row["segments"]] == [segment["rle"] for segment in columns["segments"]]


def test_what_a_task_lacks_is_left_out() -> None:
    assert encode(Prediction(), "png", width=4, height=3) == {}
    assert list(encode(Prediction(instances=instances([])), "png", width=4, height=3)) == ["segments"]


def test_boxes_alone_have_no_mask() -> None:
    boxes = [(1.0, 2.0, 4.5, 6.0), (-3.0, 0.0, 2.0, 90.0), (7.0, 7.0, 7.0, 9.0)]
    found = Instances(
        boxes_N4=np.array(boxes, np.float32),
        scores_N=np.array([0.9, 0.8, 0.7], np.float32),
        category_ids_N=np.array([3, 1, 2]),
    )
    first, second = encode_instances(found, width=10, height=8)
    assert (first["id"], first["category_id"], first["bbox"], first["area"], first["rle"]) == (
        1,
        3,
        (1.0, 2.0, 3.5, 4.0),
        14,
        None,
    )
    assert second["bbox"] == (0.0, 0.0, 2.0, 8.0)
    columns = pa.Table.from_pylist([{"segments": [first, second]}], schema=pa.schema([PREDICTIONS.field("segments")]))
    assert columns["segments"][0][0]["rle"].as_py() is None


@given(st.integers(0, 2**32 - 1))
def test_runs_are_kept_as_they_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks_NHW = rng.random((4, 7, 9)) < rng.random((4, 1, 1))
    masks_NHW[1] = False
    rles = tuple(encode_rle(mask_HW) for mask_HW in masks_NHW)
    found = Instances(
        boxes_N4=np.zeros((4, 4), np.float32),
        scores_N=np.ones(4, np.float32),
        category_ids_N=np.arange(4),
        rles=rles,
    )
    segments = encode_instances(found, width=9, height=7)
    kept = np.flatnonzero(masks_NHW.any((1, 2)))
    assert [segment["category_id"] for segment in segments] == kept.tolist()
    assert [segment["id"] for segment in segments] == list(range(1, len(kept) + 1))
    for segment, index in zip(segments, kept, strict=True):
        np.testing.assert_array_equal(decode_rle(segment["rle"], width=9, height=7), masks_NHW[index])
        rows, columns = np.nonzero(masks_NHW[index])
        assert segment["area"] == len(rows)
        assert segment["bbox"][:2] == (columns.min(), rows.min())
