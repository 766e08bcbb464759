"""Which rows an export has, in which order, and how they are cut into pieces: keys are scanned, no mask is read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyroaring import BitMap

from pipeline.export.names import Shared
from pipeline.rows import LATER, PREDICTIONS
from pipeline.schema import MODEL, OK
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable

__all__ = ["Part", "Piece", "Scan", "chosen", "cut", "describe", "read_rows", "scan_parts"]

KEYS = ["image_id", "shard_id", "position", "model_version", "status"]
SCANS_AT_ONCE = 8
# What a reader holds at once: a row of a 4K image may be megabytes.
ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one row group. wanted: a serialized BitMap of their ordinals in it. shards: that they are of."""

    path: str
    group: int
    wanted: bytes
    shards: tuple[str, ...]

    def __len__(self) -> int:
        return len(BitMap.deserialize(self.wanted))


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of work. first: the number of its first row, from 1."""

    index: int
    first: int
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True, slots=True)
class Scan:
    """All rows of one model, as parts in the table's order. shared: see `Namer`."""

    parts: tuple[Part, ...]
    shared: tuple[int, ...]
    rows: int
    failed: int


def scan_parts(table: RowTable, model: Mapping[str, Any]) -> Scan:
    """Scan the keys of a model's rows; costs 8 bytes an image and a bit for each row."""
    files = table.listing().filter(pc.field(MODEL) == model["label"])
    version = files.column("model_version")
    files = files.filter(pc.or_(pc.is_null(version), pc.equal(version, model["version"])))
    order = [(name, "ascending") for name in ("first_shard_id", "first_position", "path")]
    paths = files.sort_by(order).column("path").to_pylist()
    shared, parts, rows, failed = Shared(), [], 0, 0
    with ThreadPoolExecutor(SCANS_AT_ONCE, "maskmill-scan") as pool:
        for start in range(0, len(paths), 4 * SCANS_AT_ONCE):
            chunk = paths[start : start + 4 * SCANS_AT_ONCE]
            for found in pool.map(lambda path: [*_keys(table, path, model["version"])], chunk):
                for part, image_ids, bad in found:
                    shared.add(image_ids)
                    parts.append(part)
                    rows, failed = rows + len(image_ids), failed + bad
    return Scan(tuple(parts), shared.found(), rows, failed)


def _keys(table: RowTable, path: str, version: str) -> Iterator[tuple[Part, list[str], int]]:
    fs, base = open_fs(table.uri, table.storage)
    with storage_errors(join(table.uri, path)), fs.open(join(base, path), "rb") as data:
        file = pq.ParquetFile(data, pre_buffer=False)
        for group in range(file.num_row_groups):
            keys = file.read_row_group(group, columns=KEYS, use_threads=False)
            own = pc.fill_null(pc.equal(keys.column("model_version"), version), False)
            wanted = np.flatnonzero(own.to_numpy())
            if not len(wanted):
                continue
            keys = keys.filter(own)
            shards = tuple(sorted(keys.column("shard_id").unique().to_pylist()))
            bad = len(keys) - (pc.sum(pc.equal(keys.column("status"), OK)).as_py() or 0)
            part = Part(path, group, BitMap(wanted.astype(np.uint32)).serialize(), shards)
            yield part, keys.column("image_id").to_pylist(), bad


def cut(parts: Sequence[Part], rows_per_piece: int) -> list[Piece]:
    """Neighbouring row groups put together up to so many rows; a row group is never divided: it is read once."""
    pieces: list[Piece] = []
    waiting: list[Part] = []
    first, rows = 1, 0
    for part in parts:
        if waiting and rows + len(part) > rows_per_piece:
            pieces.append(Piece(len(pieces), first, tuple(waiting)))
            first, rows, waiting = first + rows, 0, []
        waiting.append(part)
        rows += len(part)
    if waiting:
        pieces.append(Piece(len(pieces), first, tuple(waiting)))
    return pieces


def chosen(parts: Sequence[Part], wanted: Mapping[tuple[str, int], BitMap]) -> list[Part]:
    """The parts with fewer rows: ordinals by path and row group."""
    kept = (
        replace(part, wanted=(BitMap.deserialize(part.wanted) & wanted[part.path, part.group]).serialize())
        for part in parts
        if (part.path, part.group) in wanted
    )
    return [part for part in kept if len(part)]


def read_rows(
    uri: str, storage: Mapping[str, Any], part: Part, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a part with their ordinals, a few in memory at once. A column that an older table lacks is None."""
    wanted = BitMap.deserialize(part.wanted)
    fs, base = open_fs(uri, storage)
    with storage_errors(join(uri, part.path)), fs.open(join(base, part.path), "rb") as data:
        file = pq.ParquetFile(data, pre_buffer=False)
        present = [name for name in columns if name in file.schema_arrow.names]
        missing = {name: None for name in columns if name not in present and name in LATER}
        ordinal, last = 0, wanted.max()
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[part.group], columns=present, use_threads=False):
            kept = [place for place in range(len(batch)) if ordinal + place in wanted]
            rows = batch.take(pa.array(kept, pa.int64())).cast(pa.schema([PREDICTIONS.field(name) for name in present]))
            for place, row in zip(kept, rows.to_pylist(), strict=True):
                yield ordinal + place, row | missing
            ordinal += len(batch)
            if ordinal > last:
                return


def describe(parts: Sequence[Part]) -> Iterator[bytes]:
    """What tells one set of rows from another, for a hash."""
    for part in parts:
        yield json.dumps([part.path, part.group]).encode() + part.wanted
