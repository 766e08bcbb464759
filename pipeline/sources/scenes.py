"""Synthetic street scenes as a source: any number of small pictures with exact targets, from a seed.

Axes: H rows, W columns, C colour channels (RGB).
"""

import hashlib
import io
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.config import ScenesSource
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.scenes_render import CAR, Canvas, Draw
from pipeline.sources.scenes_street import paint_street

__all__ = ["Scene", "SceneSegment", "Scenes", "render_scene"]

# Part of every fingerprint: raise it whenever any pixel of any scene or target changes.
GENERATOR_VERSION = 1
# Part of every fingerprint too: raise it where a target says something else, or says it otherwise, of the same pixels.
TARGETS_VERSION = 2
VOID = 255


@dataclass(frozen=True, slots=True)
class SceneSegment:
    """One panoptic segment. id is (category_id + 1) * 1000 + n, n = 0 for stuff; area in pixels; bbox x, y, w, h."""

    id: int
    category_id: int
    iscrowd: int
    area: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and its targets.

    image_HWC: uint8 RGB.
    semantic_HW: uint8 ids of the taxonomy `scenes`; 255 = void, a thin line around things as annotators leave it
        (1 pixel at 256 x 192, none below half that).
    segment_HW: int32 panoptic ids; 0 = void.
    segments: what is visible, by id.
    depth_HW: float32 metres along the optical axis, below 65; 0 = invalid, which is the sky.
    """

    image_HWC: npt.NDArray[np.uint8]
    semantic_HW: npt.NDArray[np.uint8]
    segment_HW: npt.NDArray[np.int32]
    segments: tuple[SceneSegment, ...]
    depth_HW: npt.NDArray[np.float32]


def render_scene(index: int, *, seed: int = 0, width: int = 256, height: int = 192) -> Scene:
    """Scene number `index` of the world `seed`: the same bytes on every machine for the same four numbers."""
    draw = Draw(seed, index)
    canvas, fog, fog_share = paint_street(draw, width, height)
    depth_HW = canvas.depth()
    image_HWC = canvas.image(draw, depth_HW, fog, fog_share)
    return Scene(image_HWC, *_targets(canvas), depth_HW)


def _targets(
    canvas: Canvas,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], tuple[SceneSegment, ...]]:
    objects = canvas.objects
    # Objects in painting order; index 0 is the sky.
    object_HW = np.array(canvas.owner, np.int32)[canvas.face_HW]
    segment_ids = np.zeros(len(objects), np.int32)
    counts: dict[int, int] = {}
    for number, painted in enumerate(objects):
        if painted.category >= CAR:
            counts[painted.category] = counts.get(painted.category, 0) + 1
        segment_ids[number] = (painted.category + 1) * 1000 + counts.get(painted.category, 0)
    categories = np.array([painted.category for painted in objects], np.uint8)
    void_HW = _borders(object_HW, categories >= CAR)
    segment_HW = segment_ids[object_HW]
    segment_HW[void_HW] = 0
    semantic_HW = categories[object_HW]
    semantic_HW[void_HW] = VOID

    full = [0, canvas.height, 0, canvas.width]
    found: dict[int, tuple[int, bool, list[int]]] = {}
    for segment_id, painted in zip(segment_ids.tolist(), objects, strict=True):
        window = painted.window if painted.category >= CAR else full
        found[segment_id] = (painted.category, painted.crowd, window)
    segments = []
    for segment_id in sorted(found):
        category, crowd, (top, bottom, left, right) = found[segment_id]
        if top >= bottom or left >= right:
            continue
        inside_HW = segment_HW[top:bottom, left:right] == segment_id
        area = int(np.count_nonzero(inside_HW))
        if area:
            rows, columns = np.flatnonzero(inside_HW.any(1)), np.flatnonzero(inside_HW.any(0))
            x, y = left + int(columns[0]), top + int(rows[0])
            bbox = (x, y, int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1)
            segments.append(SceneSegment(segment_id, category, int(crowd), area, bbox))
    return semantic_HW, segment_HW, tuple(segments)


def _borders(object_HW: npt.NDArray[np.int32], is_thing: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The line around things: on the far side of every edge that has a thing on it, so that thin things survive."""
    height, width = object_HW.shape
    void_HW = np.zeros((height, width), np.bool_)
    reach = int(min(width / 256, height / 192) + 0.5)
    if reach == 0:
        return void_HW
    thing_HW = is_thing[object_HW]
    for step in range(1, min(reach, width - 1, height - 1) + 1):
        for near, far in (
            ((slice(None), slice(step, None)), (slice(None), slice(None, -step))),
            ((slice(step, None), slice(None)), (slice(None, -step), slice(None))),
        ):
            one, other = object_HW[near], object_HW[far]
            edge = thing_HW[near] | thing_HW[far]
            void_HW[near] |= edge & (one < other)
            void_HW[far] |= edge & (one > other)
    return void_HW


