"""What the tests of dense metrics share: small label spaces, random maps, the laws of a state, COCO's files."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from pipeline.masks import decode_panoptic_png
from pipeline.taxonomy import Category, Taxonomy


def taxonomy(things: Sequence[int] = (1, 2), stuff: Sequence[int] = (3, 4)) -> Taxonomy:
    categories = [Category(n, f"thing {n}", "thing", (0, 0, 0)) for n in things]
    categories += [Category(n, f"stuff {n}", "stuff", (0, 0, 0)) for n in stuff]
    return Taxonomy("test", "made here", tuple(categories))


def blocky(seed: int, height: int, width: int, values: Sequence[int], boxes: int = 6) -> np.ndarray[Any, Any]:
    """A map of overlapping boxes, int32."""
    rng = np.random.default_rng(seed)
    map_HW = np.full((height, width), values[0], np.int32)
    for value in rng.choice(values, boxes):
        top, left = rng.integers(0, height), rng.integers(0, width)
        map_HW[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = value
    return map_HW


seeds = st.integers(0, 2**32 - 1)


def check_laws(
    states: Sequence[Any],
    empty: Any,
    arrow_type: pa.DataType,
    seed: int,
    figures: Callable[[Any], Any],
    *from_rows: Any,
) -> None:
    """Identity, commutativity, associativity, any partition and order, and rows that lose nothing.

    Figures are compared as text, so that NaN equals NaN and the last bit counts. from_rows: its further arguments.
    """
    whole = reduce(lambda left, right: left.merge(right), states, empty)
    first, second, third = states[:3]
    assert first.merge(empty) == first == empty.merge(first)
    assert first.merge(second) == second.merge(first)
    assert first.merge(second).merge(third) == first.merge(second.merge(third))
    assert hash(first.merge(second)) == hash(second.merge(first))

    shuffler = random.Random(seed)
    parts = list(states)
    shuffler.shuffle(parts)
    while len(parts) > 1:
        other = parts.pop(shuffler.randrange(len(parts)))
        at = shuffler.randrange(len(parts))
        parts[at] = parts[at].merge(other)
    assert parts[0] == whole
    assert repr(figures(parts[0])) == repr(figures(whole))

    column = pa.array([state.to_row() for state in [*states, empty]], arrow_type)
    assert [type(empty).from_row(row) for row in column.to_pylist()] == [*states, empty]
    if hasattr(empty, "from_rows"):
        with_null = pa.array([None, *column.to_pylist()], arrow_type)
        chunks = pa.chunked_array([column[:1], column[1:], with_null[:1]])
        assert type(empty).from_rows(with_null, *from_rows) == whole
        assert type(empty).from_rows(chunks, *from_rows) == whole
        assert type(empty).from_rows(column[:0], *from_rows) == empty


def coco_taxonomy(path: Path) -> Taxonomy:
    rows = json.loads(path.read_text())["categories"]
    return taxonomy([r["id"] for r in rows if r["isthing"]], [r["id"] for r in rows if not r["isthing"]])


def coco_panoptic(path: Path, folder: Path) -> Iterator[tuple[np.ndarray[Any, Any], list[dict[str, Any]]]]:
    """(segment_HW, segments) of each annotation."""
    tree = json.loads(path.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
    for annotation in tree["annotations"]:
        width, height = sizes[annotation["image_id"]]
        data = (folder / annotation["file_name"]).read_bytes()
        yield decode_panoptic_png(data, width=width, height=height), annotation["segments_info"]


def erode(mask_HW: Any, distance: int) -> Any:
    """The minimum over a square of 2 * distance + 1 pixels, with zeros outside the image; one pixel at a time."""
    padded = np.pad(mask_HW.astype(bool), distance)
    size = 2 * distance + 1
    return np.array(
        [[padded[y : y + size, x : x + size].all() for x in range(mask_HW.shape[1])] for y in range(mask_HW.shape[0])]
    ).reshape(mask_HW.shape)


def boundary(mask_HW: Any, ratio: float = 0.02) -> Any:
    height, width = mask_HW.shape
    return mask_HW & ~erode(mask_HW, max(1, round(ratio * float(np.sqrt(height**2 + width**2)))))


def slow_panoptic(
    target_HW: Any, target_segments: Any, pred_HW: Any, pred_segments: Any, ratio: float | None = None
) -> dict[int, list[float]]:
    """{category: [iou_sum, tp, fp, fn]} mask by mask, from the published definitions; with `ratio`, boundary PQ's."""
    void = target_HW == 0
    target = [(s, target_HW == s["id"]) for s in target_segments]
    pred = [(s, pred_HW == s["id"]) for s in pred_segments]
    figures: dict[int, list[float]] = {}
    matched = set()
    for t, t_mask in target:
        found = False
        for p, p_mask in pred:
            if t.get("iscrowd") or t["category_id"] != p["category_id"]:
                continue
            shared = (t_mask & p_mask).sum()
            iou = shared / (t["area"] + (p_mask & ~void).sum() - shared) if shared else 0.0
            if ratio is not None and shared:
                t_edge, p_edge = boundary(t_mask, ratio), boundary(p_mask, ratio)
                iou = min(iou, (t_edge & p_edge).sum() / (t_edge | (p_edge & ~void)).sum())
            if iou > 0.5:
                entry = figures.setdefault(t["category_id"], [0.0, 0, 0, 0])
                entry[0] += iou
                entry[1] += 1
                found = True
                matched.add(p["id"])
        if not found and not t.get("iscrowd"):
            figures.setdefault(t["category_id"], [0.0, 0, 0, 0])[3] += 1
    crowds = {t["category_id"]: mask for t, mask in target if t.get("iscrowd")}
    for p, p_mask in pred:
        ignored = void | crowds.get(p["category_id"], np.zeros_like(void))
        if p["id"] not in matched and not (p_mask & ignored).sum() / p_mask.sum() > 0.5:
            figures.setdefault(p["category_id"], [0.0, 0, 0, 0])[2] += 1
    return figures


def scene(seed: int, height: int, width: int) -> tuple[Any, Any, Any, Any]:
    """A target and a prediction like it: crowds, void, areas that are not the map's, segments that miss."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.arange(1, 2**24), 6, replace=False).tolist()
    target_HW = blocky(seed, height, width, [0, *ids], 8)
    pred_HW = np.roll(target_HW, tuple(rng.integers(-2, 3, 2)), (0, 1))
    pred_HW = np.where(blocky(seed + 1, height, width, [0, 1], 2) > 0, blocky(seed + 2, height, width, ids, 2), pred_HW)
    category = dict(zip(ids, rng.integers(1, 5, len(ids)).tolist(), strict=True))
    target = [
        {
            "id": n,
            "category_id": category[n],
            "area": int((target_HW == n).sum()) + int(rng.choice([0, 0, 0, 5])),
            "iscrowd": int(rng.random() < 0.2),
        }
        for n in ids
        if rng.random() < 0.9 or (target_HW == n).any()
    ]
    pred = [{"id": n, "category_id": category[n] if rng.random() < 0.8 else 1} for n in ids if (pred_HW == n).any()]
    return target_HW, target, pred_HW, pred


def check_panoptic(state: Any, expected: dict[int, list[float]]) -> None:
    rows = state.compute(taxonomy())["per_class"]
    for category, row in rows.items():
        iou_sum, *counts = expected.get(category, [0.0, 0, 0, 0])
        assert [row["tp"], row["fp"], row["fn"]] == counts
        assert abs(row["iou_sum"] - iou_sum) < 1e-12
