"""One piece of an export, wherever it runs: rows to items, items to files and lines of the format, and a last mark.

A piece that has its mark is whole; one that has not is made again from its first row, over what is there, with the same
bytes.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig
from pipeline.errors import RowError, SchemaError
from pipeline.export.base import Item, Job, dumps, pretty
from pipeline.export.folder import Lines, OutputFolder, piece_name
from pipeline.export.names import Namer, is_plain_path
from pipeline.export.originals import Originals, matching
from pipeline.export.parts import Piece, read_rows
from pipeline.export.registry import FORMATS
from pipeline.schema import OK
from pipeline.sources.base import Unit

__all__ = ["NAMES", "Work", "export_piece"]

KEYS = ["shard_id", "position"]
COLUMNS = ["image_id", *KEYS, "width", "height", "status", "error_type", "error_stage", "error_message", "semantic",
           "segments", "depth", "quality"]  # fmt: skip
MARK = "done.json"
NAMES = pa.schema(
    [
        ("number", pa.int64()),
        ("name", pa.string()),
        ("file_name", pa.string()),
        ("image_id", pa.string()),
        ("shard_id", pa.string()),
        ("position", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all pieces share. source: where images come from, None where they are not copied. with_failed: rows without
    labels go out as images to be labelled."""

    job: Job
    table: str
    table_storage: Mapping[str, Any]
    output: str
    output_storage: Mapping[str, Any]
    namer: Namer
    source: SourceConfig | None = None
    with_failed: bool = False


@dataclass(frozen=True)
class PieceWork:
    """One piece with the units of the source that its images are in."""

    work: Work
    piece: Piece
    units: Mapping[str, Unit] = field(default_factory=dict)


def export_piece(given: PieceWork) -> dict[str, int]:
    """Write one piece; returns how many images went out and how many rows did not. Raises StorageError."""
    work, piece = given.work, given.piece
    job, form = work.job, FORMATS[work.job.format]
    counts = {"images": 0, "failed": 0}
    lines = Lines()
    originals = _originals(given)
    with OutputFolder(work.output, work.output_storage) as folder:
        with contextlib.ExitStack() as stack:
            names = _Names(stack.enter_context(folder.spool(piece_name(piece.index, "names.parquet"))))
            stack.callback(names.close)
            write = stack.enter_context(form.sink(job, piece.index, folder))
            number = piece.first
            for part in piece.parts:
                for _, row in read_rows(work.table, work.table_storage, part, COLUMNS):
                    if row["status"] != OK:
                        lines.add("failed", _failure(row))
                        counts["failed"] += 1
                    if row["status"] == OK or work.with_failed:
                        try:
                            item = _item(work, row, number, originals)
                            encoded = form.encode(job, item)
                        except (RowError, SchemaError) as error:
                            if row["status"] == OK:
                                lines.add("failed", _failure(row, error))
                                counts["failed"] += 1
                        else:
                            write(encoded)
                            for stream, text in encoded.lines:
                                lines.add(stream, text)
                            names.add(item)
                            counts["images"] += 1
                    number += 1
        lines.store(folder, piece.index)
        folder.flush()
        # The last thing, when all else is there.
        folder.file(piece_name(piece.index, MARK), pretty(counts))
    return counts


def _originals(given: PieceWork) -> Originals | None:
    work = given.work
    if work.source is None:
        return None
    positions: dict[str, list[int]] = {}
    for part in given.piece.parts:
        for _, row in read_rows(work.table, work.table_storage, part, KEYS):
            positions.setdefault(row["shard_id"], []).append(row["position"])
    return Originals(work.source, given.units, positions)


def _item(work: Work, row: Mapping[str, Any], number: int, originals: Originals | None) -> Item:
    """A row as an item. Raises RowError where its image is wanted and cannot be had, SchemaError without a size."""
    image_id = row["image_id"]
    name = work.namer.name(image_id)
    image, suffix = None, ""
    width, height = row["width"], row["height"]
    if originals is not None:
        data = originals.get(row["shard_id"], row["position"])
        image, suffix, width, height = matching(data, row, max_pixels=originals.max_pixels)
    if not width or not height:
        raise SchemaError("the size of the image is not known; images=true reads it")
    shown = image_id if is_plain_path(image_id) else name
    return Item(
        number=number,
        name=name,
        image_id=image_id,
        width=width,
        height=height,
        row=row,
        taxonomy=work.job.taxonomy,
        task=work.job.task,
        image=image,
        suffix=suffix,
        shown=shown,
    )


def _failure(row: Mapping[str, Any], error: Exception | None = None) -> str:
    """A line of failed.json: the row's own error, or the export's."""
    whose = {name: row[name] for name in ("image_id", *KEYS)}
    if error is None:
        return dumps(whose | {name: row[name] for name in ("error_type", "error_stage", "error_message")})
    what = {"error_type": type(error).__name__, "error_stage": "export", "error_message": str(error)}
    return dumps(whose | what)


class _Names:
    """names.parquet of a piece, a few rows in memory at once."""

    def __init__(self, file: Any) -> None:
        self._writer = pq.ParquetWriter(file, NAMES, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def add(self, item: Item) -> None:
        copied = item.image is not None
        row = {name: item.row[name] for name in ("image_id", *KEYS)}
        row |= {"number": item.number, "name": item.name, "width": item.width, "height": item.height}
        self._waiting.append(row | {"file_name": f"{item.name}{item.suffix}" if copied else item.shown})

    def close(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, NAMES))
        self._writer.close()
