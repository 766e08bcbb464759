"""Predictions found by templates: label maps and depth, any kind of source, what is missing, broken or strange."""

import io
import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prediction_helpers import find_all, fingerprints, score_all
from source_faults import FlakyFileSystem
from source_helpers import http_server, tar_bytes, write_tree

from pipeline.errors import ConfigError, ImageTooLargeError, PredictError, RowError, StorageError, UnreadableError
from pipeline.metrics.confusion import ClassCounts
from pipeline.metrics.depth import Depth
from pipeline.predictions.base import Found
from pipeline.taxonomy import load_taxonomy

LABEL_HW = np.array([[0, 1, 2], [7, 7, 255]], np.uint8)


def png(array: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


LABELS = png(LABEL_HW)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A source of three images in two folders, with predictions of two of them and of one that it does not have."""
    write_tree(
        tmp_path,
        {f"img/{name}.jpg": b"" for name in ("ulm/1", "ulm/2", "bonn/1")}
        | {f"ann/{name}.png": LABELS for name in ("ulm/1", "ulm/2", "bonn/1")}
        | {f"pred/{name}_p.png": LABELS for name in ("ulm/1", "bonn/1", "rome/5")}
        | {"pred/ulm/1_q.png": b"", "pred/readme.txt": b""},
    )
    return {"format": "files", "uri": tmp_path / "img", "targets": {"semantic": "../ann/{dir}/{stem}.png"}}


def by_image(source: dict[str, Any], predictions: dict[str, Any]) -> dict[str, Found | None]:
    return {sample.image_id: found for sample, found in find_all(source, predictions)[0]}


@pytest.mark.shared
def test_real_camvid_against_itself_without_an_image(shared_data: Path) -> None:
    source = {
        "format": "files",
        "uri": shared_data / "camvid" / "valannot",
        "targets": {"semantic": "{stem}.png"},
        "unit_images": 40,
    }
    pairs, names = find_all(source, {"format": "files", "uri": "{stem}.png"})
    assert len(pairs) == 101
    assert names == [found.name for _, found in pairs if found]
    assert all(sample.image == b"" for sample, _ in pairs)
    taxonomy = load_taxonomy("camvid11")
    counts = (ClassCounts.from_row(score["classes"]) for score in score_all(pairs[:30], taxonomy, boundary=False))
    figures = reduce(lambda one, other: one.merge(other), counts).compute(taxonomy)
    assert figures["mIoU"] == figures["pixel_accuracy"] == 1.0


@pytest.mark.shared
def test_real_depth_pair(shared_data: Path) -> None:
    root = shared_data / "depth_pair"
    source = {"format": "files", "uri": root, "images": "{id}.png", "targets": {"depth": "depth.npy"}}
    pairs, names = find_all(source, {"format": "depth", "uri": "pred.npy"})
    assert names == ["pred.npy"]
    (score,) = score_all(pairs, load_taxonomy("scenes"))
    figures = Depth.from_row(score["depth"]).compute()
    expected = {"AbsRel": 0.1404982, "RMSE": 0.6180007, "SILog": 18.870581, "delta1": 0.777264, "delta2": 0.964724,
                "delta3": 0.999621, "SqRel": 0.0986683, "log10": 0.0620487}  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    (score,) = score_all(pairs, load_taxonomy("scenes"), depth={"alignment": "median"})
    assert Depth.from_row(score["depth"]).compute()["AbsRel"] == pytest.approx(0.1559, abs=5e-5)


def test_captures_of_the_path(tree: dict[str, Any]) -> None:
    pairs, names = find_all(tree, {"format": "files", "uri": "../pred/{dir}/{stem}_p.png"})
    assert [(sample.image_id, found and found.name) for sample, found in pairs] == [
        ("bonn/1.jpg", "bonn/1_p.png"), ("ulm/1.jpg", "ulm/1_p.png"), ("ulm/2.jpg", None),
    ]  # fmt: skip
    assert names == ["bonn/1_p.png", "rome/5_p.png", "ulm/1_p.png"]
    found = pairs[0][1]
    assert found is not None
    assert found.predicted is not None
    np.testing.assert_array_equal(found.predicted.label_HW, LABEL_HW)
    assert (found.width, found.height) == (3, 2)


@pytest.mark.parametrize("folder", ["{root}/pred", "file://{root}/pred", "../pred", "../img/../pred/"])
def test_captures_of_the_images(tree: dict[str, Any], tmp_path: Path, folder: str) -> None:
    source = {**tree, "images": "{city}/{id}.jpg"}
    uri = f"{folder.format(root=tmp_path)}/{{city}}/{{id}}_p.png"
    pairs, names = find_all(source, {"format": "files", "uri": uri})
    assert [found is not None for _, found in pairs] == [True, True, False]
    assert names == ["bonn/1_p.png", "rome/5_p.png", "ulm/1_p.png"]


def test_a_folder_that_may_be_none(tmp_path: Path) -> None:
    write_tree(tmp_path, {"i/a.jpg": b"", "i/d/e/b.jpg": b"", "p/a.png": LABELS, "p/d/e/b.png": LABELS})
    pairs, names = find_all(
        {"format": "files", "uri": tmp_path / "i"}, {"format": "files", "uri": "../p/{dir}/{stem}.png"}
    )
    assert [found and found.name for _, found in pairs] == ["a.png", "d/e/b.png"]
    assert names == ["a.png", "d/e/b.png"]


def test_a_limited_source_and_a_template_that_goes_up_again(tree: dict[str, Any]) -> None:
    predictions = {"format": "files", "uri": "../pred/{dir}/{stem}_p.png"}
    assert find_all({**tree, "limit": 1}, predictions)[1] is None
    pairs, names = find_all(tree, {"format": "files", "uri": "{dir}/../../pred/{dir}/{stem}_p.png"})
    assert ([found is not None for _, found in pairs], names) == ([True, True, False], None)


def test_any_prediction_that_changes_marks_all_units(tree: dict[str, Any], tmp_path: Path) -> None:
    source, predictions = {**tree, "unit_images": 1}, {"format": "files", "uri": "../pred/{dir}/{stem}_p.png"}
    before = fingerprints(source, predictions)
    (tmp_path / "pred/ulm/1_q.png").write_bytes(b"of another shape")
    assert fingerprints(source, predictions) == before
    (tmp_path / "pred/ulm/2_p.png").write_bytes(LABELS)
    assert not set(before) & set(fingerprints(source, predictions))


def test_targets_are_part_of_the_fingerprint(tree: dict[str, Any], tmp_path: Path) -> None:
    source, predictions = {**tree, "unit_images": 1}, {"format": "files", "uri": "../pred/{dir}/{stem}_p.png"}
    before = fingerprints(source, predictions)
    (tmp_path / "ann/ulm/1.png").write_bytes(png(LABEL_HW.T))
    assert [a == b for a, b in zip(before, fingerprints(source, predictions), strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("data", "options", "kind", "stage"),
    [
        (b"", {}, PredictError, "decode"),
        (LABELS[:-30], {}, PredictError, "decode"),
        (png(np.zeros((2, 3, 3), np.uint8)), {}, PredictError, "decode"),
        (npy(LABEL_HW), {}, PredictError, "decode"),
        (png(np.zeros((9, 9), np.uint8)), {}, ImageTooLargeError, "decode"),
        (b"x" * 2000, {"max_bytes": 1000}, ImageTooLargeError, "read"),
    ],
)
def test_a_label_map_that_is_none_fails_its_image_alone(
    tree: dict[str, Any], tmp_path: Path, data: bytes, options: dict[str, Any], kind: type[RowError], stage: str
) -> None:
    (tmp_path / "pred/ulm/1_p.png").write_bytes(data)
    predictions = {"format": "files", "uri": "../pred/{dir}/{stem}_p.png", **options}
    found = by_image({**tree, "max_pixels": 60}, predictions)
    first = found["ulm/1.jpg"]
    assert first is not None
    assert (type(first.error), first.error_stage, first.name) == (kind, stage, "ulm/1_p.png")
    assert found["bonn/1.jpg"].error is None  # type: ignore[union-attr]


def test_a_folder_in_place_of_a_prediction(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pred/ulm/2_p.png").mkdir()
    found = by_image(tree, {"format": "files", "uri": "../pred/{dir}/{stem}_p.png"})["ulm/2.jpg"]
    assert found is not None
    assert isinstance(found.error, UnreadableError)


def test_sizes_that_differ_and_ids_outside_the_taxonomy(tmp_path: Path) -> None:
    strange_HW = np.where(LABEL_HW == 1, 99, LABEL_HW).astype(np.uint8)
    write_tree(
        tmp_path,
        {f"{n}.jpg": b"" for n in range(3)}
        | {"0.t.png": LABELS, "1.t.png": LABELS, "2.t.png": png(strange_HW)}
        | {"0.p.png": png(LABEL_HW.T), "1.p.png": png(strange_HW), "2.p.png": LABELS},
    )
    source = {"format": "files", "uri": tmp_path, "images": "{id}.jpg", "targets": {"semantic": "{id}.t.png"}}
    pairs, _ = find_all(source, {"format": "files", "uri": "{id}.p.png"})
    size, pred, target = score_all(pairs, load_taxonomy("scenes"), boundary=False)
    assert [score.get("error_type") for score in (size, pred, target)] == [
        "TargetMismatchError", None, "TargetMismatchError",
    ]  # fmt: skip
    # What is predicted outside the label space is wrong, not gone.
    counts = ClassCounts.from_row(pred["classes"]).compute(load_taxonomy("scenes"))
    assert counts["pixel_accuracy"] == pytest.approx(4 / 5)


def test_no_prediction_at_all(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"predictions.uri: no file below .*/pred is like '../pred/\{stem\}.tif'"):
        find_all(tree, {"format": "files", "uri": "../pred/{stem}.tif"})
    with pytest.raises(ConfigError, match=r"no file below .*/none is like"):
        find_all(tree, {"format": "files", "uri": "../none/{stem}.png"})


@pytest.mark.parametrize(
    ("source", "uri", "message"),
    [
        ({"format": "files", "uri": "x"}, "{id}.png", r"captures \{id\}; known captures: dir, ext, stem"),
        ({"format": "files", "uri": "x", "images": "{id}.png"}, "{id.png", "unbalanced brace"),
        ({"format": "webdataset", "uri": "x"}, "p/{stem}.png", "must be absolute: source.format webdataset"),
        ({"format": "coco", "instances": "x"}, "p/{coco_id}.png", "must be absolute: source.format coco"),
        ({"format": "parquet", "uri": "x"}, "/p/{city}.png", r"captures \{city\}; known captures: dir, ext, stem"),
    ],
)  # fmt: skip
def test_templates_that_cannot_work(source: dict[str, Any], uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_all(source, {"format": "files", "uri": uri})


def test_every_kind_of_source(tmp_path: Path) -> None:
    """What its ids and fields say fills the template."""
    coco = {"images": [{"id": 7, "file_name": "d/a.jpg"}], "annotations": []}
    write_tree(tmp_path, {"7.png": LABELS, "ulm-k1.png": LABELS, "a.tar#d#x.png": b"", "d/x.png": LABELS,
                          "t/a.tar": tar_bytes([("d/x.seg.png", LABELS)]), "c.json": json.dumps(coco).encode(),
                          "d/a.png": LABELS, "000000000.png": LABELS})  # fmt: skip
    pq.write_table(
        pa.table({"city": ["ulm", None], "key": ["k1.jpg", "k2"], "seg": [LABELS] * 2}), tmp_path / "a.parquet"
    )
    cases: list[tuple[dict[str, Any], str, list[str | None]]] = [
        ({"format": "coco", "instances": tmp_path / "c.json"}, "{coco_id}.png", ["7.png"]),
        ({"format": "coco", "instances": tmp_path / "c.json"}, "{dir}/{stem}.png", ["d/a.png"]),
        ({"format": "webdataset", "uri": tmp_path / "t"}, "d/{stem}.png", ["x.png"]),
        ({"format": "parquet", "uri": tmp_path, "id_column": "key", "field_columns": ["city"],
          "target_columns": {"semantic": "seg"}}, "{city}-{stem}.png", ["ulm-k1.png", None]),
        ({"format": "scenes", "count": 2}, "{stem}.png", ["000000000.png", None]),
    ]  # fmt: skip
    for source, uri, expected in cases:
        pairs, names = find_all(source, {"format": "files", "uri": f"{tmp_path}/{uri}"})
        assert [found and found.name for _, found in pairs] == expected, source
        assert names is not None
        assert {name for name in expected if name} <= set(names)
    source = {"format": "coco", "uri": tmp_path, "instances": tmp_path / "c.json"}
    assert find_all(source, {"format": "files", "uri": "{coco_id}.png"})[0][0][1] is not None


def test_captures_that_lead_elsewhere(tmp_path: Path) -> None:
    write_tree(tmp_path, {"p/x.png": LABELS, "secret.png": LABELS, "etc/x.png": LABELS})
    keys = ["x", "../secret", "/etc/x", "../p/x", "..", "{stem}", "\0", "x/../../secret"]
    pq.write_table(pa.table({"key": keys, "seg": [LABELS] * len(keys), "id": keys}), tmp_path / "a.parquet")
    source = {"format": "parquet", "uri": tmp_path, "field_columns": ["key"], "target_columns": {"semantic": "seg"}}
    pairs, _ = find_all(source, {"format": "files", "uri": f"{tmp_path}/p/{{key}}.png"})
    useful = [sample.fields["key"] for sample, found in pairs if found is not None and found.error is None]
    assert useful == ["x"]


DEPTH_HW = np.array([[0, 1000, 2500], [65535, 1, 500]], np.uint16)


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (png(DEPTH_HW), {}, [[np.nan, 1, 2.5], [65.535, 0.001, 0.5]]),
        (png(DEPTH_HW), {"scale": 1 / 256}, [[np.nan, 3.90625, 9.765625], [255.99609375, 0.00390625, 1.953125]]),
        (png(DEPTH_HW), {"kind": "inverse_relative", "scale": 1}, DEPTH_HW),
        (png(DEPTH_HW), {"kind": "relative", "scale": 1}, DEPTH_HW),
        (npy(DEPTH_HW.astype(np.float32)), {"scale": 7}, DEPTH_HW),
        (npy(np.asfortranarray(DEPTH_HW.astype(">f8"))), {}, DEPTH_HW),
        (npy(DEPTH_HW[None, None].astype(np.int32)), {}, DEPTH_HW),
    ],
)
def test_depth(tmp_path: Path, data: bytes, options: dict[str, Any], expected: Any) -> None:
    write_tree(tmp_path, {"a.jpg": b"", "d/a.bin": data})
    found = by_image(
        {"format": "files", "uri": tmp_path / "a.jpg"}, {"format": "depth", "uri": "d/{stem}.bin", **options}
    )
    predicted = found["a.jpg"].predicted  # type: ignore[union-attr]
    assert predicted is not None
    np.testing.assert_array_equal(predicted.depth_HW, np.asarray(expected, np.float64))
    assert predicted.depth_kind == options.get("kind", "metric_m")


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (npy(np.array([{}], object)), PredictError, "expected an .npy array of depth: its values are object"),
        (npy(np.zeros((100, 100), np.uint8)), ImageTooLargeError, r"an array of \(100, 100\), at most 60 pixels"),
        (npy(np.zeros((2, 3)))[:-8], PredictError, "EOF"),
        (npy(np.zeros((2, 3, 4))), PredictError, "height x width"),
        (b"PK\x03\x04", PredictError, "expected a PNG"),
    ],
)
def test_depth_that_is_none(tmp_path: Path, data: bytes, kind: type[RowError], message: str) -> None:
    write_tree(tmp_path, {"a.jpg": b"", "d/a.npy": data})
    source = {"format": "files", "uri": tmp_path / "a.jpg", "max_pixels": 60}
    found = by_image(source, {"format": "depth", "uri": "d/{stem}.npy"})["a.jpg"]
    assert found is not None
    assert (type(found.error), found.error_stage) == (kind, "decode")
    with pytest.raises(kind, match=message):
        raise found.error  # type: ignore[misc]


def test_faults_of_the_storage(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{n}.jpg": b"" for n in range(5)})
    FlakyFileSystem.reset({f"p/{n}.png": LABELS for n in range(4)})
    FlakyFileSystem.faults += [0, 5]
    predictions = {"format": "files", "uri": "flaky://p/{stem}.png"}
    pairs, _ = find_all({"format": "files", "uri": tmp_path}, predictions)
    assert [found and found.error for _, found in pairs] == [None] * 5
    assert [found is None for _, found in pairs] == [False] * 4 + [True]
    assert FlakyFileSystem.raised == 2
    FlakyFileSystem.lasting += [0]
    with pytest.raises(StorageError, match="as always"):
        find_all({"format": "files", "uri": tmp_path}, predictions)


def test_over_http_nothing_is_listed(tree: dict[str, Any], tmp_path: Path) -> None:
    with http_server(tmp_path, ranges=True) as (address, _):
        predictions = {"format": "files", "uri": f"{address}/pred/{{dir}}/{{stem}}_p.png"}
        pairs, names = find_all(tree, predictions)
        before = fingerprints(tree, predictions)
        assert ([found is not None for _, found in pairs], names) == ([True, True, False], None)
        assert before == fingerprints(tree, predictions)
        assert before != fingerprints(tree, {**predictions, "uri": f"{address}/pred/{{dir}}/{{stem}}_q.png"})


def test_s3_below_the_source_and_with_options_of_its_own(s3: Any, tree: dict[str, Any], tmp_path: Path) -> None:
    bucket = s3.bucket("predictions")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            s3.client.put_object(Bucket=bucket, Key=str(path.relative_to(tmp_path)), Body=path.read_bytes())
    there = {**tree, "uri": f"s3://{bucket}/img", "storage": s3.options}
    for source, predictions in (
        (there, {"uri": "../pred/{dir}/{stem}_p.png"}),
        (there, {"uri": f"s3://{bucket}/pred/{{dir}}/{{stem}}_p.png"}),
        (tree, {"uri": f"s3://{bucket}/pred/{{dir}}/{{stem}}_p.png", "storage": s3.options}),
    ):
        pairs, names = find_all(source, {"format": "files", **predictions})
        assert [found is not None for _, found in pairs] == [True, True, False]
        assert names == ["bonn/1_p.png", "rome/5_p.png", "ulm/1_p.png"]
