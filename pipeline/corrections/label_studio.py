"""Label Studio's JSON export: of each task the newest annotation that was not cancelled, its brush strokes, polygons
and rectangles (https://labelstud.io/guide/export#Raw-JSON-format-of-completed-tasks)."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import numpy as np

from pipeline.config_export import ImportConfig
from pipeline.corrections.base import Classes, Corrected, Notes, Shape, box_shape, check_size, polygon_shape
from pipeline.errors import RowError, TargetMismatchError
from pipeline.export.runlengths import decode_brush
from pipeline.masks import encode_rle
from pipeline.sources.coco_json import read_elements
from pipeline.storage import read_bytes
from pipeline.taxonomy import Taxonomy

__all__ = ["read_label_studio"]

KINDS = ("brushlabels", "polygonlabels", "rectanglelabels")


def read_label_studio(config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
    """See Reader. Tasks that nobody has annotated are passed over."""
    classes = Classes(taxonomy)
    data = read_bytes(config.uri, config.storage, max_bytes=config.max_bytes)
    for place, _, task in read_elements(data, config.uri, name="tasks"):
        found = task.get("data") if isinstance(task, dict) else None
        told = found if isinstance(found, dict) else {}
        name, image_id = told.get("image"), told.get("maskmill_image_id")
        file_name = unquote(name) if isinstance(name, str) else place
        # An address of Label Studio's own ends in the name: /data/local-files/?d=images/a.jpg, /data/upload/1/a.jpg.
        file_name = file_name.rpartition("?d=")[2]
        annotation = _newest(task)
        if annotation is None:
            notes.passed_over["tasks without an annotation"] += 1
            continue
        known = image_id if isinstance(image_id, str) else None
        try:
            yield _corrected(file_name, known, annotation, classes, config.max_pixels, notes)
        except RowError as error:
            yield Corrected(file_name, known, error=error)


def _newest(task: Any) -> Mapping[str, Any] | None:
    annotations = task.get("annotations") if isinstance(task, dict) else None
    kept = [
        one
        for one in (annotations if isinstance(annotations, list) else ())
        if isinstance(one, dict) and not one.get("was_cancelled") and isinstance(one.get("result"), list)
    ]
    return max(kept, key=lambda one: str(one.get("updated_at") or ""), default=None)


def _corrected(
    name: str,
    image_id: str | None,
    annotation: Mapping[str, Any],
    classes: Classes,
    max_pixels: int,
    notes: Notes,
) -> Corrected:
    width = height = 0
    shapes: list[Shape] = []
    # The first stroke of the export is the best object, which lies on top; what a person adds comes later.
    for place, result in enumerate(annotation["result"]):
        if not isinstance(result, dict) or result.get("type") not in KINDS:
            kind = str(result.get("type"))[:40] if isinstance(result, dict) else "?"
            notes.passed_over[f"{kind} of Label Studio"] += 1
            continue
        width, height = (_size(result, key) for key in ("original_width", "original_height"))
        check_size(width, height, max_pixels)
        if result.get("image_rotation"):
            raise TargetMismatchError(f"the image was turned by {result['image_rotation']} degrees in Label Studio")
        shapes.append(_shape(result, classes, width, height, -place))
    return Corrected(name, image_id, width, height, tuple(shapes))


def _size(result: Mapping[str, Any], key: str) -> int:
    value = result.get(key)
    if type(value) is not int:
        raise TargetMismatchError(f"expected {key} to be a whole number, got {str(value)[:40]!r}")
    return value


def _shape(result: Mapping[str, Any], classes: Classes, width: int, height: int, order: int) -> Shape:
    value, kind = result.get("value"), result["type"]
    names = value.get(kind) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise TargetMismatchError(f"expected one class for each shape, got {str(names)[:80]}")
    category_id = classes.id_of(names[0])
    size = {"width": width, "height": height, "order": order}
    try:
        if kind == "rectanglelabels":
            if value.get("rotation"):
                raise TargetMismatchError("a rotated rectangle is no box")
            x, y, w, h = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
            return box_shape(category_id, (x * width, y * height, w * width, h * height), **size)
        if kind == "polygonlabels":
            points = np.array(value["points"], np.float64) / 100 * (width, height)
            return polygon_shape(category_id, [points], **size)
        if value.get("format") != "rle":
            raise TargetMismatchError(f"expected brush strokes in format rle, got {str(value.get('format'))[:40]!r}")
        data = np.array(value["rle"], np.int64)
        if data.ndim != 1 or (data.size and (data.min() < 0 or data.max() > 255)):
            raise TargetMismatchError("expected rle to be a list of bytes")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TargetMismatchError(f"a shape of {kind} is not as Label Studio writes it: {error}") from error
    mask_HW = decode_brush(data.astype(np.uint8), width=width, height=height)
    return Shape(category_id, encode_rle(mask_HW), order)