@dataclass(frozen=True)
class Scenes:
    """The source of `format: scenes`. Units are cut at multiples of `unit_images` after `start`."""

    config: ScenesSource

    @property
    def base(self) -> str:
        config = self.config
        return f"scenes/seed{config.seed}-{config.width}x{config.height}"

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        config = self.config
        total = config.count if config.limit is None else min(config.count, config.limit)
        for first in range(0, total, config.unit_images):
            rows = min(config.unit_images, total - first)
            yield Unit(
                shard_id=f"{self.base}#{config.start + first}",
                location="scenes://",
                size_bytes=0,
                fingerprint=self._fingerprint(config.start + first),
                rows=rows,
                cut=config.start + first,
                # A larger count goes on where this one stops, as a larger limit does.
                stop=rows if rows < config.unit_images else None,
            )

    def _fingerprint(self, first: int) -> str:
        """Of the whole unit, however `count` and `limit` cut it: what it holds at a position never changes."""
        config = self.config
        parts = (GENERATOR_VERSION, TARGETS_VERSION, config.seed, config.width, config.height, first,
                 config.unit_images, sorted(config.targets))  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        config = self.config
        rows = config.unit_images if unit.stop is None else unit.stop
        for position in range(rows):
            if position in done:
                continue
            index = unit.cut + position
            scene = render_scene(index, seed=config.seed, width=config.width, height=config.height)
            yield Sample(
                image_id=f"{self.base}/{index:09d}",
                shard_id=unit.shard_id,
                position=position,
                image=_png(scene.image_HWC) if images else b"",
                targets=_encode_targets(scene, config.targets),
            )
        yield UnitEnd(rows=rows)


def _encode_targets(scene: Scene, kinds: tuple[str, ...]) -> dict[str, bytes]:
    targets: dict[str, bytes] = {}
    if "semantic" in kinds:
        targets["semantic"] = _png(scene.semantic_HW)
    if "panoptic" in kinds:
        packed_HW = scene.segment_HW.astype("<u4")
        targets["panoptic"] = _png(packed_HW.view(np.uint8).reshape(*packed_HW.shape, 4)[:, :, :3])
        targets["segments"] = _json({"segments_info": [_info(segment) for segment in scene.segments]})
    if "instances" in kinds:
        height, width = scene.segment_HW.shape
        targets["instances"] = _json({"annotations": [*_annotations(scene)], "width": width, "height": height})
    if "prompts" in kinds:
        boxes = [segment.bbox for segment in scene.segments if segment.category_id >= CAR]
        targets["prompts"] = _json({"boxes": [[x, y, x + w, y + h] for x, y, w, h in boxes]})
    if "depth" in kinds:
        # Millimetres; + 0.5 rounds to nearest without depending on a library's rounding.
        targets["depth"] = _png((scene.depth_HW * np.float32(1000) + np.float32(0.5)).astype(np.uint16))
    return targets


def _annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    for segment in scene.segments:
        if segment.category_id >= CAR:
            mask_HW = np.asfortranarray(scene.segment_HW == segment.id, np.uint8)
            rle = coco_mask.encode(mask_HW)
            yield _info(segment) | {"segmentation": {"size": [*mask_HW.shape], "counts": rle["counts"].decode("ascii")}}


def _info(segment: SceneSegment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "category_id": segment.category_id,
        "iscrowd": segment.iscrowd,
        "area": segment.area,
        "bbox": [*segment.bbox],
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _png(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    # Fast rather than small: these bytes live for one read.
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
