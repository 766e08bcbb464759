"""Windows on their way from the workers to the driver, as Arrow rows."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from pipeline.dataflow.cluster import ray_errors
from pipeline.stages.work import Window
from pipeline.table import FileRecord

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
    )
