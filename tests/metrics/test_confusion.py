"""Confusion and class counts: figures by hand, void, unknown ids, wrong input, dtypes, laws, a slow reference."""

import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from dense_helpers import blocky, check_laws, seeds, taxonomy
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PredictError, SchemaError, TargetMismatchError
from pipeline.metrics.confusion import CLASS_COUNTS, CONFUSION, ClassCounts, Confusion
from pipeline.metrics.joint import joint_counts

NAN = math.nan


def maps(target: str, pred: str) -> tuple[Any, Any]:
    """Digits are ids, v is 255."""
    return tuple(  # type: ignore[return-value]
        np.array([[255 if c == "v" else int(c) for c in row] for row in text.split("/")], np.uint8)
        for text in (target, pred)
    )


# By hand. Ids are 0 to 3; IoU per class, then the means.
CASES: dict[str, tuple[str, str, list[float], dict[str, float]]] = {
    "equal": (
        "0011",
        "0011",
        [1, 1, NAN, NAN],
        {"mIoU": 1, "mIoU_present": 1, "fwIoU": 1, "pixel_accuracy": 1, "mean_accuracy": 1, "dice": 1, "n": 2},
    ),
    "one pixel wrong": (
        "0001",
        "0011",
        [2 / 3, 1 / 2, NAN, NAN],
        {
            "mIoU": (2 / 3 + 1 / 2) / 2,
            "fwIoU": 3 / 4 * 2 / 3 + 1 / 4 * 1 / 2,
            "pixel_accuracy": 3 / 4,
            "mean_accuracy": (2 / 3 + 1) / 2,
            "dice": (4 / 5 + 2 / 3) / 2,
        },
    ),
    # Predictions on void count neither for nor against: class 2 has no evidence.
    "void in target": ("00vv", "0012", [1, NAN, NAN, NAN], {"mIoU": 1, "n": 1, "n_without_evidence": 3, "dice": 1}),
    # Class 2 is predicted but absent: 0 in mIoU, left out of mIoU_present.
    "predicted but absent": (
        "0011",
        "0021",
        [2 / 2, 1 / 2, 0, NAN],
        {"mIoU": 1.5 / 3, "mIoU_present": 1.5 / 2, "n": 3, "n_present": 2, "mean_accuracy": 3 / 4},
    ),
    # Void and unknown ids in the prediction count against the class of the target.
    "predicted void": ("0000/1111", "000v/1119", [3 / 4, 3 / 4, NAN, NAN], {"mIoU": 3 / 4, "pixel_accuracy": 6 / 8}),
    "missed": ("0011", "0000", [1 / 2, 0, NAN, NAN], {"mIoU": 1 / 4, "mIoU_present": 1 / 4, "mean_accuracy": 1 / 2}),
    "all void": (
        "vv",
        "01",
        [NAN] * 4,
        dict.fromkeys(("mIoU", "mIoU_present", "fwIoU", "pixel_accuracy", "mean_accuracy", "dice"), NAN) | {"n": 0},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_figures_by_hand(name: str) -> None:
    target, pred, iou, means = CASES[name]
    arrays = maps(target, pred)
    space = taxonomy((0, 1), (2, 3))
    for figures in (
        Confusion.from_maps(*arrays, space).compute(),
        ClassCounts.from_maps(*arrays, space).compute(space),
        ClassCounts.from_maps(*arrays, (0, 1, 2, 3), ignore=[255]).compute(range(4)),
    ):
        assert [figures["per_class"][n]["IoU"] for n in range(4)] == pytest.approx(iou, nan_ok=True)
        assert {key: figures[key] for key in means} == pytest.approx(means, nan_ok=True)


def test_matrix_and_counts() -> None:
    state = Confusion.from_maps(*maps("0012v", "02v90"), taxonomy((0, 1), (2,)))
    assert state.ids == (0, 1, 2)
    assert state.matrix.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    counts = ClassCounts.from_maps(*maps("0012v", "02v90"), taxonomy((0, 1), (2,)))
    assert counts == state.class_counts()
    assert counts.to_row() == {
        "classes": [
            {"category_id": 0, "intersection": 1, "target": 2, "pred": 1},
            {"category_id": 1, "intersection": 0, "target": 1, "pred": 0},
            {"category_id": 2, "intersection": 0, "target": 1, "pred": 1},
        ]
    }


def test_target_ids_outside_the_label_space() -> None:
    target, pred = maps("0077", "0000")
    with pytest.raises(TargetMismatchError, match=r"outside the label space: \[7\] \(2 pixels\)"):
        Confusion.from_maps(target, pred, (0, 1))
    state = Confusion.from_maps(target, pred, (0, 1), unknown_is_void=True)
    assert state == Confusion.from_maps(target, pred, (0, 1), ignore=[7])
    assert state.matrix.tolist() == [[2, 0, 0], [0, 0, 0]]


def test_an_ignored_id_is_no_class() -> None:
    """As a background that is left out: neither its pixels nor its predictions make it a class."""
    figures = ClassCounts.from_maps(*maps("0011", "0010"), (0, 1), ignore=[0]).compute((0, 1))
    assert figures["per_class"][1]["IoU"] == 1 / 2
    assert math.isnan(figures["per_class"][0]["IoU"])
    assert figures["mIoU"] == 1 / 2


@pytest.mark.parametrize(
    ("target", "pred", "error", "message"),
    [
        (
            np.zeros((2, 3), np.uint8),
            np.zeros((3, 2), np.uint8),
            TargetMismatchError,
            "target is 3x2 .* prediction 2x3",
        ),
        (np.zeros((2, 2), np.float32), np.zeros((2, 2), np.uint8), TargetMismatchError, "target_HW of integers"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.float32), PredictError, "pred_HW of integers"),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8), TargetMismatchError, "target_HW of integers"),
    ],
)
def test_what_is_no_pair_of_maps(target: Any, pred: Any, error: type[Exception], message: str) -> None:
    for state in (Confusion, ClassCounts):
        with pytest.raises(error, match=message):
            state.from_maps(target, pred, (0,))


