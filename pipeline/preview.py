"""A contact sheet: images beside their masks, so that a person sees at once whether the labels make sense."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from pipeline.config import SourceConfig
from pipeline.errors import ConfigError, RowError, SchemaError
from pipeline.images import decode_image
from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.overlay import Rgb, blend_labels, blend_masks, color_depth
from pipeline.schema import OK
from pipeline.sources.base import AllBut, Sample, UnitEnd, read_unit
from pipeline.sources.registry import open_source
from pipeline.table import RowTable
from pipeline.taxonomy import Taxonomy

__all__ = ["contact_sheet", "overlay", "pick_rows"]

TILE = 320
CAPTION = 20
MAX_CAPTION = 300
GAP = 8
BACKGROUND = (24, 26, 30)
TEXT = (225, 228, 232)
COLUMNS = ["image_id", "shard_id", "position", "width", "height", "semantic", "segments", "depth"]


def pick_rows(table: RowTable, model: str, version: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` labelled rows of one model, spread over the shards: the same for the same seed and rows, whatever files
    they stand in."""
    wanted = (pc.field("model") == model) & (pc.field("model_version") == version) & (pc.field("status") == OK)

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
        own = wanted & pc.field("shard_id").isin(pa.array(shards[start : start + count], pa.string()))
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
    narrowed = (
        wanted
        & pc.field("shard_id").isin(pa.array(sorted({shard_id for shard_id, _ in chosen})))
        & pc.field("position").isin(pa.array(sorted({position for _, position in chosen}), pa.int32()))
    )
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
    """The image under the row's label map, segments or depth: uint8 RGB of the same size."""
    height, width = image_HWC.shape[:2]
    if row.get("semantic"):
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=width, height=height)
        return blend_labels(image_HWC, label_HW, taxonomy)
    if row.get("segments") is not None:
        return _blend_segments(image_HWC, row["segments"], taxonomy)
    if row.get("depth"):
        depth_HW = decode_depth(row["depth"], width=width, height=height)
        return color_depth(-depth_HW if row["depth"]["kind"] == "inverse_relative" else depth_HW)
    return image_HWC


def _blend_segments(image_HWC: Rgb, segments: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> Rgb:
    """Masks in their class's colour; the first (best) lies on top."""
    height, width = image_HWC.shape[:2]
    return blend_masks(
        image_HWC,
        (
            (
                decode_rle(segment["rle"], width=width, height=height),
                taxonomy.palette[min(segment["category_id"], taxonomy.void_id)],
            )
            for segment in reversed(segments)
        ),
    )


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
    return _lay_out(panels, names, _used_categories(rows, taxonomy), taxonomy, title)


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
    except (ValueError, KeyError, TypeError, OSError, SchemaError):
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


def _lay_out(
    panels: Sequence[tuple[str, list[Rgb]]],
    names: Sequence[str],
    categories: Sequence[int],
    taxonomy: Taxonomy,
    title: str,
) -> Image.Image:
    across = 2 if len(names) < 3 else 1
    across = min(across * 2, len(panels)) if len(panels) > 2 else across
    across = max(1, min(across, len(panels)))
    tile_height = round(TILE * float(np.median([p[0].shape[0] / p[0].shape[1] for _, p in panels])))
    tile_height = max(TILE // 3, min(tile_height, TILE * 3 // 2))
    cell_width = len(names) * (TILE + 2) + GAP
    cell_height = tile_height + CAPTION + GAP
    down = -(-len(panels) // across)
    width = across * cell_width + GAP
    font, small = ImageFont.load_default(18), ImageFont.load_default(12)
    legend_columns = max(1, width // 150)
    legend_rows = -(-len(categories) // legend_columns)
    top = 58
    sheet = Image.new("RGB", (width, top + down * cell_height + legend_rows * 22 + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, TEXT, font)
    for column in range(across):
        for place, name in enumerate(names):
            draw.text((GAP + column * cell_width + place * (TILE + 2), 38), name, (140, 146, 155), small)
    for index, (caption, pictures) in enumerate(panels):
        left, upper = GAP + index % across * cell_width, top + index // across * cell_height
        for place, picture in enumerate(pictures):
            tile = Image.fromarray(picture)
            scale = min(TILE / tile.width, tile_height / tile.height)
            tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
            offset = ((TILE - tile.width) // 2, (tile_height - tile.height) // 2)
            sheet.paste(tile, (left + place * (TILE + 2) + offset[0], upper + offset[1]))
        draw.text((left, upper + tile_height + 3), _fit(caption, draw, small, cell_width - 2 * GAP), TEXT, small)
    for index, identifier in enumerate(categories):
        left = GAP + index % legend_columns * 150
        upper = top + down * cell_height + GAP + index // legend_columns * 22
        draw.rectangle((left, upper, left + 14, upper + 14), taxonomy.by_id[identifier].color)
        draw.text((left + 20, upper), taxonomy.by_id[identifier].name, TEXT, small)
    return sheet


def _fit(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """The end of a long id tells images apart, so its beginning is cut."""
    cut = "".join(character if character.isprintable() else "?" for character in text[-MAX_CAPTION:])
    cut = "…" + cut if len(text) > MAX_CAPTION else cut
    while cut and draw.textlength(cut, font) > width:
        cut = "…" + cut[2:] if cut.startswith("…") else "…" + cut[1:]
    return cut
