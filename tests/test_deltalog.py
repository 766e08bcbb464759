"""Additions written straight into the Delta log: read by deltalake as its own, one writer for each version."""

import json
import threading
from pathlib import Path
from typing import Any

import deltalake
import fsspec
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from fsspec.implementations.local import LocalFileSystem
from s3_endpoint import S3
from table_helpers import keys, put

from pipeline import deltalog
from pipeline.errors import StorageError
from pipeline.storage import open_fs
from pipeline.table import RowTable, _add_action, _addition

APP = "app"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = str(tmp_path / "a table")
    RowTable.open(uri, {}, create=True)
    return uri


def add(
    uri: str, after: int, version: int, names: list[str], fs: fsspec.AbstractFileSystem | None = None, who: str = "me"
) -> int:
    files = [_addition(put(uri, name, [0])) for name in names]
    return deltalog.append(fs or LocalFileSystem(), uri, after, APP, version, who, files)


def test_deltalake_reads_it_as_it_reads_its_own(uri: str, tmp_path: Path) -> None:
    files = [put(uri, "a b#1", range(3), failed={1}), put(uri, "c", [5], model="model = %41 é:x")]
    assert deltalog.append(LocalFileSystem(), uri, 0, APP, 7, "me", [_addition(file) for file in files]) == 1
    table = DeltaTable(uri)
    assert (table.version(), table.transaction_version(APP)) == (1, 7)
    other = str(tmp_path / "other")
    RowTable.open(other, {}, create=True)
    theirs = DeltaTable(other)
    theirs.create_write_transaction(
        [_add_action(file) for file in files], mode="append", schema=theirs.schema(), partition_by=["model"],
        commit_properties=CommitProperties(app_transactions=[Transaction(APP, 7)]),
    )  # fmt: skip
    theirs.update_incremental()
    for flatten in (True, False):
        # modification_time differs by the moment.
        assert [
            {key: value for key, value in row.items() if key != "modification_time"}
            for row in pa.table(table.get_add_actions(flatten=flatten)).to_pylist()
        ] == [
            {key: value for key, value in row.items() if key != "modification_time"}
            for row in pa.table(theirs.get_add_actions(flatten=flatten)).to_pylist()
        ]
    assert sorted(table.to_pyarrow_table(columns=["shard_id"]).column(0).to_pylist()) == ["a b#1"] * 3 + ["c"]
    assert not list(Path(uri, "_delta_log").glob("*.tmp"))


def test_versions_of_others_are_passed_and_its_own_application_stops_it(uri: str) -> None:
    assert add(uri, 0, 1, ["a"]) == 1
    deltalake.write_deltalake(uri, DeltaTable(uri).to_pyarrow_table(), mode="append")
    assert add(uri, 1, 2, ["b"]) == 3
    with pytest.raises(CommitFailedError, match="version 1 was written by another app"):
        add(uri, 0, 2, ["c"], who="you")
    # The same commit again, as after an interruption: it is there.
    assert add(uri, 1, 2, ["b"]) == 3
    assert DeltaTable(uri).version() == 3
    DeltaTable(uri).alter.set_table_properties({"delta.logRetentionDuration": "interval 1 days"})
    with pytest.raises(CommitFailedError, match="version 4"):
        add(uri, 3, 3, ["c"])
    assert sorted(DeltaTable(uri).to_pyarrow_table(columns=["shard_id"]).column(0).to_pylist()) == ["a", "a", "b"]


def test_of_writers_at_once_one_has_each_version(uri: str) -> None:
    versions: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        files = [_addition(put(uri, str(number), [0]))]
        barrier.wait()
        versions.append(deltalog.append(LocalFileSystem(), uri, 0, f"app-{number}", 1, f"writer-{number}", files))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(1, 9))
    assert sorted(DeltaTable(uri).to_pyarrow_table(columns=["shard_id"]).column(0).to_pylist()) == list("01234567")