def test_other_label_spaces_and_rows() -> None:
    with pytest.raises(SchemaError, match="same ids"):
        Confusion.empty((0, 1)).merge(Confusion.empty((0, 2)))
    for row in ({}, {"ids": [0], "target": [3], "pred": [0], "pixels": [1]}, {"ids": None}):
        with pytest.raises(SchemaError, match="expected a row"):
            Confusion.from_row(row)
    with pytest.raises(SchemaError, match="expected a row"):
        ClassCounts.from_row({"classes": [{"category_id": 1}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [0, 2]}, "matrices of"),
        ({"ids": [0]}, "matrices of"),
        ({"target": [7, 0]}, "cells"),
        ({"pred": [0, 3]}, "cells"),
        ({"pixels": [1]}, "as many"),
        ({"pixels": [1, None]}, "nulls"),
    ],
)
def test_columns_that_hold_no_matrices(change: dict[str, Any], message: str) -> None:
    row = {"ids": [0, 1], "target": [0, 1], "pred": [1, -1], "pixels": [5, 6]}
    whole = Confusion.from_rows(pa.array([row, None, row], CONFUSION), (1, 0))
    assert whole.matrix.tolist() == [[0, 10, 0], [0, 0, 12]]
    with pytest.raises(SchemaError, match=message):
        Confusion.from_rows(pa.array([row, {**row, **change}], CONFUSION), (0, 1))
    with pytest.raises(SchemaError, match="a column of"):
        Confusion.from_rows(pa.array([1]), (0, 1))


def test_what_lies_under_a_null_does_not_count() -> None:
    entry = {"category_id": 1, "intersection": 1, "target": 2, "pred": 3}
    lists = pa.array([{"classes": [entry]}] * 3, CLASS_COUNTS).field(0)
    column = pa.StructArray.from_arrays([lists], fields=list(CLASS_COUNTS), mask=pa.array([False, True, False]))
    row, category_id, sums = ClassCounts.entries(column)
    assert (row.tolist(), category_id.tolist(), sums.tolist()) == ([0, 2], [1, 1], [[1, 2, 3]] * 2)
    assert ClassCounts.from_rows(column).sums.tolist() == [[2, 4, 6]]
    hole = pa.array([{"classes": [{**entry, "pred": None}]}], CLASS_COUNTS)
    with pytest.raises(SchemaError, match="nulls"):
        ClassCounts.from_rows(hole)


