"""Parquet sources: row groups as units, ids and columns, paths that came with the data, broken files, cost."""

import json
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_faults import FlakyFileSystem
from source_helpers import http_server, read, read_all, write_tree

from pipeline.config import ParquetSource
from pipeline.errors import ConfigError, ImageTooLargeError, SchemaError, StorageError, UnreadableError
from pipeline.sources.base import UnitEnd
from pipeline.sources.parquet import ParquetFiles


def parquet(uri: Any, **options: Any) -> ParquetFiles:
    return ParquetFiles(ParquetSource(format="parquet", uri=str(uri), **options))


def write(path: Path, table: pa.Table | dict[str, Any], rows: int = 3, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, row_group_size=rows, **options)


def images(count: int, start: int = 0) -> list[bytes]:
    return [b"image-%d" % number for number in range(start, start + count)]


def test_row_groups_are_units(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(7), "other": ["x" * 1000] * 7})
    write(tmp_path / "sub/b.parquet", {"image": images(2, 7)})
    source = parquet(tmp_path)
    units = list(source.plan())
    assert [unit.shard_id for unit in units] == ["a.parquet#0", "a.parquet#1", "a.parquet#2", "sub/b.parquet#0"]
    assert [unit.rows for unit in units] == [3, 3, 1, 2]
    assert [unit.cut for unit in units] == [0, 1, 2, 0]
    assert len({unit.fingerprint for unit in units}) == 4
    samples = read_all(source)
    assert [s.image for s in samples] == images(9)
    assert samples[4].image_id == "a.parquet#1/1"
    assert [s.image for s in read(source, units[0], {0, 2})[0]] == [b"image-1"]
    assert read(source, units[0], {0, 1, 2}) == ([], UnitEnd(rows=3))
    assert pickle.loads(pickle.dumps(source)) == source
    before = [unit.fingerprint for unit in units]
    write(tmp_path / "a.parquet", {"image": [*images(6), b"changed"], "other": ["x" * 1000] * 7})
    after = [unit.fingerprint for unit in source.plan()]
    assert all(old != new for old, new in zip(before[:3], after, strict=False))
    assert before[3] == after[3]


def test_columns(tmp_path: Path) -> None:
    table = {
        "jpeg": pa.array([b"1", None, b"3"], pa.large_binary()),
        "id": pa.array([10, 11, None]),
        "mask": pa.array([b"m", b"n", None]),
        "boxes": pa.array(["[]", None, "{}"]),
        "city": pa.array(["Ulm", "Bonn", None]),
        "n": pa.array([1, None, 3]),
    }
    write(tmp_path / "a.parquet", table)
    source = parquet(
        tmp_path,
        image_column="jpeg",
        id_column="id",
        target_columns={"semantic": "mask", "instances": "boxes"},
        field_columns=("city", "n"),
    )
    first, second, third = read_all(source)
    assert (first.image_id, first.image, first.error) == ("10", b"1", None)
    assert first.targets == {"semantic": b"m", "instances": b"[]"}
    assert first.fields == {"city": "Ulm", "n": "1"}
    assert (second.image_id, second.image) == ("11", b"")
    assert isinstance(second.error, UnreadableError)
    assert "is null" in str(second.error)
    assert third.image_id == "a.parquet#0/2"
    assert "id is null" in str(third.error)


def test_dictionary_encoded_and_empty_values(tmp_path: Path) -> None:
    column = pa.array([b"a", b"", b"a"], pa.binary()).dictionary_encode()
    write(tmp_path / "a.parquet", pa.table({"image": column}))
    assert [(s.image, s.error) for s in read_all(parquet(tmp_path))] == [(b"a", None), (b"", None), (b"a", None)]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_structs_with_paths_stay_in_the_source(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_tree(
        tmp_path, {"root/t/img/1[a].jpg": b"one", "root/o/2.jpg": b"two", "secret.jpg": b"s", "rootx/3.jpg": b"x"}
    )
    rows = [
        {"bytes": b"0", "path": "/etc/passwd"},
        {"bytes": None, "path": "img/1[a].jpg"},
        {"bytes": None, "path": "img/../img/1[a].jpg"},
        {"bytes": None, "path": f"file://{root}/o/2.jpg"},
        {"bytes": None, "path": "../o/2.jpg"},
        {"bytes": None, "path": "../../secret.jpg"},
        {"bytes": None, "path": str(tmp_path / "secret.jpg")},
        {"bytes": None, "path": f"file://{tmp_path}/secret.jpg"},
        {"bytes": None, "path": f"file://{tmp_path}/rootx/3.jpg"},
        {"bytes": None, "path": f"file://{root}/../secret.jpg"},
        {"bytes": None, "path": "http://127.0.0.1:1/x.jpg"},
        {"bytes": None, "path": "img/none.jpg"},
        {"bytes": None, "path": "img"},
        {"bytes": None, "path": "img/\0.jpg"},
        {"bytes": None, "path": ""},
        {"bytes": None, "path": None},
        None,
    ]
    write(root / "t/a.parquet", pa.table({"image": pa.array(rows, STRUCT)}), rows=100)
    write(root / "b.parquet", pa.table({"image": pa.array(rows[:1], STRUCT)}))
    samples = read_all(parquet(root))[1:]
    assert [s.image for s in samples] == [b"0", b"one", b"one", b"two"] + [b""] * 13
    assert all(s.error is None for s in samples[:4])
    assert all(isinstance(s.error, UnreadableError) for s in samples[4:])
    assert all("leads out" in str(s.error) for s in [*samples[4:11], *samples[13:15]])
    assert "does not exist" in str(samples[11].error)


def test_a_value_over_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [b"x" * 11, b"x" * 10]})
    first, second = read_all(parquet(tmp_path, max_bytes=10))
    assert isinstance(first.error, ImageTooLargeError)
    assert first.image == b""
    assert second.error is None


