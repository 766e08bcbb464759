"""Worst and best images and the examples of problems equal sorting everything, in any order and partition."""

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.figures import ImageFigure
from pipeline.report.notable import EXAMPLES, Extremes, Problems


def block(names: list[str], **columns: list[str]) -> pa.RecordBatch:
    whose = {"image_id": names, "shard_id": ["s"] * len(names), "position": pa.array(range(len(names)), pa.int32())}
    return pa.RecordBatch.from_pydict({**whose, **columns})


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")]), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(0, 9),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_extremes(values: list[float], cuts: list[int], images: int, rising: bool, shuffle: random.Random) -> None:
    items = [(f"image {n:02d}", value) for n, value in enumerate(values)]
    known = [item for item in items if not np.isnan(item[1])]
    low = sorted(known, key=lambda item: (item[1], item[0]))[:images]
    high = sorted(known, key=lambda item: (-item[1], item[0]))[:images]
    shuffle.shuffle(items)
    extremes = Extremes(ImageFigure("x", rising=rising), images)
    edges = [0, *sorted(cut for cut in cuts if cut < len(items)), len(items)]
    for start, stop in itertools.pairwise(edges):
        part = items[start:stop]
        extremes.add(np.array([value for _, value in part], float), block([name for name, _ in part]))
    found = (extremes.worst(), extremes.best())
    worst, best = ([(item["image_id"], item["value"]) for item in end] for end in found)
    assert (worst, best) == ((low, high) if rising else (high, low))
    assert "-" not in str(extremes.best())


def test_an_equal_value_of_an_earlier_id_comes_later() -> None:
    extremes = Extremes(ImageFigure("x"), 1)
    for name in ("c", "a", "b"):
        extremes.add(np.array([0.5]), block([name]))
    assert [end[0]["image_id"] for end in (extremes.worst(), extremes.best())] == ["a", "a"]


def test_an_extreme_says_where_it_stands() -> None:
    extremes = Extremes(ImageFigure("AbsRel", rising=False), 1)
    extremes.add(np.array([0.1, 0.3]), block(["a", "b"]))
    assert extremes.worst() == [{"image_id": "b", "shard_id": "s", "position": 1, "value": 0.3}]
    assert extremes.best() == [{"image_id": "a", "shard_id": "s", "position": 0, "value": 0.1}]


@pytest.mark.parametrize("seed", range(5))
def test_problems(seed: int) -> None:
    rng = random.Random(seed)
    rows = [(f"image {n:03d}", rng.choice("ABC"), rng.choice(["decode", "score"])) for n in range(200)]
    rng.shuffle(rows)
    problems = Problems()
    for start in range(0, 200, 37):
        names, kinds, stages = (list(column) for column in zip(*rows[start : start + 37], strict=True))
        size = len(names)
        more = {"outcome": ["failed"] * size, "error_message": [f"bad {name}" for name in names]}
        problems.add(block(names, error_type=kinds, error_stage=stages, **more))
    found = problems.compute()
    assert [entry["count"] for entry in found] == sorted((entry["count"] for entry in found), reverse=True)
    assert sum(entry["count"] for entry in found) == 200
    for entry in found:
        names = sorted(name for name, kind, stage in rows if (kind, stage) == (entry["type"], entry["stage"]))
        assert entry["outcome"] == "failed"
        assert entry["count"] == len(names)
        assert entry["examples"] == [{"image_id": n, "message": f"bad {n}"} for n in names[:EXAMPLES]]
