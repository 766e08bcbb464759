"""Tar shards: grouping, what fails and why, cuts at any byte, faults of the storage, and what it costs to read them."""

import gzip
import io
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_faults import FlakyFileSystem
from source_helpers import http_server, read, read_all, tar_bytes, write_tree

from pipeline.config import WebdatasetSource
from pipeline.errors import ConfigError, CorruptImageError, ImageTooLargeError, StorageError, UnreadableError
from pipeline.sources.base import Sample, UnitEnd
from pipeline.sources.registry import open_source
from pipeline.sources.tarstream import MAX_EXTENDED_HEADER
from pipeline.sources.webdataset import BLOCK_BYTES, Webdataset


def webdataset(uri: Any, **options: Any) -> Webdataset:
    return Webdataset(WebdatasetSource(format="webdataset", uri=str(uri), **options))


def samples_of(tmp_path: Path, data: bytes, name: str = "a.tar", **options: Any) -> tuple[list[Sample], UnitEnd]:
    (tmp_path / name).write_bytes(data)
    source = webdataset(tmp_path / name, **options)
    (unit,) = source.plan()
    return read(source, unit)


def outcome(samples: list[Sample]) -> list[tuple[str, bytes | str]]:
    return [(s.image_id.partition("/")[2], type(s.error).__name__ if s.error else s.image) for s in samples]


def test_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    samples, end = samples_of(
        tmp_path,
        tar_bytes(
            [
                ("d.v1/0001.jpg", b"one"),
                ("d.v1/0001.seg.png", b"seg"),
                ("d.v1/0001.panoptic.png", b"pan"),
                ("d.v1/0001.panoptic.json", b"segments"),
                ("d.v1/0001.json", b"about"),
                ("d.v1/0001.instances.json", b"inst"),
                ("d.v1/0001.depth.png", b"depth"),
                ("d.v1/0001.txt", b"ignored"),
                ("d.v1/0002.PNG", b"two"),
                ("d.v1/0002.json", b"segments2"),
                ("e/0002.Webp", b"three"),
            ]
        ),
    )
    assert end.rows == 3
    assert [s.image_id for s in samples] == ["a.tar/d.v1/0001", "a.tar/d.v1/0002", "a.tar/e/0002"]
    assert [s.image for s in samples] == [b"one", b"two", b"three"]
    assert [s.position for s in samples] == [0, 1, 2]
    assert samples[0].targets == {
        "semantic": b"seg",
        "panoptic": b"pan",
        "segments": b"segments",
        "instances": b"inst",
        "depth": b"depth",
    }
    assert samples[1].targets == {"segments": b"segments2"}
    assert {s.shard_id for s in samples} == {"a.tar"}


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../etc/passwd"
    return info


CASES = [
    ("no image", [("1.json", b"x"), ("2.jpg", b"2")], [("1", "UnreadableError"), ("2", b"2")]),
    ("two images", [("1.jpg", b"x"), ("1.png", b"y"), ("2.jpg", b"2")], [("1", "CorruptImageError"), ("2", b"2")]),
    ("mask beside", [("1.jpg", b"1"), ("1.mask.png", b"m")], [("1", b"1")]),
    ("mask before", [("1.a.png", b"m"), ("1.jpg", b"1")], [("1", b"1")]),
    ("longer extension", [("1.color.jpg", b"1"), ("1.depth.png", b"d")], [("1", b"1")]),
    ("two longer ones", [("1.left.jpg", b"1"), ("1.right.jpg", b"2")], [("1", "CorruptImageError")]),
    (
        "apart",
        [("1.jpg", b"1"), ("2.jpg", b"2"), ("1.json", b"j"), ("1.jpg", b"again"), ("3.jpg", b"3"), ("1.jpg", b"")],
        [("1", b"1"), ("2", b"2"), ("1#2", "CorruptImageError"), ("3", b"3"), ("1#4", "CorruptImageError")],
    ),
    ("empty member", [("1.jpg", b""), ("2.jpg", b"2")], [("1", b""), ("2", b"2")]),
    ("outside names", [("../../x.jpg", b"1"), ("/etc/y.jpg", b"2")], [("../../x", b"1"), ("/etc/y", b"2")]),
    ("hidden and bare", [("._1.jpg", b"mac"), ("README", b"r"), ("1.jpg", b"1"), (".x/2.jpg", b"2")],
     [("1", b"1"), (".x/2", b"2")]),
    ("symlink", [link("1.jpg", tarfile.SYMTYPE), ("2.jpg", b"2")], [("1", "UnreadableError"), ("2", b"2")]),
    ("hard link", [link("1.jpg", tarfile.LNKTYPE), ("1.json", b"{}")], [("1", "UnreadableError")]),
    ("link as target", [("1.jpg", b"1"), link("1.seg.png", tarfile.SYMTYPE)], [("1", b"1")]),
    ("folders, devices", [link("d.jpg", tarfile.DIRTYPE), link("c.jpg", tarfile.CHRTYPE),
                          link("f.jpg", tarfile.FIFOTYPE), ("1.jpg", b"1")], [("1", b"1")]),
]  # fmt: skip