class Faulty:
    """A file system of which some answers do not arrive: before the write, or after it."""

    def __init__(self, fs: fsspec.AbstractFileSystem, base: str, faults: list[str]) -> None:
        self.fs, self.base, self.faults, self.protocol = fs, base, faults, "s3"

    def _fault(self, when: str) -> None:
        if self.faults and self.faults[0] == when:
            self.faults.pop(0)
            raise OSError(5, f"lost {when}")

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        self._fault("before")
        with open(path, "xb") as file:
            file.write(data)
        self._fault("after")

    def cat_file(self, path: str) -> Any:
        self._fault("reading")
        return self.fs.cat_file(path)


@pytest.mark.parametrize(
    "faults", [["before"], ["after"], ["before", "before", "after"], ["after", "reading", "reading"]], ids=str
)
def test_an_answer_that_is_lost_does_not_double_a_commit(
    uri: str, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    monkeypatch.setattr(deltalog, "PAUSE_S", 0.0)
    fs = Faulty(LocalFileSystem(), uri, faults)
    assert add(uri, 0, 1, ["a"], fs) == 1  # type: ignore[arg-type]
    assert not faults
    assert add(uri, 1, 2, ["b"], fs) == 2  # type: ignore[arg-type]
    assert sorted(DeltaTable(uri).to_pyarrow_table(columns=["shard_id"]).column(0).to_pylist()) == ["a", "b"]
    fs.faults = ["before"] * deltalog.ATTEMPTS
    with pytest.raises(StorageError, match="lost before"):
        add(uri, 2, 3, ["c"], fs)  # type: ignore[arg-type]


def test_which_tables_it_writes_to(uri: str) -> None:
    table = DeltaTable(uri)
    assert deltalog.can_append(LocalFileSystem(), table)
    assert not deltalog.can_append(fsspec.filesystem("memory"), table)
    table.alter.add_constraint({"known": "position >= 0"})  # a rule that a writer has to check
    assert not deltalog.can_append(LocalFileSystem(), DeltaTable(uri))
    own = RowTable.open(uri, {})
    own.take_over()
    assert not own._appends


def test_checkpoints_come_by_commits_and_by_the_share_of_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.table.COMMITS_PER_CHECKPOINT", 3)
    monkeypatch.setattr("pipeline.table.FILES_PER_CHECKPOINT", 0.5)
    uri = str(tmp_path)
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    for number in range(30):
        table.commit([put(uri, str(number), [0])])
    found = sorted(int(path.name.split(".")[0]) for path in Path(uri, "_delta_log").glob("*.checkpoint.parquet"))
    # Version 1 took over; 3 files, then half as many again each time.
    assert found == [4, 7, 10, 15, 22]
    table.commit([])
    assert len(keys(RowTable.open(uri, {}))) == len(keys(table)) == 30


def test_a_checkpoint_that_fails_is_said_and_the_rows_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.table.COMMITS_PER_CHECKPOINT", 1)
    uri = str(tmp_path)
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    Path(uri, "_delta_log", "00000000000000000002.checkpoint.parquet").mkdir()
    table.commit([put(uri, "a", [0])])
    assert "no checkpoint of the table's log" in caplog.text
    Path(uri, "_delta_log", "00000000000000000002.checkpoint.parquet").rmdir()
    assert len(keys(RowTable.open(uri, {}))) == 1


def test_s3(s3: S3) -> None:
    uri = f"s3://{s3.bucket('deltalog')}/out"
    table = RowTable.open(uri, s3.options, create=True)
    fs, base = open_fs(uri, s3.options)
    assert table._appends
    table.take_over()
    file = put(uri, "a", [0], storage=s3.options)
    with pytest.raises(CommitFailedError):
        deltalog.append(fs, base, 0, "maskmill", 2, "me", [_addition(file)])
    assert deltalog.append(fs, base, 0, APP, 1, "me", [_addition(file)]) == 2
    content = s3.client.get_object(Bucket="deltalog", Key="out/_delta_log/00000000000000000002.json")["Body"].read()
    assert [next(iter(json.loads(line))) for line in content.splitlines()] == ["commitInfo", "txn", "add"]
    table.commit([put(uri, "b", [0], storage=s3.options)])
    assert len(keys(RowTable.open(uri, s3.options))) == 2
