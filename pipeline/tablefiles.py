"""The Parquet files of a table, and what the log says of each: written, merged, and read as they should have been.

Nobody sees a file before its table's driver commits it (table.py).
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyroaring import BitMap

from pipeline.errors import StorageError
from pipeline.rows import PREDICTIONS
from pipeline.schema import MODEL
from pipeline.storage import join, open_fs, storage_errors

__all__ = [
    "FILE_SCHEMA",
    "FileRecord",
    "as_written",
    "file_schema",
    "file_stats",
    "merge_files",
    "merge_stats",
    "row_groups_of",
    "stats_columns",
    "write_file",
]

# Row groups of merged files: what a reader of one shard reads at once, and a merger holds.
GROUP_ROWS = 4096
GROUP_BYTES = 32 << 20


def file_schema(rows: pa.Schema) -> pa.Schema:
    """The columns of a table's files: all but the partition's."""
    return pa.schema([field for field in rows if field.name != MODEL])


FILE_SCHEMA = file_schema(PREDICTIONS)


def stats_columns(rows: pa.Schema) -> tuple[str, ...]:
    """Columns with bounds in the log: every plain one, because pyarrow takes a column without bounds in a file with
    bounds for one without values; and none inside a struct, because Polars refuses a struct of which it is given the
    bounds of some fields only."""
    return tuple(field.name for field in file_schema(rows) if not pa.types.is_nested(field.type))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One Parquet file of the table: rows of one model, one version and one unit.

    positions: a serialized BitMap. stats: Delta's statistics, JSON.
    """

    path: str
    size_bytes: int
    model: str
    model_version: str
    shard_id: str
    rows: int
    failed: int
    positions: bytes
    stats: str


def write_file(
    root: str, storage: Mapping[str, Any], rows: pa.Table, *, model: str, model_version: str, shard_id: str
) -> FileRecord:
    """Put `rows` (`file_schema` of the table, one unit and model) under the table; nobody sees it before a commit."""
    path = f"{MODEL}={model}/part-{uuid.uuid4().hex}.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", compression_level=1, write_statistics=True)
    data = sink.getvalue()
    fs, base = open_fs(root, storage)
    with storage_errors(join(root, path)):
        fs.makedirs(join(base, f"{MODEL}={model}"), exist_ok=True)
        fs.pipe_file(join(base, path), data.to_pybytes())
    failed = len(rows) - rows.column("error_type").null_count
    positions = BitMap(rows.column("position").to_numpy()).serialize()
    return FileRecord(path, data.size, model, model_version, shard_id, len(rows), failed, positions, file_stats(rows))


def merge_files(
    root: str, storage: Mapping[str, Any], schema: pa.Schema, files: Sequence[Mapping[str, Any]]
) -> FileRecord:
    """Write the rows of several files (path, model, model_version, rows) of one model and version as one file.

    Rows keep their order. Memory is bounded by a row group. Nobody sees the file before a commit. Raises StorageError,
    also where other rows come than the log has.
    """
    model, version = files[0]["model"], files[0]["model_version"]
    path = f"{MODEL}={model}/part-{uuid.uuid4().hex}.parquet"
    columns = file_schema(schema)
    fs, base = open_fs(root, storage)
    stats: list[dict[str, Any]] = []
    waiting: list[pa.RecordBatch] = []

    def write(writer: pq.ParquetWriter) -> None:
        rows = pa.Table.from_batches(waiting, columns)
        waiting.clear()
        writer.write_table(rows)
        stats.append(json.loads(file_stats(rows)))

    with (
        storage_errors(join(root, path)),
        fs.open(join(base, path), "wb") as sink,
        pq.ParquetWriter(sink, columns, compression="zstd", compression_level=1) as writer,
    ):
        for file in files:
            with storage_errors(join(root, file["path"])), fs.open(join(base, file["path"]), "rb") as data:
                stored = pq.ParquetFile(data, pre_buffer=False)
                for batch in stored.iter_batches(GROUP_ROWS // 8, use_threads=False):
                    waiting.append(as_written(batch, columns))
                    if sum(map(len, waiting)) >= GROUP_ROWS or sum(part.nbytes for part in waiting) >= GROUP_BYTES:
                        write(writer)
        if waiting:
            write(writer)
    expected, rows = sum(file["rows"] for file in files), sum(part["numRecords"] for part in stats)
    if rows != expected:
        raise StorageError(f"{root}: expected {expected} rows in {len(files)} files as the log says, got {rows}")
    merged = merge_stats(stats)
    failed = rows - merged["nullCount"]["error_type"]
    size = int(fs.size(join(base, path)))
    return FileRecord(path, size, model, version, "", rows, failed, b"", json.dumps(merged))


def row_groups_of(file: pq.ParquetFile, shard_id: str) -> list[int]:
    """The row groups that may hold rows of a shard, by their statistics."""
    column = file.schema_arrow.names.index("shard_id")
    groups = []
    for group in range(file.num_row_groups):
        stats = file.metadata.row_group(group).column(column).statistics
        if stats is None or not stats.has_min_max or stats.min <= shard_id <= stats.max:
            groups.append(group)
    return groups


def merge_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Delta's statistics of a file from those of its parts."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    for part in parts:
        for name, value in part["minValues"].items():
            low[name] = min(low.get(name, value), value)
        for name, value in part["maxValues"].items():
            high[name] = max(high.get(name, value), value)
    nulls = {name: sum(part["nullCount"][name] for part in parts) for name in parts[0]["nullCount"]}
    return {
        "numRecords": sum(part["numRecords"] for part in parts),
        "minValues": low,
        "maxValues": high,
        "nullCount": nulls,
    }


def as_written(
    stored: pa.RecordBatch | pa.Table, schema: pa.Schema, partition: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """A file's rows in the table's columns: the partition's with its value, those that came later as nulls."""
    for field in schema:
        if field.name not in stored.schema.names:
            value = pa.scalar(partition.get(field.name), field.type)
            stored = stored.append_column(field, pa.repeat(value, len(stored)))
    return stored.select(schema.names).cast(schema)


def file_stats(rows: pa.Table) -> str:
    """Delta's statistics of a file as JSON: rows, and minimum, maximum and nulls of each of `stats_columns`."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, Any] = {}
    for name in stats_columns(rows.schema):
        column = rows.column(name)
        nulls[name] = column.null_count
        if column.null_count < len(column):
            bounds = pc.min_max(column)
            low[name], high[name] = (_plain(bounds[side].as_py()) for side in ("min", "max"))
    return json.dumps({"numRecords": len(rows), "minValues": low, "maxValues": high, "nullCount": nulls})


def _plain(value: Any) -> Any:
    return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(value, datetime) else value