@pytest.mark.parametrize(("members", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_odd_samples(tmp_path: Path, members: list[Any], expected: list[Any]) -> None:
    samples, end = samples_of(tmp_path, tar_bytes(members))
    assert outcome(samples) == expected
    assert end.rows == len(expected)
    for skipped in range(len(expected)):
        source = webdataset(tmp_path / "a.tar")
        (unit,) = source.plan()
        rest, again = read(source, unit, {skipped})
        assert outcome(rest) == [pair for number, pair in enumerate(expected) if number != skipped]
        assert again == end


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    members = [("1.json", b"x"), ("2.jpg", b"2"), ("2.jpeg", b"2"), link("3.jpg", tarfile.SYMTYPE)]
    messages = [str(sample.error) for sample in samples_of(tmp_path, tar_bytes(members))[0]]
    assert messages[0] == "1: sample has no image member"
    assert messages[1] == "2: expected one image member, got 2"
    assert "3.jpg is a link" in messages[2]


@pytest.mark.parametrize("names", [("1.depth.png", "1.depth.npy"), ("1.depth.npy", "1.depth.png"), ("1.depth.npy",)])
def test_depth_in_metres(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Of both, the PNG counts, in whatever order."""
    samples, _ = samples_of(tmp_path, tar_bytes([("1.jpg", b"1"), *((name, name.encode()) for name in names)]))
    assert samples[0].targets == {"depth": min(names, key=lambda name: name.endswith("npy")).encode()}


ALONE = [
    ("no image", [("1.seg.png", b"s"), ("2.json", b"j"), ("2.jpg", b"2")], [{"semantic": b"s"}, {"segments": b"j"}]),
    ("no target", [("1.jpg", b"1"), ("2.jpg", b"2"), ("2.seg.png", b"s")], [{}, {"semantic": b"s"}]),
    ("two images", [("1.jpg", b"x"), ("1.png", b"y"), ("1.seg.png", b"s")], [{"semantic": b"s"}]),
    ("large image", [("1.jpg", bytes(5001)), ("1.seg.png", b"s")], [{"semantic": b"s"}]),
    ("large target", [("1.jpg", b"x"), ("1.seg.png", bytes(5001))], ["ImageTooLargeError"]),
    ("neither", [("1.mp3", b"x"), ("2.seg.png", b"s")], ["UnreadableError", {"semantic": b"s"}]),
    ("apart", [("1.seg.png", b"s"), ("2.seg.png", b"s"), ("1.depth.png", b"d")],
     [{"semantic": b"s"}, {"semantic": b"s"}, "CorruptImageError"]),
]  # fmt: skip


@pytest.mark.parametrize(("members", "expected"), [c[1:] for c in ALONE], ids=[c[0] for c in ALONE])
def test_targets_alone(tmp_path: Path, members: list[Any], expected: list[Any]) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    source = webdataset(tmp_path / "a.tar", max_bytes=5000)
    (unit,) = source.plan(images=False)
    assert unit == next(iter(source.plan()))
    samples, end = read(source, unit, images=False)
    assert [type(s.error).__name__ if s.error else dict(s.targets) for s in samples] == expected
    assert all(s.image == b"" for s in samples)
    whole, same_end = read(source, unit)
    assert (end, [(s.image_id, s.position) for s in samples]) == (same_end, [(s.image_id, s.position) for s in whole])
    assert [s.position for s in read(source, unit, {0}, images=False)[0]] == [s.position for s in samples[1:]]


def test_images_that_are_not_asked_for_are_not_held(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", bytes(size)) for n in range(4) for kind, size in (("jpg", 20_000_000), ("seg.png", 10))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    source = webdataset(tmp_path / "a.tar")
    (unit,) = source.plan(images=False)
    tracemalloc.start()
    samples, _ = read(source, unit, images=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(s.targets["semantic"]) for s in samples] == [10] * 4
    assert peak < 12_000_000


@pytest.mark.parametrize("offset", range(0, 6144, 256))
def test_a_cut_leaves_the_same_samples_with_and_without_images(tmp_path: Path, offset: int) -> None:
    data = tar_bytes([(f"{n}.{kind}", b"x" * 600) for n in range(2) for kind in ("jpg", "seg.png")])
    (tmp_path / "a.tar").write_bytes(data[:offset])
    source = webdataset(tmp_path / "a.tar")
    (unit,) = source.plan()
    whole, alone = (read(source, unit, images=images) for images in (True, False))
    assert [(s.image_id, dict(s.targets)) for s in whole[0]] == [(s.image_id, dict(s.targets)) for s in alone[0]]
    assert whole[1] == alone[1]


def test_over_the_size_limit_is_not_read(tmp_path: Path) -> None:
    members = [("1.jpg", bytes(5001)), ("2.jpg", bytes(5000)), ("3.jpg", b"3"), ("3.seg.png", bytes(9999))]
    samples, end = samples_of(tmp_path, tar_bytes(members), max_bytes=5000)
    assert [type(s.error) for s in samples] == [ImageTooLargeError, type(None), ImageTooLargeError]
    assert "5001 bytes" in str(samples[0].error)
    assert samples[0].image_id == "a.tar/1"
    assert samples[1].image == bytes(5000)
    assert end.rows == 3


LONG = "long-" * 60 + "é"


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_formats_and_compression(tmp_path: Path, kind: int, suffix: str) -> None:
    data = tar_bytes(
        [(f"{LONG}.jpg", b"1"), (f"{LONG}.json", b"j"), ("kurz.jpg", b"2" * 3000)],
        mode="w" if suffix == ".tar" else "w:gz",
        format=kind,
    )
    samples, _ = samples_of(tmp_path, data, f"a{suffix}")
    assert outcome(samples) == [(LONG, b"1"), ("kurz", b"2" * 3000)]
    assert samples[0].targets == {"segments": b"j"}


def test_names_that_are_no_utf8_become_text(tmp_path: Path) -> None:
    data = tar_bytes([("\udcff.jpg", b"1")], format=tarfile.GNU_FORMAT)
    samples, _ = samples_of(tmp_path, data)
    assert samples[0].image_id.encode() == rb"a.tar/\xff"


def test_gzip_of_several_parts_is_read_through(tmp_path: Path) -> None:
    plain = tar_bytes([(f"{n}.jpg", bytes([n]) * 2000) for n in range(8)])
    data = b"".join(gzip.compress(plain[i : i + 3000]) for i in range(0, len(plain), 3000)) + bytes(512)
    samples, end = samples_of(tmp_path, data, "a.tar.gz")
    assert [s.image for s in samples] == [bytes([n]) * 2000 for n in range(8)]
    assert end.rows == 8


def test_concatenated_archives_are_read_through(tmp_path: Path) -> None:
    samples, _ = samples_of(tmp_path, tar_bytes([("1.jpg", b"1")]) + tar_bytes([("2.jpg", b"2")]))
    assert outcome(samples) == [("1", b"1"), ("2", b"2")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"x", "one byte"),
        (b"this is no tar" * 100, "no tar header"),
        (tar_bytes([("1.jpg", b"1")])[:1024] + b"garbage!" * 200, "no tar header"),
        (tar_bytes([("1.jpg", b"1")]) + b"garbage!" * 200, "after its end mark"),
        (gzip.compress(b"no tar inside" * 99), "no tar header"),
        (b"\x1f\x8b" + b"not gzip" * 10, "gzip stream is broken"),
        (gzip.compress(tar_bytes([("1.jpg", b"1")]))[:-4], "gzip stream is cut"),
    ],
    ids=["empty", "byte", "text", "garbage", "after end", "gz of text", "bad gz", "cut gz"],
)
def test_what_is_no_tar_is_one_failed_sample(tmp_path: Path, data: bytes, expected: str) -> None:
    samples, end = samples_of(tmp_path, data)
    assert isinstance(samples[-1].error, UnreadableError)
    assert expected in str(samples[-1].error)
    assert samples[-1].image_id == "a.tar/!unreadable"
    assert end.rows == len(samples)
    assert [s.image for s in samples[:-1]] == [b"1"][: len(samples) - 1]


def test_an_empty_archive_has_no_samples(tmp_path: Path) -> None:
    assert samples_of(tmp_path, tar_bytes([])) == ([], UnitEnd(rows=0))


MEMBERS = [(f"{n:02d}.{ext}", bytes([65 + n]) * size)
           for n, size in enumerate([0, 1, 511, 512, 513, 3000, 40])
           for ext in ("jpg", "json")]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gz"])
def test_a_cut_at_any_byte(tmp_path: Path, packed: bool) -> None:
    """Complete samples come out, then one failed one; only a cut between members cannot be told from an end."""
    plain = tar_bytes(MEMBERS)
    ends: list[int] = []
    bodies: list[int] = []
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        for info in tar:
            bodies.append(info.offset_data + info.size)
            ends.append(info.offset_data + -(-info.size // 512) * 512)
    data = gzip.compress(plain) if packed else plain
    offsets = random.Random(1).sample(range(len(data)), 120) + ([] if packed else [*ends, ends[-1] + 512])
    for offset in offsets:
        samples, end = samples_of(tmp_path, data[:offset])
        whole = [s for s in samples if s.error is None]
        failed = [s for s in samples if s.error is not None]
        assert [s.image for s in whole] == [data for name, data in MEMBERS if name.endswith("jpg")][: len(whole)]
        assert end.rows == len(samples)
        if packed:
            assert len(failed) == 1
        else:
            assert len(whole) == sum(body <= offset for body in bodies[::2])
            silent = offset in ends or offset > ends[-1]
            assert len(failed) == (0 if silent else 1), offset
        assert all(s.image_id == "a.tar/!unreadable" for s in failed)
        if failed:
            source = webdataset(tmp_path / "a.tar")
            (unit,) = source.plan()
            assert read(source, unit, set(range(end.rows))) == ([], end)


def test_a_declared_size_is_not_believed(tmp_path: Path) -> None:
    """Extended headers of a terabyte and members of an exabyte cost nothing."""
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 40
        header = info.tobuf(tarfile.GNU_FORMAT)
        tracemalloc.start()
        samples, _ = samples_of(tmp_path, tar_bytes([("1.jpg", b"1")])[:1024] + header + bytes(1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert outcome(samples) == [("1", b"1"), ("!unreadable", "UnreadableError")]
        assert f"at most {MAX_EXTENDED_HEADER}" in str(samples[1].error)
        assert peak < 20 << 20
    info = tarfile.TarInfo("2.jpg")
    info.size = 1 << 60
    samples, _ = samples_of(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(5000), max_bytes=1 << 62)
    assert outcome(samples) == [("!unreadable", "UnreadableError")]
    for size in (b"-5", b"9" * 500, b"x"):
        length = len(b" size=\n") + len(size)
        length += len(str(length + len(str(length))))
        text = b"%d size=%s\n" % (length, size)
        assert len(text) == length
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, length
        data = info.tobuf() + text + bytes(-length % 512) + tar_bytes([("1.jpg", b"1")])
        samples, _ = samples_of(tmp_path, data)
        assert outcome(samples) == [("!unreadable", "UnreadableError")]
        assert "pax header gives the size" in str(samples[0].error)


def test_a_gzip_bomb_is_streamed(tmp_path: Path) -> None:
    data = gzip.compress(tar_bytes([("1.jpg", bytes(60 << 20)), ("2.jpg", b"2")]))
    assert len(data) < 100_000
    (tmp_path / "a.tgz").write_bytes(data)
    source = webdataset(tmp_path, max_bytes=1 << 20)
    (unit,) = source.plan()
    tracemalloc.start()
    samples, _ = read(source, unit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome(samples) == [("1", "ImageTooLargeError"), ("2", b"2")]
    assert peak < 10 << 20


def test_skipped_bodies_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"{n}.jpg", bytes(20 << 20)) for n in range(3)]))
    source = webdataset(tmp_path)
    (unit,) = source.plan()
    tracemalloc.start()
    assert read(source, unit, range(3)) == ([], UnitEnd(rows=3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_plan_lists_and_opens_nothing(tmp_path: Path) -> None:
    shard = tar_bytes([("1.jpg", b"1")])
    write_tree(tmp_path, {"b.tar": shard, "sub/a.TAR.GZ": gzip.compress(shard), "c.tgz": b"", "notes.txt": b"",
                          ".hidden/x.tar": shard})  # fmt: skip
    source = webdataset(tmp_path)
    units = list(source.plan())
    assert [unit.shard_id for unit in units] == ["b.tar", "c.tgz", "sub/a.TAR.GZ"]
    assert [unit.size_bytes for unit in units] == [len(shard), 0, len(gzip.compress(shard))]
    assert all(unit.rows is None and unit.stop is None and unit.payload == b"" for unit in units)
    assert pickle.loads(pickle.dumps(source)) == source
    before = units[0].fingerprint
    (tmp_path / "b.tar").write_bytes(shard + shard)
    assert next(iter(source.plan())).fingerprint != before
    assert isinstance(open_source(source.config), Webdataset)


@pytest.mark.parametrize(("limit", "expected"), [(1, [1]), (3, [3]), (4, [3, 1]), (5, [3, 2]), (100, [3, 3, 3])])
def test_limit(tmp_path: Path, limit: int, expected: list[int]) -> None:
    for name in "abc":
        members = [(f"{n}.{ext}", b"x") for n in range(3) for ext in ("jpg", "json")]
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    units = list(webdataset(tmp_path, limit=limit).plan())
    source = webdataset(tmp_path)
    assert [unit.rows for unit in units] == expected
    assert [len(read(source, unit)[0]) for unit in units] == expected
    assert [read(source, unit)[1].rows for unit in units] == expected
    assert [unit.fingerprint for unit in units] == [unit.fingerprint for unit in source.plan()][: len(units)]


def test_missing_and_empty_roots(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        list(webdataset(tmp_path / "nowhere").plan())
    with pytest.raises(ConfigError, match="nothing matches"):
        list(webdataset(tmp_path).plan())
    (tmp_path / "a.tar").write_bytes(tar_bytes([("1.jpg", b"1")]))
    source = webdataset(tmp_path)
    (unit,) = source.plan()
    (tmp_path / "a.tar").unlink()
    with pytest.raises(StorageError):
        list(source.read(unit, ()))
    samples, end = read(source, unit)
    assert outcome(samples) == [("!unreadable", "UnreadableError")]
    assert end.rows == 1


@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_passing_faults_lose_and_repeat_nothing(suffix: str) -> None:
    members = [(f"{n:02d}.jpg", random.Random(n).randbytes(50_000 + n)) for n in range(40)]
    data = tar_bytes(members, mode="w" if suffix == ".tar" else "w:gz")
    FlakyFileSystem.reset({f"root/a{suffix}": data})
    # A packed stream is read in larger parts, and more than two faults without a sample between them end the unit.
    faults = [7, 8, 1_100_000] if suffix == ".tgz" else random.Random(2).sample(range(len(data)), 12)
    FlakyFileSystem.faults += faults
    samples = read_all(webdataset("flaky://root"))
    assert [(s.image_id, s.image) for s in samples] == [(f"a{suffix}/{n[:2]}", data) for n, data in members]
    assert FlakyFileSystem.raised == len(faults)


def test_a_lasting_fault_is_one_failed_sample() -> None:
    members = [(f"{n:02d}.jpg", bytes([n]) * 3_000_000) for n in range(4)]
    FlakyFileSystem.reset({"root/a.tar": tar_bytes(members)})
    FlakyFileSystem.lasting.append(7_000_000)
    source = webdataset("flaky://root")
    (unit,) = source.plan()
    samples, end = read(source, unit)
    assert [s.image_id for s in samples] == ["a.tar/00", "a.tar/01", "a.tar/!unreadable"]
    assert "after 3 attempts" in str(samples[2].error)
    assert end.rows == 3
    # A limit has the rows counted, and what cannot be read has as many.
    assert [unit.rows for unit in webdataset("flaky://root", limit=100).plan()] == [3]
    FlakyFileSystem.lasting[:] = [0]
    assert [unit.rows for unit in webdataset("flaky://root", limit=100).plan()] == [1]


def test_a_shard_that_shrank_is_a_storage_fault(tmp_path: Path) -> None:
    data = tar_bytes([("1.jpg", bytes(600)), ("2.jpg", bytes(600))])
    (tmp_path / "a.tar").write_bytes(data)
    source = webdataset(tmp_path)
    (unit,) = source.plan()
    (tmp_path / "a.tar").write_bytes(data[:1536])
    with pytest.raises(StorageError, match="ended after 1536"):
        list(source.read(unit, ()))


def test_memory_file_system() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/wds/x/a.tar", tar_bytes([("1.jpg", b"1")]))
    fsspec.filesystem("memory").pipe("/wds/y/a.tar", tar_bytes([("1.jpg", b"2")]))
    samples = read_all(webdataset("memory://wds/{x,y}/*.tar"))
    assert [(s.image_id, s.image) for s in samples] == [("x/a.tar/1", b"1"), ("y/a.tar/1", b"2")]


@pytest.mark.parametrize("ranges", [True, False])
def test_http(tmp_path: Path, ranges: bool) -> None:
    write_tree(
        tmp_path,
        {f"s/a-{n}.tar": tar_bytes([(f"{i}.jpg", bytes([i]) * 900_000) for i in range(12)]) for n in range(2)},
    )
    with http_server(tmp_path, ranges=ranges) as (address, log):
        source = webdataset(f"{address}/s/a-{{0..1}}.tar")
        units = list(source.plan())
        assert [unit.shard_id for unit in units] == ["a-0.tar", "a-1.tar"]
        samples, end = read(source, units[0])
        assert [s.image for s in samples] == [bytes([i]) * 900_000 for i in range(12)]
        assert read(source, units[0], range(12)) == ([], end)
        assert any("GET" in line and "bytes=" in line for line in log) == ranges
        with pytest.raises(StorageError):
            list(webdataset(f"{address}/s/missing.tar").plan())


def test_s3_streams_in_parts(s3: Any) -> None:
    bucket = s3.bucket("wds-stream")
    images = [random.Random(n).randbytes(1_000_000) for n in range(24)]
    s3.client.put_object(
        Bucket=bucket, Key="t/s-000.tar", Body=tar_bytes([(f"{n}.jpg", d) for n, d in enumerate(images)])
    )
    source = webdataset(f"s3://{bucket}/t/s-{{000..000}}.tar", storage=s3.options)
    (unit,) = source.plan()
    assert unit.location == f"s3://{bucket}/t/s-000.tar"
    before = len(s3.requests())
    tracemalloc.start()
    count = 0
    for item in source.read(unit, ()):
        if isinstance(item, Sample):
            assert item.image == images[item.position]
            count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 24
    gets = [line for line in s3.requests()[before:] if '"GET' in line and "s-000.tar" in line]
    assert all(" 206 " in line for line in gets)
    assert unit.size_bytes // (2 * BLOCK_BYTES) <= len(gets) <= unit.size_bytes // BLOCK_BYTES + 2
    assert peak < 5 * BLOCK_BYTES
    with pytest.raises(StorageError):
        list(webdataset("s3://no-such-bucket/x", storage=s3.options).plan())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["jpg", "png", "json", "seg.png", "txt"]))))
def test_every_run_of_a_key_is_one_sample(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]
) -> None:
    data = tar_bytes([(f"{key}.{ext}", f"{i}".encode()) for i, (key, ext) in enumerate(names)])
    samples, end = samples_of(tmp_path_factory.mktemp("h"), data)
    runs: list[str] = []
    for key, _ in names:
        if not runs or runs[-1] != key:
            runs.append(key)
    assert end.rows == len(samples) == len(runs) == len({s.image_id for s in samples})
    assert [s.image_id.partition("/")[2][0] for s in samples] == runs
    for position, sample in enumerate(samples):
        assert isinstance(sample.error, CorruptImageError) or runs[position] not in runs[:position]


@pytest.mark.shared
def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "coco128" / "images").iterdir())[:20]
    (tmp_path / "a.tar.gz").write_bytes(tar_bytes([(f.name, f.read_bytes()) for f in files], mode="w:gz"))
    samples = read_all(webdataset(tmp_path))
    assert [s.image for s in samples] == [f.read_bytes() for f in files]
