"""`maskmill label`: what ends up in the table, and what does not."""

import json
import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable
from job_helpers import jpeg, png, png_bomb, rows_of, run_label, tar_bytes

from jobs import preview, status
from pipeline.masks import decode_label_map, decode_rle
from pipeline.taxonomy import load_taxonomy

SCENES = ("source.format=scenes", "source.unit_images=16")
UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")
NULL = ("models.0.name=null_model",)


def label_map(row: dict) -> np.ndarray:
    return decode_label_map(
        row["semantic"]["data"], row["semantic"]["format"], width=row["width"], height=row["height"]
    )


def test_several_models_in_one_pass_and_one_more_later(tmp_path: Path) -> None:
    common = (*SCENES, "source.count=20", "source.width=64", "source.height=48", f"output.uri={tmp_path}")
    lraspp = "lraspp_mobilenet_v3_large"
    first = (*UNET, f"models.1.name={lraspp}", "models.1.options.resize=64")
    assert run_label(*common, *first, "output.rows_per_file=8") == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 40
    assert len({(row["image_id"], row["model"]) for row in rows}) == 40
    voc = set(load_taxonomy("voc21").ids)
    assert all(set(np.unique(label_map(row))) <= voc for row in rows if row["model"] == lraspp)
    # The third model is labelled alone; nothing of the others is touched.
    assert run_label(*common, *first, "models.2.name=null_model", "output.rows_per_file=8") == 0
    again = rows_of(tmp_path)
    assert len(again) == 60
    assert [row for row in again if row["model"] != "null_model"] == rows


def test_mask_rcnn_rows(tmp_path: Path) -> None:
    assert (
        run_label(
            *SCENES,
            "source.count=2",
            "models.0.name=maskrcnn_resnet50_fpn_v2",
            "models.0.options.resize=64",
            "models.0.options.score_threshold=0.0",
            "models.0.options.box_score_thresh=0.0",
            "models.0.options.max_segments=5",
            f"output.uri={tmp_path}",
        )
        == 0
    )
    ids = set(load_taxonomy("coco80").ids)
    for row in rows_of(tmp_path):
        assert 0 < len(row["segments"]) <= 5
        for segment in row["segments"]:
            mask_HW = decode_rle(segment["rle"], width=256, height=192)
            assert mask_HW.sum() == segment["area"] > 0
            assert segment["category_id"] in ids
            x, y, w, h = segment["bbox"]
            ys, xs = np.nonzero(mask_HW)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)


