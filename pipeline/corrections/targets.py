"""Corrected images as the targets that sources hold: a label map, a panoptic map with its segments, or instances."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corrections.base import Corrected, painted
from pipeline.errors import TargetMismatchError
from pipeline.masks import encode_label_map, encode_panoptic_png, encode_rle, rle_area, rle_bbox
from pipeline.segments import with_categories
from pipeline.taxonomy import Taxonomy

__all__ = ["COLUMNS", "KINDS", "targets_of"]

# By the task of the model whose labels were corrected.
KINDS = {"semantic": "semantic", "panoptic": "panoptic", "instance": "instances", "detection": "instances"}
# Columns of the Parquet files by kind, named as `source.target_columns` names kinds.
COLUMNS = {"semantic": ("semantic",), "panoptic": ("panoptic", "segments"), "instances": ("instances",)}


def targets_of(corrected: Corrected, kind: str, taxonomy: Taxonomy) -> dict[str, bytes]:
    """Encoded targets by column. Where shapes overlap, the one that the tool shows on top counts; where there is none,
    a map is void. Raises TargetMismatchError where what came back cannot become a target of this kind."""
    if kind == "semantic":
        return {"semantic": encode_label_map(_label_map(corrected, taxonomy))}
    if kind == "panoptic":
        return _panoptic(corrected, taxonomy)
    return {"instances": json.dumps(_instances(corrected), separators=(",", ":")).encode()}


def _label_map(corrected: Corrected, taxonomy: Taxonomy) -> npt.NDArray[Any]:
    if corrected.label_HW is not None:
        return corrected.label_HW
    if corrected.segment_HW is None:
        ids = [shape.category_id for shape in corrected.shapes]
        return painted(corrected, ids, start=taxonomy.void_id, dtype=taxonomy.dtype)
    values, place_HW = np.unique(corrected.segment_HW, return_inverse=True)
    ids = [corrected.segments.get(value, taxonomy.void_id) for value in values.tolist()]
    return np.array(ids, taxonomy.dtype)[place_HW.reshape(corrected.segment_HW.shape)]


def _panoptic(corrected: Corrected, taxonomy: Taxonomy) -> dict[str, bytes]:
    segment_HW, categories = corrected.segment_HW, corrected.segments
    if corrected.label_HW is not None:
        raise TargetMismatchError("a label map does not tell objects apart; kind=semantic takes it")
    if segment_HW is None:
        numbers = range(1, len(corrected.shapes) + 1)
        segment_HW = painted(corrected, numbers, start=0, dtype=np.int32)
        categories = dict(zip(numbers, (shape.category_id for shape in corrected.shapes), strict=True))
    present = set(np.unique(segment_HW).tolist())
    segments = [{"id": number} for number in categories if number in present]
    ids = [categories[segment["id"]] for segment in segments]
    # Stuff that came in several pieces is one segment, as everywhere else.
    segment_HW, kept = with_categories(segment_HW, segments, ids, taxonomy)
    found = {"segments_info": kept}
    return {"panoptic": encode_panoptic_png(segment_HW), "segments": json.dumps(found).encode()}


def _instances(corrected: Corrected) -> dict[str, Any]:
    if corrected.label_HW is not None:
        raise TargetMismatchError("a label map does not tell objects apart; kind=semantic takes it")
    size = {"width": corrected.width, "height": corrected.height}
    found = [(shape.category_id, shape.rle) for shape in corrected.shapes]
    if corrected.segment_HW is not None:
        segment_HW = corrected.segment_HW
        found = [(category_id, encode_rle(segment_HW == number)) for number, category_id in corrected.segments.items()]
    annotations = [
        {
            "id": number,
            "category_id": category_id,
            "bbox": [*rle_bbox(rle, **size)],
            "area": rle_area(rle, **size),
            "iscrowd": 0,
            "segmentation": {"size": [corrected.height, corrected.width], "counts": rle},
        }
        for number, (category_id, rle) in enumerate(found, 1)
        if rle_area(rle, **size)
    ]
    return {"annotations": annotations, **size}
