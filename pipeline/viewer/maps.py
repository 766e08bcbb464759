"""What a row or a target says of each pixel, as numbers for the page: a map of indices into a list, or of depth codes.

The page colours them itself, so opacity, outlines and hidden classes cost no request. Large maps are sampled down.

Index maps: 0 is nothing, k the k-th of `entries`. Depth maps: 0 is unknown, else depth = code * scale + offset.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pipeline.errors import ImageTooLargeError, SchemaError, TargetMismatchError
from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.metrics.detection_match import Objects
from pipeline.stages.score import Scorer
from pipeline.targets import read_depth, read_instances, read_panoptic, read_segments
from pipeline.taxonomy import Taxonomy

__all__ = ["MAX_SIDE", "PixelMap", "any_color", "row_map", "target_map"]

MAX_SIDE = 2048
# Of more segments the best are drawn.
MOST_SEGMENTS = 1000
# Instances of a hundred megapixels each cost memory and a second for every ten of them.
MOST_MASK_PIXELS = 4 << 30
DEPTH_LEVELS = 65534
# The colours of depth span these percentiles, as in every picture of ours (pipeline/overlay.py).
SPAN = (2, 98)

Codes = npt.NDArray[np.uint16]
Segment = Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class PixelMap:
    """header: kind (classes | segments | depth), entries or the scale of depth, and notes. width, height: at full
    size, which boxes are in."""

    codes_HW: Codes
    header: dict[str, Any]
    width: int
    height: int

    def encode(self) -> bytes:
        """Four bytes of length, the header as JSON (of an even length), the codes as little-endian rows."""
        rows, columns = self.codes_HW.shape
        sizes = {"columns": columns, "rows": rows, "width": self.width, "height": self.height}
        text = json.dumps(self.header | sizes, allow_nan=False).encode()
        text += b" " * (len(text) % 2)
        return struct.pack("<I", len(text)) + text + self.codes_HW.astype("<u2").tobytes()


def row_map(row: Mapping[str, Any], taxonomy: Taxonomy, side: int, *, max_pixels: int) -> PixelMap | None:
    """The prediction of a stored row (width, height, semantic, segments, depth), None where it has none.

    side: pixels of the longest side at most. Raises SchemaError where a column is not what the table promises,
    ImageTooLargeError.
    """
    width, height = row.get("width") or 0, row.get("height") or 0
    if row.get("segments") is None and not row.get("semantic") and not row.get("depth"):
        return None
    _check(width, height, max_pixels)
    if row.get("segments") is not None:
        return _segments(row["segments"], taxonomy, width, height, side)
    if row.get("semantic"):
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=width, height=height)
        return _classes(label_HW, taxonomy, side)
    depth_HW = decode_depth(row["depth"], width=width, height=height)
    return _depth(depth_HW, row["depth"]["kind"] or "relative", side)


def target_map(
    targets: Mapping[str, bytes], kind: str, scorer: Scorer, side: int, *, width: int, height: int
) -> PixelMap | None:
    """The target that a prediction of this kind (semantic, segments, depth) is held against, None where there is none.

    width, height: of the image. Raises TargetMismatchError, ImageTooLargeError, SchemaError.
    """
    _check(width, height, scorer.max_pixels)
    if kind == "depth" and "depth" in targets:
        options = scorer.options.depth
        depth_HW = read_depth(
            targets["depth"], scale=options.scale, invalid=options.invalid, max_pixels=scorer.max_pixels
        )
        return _depth(depth_HW, "metric_m", side)
    if kind == "segments" and {"panoptic", "segments"} <= targets.keys():
        segment_HW = read_panoptic(targets["panoptic"], max_pixels=scorer.max_pixels)
        return _panoptic(segment_HW, read_segments(targets["segments"]), scorer.target, side)
    if kind == "segments" and "instances" in targets:
        annotations, known_width, known_height = read_instances(targets["instances"])
        width, height = known_width or width, known_height or height
        _check(width, height, scorer.max_pixels)
        return _annotations(annotations, scorer.target, width, height, side)
    if kind == "semantic" and (label_HW := scorer.semantic_target(targets)) is not None:
        void = [*scorer.options.ignore, *scorer.target.void_ids]
        label_HW = np.where(np.isin(label_HW, void), scorer.target.void_id, label_HW) if void else label_HW
        return _classes(label_HW, scorer.target, side)
    return None


def _check(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise SchemaError(f"expected the size of an image, got {width}x{height}")
    if width * height > max_pixels:
        raise ImageTooLargeError(f"{width}x{height} pixels, at most {max_pixels} are shown (source.max_pixels)")


def _sampling(width: int, height: int, side: int) -> tuple[Any, Any]:
    """Rows and columns of the nearest pixels, at most `side` along the longest side."""
    scale = min(1.0, min(side, MAX_SIDE) / max(width, height))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    y_H = (np.arange(rows) * 2 + 1) * height // (2 * rows)
    x_W = (np.arange(columns) * 2 + 1) * width // (2 * columns)
    return y_H[:, None], x_W


def _entry(taxonomy: Taxonomy | None, category_id: int) -> dict[str, Any]:
    category = taxonomy.by_id.get(category_id) if taxonomy else None
    if category is None:
        return {"id": category_id, "name": f"class {category_id}", "color": list(any_color(category_id)), "kind": ""}
    return {"id": category_id, "name": category.name, "color": list(category.color), "kind": category.kind}


def any_color(category_id: int) -> tuple[int, int, int]:
    """A colour of its own for a class that no label space names."""
    mixed = (category_id + 1) * 2654435761 & 0xFFFFFFFF
    return 64 + (mixed >> 24) % 160, 64 + (mixed >> 16 & 255) % 160, 64 + (mixed >> 8 & 255) % 160


def _classes(label_HW: npt.NDArray[Any], taxonomy: Taxonomy, side: int) -> PixelMap:
    height, width = label_HW.shape
    values, counts = np.unique(label_HW, return_counts=True)
    shown = values != taxonomy.void_id
    entries = [
        _entry(taxonomy, value) | {"share": count / label_HW.size}
        for value, count in zip(values[shown].tolist(), counts[shown].tolist(), strict=True)
    ]
    codes = np.zeros(len(values), np.uint16)
    codes[shown] = np.arange(1, len(entries) + 1)
    codes_HW = codes[np.searchsorted(values, label_HW[_sampling(width, height, side)])]
    return PixelMap(codes_HW=codes_HW, header={"kind": "classes", "entries": entries}, width=width, height=height)


def _segments(segments: Sequence[Segment], taxonomy: Taxonomy, width: int, height: int, side: int) -> PixelMap:
    """Segments by score, the best on top; boxes without a mask are entries alone."""
    ordered = sorted(segments, key=lambda segment: -(segment["score"] or 0.0))
    most = min(MOST_SEGMENTS, max(1, MOST_MASK_PIXELS // (width * height)))
    place = _sampling(width, height, side)
    codes_HW = np.zeros(np.broadcast_shapes(place[0].shape, place[1].shape), np.uint16)
    entries = []
    for segment in ordered[:most]:
        entry = _entry(taxonomy, segment["category_id"])
        entry |= {"score": _finite(segment["score"]), "area": segment["area"], "box": _box(segment["bbox"])}
        entry["masked"] = bool(segment["rle"])
        entries.append(entry)
    for index in range(len(entries), 0, -1):
        if entries[index - 1]["masked"]:
            mask_HW = decode_rle(ordered[index - 1]["rle"], width=width, height=height)
            entries[index - 1]["share"] = float(mask_HW.mean())
            codes_HW[mask_HW[place]] = index
    header: dict[str, Any] = {"kind": "segments", "entries": entries}
    if len(ordered) > most:
        header["note"] = f"the best {most} of {len(ordered)} segments are drawn"
    return PixelMap(codes_HW=codes_HW, header=header, width=width, height=height)


def _panoptic(
    segment_HW: npt.NDArray[np.int32], segments: Sequence[Segment], taxonomy: Taxonomy, side: int
) -> PixelMap:
    height, width = segment_HW.shape
    values, counts = np.unique(segment_HW, return_counts=True)
    category = {int(segment["id"]): segment for segment in segments}
    codes = np.zeros(len(values), np.uint16)
    entries: list[dict[str, Any]] = []
    for at, (value, count) in enumerate(zip(values.tolist(), counts.tolist(), strict=True)):
        if value in category and len(entries) < MOST_SEGMENTS:
            entry = _entry(taxonomy, category[value]["category_id"])
            crowd = bool(category[value].get("iscrowd"))
            entries.append(entry | {"share": count / segment_HW.size, "masked": True, "crowd": crowd})
            codes[at] = len(entries)
    codes_HW = codes[np.searchsorted(values, segment_HW[_sampling(width, height, side)])]
    return PixelMap(codes_HW=codes_HW, header={"kind": "segments", "entries": entries}, width=width, height=height)


def _annotations(annotations: Sequence[Segment], taxonomy: Taxonomy, width: int, height: int, side: int) -> PixelMap:
    """COCO's annotations, the small ones on top."""
    most = min(MOST_SEGMENTS, max(1, MOST_MASK_PIXELS // (width * height)))
    objects = Objects.from_annotations(annotations[:most], height=height, width=width)
    rles = objects.rles()
    masks = objects.segmentation or [None] * len(objects)
    place = _sampling(width, height, side)
    codes_HW = np.zeros(np.broadcast_shapes(place[0].shape, place[1].shape), np.uint16)
    entries: list[dict[str, Any]] = []
    boxes = objects.bbox_N4
    crowd = np.zeros(len(objects), bool) if objects.crowd is None else objects.crowd
    areas = []
    for at, category_id in enumerate(objects.category_id.tolist()):
        entry = _entry(taxonomy, category_id) | {"masked": bool(masks[at]), "crowd": bool(crowd[at])}
        entry["box"] = None if boxes is None else _box(boxes[at].tolist())
        entries.append(entry)
        areas.append(int(coco_mask.area(rles[at])))
    for at in np.argsort(-np.array(areas, np.int64), kind="stable").tolist():
        entries[at]["share"] = areas[at] / (width * height)
        if entries[at]["masked"]:
            try:
                mask_HW = np.asarray(coco_mask.decode(rles[at]), bool)
            except (ValueError, TypeError, RuntimeError) as error:
                raise TargetMismatchError(f"expected COCO masks: {error}") from error
            codes_HW[mask_HW[place]] = at + 1
    header: dict[str, Any] = {"kind": "segments", "entries": entries}
    if len(annotations) > most:
        header["note"] = f"{most} of {len(annotations)} annotations are drawn"
    return PixelMap(codes_HW=codes_HW, header=header, width=width, height=height)


def _depth(depth_HW: npt.NDArray[np.floating[Any]], kind: str, side: int) -> PixelMap:
    """Depth in 65,534 steps between its extremes. near, far: the values that the ends of the ramp stand for."""
    height, width = depth_HW.shape
    valid_HW = np.isfinite(depth_HW)
    header: dict[str, Any] = {"kind": "depth", "depth": kind, "scale": 1.0, "offset": 0.0, "near": 0.0, "far": 1.0}
    sampled_HW = depth_HW[_sampling(width, height, side)]
    codes_HW = np.zeros(sampled_HW.shape, np.uint16)
    if valid_HW.any():
        values = depth_HW[valid_HW].astype(np.float64)
        low, high = float(values.min()), float(values.max())
        scale = (high - low) / (DEPTH_LEVELS - 1) or 1.0
        known_HW = np.isfinite(sampled_HW)
        codes_HW[known_HW] = np.rint((sampled_HW[known_HW].astype(np.float64) - low) / scale).astype(np.uint16) + 1
        near, far = (float(value) for value in np.percentile(values, SPAN))
        header |= {"scale": scale, "offset": low - scale, "near": near, "far": far}
        if kind == "inverse_relative":
            header |= {"near": far, "far": near}
    return PixelMap(codes_HW=codes_HW, header=header, width=width, height=height)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _box(box: Sequence[float] | None) -> list[float] | None:
    """x, y, w, h, None where there is no box of numbers."""
    if not box or len(box) != 4 or not np.isfinite(box).all():
        return None
    return [float(value) for value in box]
