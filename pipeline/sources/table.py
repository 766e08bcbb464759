"""A prediction table as targets: what one model said is what another is held against. There are no images in it.

A unit is what the table has of one shard; positions count its rows in their order.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import TableSource
from pipeline.errors import ConfigError
from pipeline.masks import decode_depth, decode_label_map, decode_rle, encode_label_map, encode_panoptic_png
from pipeline.runfile import read_run
from pipeline.schema import MODEL, OK
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable
from pipeline.tablefiles import row_groups_of

__all__ = ["TableTargets", "table_model"]

COLUMNS = ["image_id", "shard_id", "position", "width", "height", "model_version", "status", "semantic", "segments",
           "depth", "fields"]  # fmt: skip


def table_model(config: TableSource) -> dict[str, Any]:
    """What run.json says of the model whose predictions are the targets. Raises ConfigError, StorageError."""
    models: dict[str, dict[str, Any]] = {
        model["label"]: model for model in read_run(config.uri, config.storage)["models"]
    }
    if config.model is None:
        return next(iter(models.values()))
    if config.model not in models:
        raise ConfigError(f"source.model: {config.uri} has no {config.model!r}; it has {', '.join(models)}")
    return models[config.model]


@dataclass(frozen=True)
class TableTargets:
    """The source of `format: table`."""

    config: TableSource

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        if images:
            raise ConfigError("source.format table has targets and no images")
        config = self.config
        model = table_model(config)
        table = RowTable.open(config.uri, config.storage)
        files = table.shard_files().filter(pc.field(MODEL) == model["label"])
        version = files.column("model_version")
        files = files.filter(pc.or_(pc.is_null(version), pc.equal(version, model["version"])))
        paths: dict[str, list[str]] = {}
        rows: dict[str, int] = {}
        columns = (files.column(name).to_pylist() for name in ("shard_id", "path", "rows"))
        for shard_id, path, count in zip(*columns, strict=True):
            paths.setdefault(shard_id, []).append(path)
            rows[shard_id] = rows.get(shard_id, 0) + count
        left = sum(rows.values()) if config.limit is None else config.limit
        for cut, shard_id in enumerate(sorted(paths)):
            if left <= 0:
                return
            own = json.dumps(sorted(paths[shard_id])).encode()
            yield Unit(
                shard_id=shard_id,
                location=config.uri,
                size_bytes=0,
                fingerprint=hashlib.blake2b(own, digest_size=16).hexdigest(),
                rows=min(rows[shard_id], left),
                cut=cut,
                stop=left if left < rows[shard_id] else None,
                payload=zlib.compress(own),
            )
            left -= rows[shard_id]

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        config = self.config
        model = table_model(config)
        fs, base = open_fs(config.uri, config.storage)
        files = []
        for path in json.loads(zlib.decompress(unit.payload)):
            with storage_errors(join(config.uri, path)):
                file = pq.ParquetFile(fs.open(join(base, path), "rb"))
                keys = file.read(columns=["shard_id", "position"]).filter(pc.field("shard_id") == unit.shard_id)
                files.append((pc.min(keys.column("position")).as_py(), path, file))
        position = 0
        # A file is a window of positions, so files in the order of their first position are in the order of all.
        for _, path, file in sorted(files, key=lambda entry: entry[:2]):
            with storage_errors(join(config.uri, path)):
                rows = _rows(file, unit.shard_id, model["version"])
            for row in rows.to_pylist():
                if unit.stop is not None and position >= unit.stop:
                    break
                if position not in done:
                    yield Sample(
                        image_id=row["image_id"],
                        shard_id=unit.shard_id,
                        position=position,
                        image=b"",
                        targets=_targets(row, model["task"]) if row["status"] == OK else {},
                        fields=dict(row["fields"] or ()),
                    )
                position += 1
        yield UnitEnd(rows=position)


def _rows(file: pq.ParquetFile, shard_id: str, version: str) -> pa.Table:
    """One shard's rows in a file by position; a table from before `fields` has none."""
    groups = row_groups_of(file, shard_id)
    rows = file.read_row_groups(groups, columns=[name for name in COLUMNS if name in file.schema_arrow.names])
    rows = rows.filter(pc.equal(rows.column("shard_id"), shard_id))
    if "fields" not in rows.column_names:
        rows = rows.append_column("fields", pa.nulls(len(rows), pa.map_(pa.string(), pa.string())))
    return rows.filter(pc.equal(rows.column("model_version"), version)).sort_by("position")


def _targets(row: Mapping[str, Any], task: str) -> dict[str, bytes]:
    width, height = row["width"], row["height"]
    if row["semantic"]:
        semantic = row["semantic"]
        if semantic["format"] == "png":
            return {"semantic": semantic["data"]}
        label_HW = decode_label_map(semantic["data"], semantic["format"], width=width, height=height)
        return {"semantic": encode_label_map(label_HW)}
    if row["segments"] is not None and task == "panoptic":
        segment_HW = np.zeros((height, width), np.int32)
        for segment in row["segments"]:
            segment_HW[decode_rle(segment["rle"], width=width, height=height)] = segment["id"]
        info = [{"id": segment["id"], "category_id": segment["category_id"]} for segment in row["segments"]]
        return {"panoptic": encode_panoptic_png(segment_HW), "segments": json.dumps({"segments_info": info}).encode()}
    if row["segments"] is not None:
        annotations = [
            {
                "id": segment["id"],
                "category_id": segment["category_id"],
                "area": segment["area"],
                "bbox": segment["bbox"],
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": segment["rle"]},
            }
            for segment in row["segments"]
        ]
        return {"instances": json.dumps({"annotations": annotations, "width": width, "height": height}).encode()}
    if row["depth"]:
        depth_HW = decode_depth(row["depth"], width=width, height=height).astype(np.float64)
        if row["depth"]["kind"] == "inverse_relative":
            depth_HW = 1 / np.where(depth_HW > 0, depth_HW, np.nan)
        buffer = io.BytesIO()
        np.save(buffer, depth_HW, allow_pickle=False)
        return {"depth": buffer.getvalue()}
    return {}