def slow_matrix(target: Any, pred: Any, ids: range) -> list[list[int]]:
    pairs = Counter(zip(target.ravel().tolist(), pred.ravel().tolist(), strict=True))
    rows = [[pairs[t, p] for p in ids] for t in ids]
    return [
        [*row, sum(n for (t, _), n in pairs.items() if t == at) - sum(row)] for at, row in zip(ids, rows, strict=True)
    ]


DTYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64)


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 40))
def test_equal_to_counting_pixels(
    seed: int, noise: bool, target_type: type, pred_type: type, height: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    values = [0, 1, 2, 3, 7, 255]
    if noise:
        target, pred = rng.choice(values, (2, height, width))
    else:
        target, pred = blocky(seed, height, width, values), blocky(seed + 1, height, width, values)
    target, pred = target.astype(target_type, order="F"), pred.astype(pred_type)
    state = Confusion.from_maps(target, pred, range(4), ignore=[255], unknown_is_void=True)
    assert state.matrix.tolist() == slow_matrix(target, pred, range(4))
    assert ClassCounts.from_maps(target, pred, range(4), ignore=[255], unknown_is_void=True) == state.class_counts()


@pytest.mark.parametrize("kind", ["runs", "noise", "long run"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.uint8, 0, 256),
        (np.uint8, 0, 19),
        (np.uint16, 0, 900),
        (np.uint16, 65000, 65536),
        (np.int32, -1, 2**24),
        (np.int64, -(2**40), 2**40),
        (np.int32, -(2**31), 2**31),
    ],
)
def test_joint_counts_of_any_values(kind: str, dtype: type, low: int, high: int) -> None:
    """Sizes reach every way of counting: pieces, slots, sorting, lookup tables, runs that are cut."""
    rng = np.random.default_rng(0)
    shape = (300, 700)
    if kind == "noise":
        maps = [rng.integers(low, high, shape, dtype) for _ in range(2)]
    elif kind == "runs":
        maps = [rng.integers(low, high, (10, 700 // 35), dtype).repeat(30, 0).repeat(35, 1) for _ in range(2)]
    else:
        maps = [np.full(shape, high - 1, dtype), np.full(shape, low, dtype)]
        maps[0][-1, -1] = low
    first, second, pixels = joint_counts(maps[0], maps[1])
    expected = Counter(zip(maps[0].ravel().tolist(), maps[1].ravel().tolist(), strict=True))
    assert dict(zip(zip(first.tolist(), second.tolist(), strict=True), pixels.tolist(), strict=True)) == expected
    assert pixels.dtype == first.dtype == second.dtype == np.int64


def test_no_pixels() -> None:
    nothing = np.zeros((0, 5), np.uint8)
    assert ClassCounts.from_maps(nothing, nothing, (0, 1)) == ClassCounts.empty()
    assert Confusion.from_maps(nothing, nothing, (0, 1)) == Confusion.empty((0, 1))


def test_a_state_is_a_value() -> None:
    state = Confusion.from_maps(*maps("01", "00"), (0, 1))
    for value in (state, state.class_counts()):
        assert pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(ValueError, match="read-only"):
        state.matrix[0, 0] = 5
    with pytest.raises(ValueError, match="read-only"):
        state.class_counts().sums[0, 0] = 5
    assert state != state.class_counts()


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(3, 7))
def test_laws(seed: int, images: int) -> None:
    values = [0, 3, 9, 20, 254, 255]
    pairs = [(blocky(seed + n, 9, 12, values), blocky(seed + 2 * n + 1, 9, 12, values)) for n in range(images)]
    ids = (254, 0, 3, 9)
    states = [Confusion.from_maps(*pair, ids, ignore=[255], unknown_is_void=True) for pair in pairs]
    check_laws(states, Confusion.empty(ids), CONFUSION, seed, lambda state: state.compute(), ids)
    counts = [state.class_counts() for state in states]
    check_laws(counts, ClassCounts.empty(), CLASS_COUNTS, seed, lambda state: state.compute(ids))
