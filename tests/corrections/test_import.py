"""What goes out comes back: each format's corrections as targets that sources read, and hostile files refused."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import SCENES, SPACE, mask_of, run_export, scene_table

from jobs import import_
from pipeline.config import ParquetSource
from pipeline.masks import decode_panoptic_png, decode_rle
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.parquet import ParquetFiles
from pipeline.targets import read_label_map

WIDTH, HEIGHT = SCENES.width, SCENES.height
FILES = {
    "coco": "annotations/instances.json",
    "coco_panoptic": "annotations/panoptic.json",
    "cvat": "annotations.xml",
    "label_studio": "tasks.json",
    "id_png": "gtFine",
}


def run_import(form: str, uri: Path, output: Path, *more: str) -> int:
    return import_.main([f"format={form}", f"uri={uri}", f"output.uri={output}", *more])


def samples_of(output: Path, *, images: bool = True) -> dict[str, Sample]:
    """What the source that import.json names reads."""
    told = json.loads((output / "import.json").read_text())
    source = ParquetFiles(ParquetSource.model_validate(told["source"]))
    units = source.plan(images=images)
    found = [item for unit in units for item in read_unit(source, unit, (), images=images)]
    return {item.image_id: item for item in found if isinstance(item, Sample)}


def annotated(folder: Path) -> Path:
    """Label Studio's export where a person accepted every prediction."""
    tasks = json.loads((folder / "tasks.json").read_text())
    for task in tasks:
        results = [result for prediction in task["predictions"] for result in prediction["result"]]
        old = {"result": [], "updated_at": "2024-01-01T00:00:00Z", "was_cancelled": False}
        task["annotations"] = [{"result": results, "updated_at": "2024-02-01T00:00:00Z", "was_cancelled": False}, old]
        del task["predictions"]
    path = folder / "annotated.json"
    path.write_text(json.dumps(tasks))
    return path


@pytest.mark.parametrize(
    ("task", "form"),
    [
        ("semantic", "coco"),
        ("semantic", "label_studio"),
        ("semantic", "id_png"),
        ("instance", "cvat"),
        ("panoptic", "coco_panoptic"),
        ("panoptic", "cvat"),
        ("panoptic", "id_png"),
    ],
)
def test_masks_come_back_as_they_went_out(tmp_path: Path, task: str, form: str) -> None:
    rows = scene_table(tmp_path / "table", task)
    out = tmp_path / "out"
    assert run_export(tmp_path / "table", form, out) == 0
    path = annotated(out) if form == "label_studio" else out / FILES[form]
    assert run_import(form, path, tmp_path / "targets", f"export.uri={out}") == 0
    told = json.loads((tmp_path / "targets/import.json").read_text())
    assert told["failed"] == []
    found = samples_of(tmp_path / "targets")
    assert set(found) == set(rows)
    for image_id, row in rows.items():
        targets = found[image_id].targets
        assert found[image_id].image
        if task == "semantic":
            label_HW = read_label_map(targets["semantic"], max_pixels=10**6)
            assert (label_HW == read_label_map(row["semantic"]["data"], max_pixels=10**6)).all()
            continue
        expected = [(one["category_id"], decode_rle(one["rle"], width=WIDTH, height=HEIGHT)) for one in row["segments"]]
        if task == "instance":
            annotations = json.loads(targets["instances"])["annotations"]
            got = [(one["category_id"], mask_of(one["segmentation"], WIDTH, HEIGHT)) for one in annotations]
        else:
            segment_HW = decode_panoptic_png(targets["panoptic"], width=WIDTH, height=HEIGHT)
            info = json.loads(targets["segments"])["segments_info"]
            assert {one["id"] for one in info} == set(np.unique(segment_HW).tolist()) - {0}
            got = [(one["category_id"], segment_HW == one["id"]) for one in info]
        key = sorted((category, mask_HW.tobytes()) for category, mask_HW in got)
        assert key == sorted((category, mask_HW.tobytes()) for category, mask_HW in expected)


