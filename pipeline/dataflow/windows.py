"""Windows on their way from the workers to the driver, as Arrow rows."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from pipeline.dataflow.cluster import ray_errors
from pipeline.stages.work import Note, Window
from pipeline.tablefiles import FileRecord

__all__ = ["iter_windows", "window_to_table"]

WINDOWS = pa.schema(
    [
        ("index", pa.int64()),
        (
            "files",
            pa.list_(
                pa.struct(
                    [
                        ("path", pa.string()),
                        ("size_bytes", pa.int64()),
                        ("model", pa.string()),
                        ("model_version", pa.string()),
                        ("shard_id", pa.string()),
                        ("rows", pa.int64()),
                        ("failed", pa.int64()),
                        ("positions", pa.large_binary()),
                        ("stats", pa.string()),
                    ]
                )
            ),
        ),
        ("rows", pa.int64()),
        ("images", pa.int64()),
        ("wall_s", pa.float64()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("bytes_read", pa.int64()),
        ("waits", pa.map_(pa.string(), pa.float64())),
        ("batches", pa.int64()),
        ("batch_pixels", pa.int64()),
        ("queued", pa.int64()),
        ("notes", pa.string()),  # JSON
        ("worker", pa.string()),  # JSON
    ]
)


def iter_windows(windows: Dataset) -> Iterator[Window]:
    """Run a dataflow that ends in windows, and give each as it comes. Raises RunError from the workers."""
    with ray_errors():
        for batch in windows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield _to_window(row)


def window_to_table(window: Window) -> pa.Table:
    """One window as a table of one row."""
    row = {
        "index": window.index,
        "files": [asdict(file) for file in window.files],
        "rows": window.rows,
        "images": window.images,
        "wall_s": window.wall_s,
        "seconds": list(window.seconds.items()),
        "bytes_read": window.bytes_read,
        "waits": list(window.waits.items()),
        "batches": window.batches,
        "batch_pixels": window.batch_pixels,
        "queued": window.queued,
        "notes": json.dumps([asdict(note) for note in window.notes]) if window.notes else None,
        "worker": json.dumps(window.worker) if window.worker else None,
    }
    return pa.Table.from_pylist([row], schema=WINDOWS)


def _to_window(row: Mapping[str, Any]) -> Window:
    return Window(
        index=row["index"],
        files=tuple(FileRecord(**file) for file in row["files"]),
        rows=row["rows"],
        images=row["images"],
        wall_s=row["wall_s"],
        seconds=dict(row["seconds"]),
        bytes_read=row["bytes_read"],
        waits=dict(row["waits"]),
        batches=row["batches"],
        batch_pixels=row["batch_pixels"],
        queued=row["queued"],
        notes=tuple(Note(**note) for note in json.loads(row["notes"])) if row["notes"] else (),
        worker=tuple(json.loads(row["worker"])) if row["worker"] else None,
    )
