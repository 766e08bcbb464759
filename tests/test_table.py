"""The prediction table: what is committed is there, once; what is not does not exist; readers see every row."""

import random
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyroaring import BitMap
from s3_endpoint import S3
from table_helpers import keys, make_rows, put

from pipeline import deltalog
from pipeline.errors import SchemaError, StorageError
from pipeline.rows import LATER, PREDICTIONS
from pipeline.schema import MODEL
from pipeline.table import RowTable
from pipeline.tablefiles import write_file

ODD_NAMES = [
    "it's/shard.tar",
    'say "hi".tar',
    "a b/c d.tar#3",
    "naïve/日本語.tar",
    "back\\slash.tar",
    "100%/%20.tar",
    "model=x/[1]*?.tar",
    "a" * 300 + ".tar",
]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "out [put] é#1*|")


@pytest.fixture
def table(uri: str) -> RowTable:
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    return table


def data_files(uri: str) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in Path(uri).glob("model=*/*.parquet")}


def read_back(table: RowTable) -> pa.Table:
    return pa.Table.from_batches(list(table.scan(PREDICTIONS.names)), schema=PREDICTIONS).sort_by(
        [("model", "ascending"), ("shard_id", "ascending"), ("position", "ascending")]
    )


def test_rows_come_back_exactly(table: RowTable, uri: str) -> None:
    segments = [
        {"id": 1, "category_id": 5, "score": 0.5, "area": 7, "bbox": [1.0, 2.0, 3.0, 4.0], "rle": "abc"},
        {"id": 2, "category_id": 6, "score": 0.25, "area": 0, "bbox": [], "rle": ""},
    ]
    depth = {"format": "zstd", "data": b"\x00\xff", "scale": 0.1, "offset": -3.0, "kind": "metric_m"}
    quality = {"mean_max_probability": 0.75, "mean_entropy": 0.5, "low_confidence_share": 0.0}
    rows = [
        make_rows("a.tar", range(3), failed={1}, quality=quality),
        make_rows("b.tar", [0, 5], segments=segments, depth=depth),
        make_rows("c.tar", [7], segments=[]),
    ]
    for part in rows:
        (shard_id,) = part.column("shard_id").unique().to_pylist()
        table.commit([write_file(uri, {}, part, model="m.1-x_y", model_version="v1", shard_id=shard_id)])
    expected = pa.concat_tables(rows)
    expected = expected.append_column(MODEL, pa.array(["m.1-x_y"] * len(expected))).select(PREDICTIONS.names)
    assert read_back(table).equals(expected)
    # A second look at the same table, by name alone.
    assert read_back(RowTable.open(f"file://{uri}", {})).equals(expected)


def test_uncommitted_files_are_invisible_and_several_files_come_together(table: RowTable, uri: str) -> None:
    first, second = put(uri, "a", [0, 1]), put(uri, "b", [0], model="n", version="w")
    assert keys(table) == []
    assert keys(RowTable.open(uri, {})) == []
    assert len(table.files()) == 0
    before = deltalake.DeltaTable(uri).version()
    table.commit([first, second])
    assert deltalake.DeltaTable(uri).version() == before + 1
    assert keys(RowTable.open(uri, {})) == [("m", "a", 0), ("m", "a", 1), ("n", "b", 0)]
    table.commit([])
    assert deltalake.DeltaTable(uri).version() == before + 1


def test_the_same_file_committed_twice_is_there_once(table: RowTable, uri: str) -> None:
    file = put(uri, "a", [0, 1])
    table.commit([file])
    table.commit([file])  # a commit that was interrupted after it had landed is made again
    assert keys(table) == [("m", "a", 0), ("m", "a", 1)]
    assert table.counts("m", "v1") == (2, 0)


