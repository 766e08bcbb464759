"""PQ: official values, each rule of panopticapi by hand, wrong input, exact sums, laws, a slow reference."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_helpers import (
    check_laws,
    check_panoptic,
    coco_panoptic,
    coco_taxonomy,
    scene,
    seeds,
    slow_panoptic,
    taxonomy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, PredictError, TargetMismatchError
from pipeline.metrics.panoptic import PANOPTIC, PanopticState, join_iou, split_iou

SPACE = taxonomy()


def row(text: str) -> Any:
    return np.array([[int(c) for c in text]], np.int32)


def segment(number: int, category: int = 1, *, area: int | None = None, iscrowd: int = 0) -> dict[str, int]:
    return {"id": number, "category_id": category, "iscrowd": iscrowd} | ({} if area is None else {"area": area})


def score(target: str, target_segments: Any, pred: str, pred_segments: Any) -> dict[int, tuple[float, int, int, int]]:
    """{category: (iou_sum, tp, fp, fn)} of a map of one row, where digits are segment ids."""
    rows = PanopticState.from_segments(row(target), target_segments, row(pred), pred_segments, SPACE).compute(SPACE)
    return {
        category: (figures["iou_sum"], figures["tp"], figures["fp"], figures["fn"])
        for category, figures in rows["per_class"].items()
        if figures["tp"] + figures["fp"] + figures["fn"]
    }


# Each rule of panopticapi's evaluation.py: target map and segments, prediction map and segments, what is counted.
RULES: dict[str, tuple[str, list[Any], str, list[Any], dict[int, tuple[float, int, int, int]]]] = {
    "a match": ("1111", [segment(1)], "7777", [segment(7)], {1: (1.0, 1, 0, 0)}),
    "iou of exactly 0.5 is no match": ("1111", [segment(1)], "7700", [segment(7)], {1: (0.0, 0, 1, 1)}),
    "iou above 0.5 is one": ("1111", [segment(1)], "7770", [segment(7)], {1: (0.75, 1, 0, 0)}),
    "categories must agree": ("11", [segment(1)], "77", [segment(7, 2)], {1: (0.0, 0, 0, 1), 2: (0.0, 0, 1, 0)}),
    # 3 shared, union 3 + 5 - 3 = 5 less the two in void.
    "the union leaves out prediction-and-void": ("11100", [segment(1)], "77777", [segment(7)], {1: (1.0, 1, 0, 0)}),
    # 5 shared of a prediction of 7: the union stays 7, the crowd under it counts.
    "the union keeps prediction-and-crowd": (
        "1111122",
        [segment(1), segment(2, iscrowd=1)],
        "7777777",
        [segment(7)],
        {1: (5 / 7, 1, 0, 0)},
    ),
    "the target's area comes from the JSON": (
        "1111",
        [segment(1, area=5)],
        "7777",
        [segment(7, area=99)],
        {1: (4 / 5, 1, 0, 0)},
    ),
    "a crowd is neither found nor missed": ("11", [segment(1, iscrowd=1)], "00", [], {}),
    "a prediction on its crowd is ignored": ("1111", [segment(1, iscrowd=1)], "7777", [segment(7)], {}),
    "a crowd of another category does not excuse": (
        "1111",
        [segment(1, 2, iscrowd=1)],
        "7777",
        [segment(7)],
        {1: (0.0, 0, 1, 0)},
    ),
    "half in void is not ignored": ("00111111", [segment(1)], "77770000", [segment(7)], {1: (0.0, 0, 1, 1)}),
    "more than half in void is ignored": ("00011111", [segment(1)], "77770000", [segment(7)], {1: (0.0, 0, 0, 1)}),
    "void and crowd are added": (
        "0021111111",
        [segment(1), segment(2, iscrowd=1)],
        "7777700000",
        [segment(7)],
        {1: (0.0, 0, 0, 1)},
    ),
    "of two crowds of a category the last counts": (
        "1112222222",
        [segment(1, iscrowd=1), segment(2, iscrowd=1)],
        "7777777000",
        [segment(7)],
        {},
    ),
    "and not the first": (
        "1111222222",
        [segment(1, iscrowd=1), segment(2, iscrowd=1)],
        "7777777000",
        [segment(7)],
        {1: (0.0, 0, 1, 0)},
    ),
    "predicted void is no segment": (
        "1122",
        [segment(1), segment(2, 3)],
        "7700",
        [segment(7)],
        {1: (1.0, 1, 0, 0), 3: (0.0, 0, 0, 1)},
    ),
    "a predicted id 0 counts where the JSON lists it": (
        "1122",
        [segment(1), segment(2)],
        "7700",
        [segment(7), segment(0)],
        {1: (2.0, 2, 0, 0)},
    ),
    "a target that its map lacks is missed": ("00", [segment(1, area=4)], "00", [], {1: (0.0, 0, 0, 1)}),
    "nothing at all": ("00", [], "00", [], {}),
    "predictions without targets": (
        "33",
        [segment(3, 4)],
        "78",
        [segment(7), segment(8)],
        {1: (0.0, 0, 2, 0), 4: (0.0, 0, 0, 1)},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_panopticapi(rule: str) -> None:
    target, target_segments, pred, pred_segments, expected = RULES[rule]
    assert score(target, target_segments, pred, pred_segments) == expected


@pytest.mark.parametrize(
    ("target", "target_segments", "pred", "pred_segments", "error", "message"),
    [
        ("12", [segment(1)], "77", [segment(7)], TargetMismatchError, r"map has ids that its JSON lacks: \[2\]"),
        ("11", [segment(1)], "78", [segment(7)], PredictError, r"map has ids that its JSON lacks: \[8\]"),
        ("11", [segment(1)], "77", [segment(7), segment(9)], PredictError, r"JSON has ids that its map lacks: \[9\]"),
        ("11", [segment(1)], "77", [segment(7, 5)], PredictError, r"categories that test lacks: \[5\]"),
        ("11", [segment(1, 5)], "77", [segment(7)], TargetMismatchError, r"categories that test lacks: \[5\]"),
        ("11", [segment(1), segment(1)], "77", [segment(7)], TargetMismatchError, "lists a segment id twice"),
        ("11", [segment(1)], "77", [segment(7), segment(7)], PredictError, "lists a segment id twice"),
        ("11", [segment(1)], "777", [segment(7)], TargetMismatchError, "target is 2x1 pixels, the prediction 3x1"),
        ("11", [{"id": 1}], "77", [segment(7)], TargetMismatchError, "need id and category_id"),
        ("11", [segment(1)], "77", [{"category_id": 1}], PredictError, "need id and category_id"),
        ("11", [segment(1)], "77", [None], PredictError, "need id and category_id"),
        ("00", [segment(0)], "77", [segment(7)], TargetMismatchError, "ids start at 1"),
        ("11", [segment(1, area=0)], "77", [segment(7)], TargetMismatchError, "an area of 0, its map 2"),
        ("11", [segment(1, area=-9)], "77", [segment(7)], TargetMismatchError, "an area of -9, its map 2"),
    ],
)
def test_input_that_does_not_fit(
    target: str, target_segments: Any, pred: str, pred_segments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score(target, target_segments, pred, pred_segments)


def test_means_over_groups() -> None:
    state = PanopticState.from_segments(
        row("11112233"),
        [segment(1), segment(2, 3), segment(3, 2)],
        row("77708800"),
        [segment(7), segment(8, 3)],
        SPACE,
    )
    figures = state.compute(SPACE)
    assert figures["per_class"][1] == {"PQ": 0.75, "SQ": 0.75, "RQ": 1.0, "iou_sum": 0.75, "tp": 1, "fp": 0, "fn": 0}
    assert figures["per_class"][2] == {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0, "iou_sum": 0.0, "tp": 0, "fp": 0, "fn": 1}
    assert math.isnan(figures["per_class"][4]["PQ"])
    assert figures["Things"] == {"PQ": 0.375, "SQ": 0.375, "RQ": 0.5, "n": 2}
    assert figures["Stuff"] == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0, "n": 1}
    assert figures["All"] == pytest.approx({"PQ": 1.75 / 3, "SQ": 1.75 / 3, "RQ": 2 / 3, "n": 3})
    nothing = PanopticState.empty().compute(SPACE)
    assert nothing["Things"]["n"] == 0
    assert all(math.isnan(nothing[group][key]) for group in ("All", "Things", "Stuff") for key in ("PQ", "SQ", "RQ"))
    with pytest.raises(ConfigError, match=r"categories of test, got \[3\]"):
        state.compute(taxonomy((1, 2), (4,)))


@pytest.mark.shared
def test_official_values(shared_data: Path) -> None:
    folder = shared_data / "panoptic4"
    space = coco_taxonomy(folder / "coco_gt.json")
    state = PanopticState.empty()
    pairs = zip(
        coco_panoptic(folder / "coco_gt.json", folder / "coco_gt"),
        coco_panoptic(folder / "coco_pred.json", folder / "coco_pred"),
        strict=True,
    )
    for target, pred in pairs:
        state = state.merge(PanopticState.from_segments(*target, *pred, space))
    figures = state.compute(space)
    expected = {"PQ": 0.6740486629, "SQ": 0.6834387674, "RQ": 0.8205128205, "n": 6}
    assert figures["All"] == pytest.approx(expected, abs=1e-9, rel=0)
    assert figures["Things"]["PQ"] == pytest.approx(0.5769675073, abs=1e-9, rel=0)
    assert figures["Stuff"]["PQ"] == pytest.approx(0.8682109740, abs=1e-9, rel=0)


@pytest.mark.shared
def test_a_target_against_itself(shared_data: Path) -> None:
    path = shared_data / "coco128" / "panoptic.json"
    space = coco_taxonomy(path)
    state = PanopticState.empty()
    for segment_HW, segments in coco_panoptic(path, path.with_suffix("")):
        state = state.merge(PanopticState.from_segments(segment_HW, segments, segment_HW, segments, space))
    figures = state.compute(space)
    occurring = set(state.category_id.tolist())
    assert figures["All"] == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0, "n": len(occurring)}
    assert len(occurring) > 100
    assert {category for category, row in figures["per_class"].items() if row["PQ"] == 1.0} == occurring


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(4, 40), st.integers(4, 40))
def test_equal_to_masks_one_by_one(seed: int, height: int, width: int) -> None:
    arguments = scene(seed, height, width)
    check_panoptic(PanopticState.from_segments(*arguments, SPACE), slow_panoptic(*arguments))


@given(st.lists(st.floats(0.5, 1.0, exclude_min=True), max_size=40))
def test_sums_of_iou_are_exact(values: list[float]) -> None:
    high, low = split_iou(np.array(values))
    assert ((low >= 0) & (low < 2**27)).all()
    exact = sum((Fraction(value) for value in values), Fraction(0))
    assert join_iou(int(high.sum()), int(low.sum())) == float(exact)
    for value, first, second in zip(values, high.tolist(), low.tolist(), strict=True):
        assert join_iou(first, second) == value


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(3, 8))
def test_laws(seed: int, images: int) -> None:
    states = [PanopticState.from_segments(*scene(seed + n, 12, 15), SPACE) for n in range(images)]
    check_laws(states, PanopticState.empty(), PANOPTIC, seed, lambda state: state.compute(SPACE))


def test_many_segments() -> None:
    """More pairs than the counting has slots for, and ids up to the last."""
    rng = np.random.default_rng(0)
    ids = np.append(rng.choice(np.arange(1, 2**24 - 1), 899, replace=False), 2**24 - 1)
    target_HW = ids.reshape(30, 30).repeat(6, 0).repeat(6, 1).astype(np.int32)
    pred_HW = np.roll(target_HW, 1, 1)
    segments = [{"id": int(n), "category_id": 1 + int(n) % 4, "area": 36, "iscrowd": 0} for n in ids]
    figures = PanopticState.from_segments(target_HW, segments, pred_HW, segments, SPACE).compute(SPACE)
    assert figures["All"]["RQ"] == 1.0
    assert figures["All"]["SQ"] == pytest.approx(30 / 42)
