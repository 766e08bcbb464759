"""Hugging Face datasets: Parquet with image features and a card, read by `datasets.load_dataset(FOLDER)`
(https://huggingface.co/docs/datasets/repository_structure, https://huggingface.co/docs/datasets/about_dataset_features).

What the features are stands in each file's schema under the key `huggingface`. Classes are places in the label space's
list, as ClassLabel wants them; `category_id` beside it has the label space's own.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.errors import SchemaError
from pipeline.export.base import Encoded, Folder, Format, Item, Job, Whole, depth_files, only, pretty
from pipeline.masks import encode_label_map, encode_panoptic_png

__all__ = ["HuggingFace"]

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GROUP_ROWS = 100
GROUP_BYTES = 32 << 20
WHOSE = {"image_id": "string", "shard_id": "string", "position": "int32", "width": "int32", "height": "int32"}
MEANING = {"scale": "float64", "offset": "float64", "kind": "string"}


class HuggingFace(Format):
    """The format `huggingface`."""

    tasks = frozenset({"semantic", "instance", "detection", "panoptic", "depth"})

    def encode(self, job: Job, item: Item) -> Encoded:
        record: dict[str, Any] = {name: item.row[name] for name in ("image_id", "shard_id", "position")}
        record |= {"width": item.width, "height": item.height}
        if job.images:
            record["image"] = {"bytes": item.image, "path": f"{item.name}{item.suffix}"}
        path = f"{item.name}.png"
        if item.row.get("semantic"):
            label_HW = item.label_map()
            if label_HW is None:
                raise SchemaError("expected a label map, the row has none")
            record["mask"] = {"bytes": encode_label_map(label_HW), "path": path}
        if item.row.get("segments") is not None:
            record |= _segments(job, item, path)
        if item.row.get("depth"):
            data, meaning = depth_files(item, job)
            record |= {"depth": {"bytes": data, "path": path}, "depth_coding": {key: meaning[key] for key in MEANING}}
        return Encoded(record=record)

    @contextlib.contextmanager
    def sink(self, job: Job, index: int, out: Folder) -> Iterator[Callable[[Encoded], None]]:
        columns = _columns(job)
        features = {name: feature for name, (_, feature) in columns.items()}
        schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()])
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        waiting: list[dict[str, Any]] = []
        size = 0
        name = f"data/train-{index:05d}-of-{job.pieces:05d}.parquet"
        with out.spool(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:

            def flush() -> None:
                nonlocal size
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()
                size = 0

            def write(encoded: Encoded) -> None:
                nonlocal size
                waiting.append(encoded.record)
                size += sum(
                    len(value.get("bytes") or b"") for value in encoded.record.values() if isinstance(value, dict)
                )
                if len(waiting) >= GROUP_ROWS or size >= GROUP_BYTES:
                    flush()

            yield write
            if waiting:
                flush()

    def fold(self, job: Job, out: Whole) -> None:
        head = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]}
        text = (
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
            f"Labels of the model `{job.model}` (version `{job.version}`, task {job.task}), label space "
            f"`{job.taxonomy.name}`, written by maskmill.\n"
        )
        out.file("README.md", text.encode())
        out.file("classes.json", pretty(job.taxonomy.describe()))


def _value(kind: str) -> dict[str, Any]:
    return {"dtype": kind, "_type": "Value"}


def _list(feature: Any) -> dict[str, Any]:
    return {"feature": feature, "_type": "Sequence"}


def _columns(job: Job) -> dict[str, tuple[pa.DataType, Any]]:
    """By name: Arrow's type and the feature."""
    columns: dict[str, tuple[pa.DataType, Any]] = {}
    for name, kind in WHOSE.items():
        columns[name] = pa.type_for_alias(kind), _value(kind)
    image = IMAGE, {"_type": "Image"}
    if job.images:
        columns["image"] = image
    # What a model of the task may have beside its own: panoptic models give label maps too.
    if job.task in ("semantic", "panoptic"):
        columns["mask"] = image
    if job.task == "panoptic":
        columns["panoptic"] = image
    if job.task in ("instance", "detection", "panoptic"):
        label = {"names": [category.name for category in job.taxonomy.categories], "_type": "ClassLabel"}
        parts = {
            "id": (pa.int32(), _value("int32")),
            "category": (pa.int64(), label),
            "category_id": (pa.int32(), _value("int32")),
            "bbox": (pa.list_(pa.float32()), _list(_value("float32"))),
            "area": (pa.int64(), _value("int64")),
            "score": (pa.float32(), _value("float32")),
            "rle": (pa.string(), _value("string")),
        }
        kind = pa.struct([(name, pa.list_(part)) for name, (part, _) in parts.items()])
        columns["objects"] = kind, {name: _list(feature) for name, (_, feature) in parts.items()}
    if job.task == "depth":
        columns["depth"] = image
        kind = pa.struct([(name, pa.type_for_alias(alias)) for name, alias in MEANING.items()])
        columns["depth_coding"] = kind, {name: _value(alias) for name, alias in MEANING.items()}
    return columns


def _segments(job: Job, item: Item, path: str) -> dict[str, Any]:
    objects = only(item.objects())
    places = {category_id: place for place, category_id in enumerate(job.taxonomy.ids)}
    record: dict[str, Any] = {
        "objects": {
            "id": [found.id for found in objects],
            "category": [places[found.category_id] for found in objects],
            "category_id": [found.category_id for found in objects],
            "bbox": [[*found.bbox] for found in objects],
            "area": [found.area for found in objects],
            "score": [found.score for found in objects],
            "rle": [found.rle for found in objects],
        }
    }
    if job.task == "panoptic":
        segment_HW = np.zeros((item.height, item.width), np.int32)
        for segment in reversed(objects):
            segment_HW[item.mask_of(segment)] = segment.id
        record["panoptic"] = {"bytes": encode_panoptic_png(segment_HW), "path": path}
    return record
