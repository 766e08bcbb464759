"""A report's Parquet tables: images and problems as they are read, classes, slices and the confusion at the end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.report.figures import COUNTS, IMAGE_FIGURES
from pipeline.schema import FIELDS
from pipeline.storage import join, storage_errors
from pipeline.taxonomy import Taxonomy

__all__ = [
    "CELLS",
    "IMAGES",
    "PROBLEMS",
    "RowTables",
    "class_rows",
    "confusion_rows",
    "row_tables",
    "slice_rows",
    "write_rows",
]

Floats = npt.NDArray[np.float64]
Rows = list[dict[str, Any]]

WHOSE = [("image_id", pa.string()), ("shard_id", pa.string()), ("position", pa.int32()), ("outcome", pa.string())]
# Every image. A dot in the name of a figure is an underscore here, which SQL takes without quotes.
IMAGES = pa.schema(
    [
        *WHOSE,
        *((figure.name.replace(".", "_"), pa.float64()) for figure in IMAGE_FIGURES),
        *((name.replace(".", "_"), pa.int64()) for name in COUNTS),
        ("fields", FIELDS),
    ]
)
# Every image that is in no figure, and why.
PROBLEMS = pa.schema([*WHOSE, *((name, pa.string()) for name in ("error_type", "error_stage", "error_message"))])
CELLS = pa.schema([("target", pa.string()), ("pred", pa.string()), ("pixels", pa.int64())])
# Sections with figures of classes, and the beginning of their columns.
CLASS_SECTIONS = {
    ("semantic",): "semantic",
    ("boundary",): "boundary",
    ("panoptic",): "panoptic",
    ("boundary_panoptic",): "boundary_panoptic",
    ("detection", "bbox"): "bbox",
    ("detection", "segm"): "segm",
}


class RowTables:
    """images.parquet and problems.parquet while they are written."""

    def __init__(self, images: pq.ParquetWriter, problems: pq.ParquetWriter) -> None:
        self._images = images
        self._problems = problems

    def add(self, block: pa.RecordBatch, figures: Mapping[str, Floats]) -> None:
        """A block of rows (`ScoredTable.blocks`) and what `Fold.add` gave for it."""
        columns = {name.replace(".", "_"): pa.array(values, from_pandas=True) for name, values in figures.items()} | {
            name: block[name] for name in (*(name for name, _ in WHOSE), "fields")
        }
        table = pa.table({name: columns[name] for name in IMAGES.names})
        self._images.write_table(table.cast(IMAGES))
        problems = block.filter(pc.not_equal(block["outcome"], "ok"))
        if len(problems):
            self._problems.write_table(pa.table({name: problems[name] for name in PROBLEMS.names}).cast(PROBLEMS))


@contextmanager
def row_tables(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[RowTables]:
    """Open both tables in a folder of `fs`. Raises StorageError."""
    with storage_errors(folder), ExitStack() as stack:
        writers = []
        for name, schema in (("images", IMAGES), ("problems", PROBLEMS)):
            file = stack.enter_context(fs.open(join(folder, f"{name}.parquet"), "wb"))
            writers.append(stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd")))
        yield RowTables(*writers)


def write_rows(fs: fsspec.AbstractFileSystem, path: str, rows: Rows, schema: pa.Schema | None = None) -> None:
    """A small table from plain rows; without a schema, a column of nulls is one of float64. Raises StorageError."""
    table = pa.Table.from_pylist(rows, schema=schema)
    for at, field in enumerate(table.schema):
        if pa.types.is_null(field.type):
            table = table.set_column(at, field.name, pa.nulls(len(table), pa.float64()))
    with storage_errors(path), fs.open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def class_rows(report: Mapping[str, Any], taxonomy: Taxonomy) -> Rows:
    """One row per class: its id, name and kind, and its figures of each section, e.g. semantic_IoU and bbox_AP50."""
    rows: Rows = [{"category_id": c.id, "name": c.name, "kind": c.kind} for c in taxonomy.categories]
    for path, prefix in CLASS_SECTIONS.items():
        section: Any = report
        for part in path:
            section = section.get(part, {})
        per_class = section.get("per_class", {})
        for figure in next(iter(per_class.values()), {}):
            for row in rows if figure not in ("name", "kind") else ():
                row[f"{prefix}_{figure}"] = per_class.get(str(row["category_id"]), {}).get(figure)
    return rows


def confusion_rows(confusion: Mapping[str, Any]) -> Rows:
    """target, pred, pixels of each cell that is not 0, by class name; pred is null for nothing of the label space."""
    names = [*confusion["names"], None]
    return [
        {"target": names[row], "pred": names[column], "pixels": pixels}
        for row, line in enumerate(confusion["matrix"])
        for column, pixels in enumerate(line)
        if pixels
    ]


def slice_rows(slicings: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per value: by, value, images, ok, ..., and its figures, e.g. semantic_mIoU and panoptic_All_PQ."""
    rows: Rows = []
    for slices in slicings:
        for entry in slices["values"]:
            figures = {name: value for name, value in entry.items() if name not in ("value", "counts")}
            rows.append({"by": slices["by"], "value": entry["value"], **entry["counts"], **_flat(figures)})
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}_") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
