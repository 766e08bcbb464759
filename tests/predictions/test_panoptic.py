"""Panoptic predictions of others: the official figures, what is missing or broken, names that leave the folder."""

import json
import struct
import zlib
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prediction_helpers import find_all, fingerprints, prepare, score_all, sections
from source_faults import FlakyFileSystem

from pipeline.errors import (
    ConfigError,
    ImageTooLargeError,
    PredictError,
    StorageError,
    TargetMismatchError,
    UnreadableError,
)
from pipeline.masks import encode_panoptic_png
from pipeline.metrics.panoptic import PanopticState
from pipeline.predictions.base import Found, split_payload
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.coco import categories_of
from pipeline.sources.registry import open_source
from pipeline.taxonomy import Taxonomy
from pipeline.units import row_to_unit

MAP_HW = np.array([[0, 1, 1], [70_000, 70_000, 1]])
SEGMENTS = [{"id": 1, "category_id": 1, "iscrowd": 0, "area": 3}, {"id": 70_000, "category_id": 2, "iscrowd": 0}]


def annotation(number: int, name: str | None = None) -> dict[str, Any]:
    return {"image_id": number, "file_name": name or f"{number}.png", "segments_info": SEGMENTS}


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    """Images 1 to 3 of two segments each; the PNGs in the folder that COCO's habit expects."""
    tree = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 3, "height": 2} for n in (1, 2, 3)],
        "annotations": [annotation(n) for n in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    }
    (tmp_path / "targets").mkdir()
    for n in (1, 2, 3):
        (tmp_path / f"targets/{n}.png").write_bytes(encode_panoptic_png(MAP_HW))
    (tmp_path / "targets.json").write_text(json.dumps(tree))
    return {"format": "coco", "panoptic": tmp_path / "targets.json"}


@pytest.fixture
def predictions(tmp_path: Path) -> dict[str, Any]:
    """The same PNGs again, and no JSON yet."""
    (tmp_path / "pred").mkdir()
    for n in (1, 2, 3):
        (tmp_path / f"pred/{n}.png").write_bytes(encode_panoptic_png(MAP_HW))
    return {"format": "panoptic", "uri": tmp_path / "pred.json"}


def write(predictions: dict[str, Any], *annotations: Any) -> None:
    predictions["uri"].write_text(json.dumps({"annotations": annotations}))


def taxonomy_of(source: dict[str, Any]) -> Taxonomy:
    taxonomy = categories_of(sections(source, {"uri": "x"})[0])
    assert taxonomy is not None
    return taxonomy


def found_by_image(source: dict[str, Any], predictions: dict[str, Any], *annotations: Any) -> dict[str, Found | None]:
    write(predictions, *annotations)
    return {sample.image_id: found for sample, found in find_all(source, predictions)[0]}


def quality(scores: list[dict[str, Any]], taxonomy: Taxonomy) -> dict[str, Any]:
    states = (PanopticState.from_row(score["panoptic"]) for score in scores)
    return reduce(lambda one, other: one.merge(other), states).compute(taxonomy)


@pytest.mark.shared
def test_official_figures(shared_data: Path) -> None:
    root = shared_data / "panoptic4"
    source = {"format": "coco", "panoptic": root / "coco_gt.json", "unit_images": 3}
    pairs, names = find_all(source, {"format": "panoptic", "uri": root / "coco_pred.json"})
    found = quality(score_all(pairs, taxonomy_of(source)), taxonomy_of(source))
    assert names == []
    assert found["All"] == {
        "PQ": pytest.approx(0.6740486629, abs=1e-9),
        "SQ": pytest.approx(0.6834387674, abs=1e-9),
        "RQ": pytest.approx(0.8205128205, abs=1e-9),
        "n": 6,
    }
    assert found["Things"]["PQ"] == pytest.approx(0.5769675073, abs=1e-9)
    assert found["Stuff"]["PQ"] == pytest.approx(0.8682109740, abs=1e-9)


@pytest.mark.shared
def test_real_targets_against_themselves(shared_data: Path) -> None:
    panoptic = shared_data / "coco128" / "panoptic.json"
    source = {"format": "coco", "panoptic": panoptic}
    pairs, _ = find_all(source, {"format": "panoptic", "uri": panoptic})
    taxonomy = taxonomy_of(source)
    found = quality(score_all(pairs[:20], taxonomy, boundary=False), taxonomy)
    assert len(pairs) == 100
    assert (found["All"]["PQ"], found["All"]["n"] > 30) == (1.0, True)


