"""The table as its log describes it at one moment, and its files read a row group and a few columns at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import SchemaError
from pipeline.schema import MODEL
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable
from pipeline.viewer.query import START, Key, Query

__all__ = ["File", "Place", "Snapshot", "Stored"]

# A footer of a table of ours takes about 300 kB, more with many row groups.
KEPT_FOOTERS = 64
LISTING = ("path", "model", "model_version", "shard_id", "rows", "failed",
           "first_shard_id", "first_position", "last_shard_id", "last_position")  # fmt: skip
# The Parquet format's names for the items of a list, today's and those of older writers.
ITEMS = ("list.element", "list.item", "bag.array_element", "array", "list.array")
# Arrow has no kernels of some text for views, which other writers leave.
PLAIN = {pa.string_view(): pa.string(), pa.large_string(): pa.string()}


class File(NamedTuple):
    """A file of the table. version: None where the log does not tell one."""

    path: str
    model: str
    version: str | None


class Place(NamedTuple):
    """Where a row is stored: the number of its file in the snapshot, of the row group there, of the row in that."""

    file: int
    group: int
    row: int


class Snapshot:
    """The files of a table, by their first key. Raises SchemaError for a log that names files elsewhere."""

    def __init__(self, table: RowTable) -> None:
        listing = table.listing().select(LISTING)
        # What the log does not tell may be anywhere, so at the very beginning too.
        keys = pa.table(
            [
                pc.fill_null(listing.column("first_shard_id"), START.shard_id),
                pc.fill_null(listing.column("first_position"), START.position),
            ],
            names=["shard_id", "position"],
        )
        order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names])
        files = listing.take(order).combine_chunks()
        rows = files.schema.get_field_index("rows")
        self.files = files.set_column(rows, "rows", pc.fill_null(files.column("rows"), 0))
        # A log is data too: what it names must lie below the table.
        paths = self.files.column("path")
        strange = pc.match_substring_regex(paths, r"(^|/)\.\.(/|$)|^/|^[A-Za-z][A-Za-z0-9+.-]*:|\\")
        if pc.any(strange).as_py():
            raise SchemaError(f"{table.uri}: its log names a file outside: {paths.filter(strange)[0].as_py()[:200]!r}")

    def __getitem__(self, number: int) -> File:
        (row,) = self.files.slice(number, 1).to_pylist()
        return File(row["path"], row[MODEL], row["model_version"])

    def totals(self) -> list[dict[str, Any]]:
        """Rows and failed rows by model and version, as far as the log tells: version or failed may be None."""
        keys = self.files.select([MODEL, "model_version", "rows", "failed"])
        sums = keys.group_by([MODEL, "model_version"]).aggregate(
            [("rows", "sum"), ("failed", "sum"), ("failed", "count"), ("rows", "count")]
        )
        return [
            {
                "model": row[MODEL],
                "version": row["model_version"],
                "rows": row["rows_sum"] or 0,
                "failed": row["failed_sum"] or 0 if row["failed_count"] == row["rows_count"] else None,
            }
            for row in sums.sort_by([(MODEL, "ascending"), ("model_version", "ascending")]).to_pylist()
        ]

    def firsts(self, numbers: pa.Array) -> Iterator[tuple[int, Key, int]]:
        """Number, first key and rows of these files."""
        files = self.files.select(["first_shard_id", "first_position", "rows"]).take(numbers)
        columns = (column.to_pylist() for column in files.columns)
        for number, shard_id, position, rows in zip(numbers.to_pylist(), *columns, strict=True):
            yield number, START if shard_id is None else Key(shard_id, -1 if position is None else position, ""), rows

    def rows_of(self, numbers: pa.Array) -> int:
        """Rows of these files, as far as the log tells."""
        return pc.sum(self.files.column("rows").take(numbers)).as_py() or 0

    def select(self, query: Query, start: Key) -> tuple[pa.Array, int]:
        """Numbers of the files that may hold rows of `query` from `start` on, in order, and the rows of all its models'
        files, those left out too."""
        files = self.files
        if not len(files):
            return pa.array([], pa.uint64()), 0
        own = pa.repeat(pa.scalar(False), len(files))
        for model, version in query.versions.items():
            mine = pc.equal(files.column(MODEL), model)
            if version is not None:
                known = files.column("model_version")
                mine = pc.and_(mine, pc.or_(pc.is_null(known), pc.fill_null(pc.equal(known, version), False)))
            own = pc.or_(own, mine)
        rows = pc.sum(pc.if_else(own, files.column("rows"), 0)).as_py() or 0
        if query.status:
            failed = files.column("failed")
            none_fits = pc.equal(failed, 0) if query.status == "failed" else pc.equal(failed, files.column("rows"))
            own = pc.and_not(own, pc.fill_null(none_fits, False))
        if query.shard:
            own = pc.and_(own, pc.fill_null(pc.match_substring(files.column("shard_id"), query.shard), True))
        if start > START:
            last, position = files.column("last_shard_id"), files.column("last_position")
            ends = pc.and_(pc.equal(last, start.shard_id), pc.less(position, start.position))
            own = pc.and_not(own, pc.fill_null(pc.or_(pc.less(last, start.shard_id), ends), False))
        return pc.indices_nonzero(own), rows

    def holding(self, model: str, version: str | None, shard_id: str, position: int) -> list[int]:
        """Numbers of the files that may hold this row."""
        files = self.files
        if not len(files):
            return []
        mask = pc.equal(files.column(MODEL), model)
        if version is not None:
            mask = pc.and_(mask, pc.fill_null(pc.equal(files.column("model_version"), version), True))
        for first, last, value in (
            ("first_shard_id", "last_shard_id", shard_id),
            ("first_position", "last_position", position),
        ):
            mask = pc.and_(mask, pc.fill_null(pc.less_equal(files.column(first), value), True))
            mask = pc.and_(mask, pc.fill_null(pc.greater_equal(files.column(last), value), True))
        return pc.indices_nonzero(mask).to_pylist()  # type: ignore[no-any-return]


class Stored:
    """The table's files, opened for one read each; their footers are kept. For many threads."""

    def __init__(self, uri: str, storage: Mapping[str, Any]) -> None:
        self.uri = uri
        self._fs, self._base = open_fs(uri, storage)
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def open(self, path: str) -> Iterator[pq.ParquetFile]:
        """A file of the table. Raises StorageError, SchemaError for what is no Parquet file."""
        whole = join(self._base, path)
        with self._lock:
            footer = self._footers.get(path)
        with storage_errors(join(self.uri, path)):
            try:
                if isinstance(self._fs, LocalFileSystem):
                    file = pq.ParquetFile(whole, metadata=footer, memory_map=True)
                else:
                    file = pq.ParquetFile(self._fs.open(whole, "rb"), metadata=footer, pre_buffer=False)
                with file:
                    if footer is None:
                        with self._lock:
                            self._footers[path] = file.metadata
                            while len(self._footers) > KEPT_FOOTERS:
                                self._footers.popitem(last=False)
                    yield file
            except pa.ArrowInvalid as error:
                raise SchemaError(f"{join(self.uri, path)}: {' '.join(str(error).split())[:300]}") from error

    def read(self, path: str, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns and leaves (`semantic.format`) of a row group; those that the file lacks are left out."""
        with self.open(path) as file:
            return read_columns(file, group, columns)


def read_columns(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """As `Stored.read`."""
    rows = file.read_row_group(group, columns=_stored_names(columns), use_threads=False)
    for at, field in enumerate(rows.schema):
        if field.type in PLAIN:
            rows = rows.set_column(at, field.name, rows.column(at).cast(PLAIN[field.type]))
    return rows


def _stored_names(columns: Sequence[str]) -> list[str]:
    """The names in a file of columns and of leaves of structs and lists of structs. Writers differ in what they call
    the items of a list; names that a file lacks are passed over."""
    found: list[str] = []
    for name in columns:
        top, _, leaf = name.partition(".")
        found += [name, *(f"{top}.{items}.{leaf}" for items in ITEMS if leaf)]
    return found


def bounds(metadata: pq.FileMetaData, group: int, leaf: str) -> tuple[Any, Any]:
    """The smallest and largest value of a leaf in a row group, None where the footer does not tell."""
    row_group = metadata.row_group(group)
    names = metadata.schema.names
    at = names.index(leaf.rpartition(".")[2]) if leaf.rpartition(".")[2] in names else -1
    if at < 0 or row_group.column(at).path_in_schema != leaf:
        return None, None
    stats = row_group.column(at).statistics
    return (stats.min, stats.max) if stats is not None and stats.has_min_max else (None, None)
