"""`maskmill label` on a real local Ray: what ends up in the table, and what does not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable
from job_helpers import png, rows_of, run_json, run_label, tar_bytes

from pipeline.masks import decode_label_map
from pipeline.sources.scenes import render_scene

SCENES = ("source.format=scenes", "source.unit_images=16")
UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")
NULL = ("models.0.name=null_model",)


def label_map(row: dict) -> np.ndarray:
    return decode_label_map(
        row["semantic"]["data"], row["semantic"]["format"], width=row["width"], height=row["height"]
    )


def test_scenes_are_labelled_well(tmp_path: Path) -> None:
    assert run_label(*SCENES, "source.count=24", *UNET, f"output.uri={tmp_path}") == 0
    rows = rows_of(tmp_path)
    assert [row["position"] for row in rows] == [*range(16), *range(8)]
    assert {row["status"] for row in rows} == {"ok"}
    confusion = np.zeros((8, 8), np.int64)
    for index, row in enumerate(rows):
        target_HW, pred_HW = render_scene(index).semantic_HW, label_map(row)
        assert pred_HW.shape == target_HW.shape == (192, 256)
        valid_HW = target_HW != 255
        np.add.at(confusion, (target_HW[valid_HW], pred_HW[valid_HW]), 1)
    iou_K = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert np.nanmean(iou_K) > 0.75
    assert all(0.5 < row["quality"]["mean_max_probability"] <= 1 for row in rows)


def test_what_no_node_can_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_label(*SCENES, *NULL, f"output.uri={tmp_path}", "resources.gpus_per_worker=3") == 2
    assert "no node can hold" in capsys.readouterr().err


def test_resume_after_half_and_with_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (*SCENES, "source.count=40", *UNET, f"output.uri={tmp_path}", "output.rows_per_file=4")
    assert run_label(*common, "source.limit=22") == 0
    first = {row["image_id"]: row for row in rows_of(tmp_path)}
    assert len(first) == 22
    assert run_label(*common) == 0
    second = {row["image_id"]: row for row in rows_of(tmp_path)}
    assert len(second) == 40
    assert {key: second[key] for key in first} == first  # with their run_id and time: not labelled again
    assert run_json(tmp_path)["images"] == 18
    capsys.readouterr()
    version = DeltaTable(str(tmp_path)).version()
    assert run_label(*common) == 0
    assert "nothing was left to label" in capsys.readouterr().err
    assert DeltaTable(str(tmp_path)).version() == version + 1  # the fence alone
    assert {row["image_id"]: row for row in rows_of(tmp_path)} == second


def test_split_layout_gives_the_same_rows(tmp_path: Path) -> None:
    common = (*SCENES, "source.count=40", *UNET, "models.1.name=null_model", "output.rows_per_file=8")
    assert run_label(*common, f"output.uri={tmp_path / 'fused'}") == 0
    assert run_label(*common, f"output.uri={tmp_path / 'split'}", "resources.layout=split") == 0
    columns = ["image_id", "shard_id", "position", "model", "model_version", "status", "semantic", "quality"]
    assert rows_of(tmp_path / "split", columns) == rows_of(tmp_path / "fused", columns)


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
    monkeypatch.setenv("PYTHONPATH", str(package))
    arguments = (*SCENES, "source.count=3", "models.0.spec=my_model:SPEC", f"output.uri={tmp_path / 'labels'}")
    command = [sys.executable, "-m", "jobs.label", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
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
