"""Files of a table: the statistics that the log gets of them, and several files as one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyroaring import BitMap
from table_helpers import TIME, make_rows, put

from pipeline.rows import PREDICTIONS
from pipeline.schema import MODEL
from pipeline.tablefiles import FILE_SCHEMA, as_written, file_stats, merge_files, merge_stats, row_groups_of


def test_statistics_bound_every_plain_column() -> None:
    quality = {"mean_max_probability": 0.75, "mean_entropy": float("nan"), "low_confidence_share": 0.25}
    rows = make_rows("a", range(3), quality=quality, failed={1})
    stats = json.loads(file_stats(rows), parse_constant=pytest.fail)
    assert stats["numRecords"] == 3
    plain = {field.name for field in FILE_SCHEMA if not pa.types.is_nested(field.type)}
    assert set(stats["minValues"]) == set(stats["maxValues"]) == set(stats["nullCount"]) == plain
    assert (stats["minValues"]["position"], stats["maxValues"]["position"]) == (0, 2)
    assert stats["minValues"]["labeled_at"] == TIME.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert (stats["minValues"]["status"], stats["maxValues"]["status"]) == ("failed", "ok")
    assert stats["nullCount"]["error_type"] == 2
    without = json.loads(file_stats(make_rows("a", range(3))))
    assert plain - set(without["minValues"]) == {"error_type", "error_stage", "error_message", "attempts"}


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    parts = [make_rows("b", range(3), failed={1}), make_rows("a", [7]), make_rows("c", [0], failed={0})]
    merged = merge_stats([json.loads(file_stats(part)) for part in parts])
    assert merged == json.loads(file_stats(pa.concat_tables(parts)))


def test_a_file_is_what_its_record_says(tmp_path: Path) -> None:
    record = put(str(tmp_path), "a", [3, 1, 7], failed={1})
    stored = pq.read_table(tmp_path / record.path, partitioning=None)
    assert stored.equals(make_rows("a", [3, 1, 7], failed={1}))
    assert record.size_bytes == (tmp_path / record.path).stat().st_size
    assert (record.model, record.model_version, record.shard_id) == ("m", "v1", "a")
    assert (record.rows, record.failed, BitMap.deserialize(record.positions)) == (3, 1, BitMap([1, 3, 7]))
    assert json.loads(record.stats) == json.loads(file_stats(stored))


def test_merged_files_keep_their_rows_in_groups_that_tell_shards_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tablefiles.GROUP_ROWS", 8)
    uri = str(tmp_path)
    shards = {"a": range(9), "b": range(3), "c": range(8)}
    records = [put(uri, shard_id, positions, failed={2}) for shard_id, positions in shards.items()]
    files = [{"path": one.path, "model": "m", "model_version": "v1", "rows": one.rows} for one in records]
    merged = merge_files(uri, {}, PREDICTIONS, files)
    parts = [make_rows(shard_id, positions, failed={2}) for shard_id, positions in shards.items()]
    assert pq.read_table(tmp_path / merged.path, partitioning=None).equals(pa.concat_tables(parts))
    assert (merged.rows, merged.failed, merged.model_version) == (20, 3, "v1")
    assert json.loads(merged.stats) == json.loads(file_stats(pa.concat_tables(parts)))
    file = pq.ParquetFile(tmp_path / merged.path)
    assert file.num_row_groups > 1
    for shard_id, positions in shards.items():
        found = file.read_row_groups(row_groups_of(file, shard_id), columns=["shard_id"])
        assert found.column("shard_id").to_pylist().count(shard_id) == len(positions)
    assert row_groups_of(file, "d") == []
    assert len(row_groups_of(file, "a")) < file.num_row_groups


def test_columns_that_came_later_are_null_and_the_partition_has_its_value() -> None:
    rows = make_rows("a", [0, 1]).drop_columns(["score", "fields"])
    whole = as_written(rows, PREDICTIONS, {MODEL: "m"})
    assert whole.schema == PREDICTIONS
    assert whole.column(MODEL).to_pylist() == ["m", "m"]
    assert whole.column("score").null_count == whole.column("fields").null_count == 2
