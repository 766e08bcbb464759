"""Rows, files and windows made by hand, for the tests of the table and of the books kept on it."""

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.schema import FAILED, OK
from pipeline.table import RowTable
from pipeline.tablefiles import FILE_SCHEMA, FileRecord, write_file

TIME = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


def make_rows(
    shard_id: str,
    positions: Iterable[int],
    *,
    version: str = "v1",
    failed: Collection[int] = (),
    attempts: Mapping[int, int] | None = None,
    **columns: Any,
) -> pa.Table:
    """One row per position; `columns` are added to the rows that did not fail."""
    rows: list[dict[str, Any]] = []
    for position in positions:
        row = {
            "image_id": f"{shard_id}/{position}",
            "shard_id": shard_id,
            "position": position,
            "model_version": version,
            "run_id": "run",
            "labeled_at": TIME,
        }
        if position in failed:
            tries = (attempts or {}).get(position, 1)
            error = {"error_type": "CorruptImageError", "error_stage": "decode", "error_message": f"bad {position}"}
            row |= {"status": FAILED, "attempts": tries, **error}
        else:
            semantic = {"format": "png", "data": f"{shard_id}{position}".encode()}
            row |= {"status": OK, "width": 10 + position, "height": 20, "semantic": semantic, **columns}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=FILE_SCHEMA)


def put(
    uri: str,
    shard_id: str,
    positions: Iterable[int],
    *,
    model: str = "m",
    version: str = "v1",
    storage: Mapping[str, Any] | None = None,
    **options: Any,
) -> FileRecord:
    """Write a file that is not committed."""
    rows = make_rows(shard_id, positions, version=version, **options)
    return write_file(uri, storage or {}, rows, model=model, model_version=version, shard_id=shard_id)


def keys(table: RowTable) -> list[tuple[str, str, int]]:
    """(model, shard_id, position) of every row, sorted, repeated where a row is doubled."""
    return sorted(
        (row["model"], row["shard_id"], row["position"])
        for batch in table.scan(["model", "shard_id", "position"])
        for row in batch.to_pylist()
    )
