"""An export as a whole: resumable to the byte, refused where it would mix, names safe and unique, nothing dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from export_helpers import SCENES, SPACE, files_of, run_export, scene_table, segment, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_endpoint import S3

from pipeline.errors import StorageError
from pipeline.export import export as driver
from pipeline.export.names import Namer, Shared, is_plain_path
from pipeline.export.outlines import inner, joined, outlines, simplified
from pipeline.export.piece import export_piece
from pipeline.export.runlengths import decode_brush, decode_runs, encode_brush, encode_runs


def of_export(folder: Path) -> dict[str, bytes]:
    """The files of an export, without what it keeps of itself."""
    return {name: data for name, data in files_of(folder).items() if not name.startswith("_export/plan")}


@pytest.mark.parametrize("form", ["coco", "webdataset"])
def test_a_killed_export_goes_on_to_the_same_bytes(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table"
    scene_table(table, "instance")
    arguments = (form, tmp_path / "killed", "rows_per_piece=3")
    begun: list[int] = []

    def dies(given: Any) -> dict[str, int]:
        begun.append(given.piece.index)
        if len(begun) == 3:
            raise StorageError("the disk went away")
        return export_piece(given)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "export_piece", dies)
        assert run_export(table, *arguments, "workers=1") == 4
    assert "the disk went away" in capsys.readouterr().err
    done = {path.name for path in (tmp_path / "killed/_export/pieces").glob("*.done.json")}
    assert 1 <= len(done) < 5
    with monkeypatch.context() as patch:
        patch.setattr(driver, "export_piece", lambda given: begun.append(-given.piece.index) or export_piece(given))
        assert run_export(table, *arguments) == 0
    # What was whole is not made again.
    assert not {f"{-index:06d}.done.json" for index in begun[3:]} & done
    assert run_export(table, form, tmp_path / "whole", "rows_per_piece=3", "workers=1") == 0
    assert of_export(tmp_path / "killed") == of_export(tmp_path / "whole")
    # Again: nothing to do, nothing changed.
    before = files_of(tmp_path / "killed")
    assert run_export(table, *arguments) == 0
    assert files_of(tmp_path / "killed") == before


def test_another_export_and_a_folder_in_use_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table"
    scene_table(table, "semantic")
    assert run_export(table, "id_png", tmp_path / "out") == 0
    assert run_export(table, "coco", tmp_path / "out") == 2
    assert "holds an export of other rows" in capsys.readouterr().err
    scene_table(table, "semantic", failed=())  # more rows than before
    assert run_export(table, "id_png", tmp_path / "out") == 2
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("x")
    assert run_export(table, "id_png", tmp_path / "used") == 2
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.tex"]


HOSTILE = (
    "../../etc/passwd", "/abs/olute.jpg", "a/b.jpg", "a_b.png", "A_B.jpg", "", "..", "con.png", "x" * 300,
    "y\n\x1b[31m.jpg",    "名前.jpg", "名字.jpg", 's.tar/"><script>alert(1)</script>', "a.b.c.jpg", "a_b_c.png",
)  # fmt: skip


def hostile_table(uri: Path) -> None:
    rows: list[dict[str, Any]] = []
    mask_HW = np.zeros((6, 8), bool)
    mask_HW[1:3, 2:5] = True
    for position, image_id in enumerate(HOSTILE):
        whose = {"image_id": image_id, "shard_id": "s.tar", "position": position, "status": "ok"}
        rows.append(whose | {"width": 8, "height": 6, "segments": [segment(mask_HW, SPACE.ids[-1], 1)]})
    broken = {"image_id": "broken", "shard_id": "s.tar", "position": 99, "status": "ok", "width": 9, "height": 9}
    rows.append(broken | {"segments": rows[0]["segments"]})  # runs of another size
    write_table(uri, rows, task="instance", taxonomy=SPACE, source={"format": "webdataset", "uri": "/nowhere"})


@pytest.mark.parametrize("form", ["coco", "id_png"])
def test_ids_of_others_become_safe_unique_names(tmp_path: Path, form: str) -> None:
    hostile_table(tmp_path / "table")
    assert run_export(tmp_path / "table", form, tmp_path / "out") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"table", "out"}
    names = pq.read_table(tmp_path / "out/names.parquet").to_pylist()
    assert [row["image_id"] for row in names] == list(HOSTILE)
    assert len({row["name"].lower() for row in names}) == len(HOSTILE)
    assert all(
        set(row["name"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for row in names
    )
    (failed,) = json.loads((tmp_path / "out/failed.json").read_text())
    assert (failed["image_id"], failed["error_type"], failed["error_stage"]) == ("broken", "SchemaError", "export")
    if form == "coco":
        tree = json.loads((tmp_path / "out/annotations/instances.json").read_text())
        assert [image["maskmill_image_id"] for image in tree["images"]] == list(HOSTILE)
        assert all(is_plain_path(image["file_name"]) for image in tree["images"])


@settings(max_examples=25)
@given(st.lists(st.text(max_size=6), unique=True, max_size=8))
def test_no_two_ids_share_a_name(image_ids: list[str]) -> None:
    shared = Shared()
    shared.add(image_ids)
    namer = Namer(shared.found())
    names = [namer.name(image_id) for image_id in image_ids]
    assert len({name.lower() for name in names}) == len(image_ids)
    assert all(name and "/" not in name and "." not in name for name in names)


MASKS = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=9)
).map(lambda rows: np.array(rows, bool))  # fmt: skip


@settings(max_examples=40)
@given(MASKS)
def test_codings_and_outlines_give_the_mask_back(mask_HW: np.ndarray[Any, Any]) -> None:
    height, width = mask_HW.shape
    size = {"width": width, "height": height}
    assert (decode_runs(np.array(encode_runs(mask_HW)), **size) == mask_HW).all()
    assert (decode_brush(np.array(encode_brush(mask_HW), np.uint8), **size) == mask_HW).all()
    filled_HW = np.zeros((height, width), bool)
    rings = outlines(mask_HW)
    for ring, is_hole in rings:
        x, y = ring.astype(float).T
        assert (np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) < 0) == is_hole
        on = inner(ring, mask_HW)
        assert mask_HW[on[:, 1], on[:, 0]].all()
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            assert (x1 == x2) != (y1 == y2)
            if y1 != y2:
                filled_HW[min(y1, y2) : max(y1, y2), x1:] ^= True
    assert (filled_HW == mask_HW).all()
    if rings:
        assert set(map(tuple, joined(rings).tolist())) == {tuple(p) for ring, _ in rings for p in ring.tolist()}


def test_simplified_outlines_stay_within_the_tolerance() -> None:
    yy, xx = np.mgrid[:60, :80]
    ((ring, _),) = outlines((yy - 30) ** 2 + (xx - 40) ** 2 < 600)
    slim = simplified(ring, 1.0)
    assert len(slim) < len(ring) / 4
    ends = np.roll(slim, -1, axis=0).astype(float)
    for point in ring:
        along = np.clip(((point - slim) * (ends - slim)).sum(axis=1) / ((ends - slim) ** 2).sum(axis=1).clip(1), 0, 1)
        nearest = slim + along[:, None] * (ends - slim)
        assert np.hypot(*(point - nearest).T).min() <= 1.0 + 1e-9


def test_object_storage_holds_the_same_files(tmp_path: Path, s3: S3) -> None:
    table = tmp_path / "table"
    scene_table(table, "semantic")
    fs = s3fs.S3FileSystem(**s3.options)
    bucket = f"s3://{s3.bucket('exports')}"
    storage = f"output.storage={json.dumps(s3.options)}"
    for form in ("coco", "webdataset"):
        assert run_export(table, form, tmp_path / form, "rows_per_piece=4") == 0
        assert run_export(table, form, f"{bucket}/{form}", "rows_per_piece=4", storage) == 0
        fs.invalidate_cache()
        found = {path.partition(f"{form}/")[2]: fs.cat_file(path) for path in fs.find(f"{bucket}/{form}")}
        kept = {name: data for name, data in found.items() if not name.startswith("_export/plan")}
        assert kept == of_export(tmp_path / form)


def test_images_that_changed_or_went_away_are_listed(tmp_path: Path) -> None:
    scene_table(tmp_path / "table", "semantic", failed=())
    # Twice as wide and two images fewer than what was labelled.
    for name, change in (("size", "source.width=128"), ("gone", "source.count=8")):
        assert run_export(tmp_path / "table", "yolo", tmp_path / name, change) == 0
        failed = json.loads((tmp_path / name / "failed.json").read_text())
        assert {one["error_type"] for one in failed} <= {"TargetMismatchError", "UnreadableError"}
        assert len(failed) == (SCENES.count if name == "size" else 2)
