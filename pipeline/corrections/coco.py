"""COCO files of other tools: instances and panoptic. Their categories are known by name, because tools number anew."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.config_export import ImportConfig
from pipeline.corrections.base import Classes, Corrected, Notes, Shape, box_shape, check_size, polygon_shape
from pipeline.errors import ConfigError, RowError, SchemaError, TargetMismatchError
from pipeline.masks import decode_rle
from pipeline.sources.coco_json import read_categories, read_coco
from pipeline.sources.objects import Wanted, below, read_objects
from pipeline.storage import open_fs, read_bytes
from pipeline.targets import read_panoptic, segments_of
from pipeline.taxonomy import Taxonomy

__all__ = ["read_coco_instances", "read_coco_panoptic"]

PANOPTIC: Mapping[str, type] = {"file_name": str, "segments_info": list}
AT_ONCE = 64


def read_coco_instances(config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
    """See Reader."""
    data = read_bytes(config.uri, config.storage, max_bytes=config.max_bytes)
    ids = _ids(data, config.uri, Classes(taxonomy))
    for image in read_coco(data, config.uri, {"category_id": int}):
        try:
            check_size(image.width, image.height, config.max_pixels)
            shapes = [
                _shape(json.loads(text), ids, image.width, image.height, -place)
                for place, text in enumerate(image.annotations)
            ]
        except RowError as error:
            yield Corrected(image.file_name, error=error)
        else:
            yield Corrected(image.file_name, width=image.width, height=image.height, shapes=tuple(shapes))


def _ids(data: bytes, where: str, classes: Classes) -> dict[int, int]:
    """The file's category ids -> the label space's. Raises ConfigError for a name that it does not have."""
    try:
        ids = {category["id"]: classes.id_of(category["name"]) for category in read_categories(data, where)}
    except TargetMismatchError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not ids:
        raise ConfigError(f"{where} has no categories, by whose names its ids are known")
    return ids


def _class_of(annotation: Mapping[str, Any], ids: Mapping[int, int]) -> int:
    if annotation["category_id"] not in ids:
        raise TargetMismatchError(f"expected a category of the file, got {annotation['category_id']}")
    return ids[annotation["category_id"]]


def _shape(annotation: Mapping[str, Any], ids: Mapping[int, int], width: int, height: int, order: int) -> Shape:
    category_id = _class_of(annotation, ids)
    found = annotation.get("segmentation")
    size = {"width": width, "height": height, "order": order}
    try:
        if isinstance(found, list) and found:
            rings = [np.array(ring, np.float64) for ring in found]
            return polygon_shape(category_id, rings, **size)
        if isinstance(found, dict):
            if found["size"] != [height, width]:
                raise TargetMismatchError(f"expected a mask of {width}x{height}, its size is {str(found['size'])[:40]}")
            counts = found["counts"]
            if isinstance(counts, list):
                runs = np.array(counts, np.int64)
                if (runs < 0).any() or runs.sum() != width * height:
                    raise TargetMismatchError(f"expected run lengths of {width}x{height} pixels")
                counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
                counts = counts.decode("ascii")
            decode_rle(counts, width=width, height=height)
            return Shape(category_id, counts, order)
        x, y, w, h = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError, SchemaError) as error:
        raise TargetMismatchError(f"an annotation is not as COCO describes it: {error}") from error
    return box_shape(category_id, (x, y, w, h), **size)


def read_coco_panoptic(config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
    """See Reader. PNGs are looked for in `masks`, else in the JSON's name without .json."""
    data = read_bytes(config.uri, config.storage, max_bytes=config.max_bytes)
    ids = _ids(data, config.uri, Classes(taxonomy))
    fs, folder = open_fs(config.masks or config.uri.removesuffix(".json"), config.storage)
    images = [image for image in read_coco(data, config.uri, PANOPTIC) if image.annotations]
    for start in range(0, len(images), AT_ONCE):
        chunk = images[start : start + AT_ONCE]
        annotations = [json.loads(image.annotations[-1]) for image in chunk]
        paths = [below(folder, annotation["file_name"]) for annotation in annotations]
        wanted = ([Wanted(fs, path) if path else None] for path in paths)
        found = read_objects(wanted, max_bytes=config.max_bytes)
        for image, annotation, (png,) in zip(chunk, annotations, found, strict=True):
            try:
                if isinstance(png, RowError):
                    raise png
                if png is None:
                    raise TargetMismatchError(f"the mask {annotation['file_name'][:80]!r} leads out of its folder")
                segment_HW = read_panoptic(png, max_pixels=config.max_pixels)
                segments = {one["id"]: _class_of(one, ids) for one in segments_of(annotation)}
                unknown = set(np.unique(segment_HW).tolist()) - {0, *segments}
                if unknown:
                    raise TargetMismatchError(f"the PNG has ids that segments_info lacks: {sorted(unknown)[:10]}")
            except RowError as error:
                yield Corrected(image.file_name, error=error)
            else:
                height, width = segment_HW.shape
                yield Corrected(image.file_name, width=width, height=height, segment_HW=segment_HW, segments=segments)
