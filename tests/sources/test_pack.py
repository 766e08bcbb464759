"""Packing: the tars hold every sample as it was, under keys that are safe and unique, and the same bytes each time."""

import hashlib
import tarfile
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_endpoint import S3
from source_helpers import read_all

from pipeline.config import ScenesSource, WebdatasetSource
from pipeline.errors import CorruptImageError, StorageError
from pipeline.images import decode_image
from pipeline.sources import pack
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.pack import pack_unit
from pipeline.sources.scenes import Scenes
from pipeline.sources.webdataset import Webdataset

UNIT = Unit(shard_id="u", location="", size_bytes=0, fingerprint="")
JPEG, PNG = b"\xff\xd8\xff-", b"\x89PNG-"


@dataclass(frozen=True)
class Listed:
    """A source of the samples that it is given."""

    samples: tuple[Sample, ...]

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        yield UNIT

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        yield from (sample for sample in self.samples if sample.position not in done)
        yield UnitEnd(rows=len(self.samples))


def listed(*names: str, image: bytes = JPEG, **fields: Any) -> Listed:
    return Listed(
        tuple(
            Sample(image_id=name, shard_id="u", position=index, image=image + str(index).encode(), **fields)
            for index, name in enumerate(names)
        )
    )


def tars(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read_tars(folder: Path | str, **options: Any) -> list[Sample]:
    return read_all(Webdataset(WebdatasetSource(format="webdataset", uri=str(folder), **options)))


def member_names(folder: Path) -> list[str]:
    return [name for path in sorted(folder.iterdir()) for name in tarfile.open(path).getnames()]


@pytest.mark.parametrize("per_shard", [1, 4, 10, 1000])
def test_scenes_come_back_with_their_targets(tmp_path: Path, per_shard: int) -> None:
    scenes = Scenes(ScenesSource(format="scenes", count=10, width=32, height=32, unit_images=7))
    counts = [
        pack_unit(scenes, unit, index, str(tmp_path / "t"), {}, images_per_shard=per_shard)
        for index, unit in enumerate(scenes.plan())
    ]
    assert counts == [7, 3]
    names = [f"shard-{unit:06d}-{part:03d}.tar" for unit, n in enumerate(counts) for part in range(-(-n // per_shard))]
    assert sorted(tars(tmp_path / "t")) == names
    before, after = read_all(scenes), read_tars(tmp_path / "t")
    assert len(before) == len(after) == 10
    for one, other in zip(before, after, strict=True):
        assert other.error is None
        assert (other.image, other.targets) == (one.image, one.targets)
        assert set(one.targets) == {"semantic", "panoptic", "segments", "instances", "depth"}
        assert other.image_id.endswith(f"/{one.image_id}")
    first = tars(tmp_path / "t")
    for index, unit in enumerate(scenes.plan()):
        pack_unit(scenes, unit, index, str(tmp_path / "again"), {}, images_per_shard=per_shard)
    assert tars(tmp_path / "again") == first


def test_keys_stay_in_their_folder_and_are_unique(tmp_path: Path) -> None:
    names = ["../../etc/passwd.jpg", "/abs/a.b.c.png", "a.jpg", "a.png", "a", "a_2", "a b", "a_b", "é/ü.TIFF", ".jpg",
             "..", "x/", "c:\\d.bmp", "n\new.jpg", "v1.0/img.v2.webp"]  # fmt: skip
    pack_unit(listed(*names, targets={"semantic": b"s"}), UNIT, 3, str(tmp_path), {}, images_per_shard=100)
    assert sorted(tars(tmp_path)) == ["shard-000003-000.tar"]
    found = member_names(tmp_path)
    assert found == [
        name + suffix
        for name in ("_/_/etc/passwd", "abs/a_b_c", "a", "a_2", "a_3", "a_2_2", "a_b", "a_b_2", "é/ü", "_", "__2", "x",
                     "c_d", "n_ew", "v1_0/img_v2")
        for suffix in (".jpg", ".seg.png")
    ]  # fmt: skip
    samples = read_tars(tmp_path)
    assert [sample.image for sample in samples] == [JPEG + str(index).encode() for index in range(len(names))]
    assert all(sample.error is None and sample.targets == {"semantic": b"s"} for sample in samples)
    assert len({sample.image_id for sample in samples}) == len(names)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.text(st.sampled_from("aA./_ #-2é\\\n"), max_size=6), max_size=12), per_shard=st.integers(1, 5))
def test_no_name_loses_a_sample(tmp_path_factory: pytest.TempPathFactory, names: list[str], per_shard: int) -> None:
    folder = tmp_path_factory.mktemp("pack")
    assert pack_unit(listed(*names), UNIT, 0, str(folder), {}, images_per_shard=per_shard) == len(names)
    samples = read_tars(folder) if names else []
    assert [sample.image for sample in samples] == [JPEG + str(index).encode() for index in range(len(names))]
    for name in member_names(folder):
        assert not name.startswith("/")
        assert ".." not in name.split("/")
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"shard-000000-{part:03d}.tar" for part in range(-(-len(names) // per_shard))
    ]


def test_a_key_is_changed_only_where_it_has_to_be(tmp_path: Path) -> None:
    pack_unit(listed("a.jpg", "a.png"), UNIT, 0, str(tmp_path), {}, images_per_shard=1)
    assert member_names(tmp_path) == ["a.jpg", "a.jpg"]  # of two tars


@pytest.mark.parametrize(
    ("image", "suffix"),
    [(JPEG, "jpg"), (PNG, "png"), (b"RIFF....WEBP", "webp"), (b"II*\x00", "tif"), (b"MM\x00*", "tif"), (b"BM", "bmp"),
     (b"what", "jpg")],
)  # fmt: skip
def test_suffix_by_content(tmp_path: Path, image: bytes, suffix: str) -> None:
    pack_unit(listed("k.gif", image=image), UNIT, 0, str(tmp_path), {}, images_per_shard=1)
    assert member_names(tmp_path) == [f"k_gif.{suffix}"]


def test_what_cannot_be_read_becomes_an_empty_image(tmp_path: Path) -> None:
    good = listed("a", "b", "c").samples
    broken = Sample(image_id="bad.png", shard_id="u", position=3, image=b"", error=CorruptImageError("no"))
    assert pack_unit(Listed((*good, broken)), UNIT, 0, str(tmp_path), {}, images_per_shard=10) == 4
    samples = read_tars(tmp_path)
    assert [sample.image for sample in samples] == [JPEG + b"0", JPEG + b"1", JPEG + b"2", b""]
    with pytest.raises(CorruptImageError):
        decode_image(samples[3].image)


def test_one_shard_at_a_time_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar is written before the first sample of the next one is read."""
    seen: list[int] = []

    class Watched(Listed):
        def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
            for item in super().read(unit, done):
                seen.append(len(list(tmp_path.iterdir())))
                yield item

    pack_unit(Watched(listed(*"abcdefg").samples), UNIT, 0, str(tmp_path), {}, images_per_shard=3)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_passing_fault_is_read_again(tmp_path: Path) -> None:
    faults = iter([2, 4])

    class Flaky(Listed):
        def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
            stop = next(faults, None)
            for item in super().read(unit, done):
                if isinstance(item, Sample) and item.position == stop:
                    raise StorageError("reset")
                yield item

    assert pack_unit(Flaky(listed(*"abcdef").samples), UNIT, 0, str(tmp_path), {}, images_per_shard=4) == 6
    assert [sample.image for sample in read_tars(tmp_path)] == [JPEG + str(index).encode() for index in range(6)]


def test_an_empty_unit_writes_nothing(tmp_path: Path) -> None:
    assert pack_unit(listed(), UNIT, 0, str(tmp_path / "none"), {}, images_per_shard=4) == 0
    assert list((tmp_path / "none").iterdir()) == []


def test_depth_in_metres_stays_what_it_is(tmp_path: Path) -> None:
    depth = b"\x93NUMPY and so on"
    (given,) = listed("a", targets={"depth": depth, "semantic": depth}).samples
    pack_unit(Listed((given,)), UNIT, 0, str(tmp_path), {}, images_per_shard=9)
    assert member_names(tmp_path) == ["a.jpg", "a.depth.npy", "a.seg.png"]
    (sample,) = read_tars(tmp_path)
    assert sample.targets == given.targets


def test_every_target_kind_has_a_suffix_that_reading_knows() -> None:
    from pipeline.sources.webdataset import TARGETS

    assert {kind: TARGETS[suffix[1:]] for kind, suffix in pack.TARGET_SUFFIXES.items()} == {
        kind: kind for kind in pack.TARGET_SUFFIXES
    }


def test_s3(s3: S3) -> None:
    uri = f"s3://{s3.bucket('packed')}/tars"
    pack_unit(listed(*"abc"), UNIT, 0, uri, s3.options, images_per_shard=2)
    samples = read_tars(uri, storage=s3.options)
    assert [sample.image_id for sample in samples] == [
        "shard-000000-000.tar/a", "shard-000000-000.tar/b", "shard-000000-001.tar/c",
    ]  # fmt: skip
    with pytest.raises(StorageError, match="s3://nowhere-at-all/tars"):
        pack_unit(listed("a"), UNIT, 0, "s3://nowhere-at-all/tars", s3.options, images_per_shard=2)
