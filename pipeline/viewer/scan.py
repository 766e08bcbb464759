"""One page of rows: the table's files are opened in the order of their rows, and no more of them than the page needs.

Nothing is loaded whole. Files and row groups whose bounds rule them out are not opened; of the others the columns are
read that the question is about, and the shown columns only where a row fits. A rare row may be far away: a page that
does not fill in time ends where the search is, and the next call goes on from there.
"""

import bisect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SchemaError
from pipeline.images import DEFAULT_MAX_PIXELS
from pipeline.masks import decode_label_map
from pipeline.schema import MODEL
from pipeline.viewer.query import QUALITY, START, Key, Query
from pipeline.viewer.stored import Place, Snapshot, Stored, bounds, read_columns

__all__ = ["SHOWN", "Page", "Stop", "find_page", "groups_of", "matching", "read_shown"]

# What a card of the page shows; no pixels.
SHOWN = ("image_id", "shard_id", "position", "width", "height", "model_version", "status", "error_type", "error_stage",
         "error_message", "attempts", "quality", "semantic.format", "depth.kind", "segments.category_id",
         "segments.score")  # fmt: skip
# Parts read ahead: one at first, because mostly one fills a page, then more, because a search waits for storage.
MOST_AHEAD = 16
FILES_AT_ONCE = 256
MAP_BATCH = 64
LONGEST_ERROR = 2000


