"""Tables whose rows are the targets of generated scenes or of COCO, for the tests of exports: masks that are known."""

import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask
from table_helpers import TIME

from jobs import export
from pipeline.config import ScenesSource
from pipeline.masks import decode_panoptic_png, encode_depth, encode_rle, rle_area, rle_bbox
from pipeline.rows import PREDICTIONS
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.scenes import Scenes
from pipeline.table import RowTable
from pipeline.tablefiles import FILE_SCHEMA, write_file
from pipeline.targets import read_depth, read_label_map
from pipeline.taxonomy import Taxonomy, load_taxonomy

VERSION = "v1"
SCENES = ScenesSource(format="scenes", count=10, width=64, height=48, unit_images=4)
SPACE = load_taxonomy("scenes")


def run_export(table: Path | str, form: str, output: Path | str, *more: str) -> int:
    """`maskmill export` in this process; the exit code."""
    return export.main([f"table.uri={table}", f"format={form}", f"output.uri={output}", "workers=2", *more])


def segment(mask_HW: Any, category_id: int, number: int, score: float | None = None) -> dict[str, Any]:
    """An element of `segments`."""
    height, width = mask_HW.shape
    rle = encode_rle(mask_HW)
    size = {"width": width, "height": height}
    return {
        "id": number,
        "category_id": category_id,
        "score": score if score is not None else 1 - number / 100,
        "area": rle_area(rle, **size),
        "bbox": list(rle_bbox(rle, **size)),
        "rle": rle,
    }


def scene_columns(sample: Sample, task: str) -> dict[str, Any]:
    """A scene's target as a row's columns."""
    targets = sample.targets
    label_HW = read_label_map(targets["semantic"], max_pixels=10**6)
    columns: dict[str, Any] = {"width": label_HW.shape[1], "height": label_HW.shape[0]}
    if task == "semantic":
        return columns | {"semantic": {"format": "png", "data": targets["semantic"]}}
    if task == "depth":
        depth_HW = read_depth(targets["depth"], scale=0.001, invalid=(0,), max_pixels=10**6)
        return columns | {"depth": encode_depth(depth_HW.astype(np.float32), "metric_m")}
    if task == "panoptic":
        segment_HW = decode_panoptic_png(targets["panoptic"], width=label_HW.shape[1], height=label_HW.shape[0])
        info = json.loads(targets["segments"])["segments_info"]
        found = [segment(segment_HW == one["id"], one["category_id"], one["id"]) for one in info]
        return columns | {"segments": found}
    annotations = json.loads(targets["instances"])["annotations"]
    found = []
    for number, one in enumerate(annotations, 1):
        mask_HW = mask_of(one["segmentation"], label_HW.shape[1], label_HW.shape[0])
        found.append(segment(mask_HW, one["category_id"], number))
    if task == "detection":
        found = [one | {"rle": None} for one in found]
    return columns | {"segments": found}


def mask_of(segmentation: Any, width: int, height: int) -> np.ndarray[Any, Any]:
    """COCO's polygons, runs or compressed runs as a mask."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return np.asarray(coco_mask.decode(rle)).astype(bool)


@functools.cache
def _samples(source: str) -> tuple[Sample, ...]:
    scenes = Scenes(ScenesSource.model_validate_json(source))
    units = scenes.plan()
    return tuple(item for unit in units for item in read_unit(scenes, unit, ()) if isinstance(item, Sample))


def scene_table(
    uri: Path | str, task: str, *, source: ScenesSource = SCENES, failed: Sequence[int] = (3,), files_of: int = 3
) -> dict[str, dict[str, Any]]:
    """Write a table of scenes; gives its rows that did not fail, by image_id. failed: numbers of images."""
    rows = []
    for number, sample in enumerate(_samples(source.model_dump_json())):
        row = {"image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position}
        if number in failed:
            rows.append(row | {"status": "failed", "error_type": "CorruptImageError", "error_stage": "decode",
                               "error_message": f"bad {number}", "attempts": 1})  # fmt: skip
        else:
            quality = {"mean_max_probability": 0.5 + number / 100, "mean_entropy": 0.1, "low_confidence_share": 0.1}
            more = {"quality": quality} if task in ("semantic", "panoptic") else {}
            rows.append(row | {"status": "ok"} | scene_columns(sample, task) | more)
    write_table(uri, rows, task=task, taxonomy=SPACE, source=source.model_dump(mode="json"), files_of=files_of)
    return {row["image_id"]: row for row in rows if row["status"] == "ok"}


def write_table(
    uri: Path | str,
    rows: Sequence[Mapping[str, Any]],
    *,
    task: str,
    taxonomy: Taxonomy,
    source: Mapping[str, Any],
    files_of: int = 3,
    label: str = "m",
    models: Iterable[str] = ("m",),
    storage: Mapping[str, Any] | None = None,
) -> None:
    """A prediction table with these rows, in files of so many rows of one shard, and its run.json."""
    table = RowTable.open(str(uri), storage or {}, create=True, schema=PREDICTIONS)
    table.take_over()
    files = []
    for shard in dict.fromkeys(row["shard_id"] for row in rows):
        own = [row for row in rows if row["shard_id"] == shard]
        for start in range(0, len(own), files_of):
            part = [
                {**row, "model_version": VERSION, "run_id": "run", "labeled_at": TIME}
                for row in own[start : start + files_of]
            ]
            data = pa.Table.from_pylist(part, schema=FILE_SCHEMA)
            files.append(write_file(str(uri), storage or {}, data, model=label, model_version=VERSION, shard_id=shard))
    table.commit(files)
    whole = taxonomy.describe()
    told = [{"label": name, "version": VERSION, "task": task, "taxonomy": whole} for name in models]
    run = {"run_id": "20240506T070809-abcdef", "state": "done", "job": "label", "models": told,
           "config": {"source": dict(source)}, "code": {}}  # fmt: skip
    table._fs.pipe_file(f"{table._base}/run.json", json.dumps(run).encode())


def png_array(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
