"""Review packs: the images that the table itself says are worth a look, the same on every run, and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import SCENES, SPACE, run_export, scene_table, segment, write_table

from pipeline.export.base import Item
from pipeline.masks import encode_label_map
from pipeline.review import disagreement, uncertainty

SOURCE = {"format": "scenes", "count": 10}


def label_row(position: int, label_HW: np.ndarray[Any, Any], **more: Any) -> dict[str, Any]:
    height, width = label_HW.shape
    data = encode_label_map(label_HW.astype(np.uint8))
    row = {"image_id": f"s/{position}", "shard_id": "s", "position": position, "status": "ok"}
    return row | {"width": width, "height": height, "semantic": {"format": "png", "data": data}, **more}


def pack(table: Path, out: Path, *more: str) -> dict[str, Any]:
    assert run_export(table, "coco", out, *more) == 0
    review: dict[str, Any] = json.loads((out / "review.json").read_text())
    images = json.loads((out / "annotations/instances.json").read_text())["images"]
    assert {one["image_id"] for one in review["images"]} >= {image["maskmill_image_id"] for image in images}
    return review


def test_the_least_sure_images_come_first(tmp_path: Path) -> None:
    scene_table(tmp_path / "table", "semantic")  # the confidence of image n is 0.5 + n / 100, image 3 failed
    review = pack(tmp_path / "table", tmp_path / "out", "review.n=4", "review.by=uncertainty")
    assert [one["image_id"][-1] for one in review["images"]] == ["0", "1", "2", "4"]
    assert [one["score"] for one in review["images"]] == pytest.approx([0.5, 0.49, 0.48, 0.46], abs=1e-6)
    assert review["images"][0]["why"] == "1 - confidence is 0.5000"
    assert review["of"] == 10
    again = pack(tmp_path / "table", tmp_path / "again", "review.n=4", "review.by=uncertainty", "rows_per_piece=1")
    assert again == review
    assert not (tmp_path / "out/_export/survey").exists()


def test_uncertainty_of_scores() -> None:
    assert uncertainty({"segments": [{"score": 0.5}, {"score": 0.9}]}) == pytest.approx(0.3)
    assert uncertainty({"segments": []}) is None
    assert uncertainty({"quality": {"mean_max_probability": 0.75}, "segments": [{"score": 0.5}]}) == 0.25


def test_rare_classes(tmp_path: Path) -> None:
    ids = SPACE.ids
    maps = [np.full((4, 4), ids[0]) for _ in range(6)]
    maps[2][0, 0] = ids[1]
    maps[4][0, 0] = ids[1]
    maps[5][0, :2] = ids[2], ids[1]
    write_table(
        tmp_path / "table",
        [label_row(n, m) for n, m in enumerate(maps)],
        task="semantic",
        taxonomy=SPACE,
        source=SOURCE,
    )
    review = pack(tmp_path / "table", tmp_path / "out", "review.n=3", "review.by=rare")
    assert [one["position"] for one in review["images"]] == [5, 2, 4]
    assert review["images"][0]["why"] == f"has {SPACE.by_id[ids[2]].name}, which 1 images have"
    assert review["images"][0]["score"] == pytest.approx(1 + 1 / 3 + 1 / 6, abs=1e-6)


def test_diverse_images_are_far_from_each_other(tmp_path: Path) -> None:
    ids = SPACE.ids
    # Four alike, and three that are each of another class alone.
    maps = [np.full((4, 4), ids[0]) for _ in range(4)] + [np.full((4, 4), ids[n]) for n in (1, 2, 3)]
    write_table(
        tmp_path / "table",
        [label_row(n, m) for n, m in enumerate(maps)],
        task="semantic",
        taxonomy=SPACE,
        source=SOURCE,
    )
    review = pack(tmp_path / "table", tmp_path / "out", "review.n=4", "review.by=diversity")
    positions = [one["position"] for one in review["images"]]
    assert set(positions[:4]) >= {4, 5, 6}
    assert len(set(positions)) == 4
    everything = pack(tmp_path / "table", tmp_path / "all", "review.n=100", "review.by=diversity")
    assert len({one["position"] for one in everything["images"]}) == 7


def test_where_two_models_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = SPACE.ids
    maps = [np.full((4, 4), ids[0]) for _ in range(3)]
    others = [m.copy() for m in maps]
    others[1][:2] = ids[1]  # IoU 1/2 of the one class, 0 of the other
    others[2][:] = ids[1]
    for label, found in (("a", maps), ("b", others)):
        rows = [label_row(n, m) for n, m in enumerate(found)]
        models = {"label": label, "models": ("a", "b")}
        write_table(tmp_path / "table", rows, task="semantic", taxonomy=SPACE, source=SOURCE, **models)
    review = pack(tmp_path / "table", tmp_path / "out", "review.n=2", "review.by=disagreement")
    assert [(one["position"], one["score"]) for one in review["images"]] == [(2, 1.0), (1, 0.75)]
    scene_table(tmp_path / "alone", "semantic")
    assert run_export(tmp_path / "alone", "coco", tmp_path / "none", "review.by=disagreement") == 2
    assert "review.against" in capsys.readouterr().err


def test_disagreement_of_instances() -> None:
    left, right = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[:, :4], right[:, 4:] = True, True

    def item(*masks: Any) -> Item:
        segments = [segment(mask, SPACE.ids[-1], n) for n, mask in enumerate(masks, 1)]
        row = {"segments": segments}
        return Item(number=1, name="", image_id="", width=8, height=8, row=row, taxonomy=SPACE, task="instance")

    assert disagreement(item(left, right), item(right, left)) == 0
    assert disagreement(item(left), item(left, right)) == pytest.approx(1 / 3)
    assert disagreement(item(left), item(right)) == 1
    assert disagreement(item(), item()) == 0


def test_failed_rows_go_out_as_images_to_label(tmp_path: Path) -> None:
    scene_table(tmp_path / "table", "semantic", failed=(3, 7))
    more = ("review.by=failed", "images=true")
    review = pack(tmp_path / "table", tmp_path / "out", *more)
    assert [one["why"] for one in review["images"]] == ["failed: CorruptImageError"] * 2
    tree = json.loads((tmp_path / "out/annotations/instances.json").read_text())
    assert [(image["width"], image["height"]) for image in tree["images"]] == [(SCENES.width, SCENES.height)] * 2
    assert tree["annotations"] == []
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    assert len(json.loads((tmp_path / "out/failed.json").read_text())) == 2
    # None failed: that is said, and no pack of nothing is written.
    scene_table(tmp_path / "well", "semantic", failed=())
    assert run_export(tmp_path / "well", "coco", tmp_path / "empty", "review.by=failed") == 2
