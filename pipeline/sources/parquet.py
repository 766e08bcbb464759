"""Parquet files of encoded images: one unit per row group, read in small batches of the needed columns.

Planning reads footers, nothing else. A file whose footer is broken becomes one unit with one failed sample.
"""

import contextlib
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ParquetSource
from pipeline.errors import (
    ConfigError,
    ImageTooLargeError,
    RowError,
    RunError,
    SchemaError,
    StorageError,
    UnreadableError,
)
from pipeline.sources.base import Sample, Unit, UnitEnd, unreadable
from pipeline.sources.objects import Wanted, below, fingerprint, read_objects
from pipeline.storage import Entry, address, list_entries, open_fs, relative, storage_errors

__all__ = ["ParquetFiles"]

SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 16
# One value may stand in a dictionary once and in every row of a batch: a file of a megabyte could ask for gigabytes.
BATCH_BYTES = 1 << 30
# A column chunk may be a gigabyte; this is how much of one is asked for at once.
BUFFER_BYTES = 4 << 20
FOOTER_THREADS = 16
FOOTER_TRIES = 3
KINDS = ("semantic", "panoptic", "segments", "instances", "depth", "prompts")


class _File:
    """A file as pyarrow reads it, that remembers storage faults: pyarrow reports corrupt data as OSError too."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self.where = path
        self.fault: BaseException | None = None
        # Without a cache: pyarrow asks for whole ranges, and columns that lie apart would drop each other's read-ahead.
        cache = {"cache_type": "none"} if fs.async_impl else {}
        with storage_errors(path):
            self._file = fs.open(path, "rb", **cache)

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return bytes(self._guard(self._file.read, size))

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._guard(self._file.seek, position, whence) or 0)

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()

    def _guard(self, call: Any, *arguments: int) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self.fault = error
            raise


class _BrokenError(Exception):
    """Bytes that are no Parquet."""


class _Group(NamedTuple):
    """rows of a row group, and the compressed bytes of its needed columns."""

    rows: int
    size_bytes: int


@dataclass(frozen=True)
class ParquetFiles:
    """The source of `format: parquet`. Raises ConfigError for an unknown kind of target."""

    config: ParquetSource

    def __post_init__(self) -> None:
        for kind in self.config.target_columns:
            if kind not in KINDS:
                raise ConfigError(f"source.target_columns: unknown kind {kind!r}; known: {', '.join(KINDS)}")

    def _columns(self, images: bool) -> list[str]:
        config = self.config
        image = config.image_column if images else None
        names = [image, config.id_column, *config.target_columns.values(), *config.field_columns]
        return list(dict.fromkeys(name for name in names if name is not None))

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        """See Source. Raises SchemaError where any file lacks a column or has another type in it."""
        fs, root, entries = list_entries(self.config.uri, self.config.storage, suffixes=SUFFIXES)
        left = self.config.limit
        for entry, footer in self._footers(fs, entries, self._columns(images)):
            for unit in self._units(fs, root, entry, footer):
                rows = unit.rows or 0
                if left is None:
                    yield unit
                    continue
                yield replace(unit, rows=left, stop=left) if left < rows else unit
                left -= rows
                if left <= 0:
                    return

    def _footers(
        self, fs: fsspec.AbstractFileSystem, entries: list[Entry], columns: list[str]
    ) -> Iterator[tuple[Entry, list[_Group] | str]]:
        waiting: deque[tuple[Entry, Future[list[_Group] | str]]] = deque()
        with ThreadPoolExecutor(FOOTER_THREADS, "maskmill-plan") as pool:
            try:
                for entry in entries:
                    waiting.append((entry, pool.submit(self._footer, fs, entry, columns)))
                    if len(waiting) >= 2 * FOOTER_THREADS:
                        first, future = waiting.popleft()
                        yield first, future.result()
                for first, future in waiting:
                    yield first, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _footer(self, fs: fsspec.AbstractFileSystem, entry: Entry, columns: list[str]) -> list[_Group] | str:
        """The row groups of a file, or why it is no Parquet."""
        tries = 0
        while True:
            try:
                with _opened(fs, entry.path) as parquet:
                    self._check(parquet.schema_arrow, entry.path, columns)
                    return _groups(parquet.metadata, set(columns))
            except _BrokenError as error:
                return str(error)
            except StorageError:
                tries += 1
                if tries == FOOTER_TRIES:
                    raise

    def _check(self, schema: pa.Schema, path: str, columns: list[str]) -> None:
        for name in columns:
            if name not in schema.names:
                raise SchemaError(f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}")
        image = self.config.image_column
        if image in columns and not _is_encoded(kind := schema.field(image).type):
            raise SchemaError(f"{path}: image column {image!r} must be binary or struct<bytes, path>, got {kind}")
        for name in self.config.target_columns.values():
            kind = schema.field(name).type
            if not _is_encoded(kind) and not _is_text(kind):
                raise SchemaError(
                    f"{path}: target column {name!r} must be binary, string or struct<bytes, path>, got {kind}"
                )
        if self.config.id_column is not None:
            kind = schema.field(self.config.id_column).type
            if not _is_text(kind) and not pa.types.is_integer(kind):
                raise SchemaError(f"{path}: id column {self.config.id_column!r} must be string or integer, got {kind}")

    def _units(
        self, fs: fsspec.AbstractFileSystem, root: str, entry: Entry, footer: list[_Group] | str
    ) -> Iterator[Unit]:
        name, location = relative(root, entry.path), address(fs, entry.path)
        if isinstance(footer, str):
            yield Unit(
                shard_id=f"{name}#0",
                location=location,
                size_bytes=entry.size_bytes,
                fingerprint=fingerprint([entry.fingerprint, "broken"]),
                rows=1,
                payload=footer.encode("utf-8", "replace"),
            )
            return
        for number, group in enumerate(footer):
            if group.rows:
                yield Unit(
                    shard_id=f"{name}#{number}",
                    location=location,
                    size_bytes=group.size_bytes,
                    fingerprint=fingerprint([entry.fingerprint, str(number)]),
                    rows=group.rows,
                    cut=number,
                )

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        """See Source. Where the file turns out to be broken, each row that is left is one failed sample."""
        if unit.payload:
            for item in unreadable(unit, 0, f"no readable Parquet: {unit.payload.decode()}"):
                if isinstance(item, UnitEnd) or 0 not in done:
                    yield item
            return
        rows = unit.rows or 0
        position = 0
        if any(number not in done for number in range(rows)):
            fs, _ = open_fs(self.config.uri, self.config.storage)
            reason = "the row group has fewer rows than planned"
            try:
                for batch in self._batches(fs, unit, self._columns(images)):
                    first, position = position, min(position + batch.num_rows, rows)
                    wanted = [number for number in range(first, position) if number not in done]
                    yield from self._samples(fs, unit, batch, first, wanted, images)
                    if position == rows:
                        break
            except (_BrokenError, SchemaError) as error:
                reason = str(error)
            for number in range(position, rows):
                if number not in done:
                    yield self._failed(unit, number, UnreadableError(f"{unit.shard_id}: {reason}"))
        yield UnitEnd(rows=rows)

    def _batches(self, fs: fsspec.AbstractFileSystem, unit: Unit, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with _opened(fs, str(fs._strip_protocol(unit.location))) as parquet:
            self._check(parquet.schema_arrow, unit.location, columns)
            rows = _batch_rows(parquet.metadata, unit.cut, set(columns))
            yield from parquet.iter_batches(rows, row_groups=[unit.cut], columns=columns, use_threads=False)

    def _samples(
        self,
        fs: fsspec.AbstractFileSystem,
        unit: Unit,
        batch: pa.RecordBatch,
        first: int,
        wanted: list[int],
        images: bool,
    ) -> Iterator[Sample]:
        config = self.config
        path = str(fs._strip_protocol(unit.location))
        root = path.removesuffix(unit.shard_id.rpartition("#")[0])
        columns = [*([config.image_column] if images else []), *config.target_columns.values()]
        cells = {
            number: [_cell(fs, batch.column(name)[number - first], path, root) for name in columns] for number in wanted
        }
        # Most tables hold the bytes themselves; what they hold as paths is read a batch at a time.
        groups = [[cell if isinstance(cell, Wanted) else None for cell in cells[number]] for number in wanted]
        loaded: Iterable[Sequence[Any]] = groups
        if any(any(group) for group in groups):
            loaded = read_objects(groups, max_bytes=config.max_bytes)
        for number, objects in zip(wanted, loaded, strict=True):
            pairs = zip(cells[number], objects, strict=True)
            values = [found if isinstance(cell, Wanted) else cell for cell, found in pairs]
            yield self._sample(unit, number, batch.slice(number - first, 1), values, images)

    def _sample(self, unit: Unit, number: int, row: pa.RecordBatch, values: list[Any], images: bool) -> Sample:
        config = self.config
        try:
            image_id = None if config.id_column is None else row.column(config.id_column)[0].as_py()
            fields = {name: row.column(name)[0].as_py() for name in config.field_columns}
        except ValueError as error:  # text that is no UTF-8
            return self._failed(unit, number, UnreadableError(f"{unit.shard_id} row {number}: {error}"))
        if config.id_column is not None and image_id is None:
            return self._failed(
                unit, number, UnreadableError(f"{unit.shard_id} row {number}: {config.id_column} is null")
            )
        name = f"{unit.shard_id}/{number}" if image_id is None else str(image_id)
        image, *targets = values if images else [b"", *values]
        complaint = next((value for value in values if isinstance(value, RowError)), None)
        largest = max((len(value) for value in values if isinstance(value, bytes)), default=0)
        where = f"{unit.shard_id} row {number}"
        if complaint is None and image is None:
            complaint = UnreadableError(f"{where}: the image is null")
        if complaint is None and largest > config.max_bytes:
            complaint = ImageTooLargeError(
                f"{where} has {largest} bytes, at most {config.max_bytes} are read (source.max_bytes)"
            )
        if complaint is not None:
            return self._failed(unit, number, complaint, name)
        return Sample(
            image_id=name,
            shard_id=unit.shard_id,
            position=number,
            image=image,
            targets={
                kind: value for kind, value in zip(config.target_columns, targets, strict=True) if value is not None
            },
            fields={name: str(value) for name, value in fields.items() if value is not None},
        )

    def _failed(self, unit: Unit, number: int, error: RowError, image_id: str | None = None) -> Sample:
        name = image_id or f"{unit.shard_id}/{number}"
        return Sample(image_id=name, shard_id=unit.shard_id, position=number, image=b"", error=error)


@contextlib.contextmanager
def _opened(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose errors are told apart: StorageError or _BrokenError."""
    file = _File(fs, path)
    try:
        source = pa.PythonFile(file, mode="r")
        # pre_buffer would hold the whole row group. Checksums are checked where the writer left any.
        with pq.ParquetFile(
            source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as parquet:
            yield parquet
    except Exception as error:
        raise _meaning(file, error) from error
    finally:
        file.close()


def _meaning(file: _File, error: Exception) -> Exception:
    """What an exception from under pyarrow means: the storage's fault, or the file's."""
    if isinstance(error, RunError):
        return error
    if file.fault is None:
        return _BrokenError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        with storage_errors(file.where):
            raise file.fault
    except RunError as known:
        return known
    except Exception as other:  # noqa: BLE001  (a server without ranges, for one)
        return StorageError(f"{file.where}: {type(other).__name__}: {other}")


def _batch_rows(metadata: pq.FileMetaData, number: int, columns: set[str]) -> int:
    """Rows that are surely no more than BATCH_BYTES, or one: no value is larger than its column's pages."""
    group = metadata.row_group(number)
    chunks = (group.column(index) for index in range(metadata.num_columns))
    needed = [
        int(chunk.total_uncompressed_size)
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns and chunk.has_dictionary_page
    ]
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(needed))))


