"""A contact sheet: images beside their masks, so that a person sees at once whether the labels make sense."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.config import SourceConfig
from pipeline.errors import ConfigError, RowError, SchemaError
from pipeline.images import decode_image
from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.overlay import Color, Rgb, blend_labels, blend_masks, color_depth, draw_boxes
from pipeline.schema import OK
from pipeline.sheet import lay_out
from pipeline.sources.base import AllBut, Sample, UnitEnd, read_unit
from pipeline.sources.registry import open_source
from pipeline.table import RowTable
from pipeline.taxonomy import Taxonomy

__all__ = ["contact_sheet", "overlay", "pick_rows"]

COLUMNS = ["image_id", "shard_id", "position", "width", "height", "semantic", "segments", "depth"]


def pick_rows(table: RowTable, model: str, version: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` labelled rows of one model, spread over the shards: the same for the same seed and rows, whatever files
    they stand in."""
    wanted: dict[str, str | pa.Array] = {"model": model, "model_version": version, "status": OK}

    def rank(*key: object) -> bytes:
        return hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()

    files = table.files().filter(pc.field("model") == model)
    labelled = files.filter((pc.field("model_version") == version) & (pc.field("failed") < pc.field("rows")))
    unclear = files.column("shard_id").null_count or files.column("model_version").null_count
    found_in = table.shards() if unclear else labelled.column("shard_id").unique()
    # Of a billion rows in a million shards only the keys of as many shards are read as it takes.
    shards = sorted(found_in.to_pylist(), key=rank)
    positions: dict[str, list[int]] = {}
    for start in range(0, len(shards), count):
        own = {**wanted, "shard_id": pa.array(shards[start : start + count], pa.string())}
        for batch in table.scan(["shard_id", "position"], own):
            for shard_id, position in zip(batch["shard_id"].to_pylist(), batch["position"].to_pylist(), strict=True):
                positions.setdefault(shard_id, []).append(position)
        if len(positions) >= count:
            break
    turns = [
        (turn, rank(shard_id), shard_id, position)
        for shard_id in sorted(positions, key=rank)[:count]
        for turn, position in enumerate(sorted(positions[shard_id], key=lambda place: rank(shard_id, place)))
    ]
    chosen = {(shard_id, position) for _, _, shard_id, position in sorted(turns)[:count]}
    rows: list[dict[str, Any]] = []
    if not chosen:
        return rows
    narrowed = {
        **wanted,
        "shard_id": pa.array({shard_id for shard_id, _ in chosen}, pa.string()),
        "position": pa.array({position for _, position in chosen}, pa.int32()),
    }
    for batch in table.scan(COLUMNS, narrowed):
        rows += [row for row in batch.to_pylist() if (row["shard_id"], row["position"]) in chosen]
    return sorted(rows, key=lambda row: (row["shard_id"], row["position"]))


def read_images(
    source_config: SourceConfig, rows: Sequence[Mapping[str, Any]], *, images: bool = True
) -> Iterator[tuple[Sample, int]]:
    """The samples of `rows` from their source, each with the index of its row. images: see Source."""
    source = open_source(source_config)
    wanted: dict[str, dict[int, int]] = {}
    for index, row in enumerate(rows):
        wanted.setdefault(row["shard_id"], {})[row["position"]] = index
    for unit in source.plan(images=images):
        places = wanted.pop(unit.shard_id, None)
        if places:
            for item in read_unit(source, unit, AllBut(frozenset(places), unit.rows), images=images):
                if not isinstance(item, UnitEnd) and item.position in places:
                    yield item, places.pop(item.position)
                    if not places:
                        break
        if not wanted:
            return


def overlay(image_HWC: Rgb, row: Mapping[str, Any], taxonomy: Taxonomy) -> Rgb:
    """The image under the row's segments, label map or depth: uint8 RGB of the same size."""
    height, width = image_HWC.shape[:2]
    if row.get("segments") is not None:
        return _blend_segments(image_HWC, row["segments"], taxonomy)
    if row.get("semantic"):
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=width, height=height)
        return blend_labels(image_HWC, label_HW, taxonomy)
    if row.get("depth"):
        depth_HW = decode_depth(row["depth"], width=width, height=height)
        return color_depth(-depth_HW if row["depth"]["kind"] == "inverse_relative" else depth_HW)
    return image_HWC


