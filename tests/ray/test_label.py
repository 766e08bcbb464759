"""`maskmill label` on a real local Ray: what ends up in the table, and what does not."""

from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable
from job_helpers import rows_of, run_json, run_label

from pipeline.masks import decode_label_map
from pipeline.sources.scenes import render_scene

SCENES = ("source.format=scenes", "source.unit_images=16")
UNET = ("models.0.name=unet_small", "models.0.weights=bundled:unet_small_scenes")
NULL = ("models.0.name=null_model",)
TWO = ("source.count=40", *UNET, "models.1.name=null_model", "output.rows_per_file=8")


def label_map(row: dict) -> np.ndarray:
    return decode_label_map(
        row["semantic"]["data"], row["semantic"]["format"], width=row["width"], height=row["height"]
    )


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes with two models, in one pass."""
    folder = tmp_path_factory.mktemp("fused")
    assert run_label(*SCENES, *TWO, f"output.uri={folder}") == 0
    return folder


def test_scenes_are_labelled_well(fused: Path) -> None:
    rows = [row for row in rows_of(fused) if row["model"] == "unet_small"]
    assert [row["position"] for row in rows] == [*range(16), *range(16), *range(8)]
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


def test_split_layout_gives_the_same_rows(fused: Path, tmp_path: Path) -> None:
    assert run_label(*SCENES, *TWO, f"output.uri={tmp_path}", "resources.layout=split") == 0
    columns = ["image_id", "shard_id", "position", "model", "model_version", "status", "semantic", "quality"]
    assert rows_of(tmp_path, columns) == rows_of(fused, columns)


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