def test_files_and_counts_come_from_the_log_alone(table: RowTable, uri: str) -> None:
    files = [
        put(uri, "a", range(10), failed={1, 2}),
        put(uri, "a", range(10, 14)),
        put(uri, "a", range(3), version="v2", failed={0, 1, 2}),
        put(uri, "b", range(5), model="n", version="w"),
    ]
    assert [(file.rows, file.failed) for file in files] == [(10, 2), (4, 0), (3, 3), (5, 0)]
    assert [BitMap.deserialize(file.positions) for file in files][1] == BitMap(range(10, 14))
    table.commit(files)
    for path in Path(uri).glob("model=*/*.parquet"):
        path.write_bytes(b"")
    listed = {row["path"]: row for row in RowTable.open(uri, {}).files().to_pylist()}
    for file in files:
        assert listed[file.path] == {
            "path": file.path,
            "model": file.model,
            "model_version": file.model_version,
            "shard_id": file.shard_id,
            "rows": file.rows,
            "failed": file.failed,
            "size_bytes": file.size_bytes,
        }
    assert table.counts("m", "v1") == (14, 2)
    assert table.counts("m", "v2") == (3, 3)
    assert table.counts("n", "w") == (5, 0)
    assert table.counts("n", "v1") == (0, 0)
    assert sorted(table.shards().to_pylist()) == ["a", "b"]


def test_a_second_driver_stops_the_first(table: RowTable, uri: str) -> None:
    table.commit([put(uri, "a", [0])])
    second = RowTable.open(uri, {})
    assert second.take_over() == 3
    late = put(uri, "b", [0])
    for _ in range(2):
        with pytest.raises(StorageError, match="another run has taken over this table"):
            table.commit([late])
    with pytest.raises(StorageError, match="taken over"):
        table.delete_units(["a"])
    with pytest.raises(StorageError, match="taken over"):
        table.vacuum()
    assert keys(second) == [("m", "a", 0)]
    assert late.path in data_files(uri)
    second.commit([put(uri, "c", [0])])
    assert keys(RowTable.open(uri, {})) == [("m", "a", 0), ("m", "c", 0)]