def test_a_correction_changes_its_image_and_no_other(tmp_path: Path) -> None:
    scene_table(tmp_path / "table", "instance")
    out = tmp_path / "out"
    assert run_export(tmp_path / "table", "cvat", out) == 0
    xml = (out / "annotations.xml").read_text()
    first = xml.index("<image ")
    opened, closed = xml.index(">", first) + 1, xml.index("</image>", first)
    name = SPACE.by_id[SPACE.ids[-1]].name
    drawn = (
        f'<polygon label="{name}" points="10,10;20,10;20,30;10,30" occluded="0" z_order="3"></polygon><tag label="x"/>'
    )
    archive = tmp_path / "corrected.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("annotations.xml", xml[:opened] + drawn + xml[closed:])
        packed.writestr("../../evil.png", b"x")
    assert run_import("cvat", archive, tmp_path / "targets", f"export.uri={out}", "images=false") == 0
    told = json.loads((tmp_path / "targets/import.json").read_text())
    assert told["passed_over"] == {"tag of CVAT": 1}
    found = samples_of(tmp_path / "targets", images=False)
    instances = [json.loads(sample.targets["instances"])["annotations"] for sample in found.values()]
    (mine,) = next(one for one in instances if len(one) == 1 and one[0]["area"] == 200)
    assert mine["bbox"] == [10, 10, 10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corrected.zip", "out", "table", "targets"]


def test_without_an_export_names_are_ids_and_categories_the_files(tmp_path: Path, shared_data: Path) -> None:
    whole = json.loads((shared_data / "coco128/panoptic.json").read_text())
    assert run_import("coco_panoptic", shared_data / "coco128/panoptic.json", tmp_path / "targets") == 0
    found = samples_of(tmp_path / "targets", images=False)
    names = {image["id"]: image["file_name"] for image in whole["images"]}
    assert set(found) == {names[one["image_id"]] for one in whole["annotations"]}
    for one in whole["annotations"][:10]:
        info = json.loads(found[names[one["image_id"]]].targets["segments"])["segments_info"]
        assert {item["category_id"] for item in info} == {item["category_id"] for item in one["segments_info"]}


XML = '<annotations><image id="0" name="a" width="{w}" height="{h}">{shapes}</image></annotations>'
MASK = '<mask label="{label}" rle="{rle}" left="{left}" top="0" width="2" height="2" z_order="0"/>'
CAR = SPACE.by_id[SPACE.ids[-1]].name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (XML.format(w=4, h=4, shapes=MASK.format(label="dragon", rle="0, 4", left=0)), "expected a class of"),
        (XML.format(w=4, h=4, shapes=MASK.format(label=CAR, rle="0, 9", left=0)), "run lengths of 2x2"),
        (XML.format(w=4, h=4, shapes=MASK.format(label=CAR, rle="-1, 5", left=0)), "run lengths of 2x2"),
        (XML.format(w=4, h=4, shapes=MASK.format(label=CAR, rle="x", left=0)), "expected run lengths"),
        (XML.format(w=4, h=4, shapes=MASK.format(label=CAR, rle="0, 4", left=3)), "inside 4x4"),
        (XML.format(w=99999, h=99999, shapes=""), "at most"),
        (XML.format(w="1e9", h=4, shapes=""), "whole number"),
        (XML.format(w=4, h=4, shapes=f'<polygon label="{CAR}" points="1,1;2,nan;3,3"/>'), "polygons of three points"),
    ],
)
def test_a_wrong_shape_costs_its_image(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.xml").write_text(text)
    assert run_import("cvat", tmp_path / "a.xml", tmp_path / "targets", "taxonomy=scenes") == 3
    (failed,) = json.loads((tmp_path / "targets/import.json").read_text())["failed"]
    assert words in failed["error_message"]


BILLION = '<!DOCTYPE a [<!ENTITY x "lol"><!ENTITY y "&x;&x;">]><annotations>&y;</annotations>'


@pytest.mark.parametrize(
    ("form", "data", "words"),
    [
        ("cvat", BILLION.encode(), "document type"),
        ("cvat", b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>', "document type"),
        ("cvat", b"<html></html>", "expected <annotations>"),
        ("cvat", b"<annotations><image>", "not readable XML"),
        ("cvat", b"PK\x03\x04 cut", "no zip"),
        ("label_studio", b"[[[[", "not JSON"),
        ("coco", b"[]", "is not JSON: expected {"),
        ("coco", b'{"images": [], "annotations": []}', "no categories"),
        ("coco", b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "dragon"}]}', "a class of"),
    ],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, form: str, data: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(data)
    assert run_import(form, tmp_path / "file", tmp_path / "targets", "taxonomy=scenes") == 2
    assert words in capsys.readouterr().err


def test_a_zip_that_unpacks_to_more_than_allowed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("annotations.xml", b"<annotations>" + b" " * 20_000_000 + b"</annotations>")
    (tmp_path / "bomb.zip").write_bytes(buffer.getvalue())
    more = ("taxonomy=scenes", "max_bytes=1000000")
    assert run_import("cvat", tmp_path / "bomb.zip", tmp_path / "targets", *more) == 2
    assert "when unpacked" in capsys.readouterr().err


def test_label_studio_tasks_that_nobody_did_are_passed_over(tmp_path: Path) -> None:
    scene_table(tmp_path / "table", "semantic")
    out = tmp_path / "out"
    assert run_export(tmp_path / "table", "label_studio", out) == 0
    # Predictions alone: nobody has looked at them.
    assert run_import("label_studio", out / "tasks.json", tmp_path / "targets", f"export.uri={out}") == 3
    told: dict[str, Any] = json.loads((tmp_path / "targets/import.json").read_text())
    assert told["passed_over"] == {"tasks without an annotation": 9}
