"""Prompts: what a document may say, how each source carries it, and that it reaches the models that want it."""

import dataclasses
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from pipeline.config import SourceConfig
from pipeline.errors import TargetMismatchError
from pipeline.models.spec import Preprocess, Prompts
from pipeline.prompts import read_prompts
from pipeline.sources.base import Sample, UnitEnd
from pipeline.sources.pack import pack_unit
from pipeline.sources.registry import open_source
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.transfer import pack_windows, unpack_window

DOCUMENT = {"boxes": [[1, 2, 3.5, 4], [0, 0, 9, 9]], "points": [[5, 6, 1], [7, 8, 0]], "text": "a red car"}
PROMPTS = Prompts(
    boxes=((1.0, 2.0, 3.5, 4.0), (0.0, 0.0, 9.0, 9.0)), points=((5.0, 6.0, 1), (7.0, 8.0, 0)), text="a red car"
)
TEXT = json.dumps(DOCUMENT).encode()


def test_a_document() -> None:
    assert read_prompts(TEXT) == PROMPTS
    assert read_prompts(b"{}") == Prompts()


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (b"\x80\x04]", "prompts are no JSON"),
        (b"[" * 100_000, "prompts are no JSON"),
        (b"[]", "prompts: expected an object, got []"),
        (b'{"box": []}', "prompts: expected boxes, points and text, got 'box'"),
        (b'{"boxes": 5}', "prompts.boxes: expected a list of at most 10000, got 5"),
        (b'{"boxes": [[1, 2, 3]]}', "prompts.boxes[0]: expected x1, y1, x2, y2, got [1, 2, 3]"),
        (b'{"boxes": [[1, 2, 3, NaN]]}', "x1, y1, x2, y2 from -1000000 to 1000000, got nan"),
        (b'{"boxes": [[1, 2, 3, Infinity]]}', "got inf"),
        (b'{"boxes": [[1, 2, 3, 1e300]]}', "got 1e+300"),
        (b'{"boxes": [[1, 2, true, 4]]}', "got True"),
        (b'{"boxes": [[1, 2, "3", 4]]}', "got '3'"),
        (b'{"boxes": [[0, 0, 1, 1], [3, 2, 1, 4]]}', "prompts.boxes[1]: expected x1 < x2 and y1 < y2"),
        (b'{"points": [[1, 2, 2]]}', "prompts.points[0]: expected 1 (inside) or 0 (outside), got 2.0"),
        (b'{"points": [[1, 2]]}', "prompts.points[0]: expected x, y and 1 or 0, got [1, 2]"),
        (b'{"text": 3}', "prompts.text: expected at most 2000 characters, got 3"),
        (json.dumps({"text": "x" * 2001}).encode(), "prompts.text: expected at most 2000 characters"),
        (json.dumps({"boxes": [[0, 0, 1, 1]] * 10_001}).encode(), "at most 10000, got 10001 of them"),
        (b" " * 4_000_001, "prompts: expected at most 4000000 bytes of JSON, got 4000001"),
    ],
)
def test_what_is_no_document(document: bytes, complaint: str) -> None:
    with pytest.raises(TargetMismatchError) as caught:
        read_prompts(document)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 400