@pytest.mark.parametrize("through", ["append", "deltalake"])
def test_a_second_driver_stops_the_first_between_its_check_and_its_commit(
    table: RowTable, uri: str, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    second = RowTable.open(uri, {})
    check, write = RowTable._check_fence, deltalog.append

    def lose() -> None:
        monkeypatch.undo()
        second.take_over()

    def check_then_lose(self: RowTable) -> None:
        check(self)
        lose()

    def lose_then_write(*arguments: Any) -> int:
        lose()
        return write(*arguments)

    monkeypatch.setattr(RowTable, "_check_fence", check_then_lose)
    monkeypatch.setattr(deltalog, "append", lose_then_write)
    table._appends = through == "append"
    with pytest.raises(StorageError, match="another run has taken over"):
        table.commit([put(uri, "a", [0])])
    with pytest.raises(StorageError, match="another run has taken over"):
        table.commit([put(uri, "a", [0])])
    assert keys(RowTable.open(uri, {})) == []


def test_vacuum_removes_exactly_what_the_log_does_not_name(table: RowTable, uri: str) -> None:
    committed = [put(uri, "a", [0], failed={0}), put(uri, "b", range(4), failed={3}), put(uri, "c", [0], model="n.2")]
    table.commit(committed)
    orphans = [put(uri, "a", [0]), put(uri, "d", [0], model="n.2"), put(uri, "d", [0], model="only-orphans")]
    kept = ["run.json", "_runs/r.json", "_units/part-0.parquet", "model=m/notes.txt", "other/part-1.parquet"]
    for name in kept:
        path = Path(uri, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    log = sorted(Path(uri, "_delta_log").iterdir())
    assert table.vacuum() == len(orphans)
    assert data_files(uri) == {file.path for file in committed}
    assert all(Path(uri, name).exists() for name in kept)
    assert sorted(Path(uri, "_delta_log").iterdir()) == log
    assert table.vacuum() == 0

    assert table.delete_failed({"m": "v1"}) == 2
    assert table.vacuum() == 2  # a's only file, and b's old one
    assert keys(RowTable.open(uri, {})) == [("m", "b", 0), ("m", "b", 1), ("m", "b", 2), ("n.2", "c", 0)]
    assert len(keys(table)) == 4


@pytest.mark.parametrize("through", ["append", "deltalake"])
def test_a_models_odd_label_keeps_its_files(table: RowTable, uri: str, through: str) -> None:
    table._appends = through == "append"
    table.commit([put(uri, "a", range(3), failed={1}, model="model = 50%41 é:x")])
    assert table.vacuum() == 0
    assert table.delete_failed({"model = 50%41 é:x": "v1"}) == 1
    assert table.vacuum() == 1
    assert [key[2] for key in keys(RowTable.open(uri, {}))] == [0, 2]


def test_vacuum_of_a_driver_that_lost_the_table_spares_the_next_ones_files(
    table: RowTable, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = RowTable.open(uri, {})
    second.take_over()
    file = put(uri, "a", [0])
    with pytest.raises(StorageError, match="taken over"):
        table.vacuum()
    second.commit([file])
    assert read_back(second).num_rows == 1


@pytest.mark.parametrize("seed", range(4))
def test_done_equals_brute_force(table: RowTable, uri: str, seed: int) -> None:
    draw = random.Random(seed)
    expected: dict[tuple[str, str, str], set[int]] = {}
    for _ in range(25):
        key = (draw.choice("abcd"), draw.choice(["m", "n"]), draw.choice(["v1", "v2"]))
        free = sorted(set(range(40)) - expected.setdefault(key, set()))
        positions = sorted(draw.sample(free, min(len(free), draw.randint(1, 6))))
        if positions:
            expected[key] |= set(positions)
            table.commit([put(uri, key[0], positions, model=key[1], version=key[2], failed=positions[:1])])
    for versions in ({"m": "v1"}, {"m": "v2", "n": "v1"}, {"m": "v1", "n": "v1"}, {"x": "v1"}, {"m": "v9"}):
        for shards in (["a"], ["b", "d", "e"], list("abcd"), []):
            want = {
                (shard, model): BitMap(expected[shard, model, version])
                for model, version in versions.items()
                for shard in shards
                if expected.get((shard, model, version))
            }
            assert table.done(shards, versions) == want


def test_failed_attempts_and_delete_failed_keep_all_others(table: RowTable, uri: str) -> None:
    table.commit(
        [
            put(uri, "a", range(6), failed={1, 4}, attempts={4: 3}),
            put(uri, "a", range(6), version="old", failed={0}),
            put(uri, "b", [0], failed={0}),
            put(uri, "b", range(3), model="n", failed={2}),
        ]
    )
    assert table.failed_attempts({"m": "v1"}) == {("a", "m"): {1: 1, 4: 3}, ("b", "m"): {0: 1}}
    assert table.failed_attempts({"m": "v1", "n": "v1"})["b", "n"] == {2: 1}
    before = read_back(table)
    gone = pc.and_(
        pc.equal(before["status"], "failed"),
        pc.and_(pc.equal(before["model"], "m"), pc.equal(before["model_version"], "v1")),
    )
    assert table.delete_failed({"m": "v1"}) == 3
    assert read_back(table).equals(before.filter(pc.invert(gone)))
    assert table.failed_attempts({"m": "v1"}) == {}
    assert table.counts("m", "v1") == (4, 0)
    assert table.counts("m", "old") == (6, 1)
    # Nothing matched, so nothing was committed: the table is still this driver's.
    assert table.delete_failed({"m": "v1"}) == 0
    table.commit([put(uri, "a", [1, 4])])
    assert table.counts("m", "v1") == (6, 0)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(table: RowTable, uri: str, name: str) -> None:
    others = [put(uri, other, range(3), failed={0}) for other in (*ODD_NAMES, "x") if other != name]
    table.commit([put(uri, name, range(5), failed={2}, attempts={2: 2}), *others])
    assert table.done([name], {"m": "v1"}) == {(name, "m"): BitMap(range(5))}
    assert table.failed_attempts({"m": "v1"})[name, "m"] == {2: 2}
    assert table.delete_failed({"m": "v1"}) == 1 + len(others)
    assert sorted(table.shards().to_pylist()) == sorted([*ODD_NAMES, "x"])
    assert table.done([name], {"m": "v1"}) == {(name, "m"): BitMap([0, 1, 3, 4])}
    assert table.delete_units([name]) == 4
    assert table.done([name], {"m": "v1"}) == {}
    assert table.counts("m", "v1") == (2 * len(others), 0)
    assert sorted(table.shards().to_pylist()) == sorted(other for other in (*ODD_NAMES, "x") if other != name)


def test_deletions_in_several_commits_can_die_between_them(
    table: RowTable, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.table.REWRITES_PER_COMMIT", 2)
    table.commit([put(uri, shard, range(3), failed={1}) for shard in "abcde"])
    commit, commits = RowTable._commit, 0

    def die_at_the_second(self: RowTable, actions: Any) -> None:
        nonlocal commits
        commits += 1
        if commits == 2:
            raise KeyboardInterrupt
        commit(self, actions)

    monkeypatch.setattr(RowTable, "_commit", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        table.delete_failed({"m": "v1"})
    monkeypatch.setattr(RowTable, "_commit", commit)
    again = RowTable.open(uri, {})
    again.take_over()
    assert again.counts("m", "v1") == (13, 3)
    assert again.vacuum() == 4  # two replaced files, two replacements that were not committed
    assert again.delete_failed({"m": "v1"}) == 3
    assert keys(again) == [("m", shard, position) for shard in "abcde" for position in (0, 2)]


def test_delete_units_in_a_file_of_many(table: RowTable, uri: str) -> None:
    shards = [f"{index}.tar" for index in range(205)]
    rows = pa.concat_tables([make_rows(shard, [0]) for shard in shards])
    table.commit([write_file(uri, {}, rows, model="m", model_version="v1", shard_id="")])
    assert table.files().column("shard_id").to_pylist() == [None]
    assert table.delete_units([*shards[1:], "unknown"]) == 204
    assert keys(table) == [("m", "0.tar", 0)]
    assert table.delete_units([]) == 0


def test_compaction_by_another_tool_keeps_everything_known(table: RowTable, uri: str) -> None:
    table.commit([put(uri, "a", range(3), failed={1}), put(uri, "b", range(4)), put(uri, "b", [0], version="old")])
    done, before = table.done(["a", "b"], {"m": "v1"}), read_back(table)
    deltalake.DeltaTable(uri).optimize.compact()
    table.commit([put(uri, "c", [0])])
    assert table.files().column("shard_id").null_count == 1
    assert sorted(table.shards().to_pylist()) == ["a", "b", "c"]
    assert table.counts("m", "v1") == (8, 1)
    assert table.counts("m", "old") == (1, 0)
    assert table.done(["a", "b"], {"m": "v1"}) == done
    assert table.vacuum() == 3
    assert read_back(table).num_rows == before.num_rows + 1
    assert table.delete_failed({"m": "v1"}) == 1
    assert table.delete_units(["b"]) == 5
    assert table.done(["a", "b", "c"], {"m": "v1"}) == {("a", "m"): BitMap([0, 2]), ("c", "m"): BitMap([0])}


QUALITY = {"mean_max_probability": 0.75, "mean_entropy": 0.5, "low_confidence_share": 0.25}
DEPTH = {"format": "png", "data": b"d", "scale": 0.5, "offset": -1.0, "kind": "relative"}
SEGMENT = {"id": 1, "category_id": 2, "score": 0.5, "area": 4, "bbox": [0.0, 0.0, 2.0, 2.0], "rle": "04"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pa.Table]:
    """Files in which columns are full, mixed or all null, in several orders, and one rewritten by deltalake."""
    uri = str(tmp_path_factory.mktemp("mixed"))
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    everything: dict[str, Any] = {"quality": QUALITY, "depth": DEPTH, "segments": [SEGMENT]}
    options: list[dict[str, Any]] = [
        {},
        {"failed": {0}},
        {"failed": set(range(9))},
        everything,
        {**everything, "failed": {1, 2}},
        {"segments": []},
        {"quality": {**QUALITY, "mean_entropy": float("nan")}},
        {"quality": {**QUALITY, "mean_entropy": float("nan"), "mean_max_probability": float("inf")}, "failed": {2}},
        {"quality": {**QUALITY, "mean_entropy": None}, "depth": {**DEPTH, "kind": None}},
        {"width": None, "height": None},
    ]
    for index, more in enumerate(options):
        table.commit([put(uri, f"s{index}", range(3), model="mn"[index % 2], **more)])
    table.commit([put(uri, "late", range(4), failed={3}), put(uri, "late", range(9, 12), failed={10}, version="v0")])
    assert table.delete_failed({"m": "v0"}) == 1
    return uri, read_back(table)


def leaves() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for field in PREDICTIONS:
        found.append((field.name,))
        if pa.types.is_struct(field.type):
            found += [(field.name, leaf.name) for leaf in field.type]
    return found


def leaf_values(rows: pa.Table, path: tuple[str, ...]) -> pa.ChunkedArray:
    column = rows.column(path[0])
    return pc.struct_field(column, list(path[1:])) if len(path) > 1 else column


def distinct(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = []
    for value in column.to_pylist():
        if (
            value is not None
            and value not in values
            and not (isinstance(value, float) and abs(value) not in (0.25, 0.5, 0.75, 1))
        ):
            values.append(value)
    return values[:4]


@pytest.mark.parametrize("path", leaves(), ids=".".join)
def test_every_readers_filter_sees_every_row(mixed: tuple[str, pa.Table], path: tuple[str, ...]) -> None:
    uri, rows = mixed
    column = leaf_values(rows, path)
    nested = pa.types.is_nested(column.type)
    valid, total = len(column) - column.null_count, len(column)
    values = [] if nested else distinct(column)
    equal = {str(value): pc.sum(pc.equal(column, pa.scalar(value, column.type))).as_py() for value in values}

    delta = deltalake.DeltaTable(uri)
    dataset = delta.to_pyarrow_dataset()
    field = pc.field(*path)
    assert dataset.count_rows(filter=field.is_valid()) == valid
    assert dataset.count_rows(filter=field.is_null()) == total - valid
    for value in values:
        assert dataset.count_rows(filter=field == pa.scalar(value, column.type)) == equal[str(value)], value

    lazy = polars.scan_delta(uri)
    expression = polars.col(path[0])
    if len(path) > 1:
        expression = expression.struct.field(path[1])
    assert lazy.filter(expression.is_not_null()).select(polars.len()).collect().item() == valid
    assert lazy.filter(expression.is_null()).select(polars.len()).collect().item() == total - valid
    for value in values:
        literal = polars.lit(value, dtype=polars.from_arrow(pa.array([value], column.type)).dtype)
        assert lazy.filter(expression == literal).select(polars.len()).collect().item() == equal[str(value)], value

    database = duckdb.connect()
    database.register("dataset", dataset)
    name = ".".join(f'"{part}"' for part in path)
    committed = [str(Path(uri, file)) for file in RowTable.open(uri, {}).files().column("path").to_pylist()]
    for relation in ("dataset", f"read_parquet({committed!r}, hive_partitioning=true)"):
        counted = database.execute(f"select count(*) from {relation} where {name} is not null").fetchone()
        assert counted == (valid,), relation
        counted = database.execute(f"select count(*) from {relation} where {name} is null").fetchone()
        assert counted == (total - valid,), relation
        for value in values:
            counted = database.execute(f"select count(*) from {relation} where {name} = ?", [value]).fetchone()
            assert counted == (equal[str(value)],), (relation, value)


def test_duckdb_reads_the_folder_by_a_pattern(table: RowTable, uri: str, tmp_path: Path) -> None:
    plain = str(tmp_path / "plain")
    other = RowTable.open(plain, {}, create=True)
    other.take_over()
    other.commit([put(plain, "a", range(3), failed={1}), put(plain, "a", range(2), model="n", failed={0, 1})])
    query = f"select model, status, count(*) from read_parquet('{plain}/model=*/*.parquet', hive_partitioning=true)"
    found = duckdb.execute(query + " group by all order by all").fetchall()
    assert found == [("m", "failed", 1), ("m", "ok", 2), ("n", "failed", 2)]


def test_a_log_with_checkpoints_says_the_same(table: RowTable, uri: str) -> None:
    for index in range(110):
        table.commit([put(uri, f"s{index % 7}", [index], failed={index} if index % 10 == 0 else ())])
    assert list(Path(uri, "_delta_log").glob("*.checkpoint.parquet"))
    again = RowTable.open(uri, {})

    def listed(each: RowTable) -> list[dict[str, Any]]:
        return each.files().sort_by("path").to_pylist()

    assert listed(again) == listed(table)
    assert again.counts("m", "v1") == (110, 11)
    assert again.done(["s3"], {"m": "v1"}) == {("s3", "m"): BitMap(range(3, 110, 7))}
    assert deltalake.DeltaTable(uri).to_pyarrow_dataset().count_rows(filter=pc.field("error_type").is_valid()) == 11
    assert again.take_over() == 112
    assert again.vacuum() == 0


def test_what_is_no_prediction_table(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(StorageError, match="no prediction table at"):
        RowTable.open(missing, {})
    assert not Path(missing).exists()
    other = str(tmp_path / "other")
    deltalake.write_deltalake(other, pa.table({"image_id": ["a"], "x": [1]}))
    for create in (False, True):
        with pytest.raises(SchemaError, match=r"is no prediction table: it lacks the column.* shard_id, position"):
            RowTable.open(other, {}, create=create)


def test_a_commit_that_storage_refuses_is_not_called_a_takeover(table: RowTable, uri: str) -> None:
    log = Path(uri, "_delta_log")
    log.rename(Path(uri, "_moved"))
    log.write_text("in the way")
    with pytest.raises(StorageError) as caught:
        table.commit([put(uri, "a", [0])])
    assert "taken over" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_s3(s3: S3) -> None:
    uri = f"s3://{s3.bucket('tables')}/deep er/out"
    table = RowTable.open(uri, s3.options, create=True)
    assert table.take_over() == 1
    storage = s3.options
    files = [put(uri, "a b#1", range(4), failed={2}, storage=storage), put(uri, "c", [0], storage=storage)]
    table.commit(files)
    orphan = put(uri, "d", [0], storage=storage)
    assert keys(RowTable.open(uri, storage)) == [
        ("m", "a b#1", 0),
        ("m", "a b#1", 1),
        ("m", "a b#1", 2),
        ("m", "a b#1", 3),
        ("m", "c", 0),
    ]
    assert table.done(["a b#1", "c"], {"m": "v1"}) == {("a b#1", "m"): BitMap(range(4)), ("c", "m"): BitMap([0])}
    assert table.vacuum() == 1
    listed = {
        item["Key"] for item in s3.client.list_objects_v2(Bucket="tables", Prefix="deep er/out/model=")["Contents"]
    }
    assert listed == {f"deep er/out/{file.path}" for file in files}
    assert orphan.path not in listed
    assert table.delete_failed({"m": "v1"}) == 1
    assert table.vacuum() == 1

    second = RowTable.open(uri, storage)
    second.take_over()
    with pytest.raises(StorageError, match="taken over"):
        table.commit([put(uri, "e", [0], storage=storage)])
    second.commit([put(uri, "f", [0], storage=storage)])
    assert len(keys(second)) == 5
    assert second.counts("m", "v1") == (5, 0)


@pytest.mark.parametrize("create", [False, True])
def test_s3_without_a_bucket_is_one_short_line(s3: S3, create: bool) -> None:
    with pytest.raises(StorageError) as caught:
        RowTable.open("s3://no-such-bucket/out", s3.options, create=create)
    message = str(caught.value)
    assert "s3://no-such-bucket/out" in message
    assert "\n" not in message
    assert "<" not in message
    assert len(message) < 250, message
    with pytest.raises(StorageError, match="no-such-bucket"):
        put("s3://no-such-bucket/out", "a", [0], storage=s3.options)


def test_a_table_from_before_scores_gets_their_columns(tmp_path: Path) -> None:
    uri = str(tmp_path)
    older = pa.schema([field for field in PREDICTIONS if field.name not in LATER])
    table = RowTable.open(uri, {}, create=True, schema=older)
    table.take_over()
    rows = make_rows("s-0", [0]).drop_columns(list(LATER))
    table.commit([write_file(uri, {}, rows, model="m", model_version="v1", shard_id="s-0")])
    assert RowTable.open(uri, {}).counts("m", "v1") == (1, 0)  # read as it is
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    table.commit([put(uri, "s-0", [1], fields=[("city", "x")])])
    found = pa.Table.from_batches(list(table.scan(["position", "fields", "score"]))).sort_by("position").to_pylist()
    assert found == [
        {"position": 0, "fields": None, "score": None},
        {"position": 1, "fields": [("city", "x")], "score": None},
    ]
    assert table.delete_units(["s-0"]) == 2
