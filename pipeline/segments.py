"""Maps of segments: what becomes of one where its categories become others, and one from a label map and instances.

Axes: H rows, W columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.masks import decode_rle
from pipeline.taxonomy import Taxonomy

__all__ = ["VOID_SEGMENT", "merge_panoptic", "with_categories"]

VOID_SEGMENT = 0
# A label map says nothing of how sure it is.
STUFF_SCORE = 1.0


def with_categories(
    segment_HW: npt.NDArray[Any], segments: Sequence[Mapping[str, Any]], categories: Sequence[int], taxonomy: Taxonomy
) -> tuple[npt.NDArray[Any], list[dict[str, Any]]]:
    """A panoptic map (0 = void) whose segments have other `categories`, one for each: those that the taxonomy lacks
    become void, and stuff of one category becomes one segment, the first, whose area (pixels) and bbox (x, y, w, h) are
    then all of its parts', where they have them. Returns the map and the segments left."""
    becomes: dict[int, int] = {}
    stuff: dict[int, int] = {}
    kept: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    for segment, category in zip(segments, categories, strict=True):
        known = taxonomy.by_id.get(category)
        if known is None:
            becomes[segment["id"]] = VOID_SEGMENT
            continue
        first = stuff.setdefault(category, segment["id"]) if known.kind == "stuff" else segment["id"]
        if first == segment["id"]:
            places[first] = len(kept)
            kept.append({**segment, "category_id": category})
        else:
            becomes[segment["id"]] = first
            kept[places[first]] |= _extent(kept[places[first]], segment)
    if becomes:
        values, place_HW = np.unique(segment_HW, return_inverse=True)
        table = np.array([becomes.get(value, value) for value in values.tolist()], segment_HW.dtype)
        segment_HW = table[place_HW.reshape(segment_HW.shape)]
    return segment_HW, kept


def _extent(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Area and bbox of two segments together, as far as both have them. Targets are scored by the area they name."""
    found: dict[str, Any] = {}
    if "area" in one and "area" in other:
        found["area"] = one["area"] + other["area"]
    if one.get("bbox") and other.get("bbox"):
        x, y, w, h = one["bbox"]
        x2, y2, w2, h2 = other["bbox"]
        left, top = min(x, x2), min(y, y2)
        found["bbox"] = [left, top, max(x + w, x2 + w2) - left, max(y + h, y2 + h2) - top]
    return found


def merge_panoptic(
    label_HW: npt.NDArray[np.integer[Any]],
    instances: Sequence[Mapping[str, Any]],
    taxonomy: Taxonomy,
    *,
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area: int = 64 * 64,
) -> tuple[npt.NDArray[np.int32], list[dict[str, Any]]]:
    """One panoptic map of a label map and of instances, such as two models' rows hold them.

    Instances go in by score, descending: those whose share of pixels that better ones have is above `overlap_threshold`
    are left out, the others get what is free. Then each class of stuff gets what is left of its pixels, where that is
    at least `stuff_area` (Kirillov et al. 2019, arXiv:1801.00868, section 5.2, with the defaults of panopticapi's
    combine_semantic_and_instance_predictions.py). The label map's things are not looked at.

    label_HW: ids of the taxonomy and its void. instances: `category_id`, `score` and `rle` (compressed, of the map's
    size); those that score below `score_threshold` or whose category is no thing are left out. Returns segment_HW, 0
    where nothing is, and the segments in the order of their ids from 1, with `id`, `category_id` and `score`; that of
    stuff is 1. Raises SchemaError for run lengths of another size.
    """
    height, width = label_HW.shape
    segment_HW = np.full((height, width), VOID_SEGMENT, np.int32)
    segments: list[dict[str, Any]] = []

    def add(free_HW: npt.NDArray[np.bool_], category_id: int, score: float) -> None:
        segments.append({"id": len(segments) + 1, "category_id": category_id, "score": score})
        segment_HW[free_HW] = len(segments)

    kinds = {category.id: category.kind for category in taxonomy.categories}
    for instance in sorted(instances, key=lambda instance: -instance["score"]):
        if instance["score"] < score_threshold or kinds.get(instance["category_id"]) != "thing":
            continue
        mask_HW = decode_rle(instance["rle"], width=width, height=height)
        free_HW = mask_HW & (segment_HW == VOID_SEGMENT)
        area, free = int(mask_HW.sum()), int(free_HW.sum())
        if free and (area - free) / area <= overlap_threshold:
            add(free_HW, instance["category_id"], instance["score"])
    for category_id in np.unique(label_HW[segment_HW == VOID_SEGMENT]).tolist():
        if kinds.get(category_id) == "stuff":
            free_HW = (label_HW == category_id) & (segment_HW == VOID_SEGMENT)
            if free_HW.sum() >= stuff_area:
                add(free_HW, category_id, STUFF_SCORE)
    return segment_HW, segments