class Stop:
    """When to give up: at a moment, or because nobody waits any more."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    @property
    def reached(self) -> bool:
        return self.cancelled or (self._end is not None and time.monotonic() >= self._end)


class Part(NamedTuple):
    """A file that is not yet opened (group -1), or one of its row groups. first: no row of it stands before."""

    first: Key
    file: int
    group: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Page:
    """rows: as `read_shown` gives them. following: where the next page begins, None at the end of the table. searched:
    of how many rows (all of the models asked for) it is known whether they belong to this page or one before it."""

    rows: list[dict[str, Any]]
    following: Key | None
    searched: int
    total: int


_Found = tuple[Key, dict[str, Any]]
_Read = Callable[[Part], tuple[list[_Found], list[Part]]]


class _Ahead:
    """Parts by their first key, the next ones being read. Of a million files only the next ones are parts."""

    def __init__(self, snapshot: Snapshot, numbers: pa.Array, pool: ThreadPoolExecutor, read: _Read) -> None:
        self._snapshot, self._numbers, self._pool, self._read = snapshot, numbers, pool, read
        self._files = 0  # parts that are files
        self._window = 1
        self._futures: dict[Part, Future[tuple[list[_Found], list[Part]]]] = {}
        self._parts: list[Part] = []
        self._refill()

    @property
    def bound(self) -> Key | None:
        """No row of what is not yet taken stands before it; None at the end."""
        return self._parts[0].first if self._parts else None

    @property
    def rows(self) -> int:
        """How many are not yet taken."""
        return sum(part.rows for part in self._parts) + self._snapshot.rows_of(self._numbers)

    def take(self) -> list[_Found]:
        """What fits among the rows of the next part."""
        for part in self._parts[: self._window]:
            if part not in self._futures:
                self._futures[part] = self._pool.submit(self._read, part)
        self._window = min(MOST_AHEAD, 2 * self._window)
        part = self._parts.pop(0)
        self._files -= part.group < 0
        found, rest = self._futures.pop(part).result()
        for left in rest:
            bisect.insort(self._parts, left)
        self._refill()
        return found

    def _refill(self) -> None:
        # A file among the parts is before every file that is not: so is then the first part, whatever it is.
        if self._files <= MOST_AHEAD and len(self._numbers):
            chunk, self._numbers = self._numbers[:FILES_AT_ONCE], self._numbers[FILES_AT_ONCE:]
            for part in (Part(first, number, -1, rows) for number, first, rows in self._snapshot.firsts(chunk)):
                bisect.insort(self._parts, part)
            self._files += len(chunk)

    def close(self) -> None:
        for future in self._futures.values():
            future.cancel()


def find_page(
    snapshot: Snapshot, stored: Stored, pool: ThreadPoolExecutor, query: Query, start: Key, count: int, stop: Stop
) -> Page:
    """At most `count` rows of `query` from `start` on, in natural order. Raises StorageError, SchemaError."""
    numbers, total = snapshot.select(query, start)
    found: list[_Found] = []
    ahead = _Ahead(snapshot, numbers, pool, lambda part: _read(snapshot, stored, query, part, start, count + 1, stop))
    try:
        while ahead.bound is not None and not (len(found) > count and found[count][0] < ahead.bound):
            found = sorted([*found, *ahead.take()], key=lambda item: item[0])[: count + 1]
            # Not before it is certain that the next call begins further on.
            if stop.cancelled or (stop.reached and (ahead.bound is None or ahead.bound > start)):
                break
    finally:
        ahead.close()
    bound = ahead.bound
    certain = [item for item in found if bound is None or item[0] < bound]
    following = certain[count][0] if len(certain) > count else bound
    return Page(rows=[row for _, row in certain[:count]], following=following, searched=total - ahead.rows, total=total)


def _read(
    snapshot: Snapshot, stored: Stored, query: Query, part: Part, start: Key, most: int, stop: Stop
) -> tuple[list[_Found], list[Part]]:
    """The first rows of a part that fit, and what is left of it: its row groups, or the rest after `stop`."""
    file = snapshot[part.file]
    if stop.cancelled:
        return [], [part]
    with stored.open(file.path) as opened:
        if part.group < 0:
            parts = [
                Part(max(_first(opened, group), part.first), part.file, group, rows)
                for group, rows in groups_of(opened, query, start)
            ]
            if len(parts) != 1:
                return [], parts
            part = parts[0]
        rows = matching(opened, part.group, query, file.model)
        rows = rows.filter(_from(rows, start, file.model))
        rows = rows.sort_by([("shard_id", "ascending"), ("position", "ascending")])
        rest: list[Part] = []
        if query.asks_maps:
            rows, left = _with_class(opened, part.group, rows, query, most, stop)
            if left is not None:
                rest = [part._replace(first=max(part.first, Key(*left, "")))]
        places = rows.slice(0, most).column("row").to_pylist()
        shown = read_shown(opened, part.file, part.group, places, file.model)
    return [(Key(row["shard_id"], row["position"], row[MODEL]), row) for row in shown], rest


def groups_of(file: pq.ParquetFile, query: Query, start: Key = START) -> Iterator[tuple[int, int]]:
    """Number and rows of the row groups that may hold rows of `query` from `start` on, by their bounds."""
    for group in range(file.num_row_groups):
        _, last = bounds(file.metadata, group, "shard_id")
        _, last_position = bounds(file.metadata, group, "position")
        if last is not None and last < start.shard_id:
            continue
        if last == start.shard_id and last_position is not None and last_position < start.position:
            continue
        if query.asks_confidence:
            low, high = bounds(file.metadata, group, f"quality.{QUALITY['confidence']}")
            below = query.low_confidence is not None and high is not None and high < query.low_confidence
            above = query.high_confidence is not None and low is not None and low > query.high_confidence
            if below or above:
                continue
        if query.status:
            statuses = bounds(file.metadata, group, "status")
            if None not in statuses and not statuses[0] <= query.status <= statuses[1]:
                continue
        yield group, file.metadata.row_group(group).num_rows


def _first(file: pq.ParquetFile, group: int) -> Key:
    shard_id, position = (bounds(file.metadata, group, name)[0] for name in ("shard_id", "position"))
    return START if shard_id is None or position is None else Key(shard_id, position, "")


def matching(file: pq.ParquetFile, group: int, query: Query, model: str, more: Sequence[str] = ()) -> pa.Table:
    """The rows of a group that fit, but for the classes of label maps: the query's columns and `more`, and `row`, their
    number in the group. Raises SchemaError."""
    rows = read_columns(file, group, [*query.columns, *more])
    rows = rows.append_column("row", pa.array(np.arange(len(rows))))
    try:
        return rows.filter(query.matches(rows, model))
    except KeyError as error:
        raise SchemaError(f"a file of the table lacks the column {error}") from error


def _from(rows: pa.Table, start: Key, model: str) -> pa.Array:
    shard, position = rows.column("shard_id"), rows.column("position")
    same = pc.equal(shard, start.shard_id)
    later = pc.greater_equal if model >= start.model else pc.greater
    return pc.or_(pc.greater(shard, start.shard_id), pc.and_(same, later(position, start.position)))


def _with_class(
    file: pq.ParquetFile, group: int, rows: pa.Table, query: Query, most: int, stop: Stop
) -> tuple[pa.Table, tuple[str, int] | None]:
    """The first `most` of the rows whose segments or label map have the class, and where it stopped before that."""
    if not len(rows):
        return rows, None
    lacking = rows.column("segments").combine_chunks().is_null().to_numpy(zero_copy_only=False)
    if not lacking.any():
        return rows, None
    wanted = {int(row) for row, lacks in zip(rows.column("row").to_pylist(), lacking, strict=True) if lacks}
    maps = MapClasses(file, group, wanted, query.class_id or 0)
    kept: list[int] = []
    for index, (row, lacks) in enumerate(zip(rows.column("row").to_pylist(), lacking, strict=True)):
        if len(kept) >= most:
            break
        if stop.reached and index and lacks:
            (at,) = rows.slice(index, 1).select(["shard_id", "position"]).to_pylist()
            return rows.take(pa.array(kept, pa.int64())), (at["shard_id"], at["position"])
        if not lacks or maps.has(row):
            kept.append(index)
    return rows.take(pa.array(kept, pa.int64())), None


class MapClasses:
    """Whether the label maps of a row group have a class, decoded when they are asked for.

    The encoded maps are read once, in batches, and only those of `wanted` are held.
    """

    def __init__(self, file: pq.ParquetFile, group: int, wanted: set[int], class_id: int) -> None:
        self._class = class_id
        self._rows: dict[int, dict[str, Any]] = {}
        names = leaves_of_maps(file)
        first = 0
        for batch in file.iter_batches(MAP_BATCH, row_groups=[group], columns=names, use_threads=False):
            for at in sorted(row - first for row in wanted if first <= row < first + len(batch)):
                self._rows[first + at] = batch.slice(at, 1).to_pylist()[0]
            first += len(batch)

    def has(self, row: int) -> bool:
        """False too for what has no map, or one that cannot be read."""
        values = self._rows.get(row, {})
        width, height, semantic = values.get("width"), values.get("height"), values.get("semantic")
        if not semantic or not width or not height or width * height > DEFAULT_MAX_PIXELS:
            return False
        try:
            label_HW = decode_label_map(semantic["data"], semantic["format"], width=width, height=height)
        except SchemaError:
            return False
        return bool((label_HW == self._class).any())


def leaves_of_maps(file: pq.ParquetFile) -> list[str]:
    """The columns of label maps and their size, as far as the file has them."""
    return [name for name in ("width", "height", "semantic") if name in file.schema_arrow.names]


def read_shown(
    file: pq.ParquetFile, number: int, group: int, places: Sequence[int], model: str
) -> list[dict[str, Any]]:
    """SHOWN of rows of a group, with `model`, and `place`, a Place. `kind` instead of leaves: semantic, segments, depth
    or ""; `objects`: their number, None without segments; `classes`: those of the segments, most frequent first."""
    if not places:
        return []
    rows = read_columns(file, group, SHOWN).take(pa.array(places, pa.int64()))
    shown = []
    for place, row in zip(places, rows.to_pylist(), strict=True):
        segments, semantic, depth = (row.pop(name, None) for name in ("segments", "semantic", "depth"))
        for name in ("error_type", "error_stage", "error_message"):
            row[name] = (row.get(name) or "")[:LONGEST_ERROR]
        classes: dict[int, int] = {}
        for segment in segments or ():
            classes[segment["category_id"]] = classes.get(segment["category_id"], 0) + 1
        row |= {
            MODEL: model,
            "place": Place(number, group, place),
            "kind": "depth" if depth else "segments" if segments is not None else "semantic" if semantic else "",
            "objects": None if segments is None else len(segments),
            "best_score": max((segment["score"] or 0.0 for segment in segments or ()), default=None),
            "classes": sorted(classes.items(), key=lambda item: (-item[1], item[0])),
        }
        shown.append(row)
    return shown