def _groups(metadata: pq.FileMetaData, columns: set[str]) -> list[_Group]:
    needed = [
        index
        for index in range(metadata.num_columns)
        if metadata.schema.column(index).path.partition(".")[0] in columns
    ]
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        found.append(_Group(group.num_rows, sum(group.column(index).total_compressed_size for index in needed)))
    return found


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_encoded(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    parts = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    known = {"bytes": _is_bytes, "path": _is_text}
    return any(name in parts for name in known) and all(
        test(parts[name]) for name, test in known.items() if name in parts and not pa.types.is_null(parts[name])
    )


def _cell(fs: fsspec.AbstractFileSystem, scalar: pa.Scalar, path: str, root: str) -> bytes | Wanted | RowError | None:
    """The bytes of a cell, or the object that it names, which came with the data and may not lead out of the source."""
    try:
        value = scalar.as_py()
    except ValueError as error:  # text that is no UTF-8
        return UnreadableError(str(error))
    if isinstance(value, dict):
        data, name = value.get("bytes"), value.get("path")
        if data is not None or name is None:
            return data
        found = _inside(fs, name, path, root)
        return UnreadableError(f"the path {name!r} leads out of the source") if found is None else Wanted(fs, found)
    return value.encode() if isinstance(value, str) else value


def _inside(fs: fsspec.AbstractFileSystem, name: str, path: str, root: str) -> str | None:
    protocol, mark, _ = name.partition("://")
    if not mark:
        return below(path.rpartition("/")[0], name)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if protocol not in protocols or "::" in protocol or ".." in name.split("/"):
        return None
    found = str(fs._strip_protocol(name))
    return found if found.startswith(root) and "\0" not in found else None
