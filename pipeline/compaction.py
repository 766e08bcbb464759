"""Many small files of a table made into few large ones: the same rows, bit for bit, which readers open faster.

Whoever compacts is the table's driver for that time: it takes the fence, so that no other run's vacuum can take its
files away (docs/decisions/0009). A death leaves files that no log names; the next call goes on with what is small.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rows import PREDICTIONS
from pipeline.schema import MODEL
from pipeline.table import RowTable
from pipeline.tablefiles import FileRecord, merge_files
from pipeline.units import UnitLog

__all__ = ["Compacted", "compact", "groups"]

FILE_BYTES = 256 << 20
KEEP_HOURS = 24
THREADS = 4
# Each exchange costs a look at every file of the table: it is made at most so often.
COMMIT_S = 30.0

Compacted = dict[str, int]


def groups(files: pa.Table, file_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Which files become one: of one model and version, by shard and position, up to about `file_bytes` each.

    files: `RowTable.listing`. Files that are half as large already stay, and those whose version the log does not tell.
    """
    small = files.filter(
        pc.and_(pc.less(files.column("size_bytes"), file_bytes // 2), pc.is_valid(files.column("model_version")))
    )
    names = (MODEL, "model_version", "first_shard_id", "first_position", "path")
    group: list[dict[str, Any]] = []
    size = 0
    ordered = small.sort_by([(name, "ascending") for name in names])
    for file in itertools.chain.from_iterable(batch.to_pylist() for batch in ordered.to_batches(10_000)):
        is_other = group and any(file[name] != group[0][name] for name in names[:2])
        if is_other or size + file["size_bytes"] > file_bytes:
            if len(group) > 1:
                yield group
            group, size = [], 0
        group.append(file)
        size += file["size_bytes"]
    if len(group) > 1:
        yield group


def compact(
    uri: str,
    storage: Mapping[str, Any],
    *,
    schema: pa.Schema = PREDICTIONS,
    file_bytes: int = FILE_BYTES,
    keep_hours: int = KEEP_HOURS,
    threads: int = THREADS,
) -> Compacted:
    """Compact the table at `uri`. Returns files_before, files_after, rewritten (bytes) and removed (old files deleted).

    schema: PREDICTIONS or SCORES. keep_hours: how long the small files stay in storage, for readers that began before;
    the table remembers it, and later runs delete them then. Memory: a row group for each thread, and what the log says.
    Raises StorageError, also where another driver takes over.
    """
    table = RowTable.open(uri, storage, schema=schema)
    epoch = table.take_over()
    table.keep_removed(keep_hours)
    removed = table.vacuum()
    listing = table.listing()
    old: list[dict[str, Any]] = []
    new: list[FileRecord] = []
    rewritten = 0
    committed = time.monotonic()
    waiting: deque[tuple[list[dict[str, Any]], Future[FileRecord]]] = deque()

    def take() -> None:
        nonlocal rewritten, committed
        files, future = waiting.popleft()
        new.append(future.result())
        old.extend(files)
        rewritten += new[-1].size_bytes
        if time.monotonic() - committed >= COMMIT_S:
            exchange()

    def exchange() -> None:
        nonlocal committed
        if new:
            table.replace(old, new)
            old.clear()
            new.clear()
        committed = time.monotonic()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in groups(listing, file_bytes):
                waiting.append((group, pool.submit(merge_files, uri, storage, schema, group)))
                if len(waiting) > 2 * threads:
                    take()
            while waiting:
                take()
        finally:
            for _, future in waiting:
                future.cancel()
    exchange()
    unit_log = UnitLog(uri, storage)
    unit_log.create(epoch)
    table.checkpoint()
    removed += table.vacuum()
    after = len(table.files())
    return {"files_before": len(listing), "files_after": after, "rewritten": rewritten, "removed": removed}
