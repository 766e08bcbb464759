"""Loose files: slices, templates in five real layouts, what is missing, faults, a real data set."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from source_faults import FlakyFileSystem
from source_helpers import http_server, read, read_all, write_tree

from pipeline import config
from pipeline.config import FilesSource
from pipeline.errors import ConfigError, ImageTooLargeError, UnreadableError
from pipeline.sources.base import UnitEnd
from pipeline.sources.files import Files
from pipeline.sources.registry import SOURCES, open_source


def files(uri: Any, **options: Any) -> Files:
    return Files(FilesSource(format="files", uri=str(uri), **options))


def test_the_registry_knows_every_format() -> None:
    assert set(SOURCES) == set(config.SOURCES)
    sections = [
        config.WebdatasetSource(format="webdataset", uri="x"),
        config.ParquetSource(format="parquet", uri="x"),
        FilesSource(format="files", uri="x"),
        config.CocoSource(format="coco", uri="x", instances="y"),
        config.ScenesSource(format="scenes"),
    ]
    for section in sections:
        source = open_source(section)
        assert pickle.loads(pickle.dumps(source)) == source
        assert len(pickle.dumps(source)) < 3000


def test_slices_of_the_sorted_listing(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{n % 2}/{n:02d}.JPG": b"%d" % n for n in range(10)} | {"notes.txt": b"", ".x/1.jpg": b""})
    source = files(tmp_path, unit_images=4)
    units = list(source.plan())
    assert [unit.shard_id for unit in units] == ["files#0", "files#1", "files#2"]
    assert [unit.rows for unit in units] == [4, 4, 2]
    samples = read_all(source)
    assert [s.image_id for s in samples] == [f"{n % 2}/{n:02d}.JPG" for n in [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]
    assert [s.image for s in samples] == [b"%d" % n for n in [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]
    assert [s.position for s in samples] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert all(s.fields == {} and s.targets == {} for s in samples)
    assert [s.position for s in read(source, units[0], {1, 3})[0]] == [0, 2]
    assert read(source, units[0], range(4)) == ([], UnitEnd(rows=4))
    assert pickle.loads(pickle.dumps(source)) == source
    os.utime(tmp_path / "0/00.JPG", (1, 1))
    assert [old.fingerprint == new.fingerprint for old, new in zip(units, source.plan(), strict=True)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(("limit", "rows"), [(1, [1]), (4, [4]), (6, [4, 2]), (9, [4, 4, 1]), (50, [4, 4, 2])])
def test_limit(tmp_path: Path, limit: int, rows: list[int]) -> None:
    write_tree(tmp_path, {f"{n}.png": b"%d" % n for n in range(10)})
    units = list(files(tmp_path, unit_images=4, limit=limit).plan())
    source = files(tmp_path, unit_images=4)
    assert [unit.rows for unit in units] == rows
    assert [u.fingerprint for u in units] == [u.fingerprint for u in source.plan()][: len(units)]
    assert [len(read(source, unit)[0]) for unit in units] == rows
    assert [read(source, unit)[1].rows for unit in units] == rows


LAYOUTS: list[tuple[str, dict[str, bytes], str, dict[str, Any], list[Any]]] = [
    (
        "CamVid, uri the images",
        {"val/a.png": b"A", "val/b.png": b"B", "valannot/a.png": b"a", "valannot/b.png": b"b", "train/c.png": b"C"},
        "val",
        {"targets": {"semantic": "../valannot/{stem}.png"}},
        [("a.png", b"A", {"semantic": b"a"}, {}), ("b.png", b"B", {"semantic": b"b"}, {})],
    ),
    (
        "CamVid, uri the root",
        {"val/a.png": b"A", "valannot/a.png": b"a", "train/c.png": b"C", "trainannot/c.png": b"c"},
        "",
        {"images": "{split}/{id}.png", "targets": {"semantic": "{split}annot/{id}.png"}},
        [
            ("train/c.png", b"C", {"semantic": b"c"}, {"split": "train", "id": "c"}),
            ("val/a.png", b"A", {"semantic": b"a"}, {"split": "val", "id": "a"}),
        ],
    ),
    (
        "Cityscapes",
        {
            "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png": b"U",
            "gtFine/val/ulm/ulm_0_gtFine_labelIds.png": b"u",
            "gtFine/val/ulm/ulm_0_gtFine_color.png": b"c",
            "leftImg8bit/train/bonn/bonn_0_leftImg8bit.png": b"B",
        },
        "",
        {
            "images": "leftImg8bit/{split}/{city}/{id}_leftImg8bit.png",
            "targets": {"semantic": "gtFine/{split}/{city}/{id}_gtFine_labelIds.png"},
        },
        [
            ("leftImg8bit/train/bonn/bonn_0_leftImg8bit.png", b"B", {},
             {"split": "train", "city": "bonn", "id": "bonn_0"}),
            ("leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", b"U", {"semantic": b"u"},
             {"split": "val", "city": "ulm", "id": "ulm_0"}),
        ],
    ),
    (
        "VOC",
        {"JPEGImages/1.jpg": b"1", "JPEGImages/2.jpg": b"2", "SegmentationClass/1.png": b"s", "Annotations/1.xml": b""},
        "",
        {"images": "JPEGImages/{id}.jpg", "targets": {"semantic": "SegmentationClass/{id}.png"}},
        [("JPEGImages/1.jpg", b"1", {"semantic": b"s"}, {"id": "1"}), ("JPEGImages/2.jpg", b"2", {}, {"id": "2"})],
    ),
    (
        "ADE20K",
        {"images/validation/a.jpg": b"A", "annotations/validation/a.png": b"a"},
        "images",
        {"targets": {"semantic": "../annotations/{dir}/{stem}.png"}},
        [("validation/a.jpg", b"A", {"semantic": b"a"}, {})],
    ),
    (
        "NYU",
        {"f-0.color.jpg": b"C", "f-0.depth.png": b"D", "f-1.color.jpg": b"E"},
        "",
        {"images": "{id}.color.jpg", "targets": {"depth": "{id}.depth.png"}},
        [("f-0.color.jpg", b"C", {"depth": b"D"}, {"id": "f-0"}), ("f-1.color.jpg", b"E", {}, {"id": "f-1"})],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "uri", "options", "expected"), [c[1:] for c in LAYOUTS], ids=[c[0] for c in LAYOUTS])
def test_layouts(
    tmp_path: Path, tree: dict[str, bytes], uri: str, options: dict[str, Any], expected: list[Any]
) -> None:
    write_tree(tmp_path, tree)
    samples = read_all(files(tmp_path / uri, **options))
    assert [(s.image_id, s.image, dict(s.targets), dict(s.fields)) for s in samples] == expected
    assert all(s.error is None for s in samples)


def test_targets_alone(tmp_path: Path) -> None:
    """Images are listed, which is where ids come from, and not read."""
    write_tree(tmp_path, {f"i/{n}.jpg": b"x" * 200 for n in range(4)} | {f"t/{n}.npy": b"%d" % n for n in (0, 1, 2)})
    source = files(tmp_path / "i", targets={"depth": "../t/{stem}.npy"}, max_bytes=100)
    (unit,) = source.plan(images=False)
    (tmp_path / "i/1.jpg").unlink()
    (tmp_path / "t/2.npy").write_bytes(b"x" * 101)
    samples, end = read(source, unit, images=False)
    assert [(s.image, dict(s.targets), type(s.error)) for s in samples] == [
        (b"", {"depth": b"0"}, type(None)),
        (b"", {"depth": b"1"}, type(None)),
        (b"", {}, ImageTooLargeError),
        (b"", {}, type(None)),
    ]
    assert end.rows == 4


def test_targets_alone_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"i/{n}.jpg": b"" for n in range(3)} | {f"{t}/{n}.png": b"t" for n in range(3) for t in "ab"})
    source = files(
        tmp_path / "i", targets={"semantic": "../a/{stem}.png", "depth": f"{tmp_path}/b/{{stem}}.png"}, unit_images=1
    )

    def marks(images: bool) -> list[str]:
        return [unit.fingerprint for unit in source.plan(images=images)]

    with_images, before = marks(True), marks(False)
    (tmp_path / "a/0.png").write_bytes(b"changed")
    (tmp_path / "b/2.png").unlink()
    assert [a == b for a, b in zip(before, marks(False), strict=True)] == [False, True, False]
    assert marks(True) == with_images


def test_absolute_and_repeated_templates(tmp_path: Path) -> None:
    write_tree(tmp_path, {"i/7/7.jpg": b"I", "i/7/8.jpg": b"no", "m/x/7+.png": b"M", "m/7.json": b"J"})
    source = files(
        tmp_path / "i",
        images="{id}/{id}.{ext}",
        targets={
            "semantic": f"{tmp_path}/m/x/{{stem}}+.png",
            "instances": f"file://{tmp_path}/m/{{id}}.json",
            "depth": "{dir}/../../m/x/{id}+.png",
        },
    )
    (sample,) = read_all(source)
    assert sample.image_id == "7/7.jpg"
    assert sample.targets == {"semantic": b"M", "instances": b"J", "depth": b"M"}
    assert sample.fields == {"id": "7", "ext": "jpg"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": {"semantic": "{split}/x.png"}}, r"captures \{split\}; known captures: dir, ext, stem"),
        (
            {"images": "{id}.jpg", "targets": {"depth": "{di}.png"}},
            r"captures \{di\}; known captures: dir, ext, id, stem",
        ),
        ({"targets": {"masks": "{stem}"}}, "unknown kind 'masks'; known: semantic"),
        ({"targets": {"semantic": "{stem"}}, "unbalanced brace"),
        ({"images": "{id.jpg"}, "unbalanced brace"),
        ({"images": "{a.b}.jpg"}, "is no name of a capture"),
        ({"images": "{}.jpg"}, "is no name of a capture"),
    ],
)
def test_templates_that_cannot_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        files(tmp_path, **options)


def test_a_template_that_matches_nothing_shows_an_example(tmp_path: Path) -> None:
    write_tree(tmp_path, {"sub/a.jpg": b""})
    with pytest.raises(ConfigError, match=r"none of 1 files matches '\{id\}.jpg'; one of them is 'sub/a.jpg'"):
        list(files(tmp_path, images="{id}.jpg").plan())


def test_template_text_is_taken_literally(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a+(1).jpg": b"1", "aa(1).jpg": b"2", "a+(1)xjpg": b"3"})
    assert [s.image for s in read_all(files(tmp_path, images="{id}+(1).jpg"))] == [b"1"]


def test_what_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{n}.jpg": b"%d" % n for n in range(6)} | {"3.png": b"t", "4.png": b"x" * 300})
    source = files(tmp_path, images="{id}.jpg", max_bytes=100, targets={"semantic": "{id}.png"})
    (unit,) = source.plan()
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"x" * 101)
    (tmp_path / "5.jpg").write_bytes(b"")
    samples, end = read(source, unit)
    assert end.rows == 6
    assert [type(s.error) for s in samples] == [type(None), UnreadableError, ImageTooLargeError, type(None),
                                                ImageTooLargeError, type(None)]  # fmt: skip
    assert [s.image for s in samples] == [b"0", b"", b"", b"3", b"", b""]
    assert samples[3].targets == {"semantic": b"t"}
    assert "does not exist" in str(samples[1].error)


def test_names_with_magic_characters_and_bytes(tmp_path: Path) -> None:
    names = ["a[1].jpg", "b*.jpg", "c?.jpg", "d {x}.jpg", "e#f%20.jpg", "é.jpg"]
    write_tree(tmp_path, {name: name.encode() for name in names})
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))).write_bytes(b"raw")
    samples = read_all(files(tmp_path, targets={"semantic": "{stem}.jpg"}))
    assert sorted(s.image for s in samples) == sorted([*(name.encode() for name in names), b"raw"])
    assert all(s.image == s.targets["semantic"] for s in samples)
    assert all(s.image_id.encode() for s in samples)


def test_a_glob_and_one_file(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a/1.jpg": b"1", "b/2.jpg": b"2", "b/2.txt": b""})
    assert [s.image_id for s in read_all(files(f"{tmp_path}/*/*"))] == ["a/1.jpg", "b/2.jpg"]
    assert [s.image_id for s in read_all(files(f"{tmp_path}/{{b,a}}/?.jpg"))] == ["a/1.jpg", "b/2.jpg"]
    assert [s.image_id for s in read_all(files(f"{tmp_path}/a/1.jpg"))] == ["1.jpg"]


def test_passing_and_lasting_faults() -> None:
    FlakyFileSystem.reset({f"root/{n:02d}.jpg": bytes([n]) * 100 * (n + 1) for n in range(40)})
    FlakyFileSystem.faults += [5, 55, 1005, 1005, 3005, 3999]
    samples = read_all(files("flaky://root"))
    assert [s.image for s in samples] == [bytes([n]) * 100 * (n + 1) for n in range(40)]
    assert FlakyFileSystem.raised == 6
    FlakyFileSystem.lasting += [3950]
    samples = read_all(files("flaky://root"))
    assert [s.position for s in samples if s.error is not None] == [39]
    assert "as always" in str(samples[39].error)
    FlakyFileSystem.lasting[:] = [2550]  # 25.jpg and all that follow: now it is the storage
    (unit,) = files("flaky://root").plan()
    samples, end = read(files("flaky://root"), unit)
    assert [s.image_id for s in samples][-2:] == ["24.jpg", "files#0/!unreadable"]
    assert end.rows == 26


def test_memory_is_bounded_and_objects_are_read_together(s3: Any) -> None:
    bucket = s3.bucket("files")
    for n in range(40):
        s3.client.put_object(Bucket=bucket, Key=f"img/{n:02d}.jpg", Body=b"%d" % n * 1000)
        if n % 2:
            s3.client.put_object(Bucket=bucket, Key=f"ann/{n:02d}.png", Body=b"t%d" % n)
    s3.client.put_object(Bucket=bucket, Key="img/99.jpg", Body=b"")
    source = files(f"s3://{bucket}/img", storage=s3.options, targets={"semantic": "../ann/{stem}.png"})
    before = len(s3.requests())
    (unit,) = source.plan()
    assert not [
        line for line in s3.requests()[before:] if "img/" in line and "list-type" not in line and "HEAD" not in line
    ]
    samples, _ = read(source, unit)
    assert [s.image for s in samples] == [b"%d" % n * 1000 for n in range(40)] + [b""]
    assert all(s.error is None for s in samples)
    assert [dict(s.targets) for s in samples] == [{"semantic": b"t%d" % n} if n % 2 else {} for n in range(40)] + [{}]


@pytest.mark.parametrize("ranges", [True, False])
def test_http_folder(tmp_path: Path, ranges: bool) -> None:
    write_tree(tmp_path, {f"f/{n}.jpg": b"%d" % n * 100 for n in range(5)} | {"t/3.png": b"t"})
    with http_server(tmp_path, ranges=ranges) as (address, _):
        samples = read_all(files(f"{address}/f/", targets={"semantic": "../t/{stem}.png"}))
    assert [s.image_id for s in samples] == [f"{n}.jpg" for n in range(5)]
    assert [s.image for s in samples] == [b"%d" % n * 100 for n in range(5)]
    assert [dict(s.targets) for s in samples] == [{}, {}, {}, {"semantic": b"t"}, {}]


@pytest.mark.shared
def test_real_camvid(shared_data: Path) -> None:
    root = shared_data / "camvid"
    samples = read_all(files(root / "val", targets={"semantic": "../valannot/{stem}.png"}, unit_images=40))
    assert len(samples) == 101
    for sample in samples:
        assert sample.error is None
        assert sample.image == (root / "val" / sample.image_id).read_bytes()
        assert sample.targets["semantic"] == (root / "valannot" / sample.image_id).read_bytes()


@pytest.mark.shared
def test_real_coco128_and_rgbd(shared_data: Path) -> None:
    samples = read_all(files(shared_data / "coco128" / "images"))
    assert len(samples) == len({s.image_id for s in samples}) == 128
    assert all(s.image[:2] == b"\xff\xd8" for s in samples)
    samples = read_all(files(shared_data / "rgbd", images="{id}.color.jpg", targets={"depth": "{id}.depth.png"}))
    assert len(samples) == 40
    assert all(s.targets["depth"][:4] == b"\x89PNG" for s in samples)


def test_a_file_that_is_the_target_of_another_is_no_image(tmp_path: Path) -> None:
    for name in ("train/a.png", "trainannot/a.png", "val/b.png", "valannot/b.png", "val/c.png", "valannot/lonely.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    annot = {"semantic": "{split}annot/{id}.png"}
    found = read_all(files(tmp_path, images="{split}/{id}.png", targets=annot))
    assert [sample.image_id for sample in found] == ["train/a.png", "val/b.png", "val/c.png", "valannot/lonely.png"]
    # One that is its own target stays: targets alone, with no image at hand.
    assert len(read_all(files(tmp_path, images="{split}/{id}.png", targets={"semantic": "{split}/{id}.png"}))) == 6


def test_prompts_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    """What a model was told changes what it says; what it is held against does not."""
    write_tree(tmp_path, {f"i/{n}.jpg": b"x" for n in range(4)} | {f"t/{n}.{e}": b"{}" for n in range(4) for e in "pd"})
    source = files(tmp_path / "i", targets={"prompts": "../t/{stem}.p", "depth": "../t/{stem}.d"}, unit_images=2)
    before = [unit.fingerprint for unit in source.plan()]
    (tmp_path / "t/3.d").write_bytes(b"another")
    assert [unit.fingerprint for unit in source.plan()] == before
    (tmp_path / "t/3.p").write_bytes(b"another")
    first, second = (unit.fingerprint for unit in source.plan())
    assert (first == before[0], second == before[1]) == (True, False)