def test_an_image_that_the_json_lacks_has_no_prediction(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    found = found_by_image(source, predictions, annotation(1), annotation(3))
    assert found["2.jpg"] is None
    assert [found[name].name for name in ("1.jpg", "3.jpg")] == ["1", "3"]  # type: ignore[union-attr]
    first = found["1.jpg"]
    assert first is not None
    assert first.predicted is not None
    np.testing.assert_array_equal(first.predicted.segment_HW, MAP_HW)
    assert ([*first.predicted.segments], first.width, first.height) == (SEGMENTS, 3, 2)


def test_images_that_the_source_lacks_are_named(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    write(predictions, annotation(1), annotation(9), annotation(8))
    assert find_all(source, predictions)[1] == ["8", "9"]
    assert find_all({**source, "limit": 2}, predictions)[1] is None


def test_an_image_twice_and_what_is_no_annotation(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    for annotations, message in (
        ([annotation(1), annotation(2), annotation(1)], r"annotations\[2\]: image 1 has an annotation already"),
        ([{**annotation(1), "image_id": "1"}, annotation(1)], "image 1 has an annotation already"),
        ([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}], "file_name must be a string"),
        ([{**annotation(1), "segments_info": {}}], "segments_info must be a list"),
    ):
        write(predictions, *annotations)
        with pytest.raises(ConfigError, match=message):
            find_all(source, predictions)


@pytest.mark.parametrize("name", ["../targets/1.png", "/etc/passwd", "a/../../targets/1.png", "file:///etc/passwd", ""])
def test_a_file_name_that_leaves_the_folder(source: dict[str, Any], predictions: dict[str, Any], name: str) -> None:
    found = found_by_image(source, predictions, {**annotation(1), "file_name": name}, annotation(2))
    assert isinstance(found["1.jpg"].error, UnreadableError)  # type: ignore[union-attr]
    assert "leads out of the folder" in str(found["1.jpg"].error)  # type: ignore[union-attr]
    assert found["1.jpg"].error_stage == "read"  # type: ignore[union-attr]
    assert found["2.jpg"].error is None  # type: ignore[union-attr]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header says another size than its few pixels have."""
    data = bytearray(encode_panoptic_png(MAP_HW))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "kind", "stage", "message"),
    [
        (None, UnreadableError, "read", "does not exist"),
        (b"", PredictError, "decode", "expected a PNG, got 0 bytes"),
        (encode_panoptic_png(MAP_HW)[:-30], PredictError, "decode", "Truncated"),
        (png_claiming(60_000, 60_000), ImageTooLargeError, "decode", "60000x60000"),
        (png_claiming(30, 20), PredictError, "decode", "cannot be read"),
        (b"x" * 5000, ImageTooLargeError, "read", "at most 1000 are read"),
    ],
)
def test_a_png_that_is_missing_or_broken_fails_alone(
    source: dict[str, Any], predictions: dict[str, Any], data: bytes | None, kind: type, stage: str, message: str
) -> None:
    path = predictions["uri"].parent / "pred/2.png"
    path.unlink() if data is None else path.write_bytes(data)
    found = found_by_image(source, {**predictions, "max_bytes": 1000}, annotation(2), annotation(3))
    second = found["2.jpg"]
    assert second is not None
    assert (type(second.error), second.error_stage, second.name) == (kind, stage, "2")
    assert message in str(second.error)
    assert found["3.jpg"].error is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "segment",
    [7, {"id": 1}, {"id": 1, "category_id": 1e999}]
    + [{"id": number, "category_id": 1} for number in ("1", True, 1.5, 1e999, 10**20, None)],
)
def test_segments_that_are_none(source: dict[str, Any], predictions: dict[str, Any], segment: Any) -> None:
    found = found_by_image(source, predictions, {**annotation(1), "segments_info": [segment]})
    assert isinstance(found["1.jpg"].error, PredictError)  # type: ignore[union-attr]