def test_targets_alone(tmp_path: Path) -> None:
    table = {"image": [b"x" * 100_000, None, b"x"], "id": ["a", "b", "c"], "mask": [b"m" * 11, b"n", None]}
    write(tmp_path / "a.parquet", {**table, "n": [1, 2, 3]}, compression="none", use_dictionary=False)
    options: dict[str, Any] = {"id_column": "id", "field_columns": ("n",), "target_columns": {"semantic": "mask"}}
    source = parquet(tmp_path, max_bytes=50, **options)
    (unit,), (whole,) = source.plan(images=False), source.plan()
    assert (unit.shard_id, unit.fingerprint, unit.rows) == (whole.shard_id, whole.fingerprint, whole.rows)
    assert unit.size_bytes < 1000 < whole.size_bytes
    samples, end = read(source, unit, images=False)
    assert [(s.image_id, s.image, dict(s.targets), s.fields, s.error) for s in samples] == [
        ("a", b"", {"semantic": b"m" * 11}, {"n": "1"}, None),
        ("b", b"", {"semantic": b"n"}, {"n": "2"}, None),
        ("c", b"", {}, {"n": "3"}, None),
    ]
    assert [s.position for s in read(source, unit, {1}, images=False)[0]] == [0, 2]
    assert end.rows == 3


def test_targets_without_an_image_column(tmp_path: Path) -> None:
    depth = b"\x93NUMPY..."
    write(tmp_path / "a.parquet", {"depth": [depth] * 20}, rows=20)
    source = parquet(tmp_path, target_columns={"depth": "depth"})
    samples = read_all(source, images=False)
    assert [dict(s.targets) for s in samples] == [{"depth": depth}] * 20
    with pytest.raises(SchemaError, match="no column 'image'"):
        list(source.plan())
    assert [s.targets for s in read_all(parquet(tmp_path), images=False)] == [{}] * 20


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({}, {"img": [b"x"], "n": [1]}, "no column 'image'; its columns are img, n"),
        ({"id_column": "key"}, {"image": [b"x"]}, "no column 'key'"),
        ({"field_columns": ("city",)}, {"image": [b"x"]}, "no column 'city'"),
        (
            {"target_columns": {"semantic": "mask"}},
            {"image": [b"x"], "mask": [1]},
            "target column 'mask' must be binary",
        ),
        ({}, {"image": ["text"]}, "must be binary or struct<bytes, path>, got string"),
        ({}, {"image": [{"x": 1}]}, "must be binary or struct"),
        ({"id_column": "key"}, {"image": [b"x"], "key": [1.5]}, "must be string or integer, got double"),
    ],
)
def test_schemas(tmp_path: Path, options: dict[str, Any], columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "z.parquet", columns)
    with pytest.raises(SchemaError, match=message.replace("(", r"\(")):
        list(parquet(tmp_path, **options).plan())


def test_a_later_file_that_differs(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(1)})
    write(tmp_path / "b.parquet", {"picture": images(1)})
    with pytest.raises(SchemaError, match=r"b\.parquet has no column 'image'"):
        list(parquet(tmp_path).plan())
    with pytest.raises(ConfigError, match="unknown kind 'masks'"):
        parquet(tmp_path, target_columns={"masks": "x"})


@pytest.mark.parametrize(
    ("limit", "expected"), [(2, [2]), (3, [3]), (4, [3, 1]), (8, [3, 3, 1, 1]), (99, [3, 3, 1, 2])]
)
def test_limit(tmp_path: Path, limit: int, expected: list[int]) -> None:
    write(tmp_path / "a.parquet", {"image": images(7)})
    write(tmp_path / "b.parquet", {"image": images(2, 7)})
    source = parquet(tmp_path, limit=limit)
    units = list(source.plan())
    assert [unit.rows for unit in units] == expected
    assert [s.image for s in read_all(source)] == images(min(limit, 9))
    assert [u.fingerprint for u in units] == [u.fingerprint for u in parquet(tmp_path).plan()][: len(units)]
    assert [read(source, unit)[1].rows for unit in units] == expected