def bad_corpus(folder: Path) -> dict[str, str]:
    """Shards with everything that goes wrong; gives the expected error type of each bad image_id."""
    good_png = png(np.full((8, 8, 3), 77, np.uint8))
    bad_crc = bytearray(good_png)
    bad_crc[good_png.index(b"IDAT") + 8] ^= 1
    a = {f"good{index}.jpg": jpeg(index) for index in range(4)}
    a |= {
        "empty.jpg": b"",
        "truncated.jpg": jpeg(7)[:900],
        "crc.png": bytes(bad_crc),
        "text.jpg": b"this is no image, whatever its name says",
        "bomb.png": png_bomb(60_000, 60_000),
        "../../x.jpg": jpeg(8),
        "one.png": png(np.array([[[1, 2, 3]]], np.uint8)),
    }
    whole = tar_bytes({f"{index}.jpg": jpeg(index) for index in range(6)})
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_bytes(a))
    (folder / "b-cut.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "c-missing.tar").symlink_to("nowhere.tar")
    (folder / "d.tar").write_bytes(whole)
    return {
        "a.tar/empty": "CorruptImageError",
        "a.tar/truncated": "CorruptImageError",
        "a.tar/crc": "CorruptImageError",
        "a.tar/text": "CorruptImageError",
        "a.tar/bomb": "ImageTooLargeError",
        "b-cut.tar/!unreadable": "UnreadableError",
    }


def test_bad_input_costs_its_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = bad_corpus(tmp_path / "shards")
    (tmp_path / "shards" / "c-missing.tar").unlink()
    output = tmp_path / "labels"
    arguments = (
        "source.format=webdataset",
        f"source.uri={tmp_path / 'shards'}",
        *UNET,
        f"output.uri={output}",
        "failure_budget=0.5",
    )
    assert run_label(*arguments) == 0
    rows = {row["image_id"]: row for row in rows_of(output)}
    failed = {key: row["error_type"] for key, row in rows.items() if row["status"] == "failed"}
    assert failed == expected
    assert all(rows[key]["error_message"] and rows[key]["attempts"] == 1 for key in failed)
    cut = [key for key in rows if key.startswith("b-cut.tar/") and rows[key]["status"] == "ok"]
    assert 1 <= len(cut) < 6
    assert len([key for key in rows if key.startswith("d.tar/")]) == 6
    assert rows["a.tar/one"]["width"] == rows["a.tar/one"]["height"] == 1
    assert rows["a.tar/../../x"]["status"] == "ok"  # a name is an id and never a path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "shards"]
    capsys.readouterr()
    assert status.main([str(output), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    (model,) = figures["models"]
    assert model["expected"] == model["ok"] + model["failed"] + model["pending"] == len(rows)
    assert model["failed"] == len(expected)
    assert sum(kind["rows"] for kind in figures["failures"]) == len(expected)
    # Over the budget: the same rows, exit code 3, all of them committed.
    assert run_label(*arguments, "failure_budget=0.1", f"output.uri={tmp_path / 'strict'}") == 3
    assert len(rows_of(tmp_path / "strict")) == len(rows)
    assert "failure_budget" in capsys.readouterr().err


def test_loose_files_with_an_unreadable_object(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.jpg").write_bytes(jpeg(index))
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    output = tmp_path / "labels"
    arguments = ("source.format=files", f"source.uri={folder}", *NULL, f"output.uri={output}", "failure_budget=1")
    assert run_label(*arguments) == 0
    rows = {row["image_id"]: row["status"] for row in rows_of(output)}
    assert {key: value for key, value in rows.items() if key != "gone.jpg"} == {f"{i}.jpg": "ok" for i in range(5)}
    assert rows.get("gone.jpg", "failed") == "failed"


def test_retry_failed_redoes_just_those(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.jpg").write_bytes(jpeg(index))
    output = tmp_path / "labels"
    arguments = ("source.format=files", f"source.uri={folder}", *NULL, f"output.uri={output}", "failure_budget=1")
    stamp = (folder / "3.jpg").stat()
    good = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(b"\0" * len(good))
    os.utime(folder / "3.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run_label(*arguments) == 0
    first = {row["image_id"]: row for row in rows_of(output)}
    assert {key for key, row in first.items() if row["status"] == "failed"} == {"3.jpg"}
    assert run_label(*arguments, "retry=failed") == 0
    assert {row["image_id"]: row for row in rows_of(output)}["3.jpg"]["attempts"] == 2
    (folder / "3.jpg").write_bytes(good)
    os.utime(folder / "3.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run_label(*arguments, "retry=failed") == 0
    last = {row["image_id"]: row for row in rows_of(output)}
    assert last["3.jpg"]["status"] == "ok"
    assert {key: row for key, row in last.items() if key != "3.jpg"} == {
        key: row for key, row in first.items() if key != "3.jpg"
    }
    # What another tool sees by globbing is the table too: nothing replaced is left lying about.
    files = ds.dataset([str(path) for path in output.glob("model=*/*.parquet")])
    assert files.count_rows() == 6


def test_a_changed_unit_stops_or_is_relabelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = {f"{index}.jpg": jpeg(10 * shard + index) for index in range(3)}
        (folder / f"s{shard}.tar").write_bytes(tar_bytes(members))
    output = tmp_path / "labels"
    arguments = ("source.format=webdataset", f"source.uri={folder}", *UNET, f"output.uri={output}")
    assert run_label(*arguments) == 0
    first = {row["image_id"]: row for row in rows_of(output)}
    (folder / "s1.tar").write_bytes(tar_bytes({f"{index}.jpg": jpeg(50 + index) for index in range(4)}))
    assert run_label(*arguments) == 4
    assert "s1.tar" in capsys.readouterr().err
    assert {row["image_id"]: row for row in rows_of(output)} == first
    assert run_label(*arguments, "on_changed=relabel") == 0
    last = {row["image_id"]: row for row in rows_of(output)}
    assert sorted(last) == [*(f"s0.tar/{i}" for i in range(3)), *(f"s1.tar/{i}" for i in range(4))]
    assert all(last[f"s0.tar/{i}"] == first[f"s0.tar/{i}"] for i in range(3))
    assert last["s1.tar/0"]["semantic"] != first["s1.tar/0"]["semantic"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("modles.0.name=unet_small",), 2, "did you mean models"),
        (("models.0.nam=unet_small",), 2, "did you mean name"),
        (("source.cuont=3",), 2, "did you mean count"),
        (("models.0.name=unet_smal",), 2, "did you mean unet_small"),
        (("models.0.weights=/nowhere",), 2, "no checkpoint at /nowhere"),
        (("models.0.options.widht=3",), 2, "widht"),
        (("models.0.weights=bundled:unet_small_scenes", "models.0.options.width=8"), 2, "does not fit the model"),
        (("models.0.taxonomy=voc21", "models.0.weights=bundled:unet_small_scenes"), 2, "does not fit the model"),
        (("source.format=webdataset", "source.uri=/nowhere"), 4, "/nowhere"),
        (("output.uri=/proc/nowhere",), 4, "/proc/nowhere"),
    ],
)
def test_a_wrong_config_is_one_line_before_any_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = {"source.format": "scenes", "models.0.name": "unet_small", "output.uri": str(tmp_path / "labels")}
    given |= dict(argument.split("=", 1) for argument in arguments)
    assert run_label(*(f"{key}={value}" for key, value in given.items())) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list((tmp_path / "labels").glob("model=*"))


def test_duckdb_and_pyarrow_read_the_table(tmp_path: Path) -> None:
    assert run_label(*SCENES, "source.count=5", *NULL, f"output.uri={tmp_path}") == 0
    table = DeltaTable(str(tmp_path))
    dataset = table.to_pyarrow_dataset()  # noqa: F841  (DuckDB finds it by name)
    assert duckdb.sql("SELECT count(*) FROM dataset WHERE status = 'ok'").fetchall() == [(5,)]
    glob = f"{tmp_path}/model=*/*.parquet"
    query = f"SELECT model, count(*) FROM read_parquet('{glob}', hive_partitioning = true) GROUP BY model"
    assert duckdb.sql(query).fetchall() == [("null_model", 5)]
    assert table.to_pyarrow_table(columns=["image_id"]).num_rows == 5


def test_preview_shows_the_labels(tmp_path: Path) -> None:
    assert run_label(*SCENES, "source.count=6", *UNET, f"output.uri={tmp_path / 'labels'}") == 0
    assert preview.main([str(tmp_path / "labels"), "--n", "4", "--out", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 20_000


def test_coco128_by_files_and_by_annotations(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "coco128"
    model = ("models.0.name=lraspp_mobilenet_v3_large", "models.0.options.resize=64")
    by_files = ("source.format=files", f"source.uri={folder / 'images'}")
    by_json = ("source.format=coco", f"source.uri={folder / 'images'}", f"source.instances={folder / 'instances.json'}")
    tables = []
    for name, source in (("files", by_files), ("coco", by_json)):
        assert run_label(*source, *model, f"output.uri={tmp_path / name}") == 0
        tables.append({row["image_id"]: row for row in rows_of(tmp_path / name)})
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in images_of(folder)}
    ids = set(load_taxonomy("voc21").ids)
    for rows in tables:
        assert {key: (row["width"], row["height"]) for key, row in rows.items()} == sizes
        assert {row["status"] for row in rows.values()} == {"ok"}
        assert all(set(np.unique(label_map(row))) <= ids for row in rows.values())
    assert all(tables[0][key]["semantic"] == tables[1][key]["semantic"] for key in sizes)


def images_of(folder: Path) -> list[dict]:
    images: list[dict] = json.loads((folder / "instances.json").read_text())["images"]
    return images


def test_camvid(tmp_path: Path, shared_data: Path) -> None:
    assert (
        run_label(
            "source.format=files",
            f"source.uri={shared_data / 'camvid'}",
            "source.images={split}/{id}.png",
            "source.targets.semantic={split}annot/{id}.png",
            "models.0.name=lraspp_mobilenet_v3_large",
            "models.0.options.resize=64",
            f"output.uri={tmp_path}",
        )
        == 0
    )
    rows = rows_of(tmp_path)
    assert len(rows) == 468
    assert {(row["status"], row["width"], row["height"]) for row in rows} == {("ok", 480, 360)}
    assert {(dict(row["fields"])["split"], row["image_id"].split("/")[0]) for row in rows} == {
        ("train", "train"),
        ("val", "val"),
    }
    assert {label_map(row).shape for row in rows} == {(360, 480)}


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "my_model.py").write_text(
        "from pipeline.models.zoo.null import Null\n"
        "from pipeline.models.spec import ModelSpec, Preprocess\n"
        "SPEC = ModelSpec(name='mine', task='semantic', build=Null, preprocess=Preprocess(pad_multiple=4),\n"
        "                 taxonomy='scenes', license='none')\n"
    )
    monkeypatch.syspath_prepend(str(package))
    arguments = (*SCENES, "source.count=3", "models.0.spec=my_model:SPEC", f"output.uri={tmp_path / 'labels'}")
    assert run_label(*arguments) == 0
    assert {row["model"] for row in rows_of(tmp_path / "labels")} == {"mine"}


def test_s3_from_shards_to_table(tmp_path: Path, s3) -> None:
    bucket = s3.bucket("label-e2e")
    # 8 MB of shard, so that it takes several ranged reads.
    members = {}
    rng = np.random.default_rng(0)
    for index in range(12):
        members[f"{index}.png"] = png(rng.integers(0, 255, (480, 480, 3), dtype=np.uint8))
    s3.client.put_object(Bucket=bucket, Key="shards/a.tar", Body=tar_bytes(members))
    storage = json.dumps(s3.options)
    arguments = (
        "source.format=webdataset",
        f"source.uri=s3://{bucket}/shards/*.tar",
        f"source.storage={storage}",
        *NULL,
        f"output.uri=s3://{bucket}/labels",
        f"output.storage={storage}",
    )
    before = len(s3.requests())
    assert run_label(*arguments) == 0
    reads = [line for line in s3.requests()[before:] if f"GET /{bucket}/shards/a.tar" in line]
    assert len(reads) > 1
    assert all(" 206 " in line for line in reads)
    before = len(s3.requests())
    assert run_label(*arguments) == 0
    assert not [line for line in s3.requests()[before:] if f"GET /{bucket}/shards/a.tar" in line]
    options = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }
    rows = rows_of(f"s3://{bucket}/labels", storage_options=options)
    assert [row["status"] for row in rows] == ["ok"] * 12
    assert run_label(*arguments, "source.uri=s3://no-such-bucket/shards/*.tar") == 4
    assert run_label(*arguments, "output.uri=s3://no-such-bucket/labels") == 4
