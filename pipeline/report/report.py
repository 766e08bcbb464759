"""A report of one model in one folder: its rows folded into report.json and Parquet tables, and the page of both."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.fold import Fold
from pipeline.report.gallery import Picture
from pipeline.report.page import render_page
from pipeline.report.rows import ScoredTable
from pipeline.report.slices import Slices, check_columns
from pipeline.report.tables import CELLS, class_rows, confusion_rows, row_tables, slice_rows, write_rows
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["PAGE_FILE", "REPORT_FILE", "ReportOptions", "encode", "plain", "provenance", "write_page", "write_report"]

FORMAT = 1
REPORT_FILE = "report.json"
PAGE_FILE = "index.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """by: columns or fields to slice by, each alone. replicates: of the bootstrap. images: how many worst and best are
    listed."""

    by: Sequence[str] = ()
    replicates: int = 1000
    images: int = 8
    seed: int = 0


def write_report(
    scored: ScoredTable, uri: str, storage: Mapping[str, Any], options: ReportOptions | None = None
) -> dict[str, Any]:
    """Fold a model's rows into the folder `uri`: report.json and its tables. Returns the report, NaN as None.

    The same rows give the same bytes of report.json, whatever files they stand in. Raises ConfigError for a column that
    is not there, SchemaError for scores that do not fit together, StorageError.
    """
    options = options or ReportOptions()
    check_columns(scored, options.by)
    slices = [Slices(name, scored.taxonomy) for name in options.by]
    fold = Fold(scored.taxonomy, slices=slices, images=options.images, replicates=options.replicates, seed=options.seed)
    fs, folder = open_fs(uri, storage)
    with storage_errors(uri):
        fs.makedirs(folder, exist_ok=True)
        # Of an earlier report in this folder nothing stays beside the new one.
        for name in (REPORT_FILE, PAGE_FILE, "slices.parquet", "confusion.parquet"):
            if fs.exists(join(folder, name)):
                fs.rm_file(join(folder, name))
    columns = [part.column for part in slices if part.column in scored.columns]
    with row_tables(fs, folder) as tables, contextlib.closing(scored.blocks(columns)) as blocks:
        for block in blocks:
            tables.add(block, fold.add(block))
    report: dict[str, Any] = plain({"format": FORMAT, **provenance(scored), **fold.report()})
    write_rows(fs, join(folder, "per_class.parquet"), class_rows(report, scored.taxonomy))
    if slices:
        write_rows(
            fs, join(folder, "slices.parquet"), slice_rows(report["slices"] if len(slices) > 1 else [report["slices"]])
        )
    if "confusion" in report.get("semantic", {}):
        write_rows(fs, join(folder, "confusion.parquet"), confusion_rows(report["semantic"]["confusion"]), CELLS)
    with storage_errors(uri):
        fs.pipe_file(join(folder, REPORT_FILE), encode(report).encode())
    return report


def write_page(
    report: Mapping[str, Any],
    pictures: Mapping[str, Sequence[Picture]],
    scored: ScoredTable,
    uri: str,
    storage: Mapping[str, Any],
) -> None:
    """index.html beside the report in the folder `uri`. pictures: as `render_page` takes them. Raises StorageError."""
    palette = {category.id: category.color for category in scored.taxonomy.categories}
    page = render_page(report, pictures, palette=palette)
    fs, folder = open_fs(uri, storage)
    with storage_errors(uri):
        fs.pipe_file(join(folder, PAGE_FILE), page.encode())


def provenance(scored: ScoredTable) -> dict[str, Any]:
    """The model and the run, without what the report has elsewhere or names only."""
    model = {name: value for name, value in scored.model.items() if name not in ("taxonomy", "score_taxonomy")}
    own = scored.model.get("taxonomy") or {}
    model |= {"taxonomy": own.get("name"), "score_taxonomy": scored.taxonomy.name}
    model.setdefault("mapping", None)
    return {"model": model, "run": {name: value for name, value in scored.run.items() if name != "models"}}


def plain(value: Any) -> Any:
    """What JSON can hold: None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(report: Mapping[str, Any]) -> str:
    """The report as JSON, a section a line."""
    sections = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in report.items())
    return "{\n" + ",\n".join(sections) + "\n}\n"
