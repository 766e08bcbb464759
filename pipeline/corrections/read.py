"""`maskmill import` from its config to Parquet files: read, matched with the table's images, checked, written."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.config import CocoSource, SourceConfig
from pipeline.config_export import ImportConfig
from pipeline.configfile import source_from
from pipeline.corrections.base import Corrected, Notes
from pipeline.corrections.known import Known, Names, read_names
from pipeline.corrections.registry import READERS
from pipeline.corrections.targets import COLUMNS, KINDS, targets_of
from pipeline.errors import ConfigError, RowError, SchemaError, TargetMismatchError
from pipeline.export.base import pretty
from pipeline.export.export import read_summary
from pipeline.export.folder import OutputFolder
from pipeline.export.originals import Originals, matching
from pipeline.sources.base import Unit
from pipeline.sources.coco import categories_of
from pipeline.sources.registry import open_source
from pipeline.taxonomy import Taxonomy, build_taxonomy, load_taxonomy

__all__ = ["Imported", "import_corrections"]

# Of one file, and of a row group, which a reader takes as one unit.
ROWS_PER_FILE = 1000
ROWS_AT_ONCE = 32

Row = dict[str, Any]


class Imported(dict[str, Any]):
    """What import.json says: kind, images, failed, passed_over, and `source`, the fields that read the folder."""


def import_corrections(config: ImportConfig, say: Callable[[str], None] = lambda _: None) -> Imported:
    """Write the targets and return what import.json says. Raises ConfigError, StorageError."""
    storage = {} if config.export is None else config.export.storage
    summary = None if config.export is None else read_summary(config.export.uri, storage)
    taxonomy = _taxonomy(config, summary)
    kind = config.kind or _kind(config, summary)
    config = config.model_copy(update={"kind": kind})
    folder = OutputFolder(config.output.uri, config.output.storage)
    if not folder.is_empty():
        raise ConfigError(f"output.uri must be an empty folder, {config.output.uri} is not")
    source = _source(config, summary)
    names = read_names(None if config.export is None else config.export.uri, storage)
    notes, failed, counts = Notes(), list[Row](), Counter[str]()
    rows = _rows(config, kind, taxonomy, names, notes, failed)
    if source is not None:
        rows = _with_images(rows, source, failed, say)
    plain = (row for _, row in rows)
    columns = {name: pa.binary() for name in (*COLUMNS[kind], *(["image"] if source is not None else []))}
    schema = pa.schema({"image_id": pa.string(), "width": pa.int32(), "height": pa.int32()} | columns)
    for number in range(1 << 31):
        part = list(islice(plain, ROWS_AT_ONCE))
        if not part:
            break
        with (
            folder.spool(f"part-{number:05d}.parquet") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            written = 0
            while part:
                writer.write_table(pa.Table.from_pylist(part, schema))
                written += len(part)
                part = list(islice(plain, ROWS_AT_ONCE)) if written < ROWS_PER_FILE else []
        counts["images"] += written
    fields = {"format": "parquet", "uri": config.output.uri, "id_column": "image_id"}
    told = Imported(
        kind=kind,
        images=counts["images"],
        failed=failed,
        passed_over=dict(notes.passed_over),
        source=fields | {"target_columns": {name: name for name in COLUMNS[kind]}},
    )
    folder.file("taxonomy.yaml", yaml.safe_dump(taxonomy.describe(), sort_keys=False, allow_unicode=True).encode())
    folder.file("import.json", pretty(told))
    return told


def _taxonomy(config: ImportConfig, summary: Mapping[str, Any] | None) -> Taxonomy:
    if config.taxonomy is not None:
        return load_taxonomy(config.taxonomy)
    if summary is not None:
        return build_taxonomy(summary["taxonomy"], "export.json")
    if config.format in ("coco", "coco_panoptic"):
        where = {"instances" if config.format == "coco" else "panoptic": config.uri, "storage": config.storage}
        found = categories_of(CocoSource.model_validate({"format": "coco", **where}))
        if found is not None:
            return found
    raise ConfigError("taxonomy must be given where there is no export that says it")


def _kind(config: ImportConfig, summary: Mapping[str, Any] | None) -> str:
    if summary is not None:
        kind = KINDS.get(str(summary["task"]))
        if kind is None:
            raise ConfigError(f"masks cannot correct rows of {summary['task']}")
        return kind
    return {"coco": "instances", "coco_panoptic": "panoptic", "id_png": "semantic"}.get(config.format, "instances")


def _source(config: ImportConfig, summary: Mapping[str, Any] | None) -> SourceConfig | None:
    """Where the images are. Only an export knows their places in the source."""
    if summary is None or not config.images:
        return None
    told = summary.get("source")
    if not told and not config.source:
        raise ConfigError("the export names no source of images; give source.format and source.uri, or images=false")
    return source_from({**(told or {}), "storage": {}, **config.source})


def _rows(
    config: ImportConfig, kind: str, taxonomy: Taxonomy, names: Names, notes: Notes, failed: list[Row]
) -> Iterator[tuple[Known, Row]]:
    seen: set[str] = set()
    for corrected in READERS[config.format](config, taxonomy, notes):
        try:
            if corrected.error is not None:
                raise corrected.error
            known = names.find(corrected.file_name, corrected.image_id)
            if known.image_id in seen:
                raise TargetMismatchError("the image occurs twice")
            whole = _sized(corrected, known)
            row = {"image_id": known.image_id, "width": whole.width, "height": whole.height}
            row |= targets_of(whole, kind, taxonomy)
        except (RowError, SchemaError) as error:
            failed.append(_failure(corrected.image_id or corrected.file_name, error))
        else:
            seen.add(known.image_id)
            yield known, row


def _sized(corrected: Corrected, known: Known) -> Corrected:
    """With the size that the tool, or else the table, says. Raises TargetMismatchError where they differ."""
    if not corrected.width:
        if not known.width:
            raise TargetMismatchError("neither the tool nor an export says how large the image is")
        return replace(corrected, width=known.width, height=known.height)
    if known.width and (corrected.width, corrected.height) != (known.width, known.height):
        raise TargetMismatchError(
            f"expected {known.width}x{known.height} pixels as labelled, the correction has "
            f"{corrected.width}x{corrected.height}"
        )
    return corrected


def _with_images(
    rows: Iterable[tuple[Known, Row]], config: SourceConfig, failed: list[Row], say: Callable[[str], None]
) -> Iterator[tuple[Known, Row]]:
    """The rows with their images, some at a time in the order of the source, so that a shard is read once for them."""
    units: dict[str, Unit] = {unit.shard_id: unit for unit in open_source(config).plan()}
    say(f"images come from {len(units)} units of the source")
    waiting = iter(rows)
    while chunk := sorted(islice(waiting, ROWS_PER_FILE), key=lambda pair: (pair[0].shard_id, pair[0].position)):
        positions: dict[str, list[int]] = {}
        for known, _ in chunk:
            positions.setdefault(known.shard_id, []).append(known.position)
        originals = Originals(config, units, positions)
        for known, row in chunk:
            try:
                data = originals.get(known.shard_id, known.position)
                row["image"] = matching(data, row, max_pixels=originals.max_pixels)[0]
            except RowError as error:
                failed.append(_failure(known.image_id, error))
            else:
                yield known, row


def _failure(name: str, error: Exception) -> Row:
    return {"image": name, "error_type": type(error).__name__, "error_message": str(error)}