def png(width: int = 16, height: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def samples_of(tree: dict[str, Any]) -> list[Sample]:
    source = open_source(TypeAdapter(SourceConfig).validate_python(tree))
    items = [item for unit in source.plan() for item in source.read(unit, ())]
    return [item for item in items if not isinstance(item, UnitEnd)]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(folder: Path, document: bytes = TEXT) -> dict[str, Any]:
    with tarfile.open(folder / "a.tar", "w") as tar:
        add(tar, "one.png", png())
        add(tar, "one.prompts.json", document)
        add(tar, "two.png", png())
    return {"format": "webdataset", "uri": str(folder)}


def test_tar_files_parquet_and_packing(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    tree = tar_of(tmp_path / "tars")
    assert [dict(sample.targets) for sample in samples_of(tree)] == [{"prompts": TEXT}, {}]

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one.png").write_bytes(png())
    (tmp_path / "files" / "one.json").write_bytes(TEXT)
    found = samples_of({"format": "files", "uri": str(tmp_path / "files"), "targets": {"prompts": "{stem}.json"}})
    assert [dict(sample.targets) for sample in found] == [{"prompts": TEXT}]

    table = pa.table({"image": [png()], "where": [TEXT.decode()]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = samples_of(
        {"format": "parquet", "uri": str(tmp_path / "a.parquet"), "target_columns": {"prompts": "where"}}
    )
    assert [dict(sample.targets) for sample in found] == [{"prompts": TEXT}]

    source = open_source(TypeAdapter(SourceConfig).validate_python(tree))
    (unit,) = source.plan()
    assert pack_unit(source, unit, 0, str(tmp_path / "packed"), {}, images_per_shard=9) == 2
    again = samples_of({"format": "webdataset", "uri": str(tmp_path / "packed")})
    assert [dict(sample.targets) for sample in again] == [{"prompts": TEXT}, {}]


def test_scenes_and_coco_have_boxes(tmp_path: Path) -> None:
    tree = {"format": "scenes", "count": 3, "width": 64, "height": 48, "targets": ["instances", "prompts"]}
    for sample in samples_of(tree):
        boxes = [annotation["bbox"] for annotation in json.loads(sample.targets["instances"])["annotations"]]
        assert read_prompts(sample.targets["prompts"]).boxes == tuple((x, y, x + w, y + h) for x, y, w, h in boxes)

    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 1},
        {"id": 4, "image_id": 2, "category_id": 1, "bbox": "wide"},
    ]
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    tree = {"format": "coco", "uri": str(tmp_path), "instances": str(tmp_path / "i.json")}
    assert "prompts" not in samples_of(tree)[0].targets
    first, second = samples_of({**tree, "prompts": True})
    assert read_prompts(first.targets["prompts"]).boxes == ((1, 2, 4, 6),)
    with pytest.raises(TargetMismatchError, match=r"prompts.boxes\[0\]: expected x1, y1, x2, y2, got 'wide'"):
        read_prompts(second.targets["prompts"])


def decoded(tree: dict[str, Any], done: list[Any], wanted: list[bool]) -> list[Decoded]:
    source = open_source(TypeAdapter(SourceConfig).validate_python(tree))
    (unit,) = source.plan()
    with ThreadPoolExecutor(1) as pool:
        preprocesses = [Preprocess(pad_multiple=4)] * len(done)
        decoder = Decoder(source, preprocesses, max_pixels=10_000, pool=pool, threads=1, targets=True, prompts=wanted)
        return [item for item in decoder.stream(unit, done) if isinstance(item, Decoded)]


def prompts_of(item: Decoded) -> list[Any]:
    return [prepared and prepared.frame.prompts for prepared in item.prepared]


def test_they_reach_the_models_that_want_them(tmp_path: Path) -> None:
    tree = tar_of(tmp_path)
    one, two = decoded(tree, [(), ()], [True, False])
    assert prompts_of(one) == [PROMPTS, None]
    assert prompts_of(two) == [None, None]
    assert not one.targets  # they are none: an image without targets is not scored
    assert prompts_of(decoded(tree, [(), ()], [])[0]) == [None, None]


def test_a_broken_document_fails_its_row_and_no_other(tmp_path: Path) -> None:
    tree = tar_of(tmp_path, b'{"boxes": [[1, 2, 3]]}')
    one, two = decoded(tree, [(), ()], [True, False])
    assert (type(one.error), one.error_stage) == (TargetMismatchError, "decode")
    assert "prompts.boxes[0]" in str(one.error)
    assert two.error is None
    # Nobody reads it where no model wants it, or where the one that does has its row.
    assert [item.error for item in decoded(tree, [(), ()], [False, False])] == [None, None]
    assert [item.error for item in decoded(tree, [(0, 1), ()], [True, False])] == [None, None]


def test_they_travel_between_nodes(tmp_path: Path) -> None:
    items = decoded(tar_of(tmp_path), [(), ()], [True, False])
    (data, _), _ = pack_windows(iter([*items, UnitEnd(rows=2)]), 9)
    again = [*unpack_window(data, (Preprocess(pad_multiple=4),) * 2)]
    for item, other in zip(items, again, strict=True):
        assert prompts_of(item) == prompts_of(other)
        assert dataclasses.replace(item, prepared=()) == dataclasses.replace(other, prepared=())
