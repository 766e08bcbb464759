"""What the page is told of each pixel: the very classes, segments and depths of the row or target, at any size."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from viewer_helpers import samples

from pipeline.config import ScoreConfig
from pipeline.errors import ImageTooLargeError, MaskmillError, SchemaError
from pipeline.masks import encode_depth, encode_label_map, encode_rle
from pipeline.stages.score import Scorer
from pipeline.targets import read_label_map
from pipeline.taxonomy import load_taxonomy
from pipeline.viewer.maps import PixelMap, row_map, target_map

SPACE = load_taxonomy("scenes")
LIMIT = 10**6


def decoded(found: PixelMap) -> tuple[dict[str, Any], Any]:
    """Header and codes as the page reads them."""
    data = found.encode()
    (length,) = struct.unpack("<I", data[:4])
    assert (4 + length) % 2 == 0
    header = json.loads(data[4 : 4 + length])
    return header, np.frombuffer(data[4 + length :], "<u2").reshape(header["rows"], header["columns"])


def test_label_maps_come_back_class_by_class() -> None:
    label_HW = np.array([[0, 0, 3, 255], [1, 1, 200, 255]], np.uint8)
    row = {"width": 4, "height": 2, "semantic": {"format": "png", "data": encode_label_map(label_HW)}}
    found = row_map(row, SPACE, 64, max_pixels=LIMIT)
    assert found is not None
    header, code_HW = decoded(found)
    ids = np.array([255, *(entry["id"] for entry in header["entries"])])
    assert np.array_equal(ids[code_HW], label_HW)
    names = {entry["id"]: entry["name"] for entry in header["entries"]}
    assert names == {**{c: SPACE.by_id[c].name for c in (0, 1, 3)}, 200: "class 200"}
    assert [entry["share"] for entry in header["entries"]] == [2 / 8, 2 / 8, 1 / 8, 1 / 8]


def test_the_best_segment_is_on_top_and_boxes_are_entries() -> None:
    low_HW, high_HW = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    low_HW[:, :4], high_HW[1:3, 2:6] = True, True
    segments = [
        {"id": 1, "category_id": 2, "score": 0.4, "area": 16, "bbox": [0, 0, 4, 4], "rle": encode_rle(low_HW)},
        {"id": 2, "category_id": 1, "score": 0.9, "area": 8, "bbox": [2, 1, 4, 2], "rle": encode_rle(high_HW)},
        {"id": 3, "category_id": 1, "score": 0.1, "area": 4, "bbox": [float("nan"), 0, 1, 1], "rle": None},
    ]
    found = row_map({"width": 6, "height": 4, "segments": segments}, SPACE, 64, max_pixels=LIMIT)
    assert found is not None
    header, code_HW = decoded(found)
    assert [entry["score"] for entry in header["entries"]] == [0.9, 0.4, 0.1]
    assert np.array_equal(code_HW, np.where(high_HW, 1, np.where(low_HW, 2, 0)))
    assert [entry["masked"] for entry in header["entries"]] == [True, True, False]
    assert header["entries"][2]["box"] is None


@pytest.mark.parametrize(("kind", "near"), [("metric_m", 1.0), ("relative", 1.0), ("inverse_relative", 9.0)])
def test_depth_comes_back_within_its_rounding(kind: str, near: float) -> None:
    depth_HW = np.tile(np.linspace(1, 9, 101, dtype=np.float32), (2, 1))
    depth_HW[0, 0] = np.nan
    row = {"width": 101, "height": 2, "depth": encode_depth(depth_HW, kind)}
    found = row_map(row, SPACE, 512, max_pixels=LIMIT)
    assert found is not None
    header, code_HW = decoded(found)
    value_HW = np.where(code_HW == 0, np.nan, code_HW * header["scale"] + header["offset"])
    assert np.allclose(value_HW, depth_HW, atol=8 / 60000, equal_nan=True)
    assert header["near"] == pytest.approx(near, abs=0.2)
    flat = row_map({**row, "depth": encode_depth(np.full((2, 101), 4.0, np.float32), kind)}, SPACE, 9, max_pixels=LIMIT)
    assert flat is not None
    header, code_HW = decoded(flat)
    assert np.allclose(code_HW * header["scale"] + header["offset"], 4.0)


def test_a_large_map_is_sampled() -> None:
    label_HW = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 50, 0), 50, 1)
    row = {"width": 150, "height": 100, "semantic": {"format": "zstd", "data": encode_label_map(label_HW, "zstd")}}
    found = row_map(row, SPACE, 30, max_pixels=LIMIT)
    assert found is not None
    header, code_HW = decoded(found)
    assert (header["columns"], header["rows"], header["width"], header["height"]) == (30, 20, 150, 100)
    assert np.array_equal(code_HW, np.repeat(np.repeat(np.arange(1, 7).reshape(2, 3), 10, 0), 10, 1))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"width": 3000, "height": 3000, "semantic": {"format": "png", "data": b""}}, ImageTooLargeError),
        ({"width": 30, "height": 30, "semantic": {"format": "png", "data": b"GIF89a"}}, SchemaError),
        ({"width": None, "height": None, "semantic": {"format": "png", "data": b""}}, SchemaError),
        ({"width": -5, "height": -5, "depth": {"format": "zstd", "data": b""}}, SchemaError),
        ({"width": 4, "height": 4, "segments": [{"category_id": 1, "score": 1.0, "area": 1, "bbox": None, "rle": "~"}]},
         SchemaError),
    ],
)  # fmt: skip
def test_what_is_no_map_is_refused(row: dict[str, Any], error: type[MaskmillError]) -> None:
    with pytest.raises(error):
        row_map(row, SPACE, 64, max_pixels=LIMIT)


def test_no_prediction_is_no_map() -> None:
    assert row_map({"width": 4, "height": 4, "segments": None, "semantic": None}, SPACE, 64, max_pixels=LIMIT) is None


def test_targets_of_every_kind() -> None:
    sample = samples()[0]
    scorer = Scorer.build(ScoreConfig(), SPACE, SPACE, max_pixels=LIMIT)

    def read(kind: str, *names: str) -> tuple[dict[str, Any], Any]:
        targets = {name: sample.targets[name] for name in names}
        found = target_map(targets, kind, scorer, 64, width=64, height=48)
        assert found is not None
        return decoded(found)

    label_HW = read_label_map(sample.targets["semantic"], max_pixels=LIMIT)
    header, code_HW = read("semantic", "semantic")
    ids = np.array([SPACE.void_id, *(entry["id"] for entry in header["entries"])])
    assert np.array_equal(ids[code_HW], np.where(np.isin(label_HW, SPACE.ids), label_HW, SPACE.void_id))
    header, code_HW = read("segments", "instances")
    annotations = json.loads(sample.targets["instances"])["annotations"]
    assert [entry["id"] for entry in header["entries"]] == [item["category_id"] for item in annotations]
    assert set(np.unique(code_HW)) <= set(range(len(annotations) + 1))
    header, code_HW = read("depth", "depth")
    assert header["depth"] == "metric_m"
    assert code_HW.any()
    if "panoptic" in sample.targets and "segments" in sample.targets:
        header, code_HW = read("segments", "panoptic", "segments")
        ids = np.array([SPACE.void_id, *(entry["id"] for entry in header["entries"])])
        assert np.array_equal(ids[code_HW], label_HW)
    assert target_map({}, "semantic", scorer, 64, width=64, height=48) is None