def test_a_file_that_is_no_parquet_is_one_failed_sample(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", {"image": images(2)})
    good = (tmp_path / "b.parquet").read_bytes()
    write_tree(tmp_path, {"a.parquet": b"nothing", "c.parquet": good[:-30], "d.parquet": b"",
                          "e.parquet": good[:-60] + b"\xff" * 40 + good[-20:]})  # fmt: skip
    source = parquet(tmp_path)
    units = list(source.plan())
    assert [unit.rows for unit in units] == [1, 2, 1, 1, 1]
    for unit in (units[0], *units[2:]):
        (sample,), end = read(source, unit)
        assert isinstance(sample.error, UnreadableError)
        assert "no readable Parquet" in str(sample.error)
        assert end.rows == 1
        assert read(source, unit, {0}) == ([], end)
    assert len(read(source, units[1])[0]) == 2


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"write_page_checksum": True}])
def test_broken_pages_fail_the_rows_that_are_left(tmp_path: Path, options: dict[str, Any]) -> None:
    values = [random.Random(n).randbytes(1000) * 4 for n in range(64)]
    write(tmp_path / "a.parquet", {"image": values}, rows=64, use_dictionary=False, data_page_size=8000,
          write_batch_size=1, write_statistics=False, **options)  # fmt: skip
    source = parquet(tmp_path)
    (unit,) = source.plan()
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 6000] = b"\xee" * 6000  # beyond one page: without checksums only its header shows damage
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    samples, end = read(source, unit)
    assert [s.position for s in samples] == list(range(64))
    assert end.rows == 64
    good = [s for s in samples if s.error is None]
    assert 0 < len(good) < 64
    assert [s.image for s in good] == values[: len(good)]
    assert all(isinstance(s.error, UnreadableError) for s in samples[len(good) :])


def test_passing_faults(tmp_path: Path) -> None:
    values = [bytes([n]) * 30_000 for n in range(60)]
    write(tmp_path / "a.parquet", {"image": values, "k": list(range(60))}, rows=30, compression="none")
    data = (tmp_path / "a.parquet").read_bytes()
    FlakyFileSystem.reset({"root/a.parquet": data})
    FlakyFileSystem.faults += [len(data) - 5]
    source = parquet("flaky://root", id_column="k")
    units = list(source.plan())
    assert FlakyFileSystem.raised == 1
    FlakyFileSystem.faults += [100, 200_000, 1_000_000, 1_700_000]
    samples = [sample for unit in units for sample in read(source, unit)[0]]
    assert [(s.image_id, s.image) for s in samples] == [(str(n), value) for n, value in enumerate(values)]
    assert FlakyFileSystem.raised >= 3
    FlakyFileSystem.lasting += [len(data) - 5]
    with pytest.raises(StorageError, match="as always"):
        list(source.plan())


def test_a_row_group_is_never_whole_in_memory(tmp_path: Path) -> None:
    values = [bytes([n]) * 1_000_000 for n in range(100)]
    write(
        tmp_path / "a.parquet",
        {"image": values},
        rows=100,
        compression="none",
        use_dictionary=False,
        write_batch_size=1,
    )
    source = parquet(tmp_path)
    (unit,) = source.plan()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = 0
    for item in source.read(unit, ()):
        if not isinstance(item, UnitEnd):
            assert item.image == values[item.position]
            most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
    assert most < 60_000_000


def test_http_needs_ranges(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(5)})
    with http_server(tmp_path, ranges=True) as (address, _):
        assert [s.image for s in read_all(parquet(f"{address}/a.parquet"))] == images(5)


def test_s3_reads_the_footer_alone_to_plan(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket("parquet")
    values = [bytes([n]) * 500_000 for n in range(20)]
    write(tmp_path / "a.parquet", {"image": values}, rows=10, compression="none", use_dictionary=False)
    s3.client.put_object(Bucket=bucket, Key="t/a.parquet", Body=(tmp_path / "a.parquet").read_bytes())
    source = parquet(f"s3://{bucket}/t", storage=s3.options)
    before = len(s3.requests())
    units = list(source.plan())
    asked = [line for line in s3.requests()[before:] if '"GET' in line and "a.parquet" in line]
    assert 1 <= len(asked) <= 3
    assert all(" 206 " in line for line in asked)
    assert [s.image for unit in units for s in read(source, unit)[0]] == values


def test_unit_survives_json(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(1)})
    (unit,) = parquet(tmp_path).plan()
    assert unit.payload == b""
    assert json.dumps([unit.shard_id, unit.location, unit.fingerprint])
