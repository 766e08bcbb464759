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


def check_laws(states: Sequence[Any], empty: Any, arrow_type: pa.DataType, seed: int, figures: Callable[[Any], Any]) -> None:
    """Identity, commutativity, associativity, any partition and order, and rows that lose nothing.

    Figures are compared as text, so that NaN equals NaN and the last bit counts.
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
        assert type(empty).from_rows(with_null) == whole
        assert type(empty).from_rows(pa.chunked_array([column[:1], column[1:], with_null[:1]])) == whole
        assert type(empty).from_rows(column[:0]) == empty


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
