"""COCO folders: targets per image, slices, untrusted names, files that are not COCO, a real data set."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from source_faults import FlakyFileSystem
from source_helpers import read, read_all, write_tree

from pipeline.config import CocoSource, FilesSource
from pipeline.errors import ConfigError, StorageError, UnreadableError
from pipeline.sources.base import UnitEnd
from pipeline.sources.coco import MAX_SLICE_CHARACTERS, Coco, categories_of
from pipeline.sources.coco_json import CocoImage, read_coco
from pipeline.taxonomy import load_taxonomy


def coco(root: Any, **options: Any) -> Coco:
    names = {key: str(value) for key, value in options.items() if key in ("instances", "panoptic", "panoptic_masks")}
    return Coco(CocoSource(format="coco", **{"uri": f"{root}/images", **options, **names}))


IMAGES = [{"id": n, "file_name": f"{n}.jpg", "width": 5, "height": 4} for n in (3, 1, 2)]
ANNOTATIONS = [
    {"id": 1, "image_id": 2, "category_id": 7, "bbox": [0, 0, 1.50, 2], "segmentation": [[0, 0, 1, 0, 1, 1]]},
    {"id": 2, "image_id": 1, "category_id": 8, "iscrowd": 1},
    {"id": 3, "image_id": 2, "category_id": 9},
    {"id": 4, "image_id": 999, "category_id": 9},
]
SEGMENTS = [{"id": 5, "category_id": 1, "iscrowd": 0, "area": 3}]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    panoptic = {
        "annotations": [
            {"image_id": 2, "file_name": "2.png", "segments_info": SEGMENTS},
            {"image_id": 4, "file_name": "4.png", "segments_info": []},
        ],
        "categories": [{"id": 1, "name": "é"}],
        "images": [*IMAGES[2:], {"id": 4, "file_name": "4.jpg"}],
    }
    return write_tree(
        tmp_path,
        {f"images/{n}.jpg": b"%d" % n for n in (1, 2, 3, 4)}
        | {
            "instances.json": json.dumps({"images": IMAGES, "annotations": ANNOTATIONS}).encode(),
            "panoptic.json": json.dumps(panoptic, indent=1, ensure_ascii=False).encode("utf-8-sig"),
            "panoptic/2.png": b"mask2",
            "images/other.jpg": b"not in the JSON",
        },
    )


def test_targets_of_each_image(tree: Path) -> None:
    source = coco(tree, instances=tree / "instances.json", panoptic=tree / "panoptic.json")
    (unit,) = source.plan()
    assert (unit.shard_id, unit.rows, unit.size_bytes) == ("coco#0", 4, 4)
    samples, end = read(source, unit)
    assert end == UnitEnd(rows=4)
    assert [s.image_id for s in samples] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [s.image for s in samples] == [b"1", b"2", b"3", b"4"]
    assert [s.fields for s in samples] == [{"coco_id": str(n)} for n in (1, 2, 3, 4)]
    size = {"width": 5, "height": 4}
    assert json.loads(samples[0].targets["instances"]) == {"annotations": [ANNOTATIONS[1]], **size}
    assert json.loads(samples[1].targets["instances"]) == {"annotations": [ANNOTATIONS[0], ANNOTATIONS[2]], **size}
    assert b"1.5" in samples[1].targets["instances"]
    assert samples[1].targets["panoptic"] == b"mask2"
    assert json.loads(samples[1].targets["segments"]) == {"segments_info": SEGMENTS}
    assert json.loads(samples[2].targets["instances"]) == {"annotations": [], **size}
    assert samples[3].targets == {}  # its mask is missing, and the instances do not know it
    assert [s.position for s in read(source, unit, {0, 1})[0]] == [2, 3]


def test_targets_alone(tree: Path) -> None:
    """No image is looked at, so that none of them needs to be there, nor a folder of them to be named."""
    options = {"instances": tree / "instances.json", "panoptic": tree / "panoptic.json", "unit_images": 3}
    whole = read_all(coco(tree, **options))
    for path in (tree / "images").iterdir():
        path.unlink()
    for source in (coco(tree, **options), coco(tree, **options, uri=None)):
        assert read_all(source, images=False) == [replace(sample, image=b"") for sample in whole]
        assert [(u.shard_id, u.rows, u.size_bytes) for u in source.plan(images=False)] == [
            ("coco#0", 3, 0),
            ("coco#1", 1, 0),
        ]
        assert all(unit.location for unit in source.plan(images=False))
    before = [unit.fingerprint for unit in source.plan(images=False)]
    (tree / "panoptic/2.png").write_bytes(b"another")
    after = [unit.fingerprint for unit in source.plan(images=False)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


def test_images_need_their_folder(tree: Path) -> None:
    source = coco(tree, instances=tree / "instances.json", uri=None)
    (unit,) = source.plan(images=False)
    with pytest.raises(ConfigError, match=r"source\.uri must be given"):
        list(source.plan())
    with pytest.raises(ConfigError, match=r"source\.uri must be given"):
        list(source.read(unit, ()))


def test_names_of_images_do_not_matter_where_they_are_not_read(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "../secret.jpg"}, {"id": 2, "file_name": "/etc/passwd"}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": []}))
    samples = read_all(coco(tmp_path, instances=tmp_path / "i.json"), images=False)
    assert [(s.error, json.loads(s.targets["instances"])) for s in samples] == [(None, {"annotations": []})] * 2


@pytest.mark.parametrize("size", [(None, 4), (5, "4"), (0, 4), (True, 1), (5.5, 4), (-5, 4)])
def test_a_size_that_is_none_is_left_out(tmp_path: Path, size: tuple[Any, Any]) -> None:
    image = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    tree = {"images": [image], "annotations": []}
    (tmp_path / "i.json").write_text(json.dumps(tree))
    (sample,) = read_all(coco(tmp_path, instances=tmp_path / "i.json"), images=False)
    assert json.loads(sample.targets["instances"]) == {"annotations": []}


def test_the_files_own_label_space(tree: Path) -> None:
    things = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "color": [1, 2, 3]}]
    both = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 300, "name": "sky", "isthing": 0, "color": [9, 9, 9]}]
    empty = {"images": [], "annotations": [{"id": 1}] * 9, "info": {"categories": [{"id": 1}]}}
    (tree / "i.json").write_text(json.dumps({**empty, "categories": things}))
    (tree / "p.json").write_text(json.dumps({"categories": both, **empty}))

    def found(**options: Any) -> list[tuple[int, str, str]]:
        taxonomy = categories_of(coco(tree, **options).config)
        assert taxonomy is not None
        return [(c.id, c.name, c.kind) for c in taxonomy.categories]

    assert found(instances=tree / "i.json") == [(3, "dog", "thing"), (7, "cat", "thing")]
    assert found(panoptic=tree / "p.json") == [(7, "cat", "thing"), (300, "sky", "stuff")]
    assert found(instances=tree / "i.json", panoptic=tree / "p.json") == [
        (3, "dog", "thing"), (7, "cat", "thing"), (300, "sky", "stuff"),
    ]  # fmt: skip
    taxonomy = categories_of(coco(tree, instances=tree / "i.json", panoptic=tree / "p.json", uri=None).config)
    assert taxonomy is not None
    assert (taxonomy.by_id[300].color, taxonomy.by_id[3].color) == ((9, 9, 9), (1, 2, 3))
    assert taxonomy.source == "categories of i.json and p.json"
    assert categories_of(coco(tree, instances=tree / "instances.json").config) is None  # it has none
    assert categories_of(FilesSource(format="files", uri="x")) is None


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 7, "name": "cow"}], r"p.json: category 7 is 'cow', but 'cat' in .*i.json"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "a"}], r"p.json: categories\[1\]: the id 1 occurs twice"),
        ([{"id": "1", "name": "a"}], r"categories\[0\]: id must be a number, got str"),
        ([{"id": 1}], r"categories\[0\]: name must be a string, it has id"),
        ({"1": "a"}, "categories must be a list"),
        ([{"id": 1, "name": "a", "color": [1, 2]}], "color three bytes"),
        ([{"id": 1, "name": "a", "color": "red"}], "holds no taxonomy"),
        ([{"id": 70_000, "name": "a"}], "ids must be unique, 0 to 65534"),
    ],
)
def test_categories_that_are_none(tree: Path, categories: Any, message: str) -> None:
    (tree / "i.json").write_text(json.dumps({"categories": [{"id": 7, "name": "cat"}]}))
    (tree / "p.json").write_text(json.dumps({"categories": categories}))
    with pytest.raises(ConfigError, match=message):
        categories_of(coco(tree, instances=tree / "i.json", panoptic=tree / "p.json").config)


def test_colours_are_those_of_the_bundled_taxonomy(tree: Path) -> None:
    coco80 = load_taxonomy("coco80")
    (tree / "i.json").write_text(json.dumps({"categories": [{"id": c.id, "name": c.name} for c in coco80.categories]}))
    found = categories_of(coco(tree, instances=tree / "i.json").config)
    assert found is not None
    assert found.categories == coco80.categories


def test_files_of_different_sets(tree: Path) -> None:
    for other in ({"id": 9, "file_name": "1.jpg"}, {"id": 1, "file_name": "9.jpg"}):
        (tree / "p.json").write_text(json.dumps({"images": [other], "annotations": []}))
        with pytest.raises(ConfigError, match=r"p\.json: image .* is another in .*instances\.json"):
            list(coco(tree, instances=tree / "instances.json", panoptic=tree / "p.json").plan())


def test_one_file_alone(tree: Path) -> None:
    samples = read_all(coco(tree, instances=tree / "instances.json"))
    assert [set(s.targets) for s in samples] == [{"instances"}] * 3
    (tree / "panoptic").rename(tree / "masks")
    samples = read_all(coco(tree, panoptic=tree / "panoptic.json", panoptic_masks=tree / "masks"))
    assert [set(s.targets) for s in samples] == [{"panoptic", "segments"}, set()]


def test_slices_limit_and_fingerprints(tree: Path) -> None:
    options = {"instances": tree / "instances.json", "unit_images": 2}
    units = list(coco(tree, **options).plan())
    assert [(u.shard_id, u.rows, u.stop) for u in units] == [("coco#0", 2, None), ("coco#1", 1, None)]
    (limited,) = coco(tree, **options, limit=1).plan()
    assert (limited.rows, limited.stop, limited.fingerprint) == (1, 1, units[0].fingerprint)
    assert [s.image_id for s in read(coco(tree, **options), limited)[0]] == ["1.jpg"]
    (tree / "images/3.jpg").write_bytes(b"new")
    after = list(coco(tree, **options).plan())
    assert [old.fingerprint == new.fingerprint for old, new in zip(units, after, strict=True)] == [True, False]
    changed = json.dumps({"images": IMAGES, "annotations": ANNOTATIONS[1:]})
    (tree / "instances.json").write_text(changed)
    last = list(coco(tree, **options).plan())
    assert [old.fingerprint == new.fingerprint for old, new in zip(after, last, strict=True)] == [False, True]


def test_a_slice_of_long_annotations_is_short(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(9)]
    text = "x" * (MAX_SLICE_CHARACTERS // 3)
    annotations = [{"image_id": n, "category_id": 1, "text": text} for n in range(9)]
    write_tree(tmp_path, {f"images/{n}.jpg": b"" for n in range(9)})
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    units = list(coco(tmp_path, instances=tmp_path / "i.json").plan())
    assert [unit.rows for unit in units] == [2, 2, 2, 2, 1]
    assert all(len(unit.payload) < 100_000 for unit in units)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "file:///etc/passwd", "", "..",
                                  "x\0.jpg", "missing.jpg", "\ud800.jpg", "images"])  # fmt: skip
def test_names_that_leave_the_folder_or_are_missing_fail(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path, {"images/a.jpg": b"a", "images/d/b.jpg": b"b", "secret.jpg": b"s", "images/images/x": b""})
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "d/../d/b.jpg"}, {"id": 3, "file_name": name}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": []}))
    samples = {s.fields["coco_id"]: s for s in read_all(coco(tmp_path, instances=tmp_path / "i.json"))}
    assert (samples["1"].image, samples["2"].image) == (b"a", b"b")
    assert isinstance(samples["3"].error, UnreadableError)
    assert (samples["3"].image, samples["3"].targets) == (b"", {})
    assert all(s.image_id.encode() is not None for s in samples.values())
    assert str(samples["3"].error).encode()


def test_a_mask_name_that_leaves_the_folder_fails(tmp_path: Path) -> None:
    write_tree(tmp_path, {"images/a.jpg": b"a", "secret.png": b"s", "p/b.png": b""})
    annotation = {"image_id": 1, "file_name": "../secret.png", "segments_info": []}
    (tmp_path / "p.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation]})
    )
    (sample,) = read_all(coco(tmp_path, panoptic=tmp_path / "p.json"))
    assert "leads out of the folder" in str(sample.error)


IMAGE = '{"id": 1, "file_name": "a.jpg"}'
WRONG = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ('{"images": [], "annotations": [', "not JSON"),
    ('{"images": [,]}', "not JSON"),
    ('{"images" 1}', "expected :"),
    ("[]", "expected an object with images and annotations, got a list"),
    ("7", "expected {"),
    ('{"images": []}', "lacks annotations"),
    ('{"images": {}, "annotations": []}', "images must be a list"),
    ('{"images": [7], "annotations": []}', r"images\[0\] must be an object, got int"),
    ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\]: file_name must be a string, it has id"),
    ('{"images": [{"id": true, "file_name": "x"}], "annotations": []}', "id must be a number or a string, got bool"),
    (f'{{"images": [{IMAGE}, {IMAGE}], "annotations": []}}', r"images\[1\]: the id 1 occurs twice"),
    (
        '{"images": [{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}]}',
        r"images\[1\]: the id '1' occurs twice",
    ),
    (f'{{"images": [{IMAGE}, {IMAGE.replace("1", "2")}], "annotations": []}}', "'a.jpg' occurs twice"),
    ('{"images": [], "annotations": [{"image_id": 1}]}', r"annotations\[0\]: category_id must be a number"),
    ('{"images": [], "annotations": []}', "names no images"),
    ('{"images": [], "annotations": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_not_coco_is_said(tmp_path: Path, text: str, message: str) -> None:
    write_tree(tmp_path, {"images/a.jpg": b"a", "i.json": text.encode()})
    with pytest.raises(ConfigError, match=message):
        list(coco(tmp_path, instances=tmp_path / "i.json").plan())


def test_panoptic_for_instances_and_missing_files(tree: Path) -> None:
    with pytest.raises(ConfigError, match="category_id must be a number"):
        list(coco(tree, instances=tree / "panoptic.json").plan())
    with pytest.raises(ConfigError, match="file_name must be a string"):
        list(coco(tree, panoptic=tree / "instances.json").plan())
    with pytest.raises(StorageError, match="does not exist"):
        list(coco(tree, instances=tree / "none.json").plan())
    with pytest.raises(StorageError, match="does not exist"):
        list(coco(tree / "none", instances=tree / "instances.json").plan())


def test_annotation_text_is_kept_whatever_the_spacing() -> None:
    text = b'\n{ "annotations" :[ {"image_id":1 , "category_id":2,"x":1.500} ,\n{"image_id":1,"category_id":3}\t] ,"info":{"a":[1,{"b":null}]},"images":[ {"id":1,"file_name":"a"}]}\n'  # fmt: skip  # noqa: E501
    (image,) = read_coco(text, "x.json", {"category_id": int})
    annotations = ('{"image_id":1 , "category_id":2,"x":1.500}', '{"image_id":1,"category_id":3}')
    assert image == CocoImage("1", "a", 0, 0, annotations)


def test_passing_faults(tree: Path) -> None:
    FlakyFileSystem.reset({f"c/{p.relative_to(tree)}": p.read_bytes() for p in tree.rglob("*") if p.is_file()})
    FlakyFileSystem.faults += [0, 0]
    source = coco("flaky://c", instances=tree / "instances.json")
    assert [s.image for s in read_all(source)] == [b"1", b"2", b"3"]
    assert FlakyFileSystem.raised == 2


def test_s3(s3: Any, tree: Path) -> None:
    bucket = s3.bucket("coco")
    for path in tree.rglob("*"):
        if path.is_file():
            s3.client.put_object(Bucket=bucket, Key=f"c/{path.relative_to(tree)}", Body=path.read_bytes())
    root = f"s3://{bucket}/c"
    source = coco(root, instances=f"{root}/instances.json", panoptic=f"{root}/panoptic.json", storage=s3.options)
    there = read_all(source)
    here = read_all(coco(tree, instances=tree / "instances.json", panoptic=tree / "panoptic.json"))
    assert there == here


@pytest.mark.shared
def test_real_coco128(shared_data: Path) -> None:
    root = shared_data / "coco128"
    source = coco(root, instances=root / "instances.json", panoptic=root / "panoptic.json", unit_images=50)
    samples = read_all(source)
    assert len(samples) == len({s.image_id for s in samples}) == 128
    assert all(s.error is None for s in samples)
    annotations = [a for s in samples for a in json.loads(s.targets["instances"])["annotations"]]
    whole = json.loads((root / "instances.json").read_text())["annotations"]
    assert sorted(annotations, key=lambda a: a["id"]) == sorted(whole, key=lambda a: a["id"])
    assert len(annotations) == 939
    panoptic = [s for s in samples if "panoptic" in s.targets]
    assert len(panoptic) == 100
    assert all(s.targets["panoptic"][:4] == b"\x89PNG" for s in panoptic)
    assert all(json.loads(s.targets["segments"])["segments_info"] for s in panoptic)