def _blend_segments(image_HWC: Rgb, segments: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> Rgb:
    """Masks, and boxes without one, in their class's colour; the first (best) lies on top."""
    height, width = image_HWC.shape[:2]

    def color(segment: Mapping[str, Any]) -> Color:
        entry: Color = taxonomy.palette[min(segment["category_id"], taxonomy.void_id)]
        return entry

    masked = [segment for segment in reversed(segments) if segment["rle"]]
    masks = ((decode_rle(segment["rle"], width=width, height=height), color(segment)) for segment in masked)
    boxes = ((segment["bbox"], color(segment)) for segment in reversed(segments) if not segment["rle"])
    return draw_boxes(blend_masks(image_HWC, masks), boxes)


def contact_sheet(
    source_config: SourceConfig, rows: Sequence[Mapping[str, Any]], taxonomy: Taxonomy, title: str
) -> Image.Image:
    """One picture: for each row the image, the prediction, and the target where the source has one of its kind.

    Raises ConfigError where no row's image can be found in the source.
    """
    panels: list[tuple[str, list[Rgb]]] = []
    for sample, index in read_images(source_config, rows):
        row = rows[index]
        try:
            image_HWC = decode_image(sample.image, max_pixels=source_config.max_pixels)
            pictures = [image_HWC, overlay(image_HWC, row, taxonomy)]
        except (RowError, SchemaError):  # the source is no longer what was labelled
            continue
        target = _target(image_HWC, sample, row, taxonomy)
        panels.append((str(row["image_id"]), [*pictures, target] if target is not None else pictures))
    if not panels:
        raise ConfigError("none of the labelled images could be read from the source")
    names = ["image", "prediction", "target"][: max(len(pictures) for _, pictures in panels)]
    used = [taxonomy.by_id[identifier] for identifier in _used_categories(rows, taxonomy)]
    return lay_out(panels, names, [(category.name, category.color) for category in used], title)


def _target(image_HWC: Rgb, sample: Sample, row: Mapping[str, Any], taxonomy: Taxonomy) -> Rgb | None:
    height, width = image_HWC.shape[:2]
    try:
        if row.get("semantic") and "semantic" in sample.targets:
            label_HW = decode_label_map(sample.targets["semantic"], "png", width=width, height=height)
            return blend_labels(image_HWC, label_HW, taxonomy)
        if row.get("segments") is not None and "instances" in sample.targets:
            annotations = json.loads(sample.targets["instances"])["annotations"]
            segments = [
                {"category_id": a["category_id"], "rle": _to_rle(a["segmentation"], width, height)} for a in annotations
            ]
            return _blend_segments(image_HWC, segments, taxonomy)
        if row.get("depth") and "depth" in sample.targets:
            codes_HW = decode_label_map(sample.targets["depth"], "png", width=width, height=height)
            return color_depth(np.where(codes_HW == 0, np.nan, codes_HW).astype(np.float32))
    except (ValueError, KeyError, TypeError, OSError, RecursionError, SchemaError):
        return None
    return None


def _to_rle(segmentation: Any, width: int, height: int) -> str:
    """COCO's polygons, uncompressed or compressed runs as compressed runs."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        return str(segmentation["counts"])
    return str(rle["counts"].decode("ascii"))


def _used_categories(rows: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> list[int]:
    used: set[int] = set()
    for row in rows:
        if row.get("semantic"):
            size = {"width": row["width"], "height": row["height"]}
            used |= set(
                np.unique(decode_label_map(row["semantic"]["data"], row["semantic"]["format"], **size)).tolist()
            )
        if row.get("segments"):
            used |= {segment["category_id"] for segment in row["segments"]}
    return [identifier for identifier in taxonomy.ids if identifier in used]