def test_fingerprints_follow_json_and_pngs_of_their_own_images(
    source: dict[str, Any], predictions: dict[str, Any]
) -> None:
    source = {**source, "unit_images": 1}
    write(predictions, *map(annotation, (1, 2, 3)))
    before = fingerprints(source, predictions)
    (predictions["uri"].parent / "pred/2.png").write_bytes(encode_panoptic_png(MAP_HW + 1))
    changed = fingerprints(source, predictions)
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, True]
    write(predictions, annotation(1), annotation(2), {**annotation(3), "segments_info": []})
    assert [a == b for a, b in zip(changed, fingerprints(source, predictions), strict=True)] == [True, True, False]


def test_where_the_pngs_are(source: dict[str, Any], predictions: dict[str, Any], tmp_path: Path) -> None:
    write(predictions, annotation(1))
    (tmp_path / "pred").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"does not exist or holds no files \(predictions.masks\)"):
        find_all(source, predictions)
    pairs, _ = find_all(source, {**predictions, "masks": tmp_path / "elsewhere"})
    assert pairs[0][1].predicted is not None  # type: ignore[union-attr]


def test_a_relative_folder_is_found_from_anywhere(
    source: dict[str, Any], predictions: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(predictions, annotation(1))
    monkeypatch.chdir(tmp_path)
    source_config, config = sections(source, {**predictions, "uri": "pred.json"})
    opened, plan = prepare(source_config, config)
    (row,) = plan.to_pylist()
    own, payload = split_payload(row["payload"])
    unit = row_to_unit({**row, "payload": own})
    sample = next(iter(read_unit(open_source(source_config), unit, (), images=False)))
    assert isinstance(sample, Sample)
    monkeypatch.chdir("/")
    found = opened.open_unit(unit, payload, "predictions").find(sample)
    assert found is not None
    assert found.error is None


def test_faults_of_the_storage(source: dict[str, Any], predictions: dict[str, Any], tmp_path: Path) -> None:
    write(predictions, *map(annotation, (1, 2, 3)))
    FlakyFileSystem.reset({f"p/{n}.png": encode_panoptic_png(MAP_HW) for n in (1, 2, 3)})
    predictions = {**predictions, "masks": "flaky://p"}
    FlakyFileSystem.faults += [0, 5]
    pairs, _ = find_all(source, predictions)
    assert [found.error for _, found in pairs if found] == [None] * 3
    assert FlakyFileSystem.raised == 2
    FlakyFileSystem.lasting += [0]
    with pytest.raises(StorageError, match="as always"):
        find_all(source, predictions)


def test_s3(s3: Any, source: dict[str, Any], predictions: dict[str, Any]) -> None:
    bucket = s3.bucket("panoptic")
    write(predictions, *map(annotation, (1, 2, 3)))
    for path in predictions["uri"].parent.glob("pred*/**/*.png"):
        s3.client.put_object(Bucket=bucket, Key=f"p/{path.name}", Body=path.read_bytes())
    s3.client.put_object(Bucket=bucket, Key="p.json", Body=predictions["uri"].read_bytes())
    there = {"format": "panoptic", "uri": f"s3://{bucket}/p.json", "storage": s3.options}
    before = len(s3.requests())
    pairs, names = find_all(source, there)
    assert names == []
    for _, found in pairs:
        assert found is not None
        assert found.predicted is not None
        np.testing.assert_array_equal(found.predicted.segment_HW, MAP_HW)
    # The listing said how large they are: one request each.
    assert len([line for line in s3.requests()[before:] if ".png" in line]) == 3


def test_a_category_or_id_that_is_unknown(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    strange = [{**SEGMENTS[0], "category_id": 99}, SEGMENTS[1]]
    write(predictions, {**annotation(1), "segments_info": strange}, {**annotation(2), "segments_info": SEGMENTS[:1]},
          annotation(3))  # fmt: skip
    first, second, third = score_all(find_all(source, predictions)[0], taxonomy_of(source))
    assert (first["error_type"], "categories that coco lacks: [99]" in first["error_message"]) == ("PredictError", True)
    assert (second["error_type"], "its JSON lacks: [70000]" in second["error_message"]) == ("PredictError", True)
    assert "panoptic" in third


def test_a_size_that_the_target_does_not_have(source: dict[str, Any], predictions: dict[str, Any]) -> None:
    (predictions["uri"].parent / "pred/1.png").write_bytes(encode_panoptic_png(MAP_HW.T))
    write(predictions, annotation(1), annotation(2), annotation(3))
    first, *others = score_all(find_all(source, predictions)[0], taxonomy_of(source))
    assert first["error_type"] == TargetMismatchError.__name__
    assert all("panoptic" in score for score in others)
