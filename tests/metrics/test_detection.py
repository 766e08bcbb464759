"""AP and AR equal COCOeval's, match by match and figure by figure, whatever the partition and order of the images."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from detection_oracle import FIGURES, SIZE, coco_eval, our_states, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PredictError, SchemaError, TargetMismatchError
from pipeline.masks import encode_rle
from pipeline.metrics.detection import DETECTION, Detection, DetectionScores
from pipeline.metrics.detection_match import AREAS, THRESHOLDS, IouType, Objects

KINDS: tuple[IouType, ...] = ("bbox", "segm")
# Our settings as COCOeval's indices of area range and limit of predictions.
SETTINGS = ((0, 2), (1, 2), (2, 2), (3, 2), (0, 0), (0, 1))
LAW = settings(deadline=None, max_examples=25)


def assert_equals_coco(scores: DetectionScores, evaluation: Any) -> None:
    expected = {name: value if value >= 0 else math.nan for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    assert scores.figures() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    ids = evaluation.params.catIds
    known = [ids.index(category) for category in scores.categories]
    others = [k for k in range(len(ids)) if k not in known]
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"]).swapaxes(1, 2)
    recall = np.where(evaluation.eval["recall"] < 0, np.nan, evaluation.eval["recall"])
    assert np.isnan(recall[:, others]).all()
    for index, (area, limit) in enumerate(SETTINGS):
        np.testing.assert_array_equal(scores.precision_STKR[index], precision[..., area, limit][:, known])
        np.testing.assert_array_equal(scores.recall_STK[index], recall[..., area, limit][:, known])
    confidence = evaluation.eval["scores"][:, :, known, 0, 2].swapaxes(1, 2)
    np.testing.assert_array_equal(np.nan_to_num(scores.confidence_TKR), np.where(confidence < 0, 0, confidence))


@pytest.mark.parametrize("kind", KINDS)
def test_official_values(kind: IouType, shared_data: Path) -> None:
    folder = shared_data / "coco_ap"
    targets = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    lines = (folder / "expected.txt").read_text().split(f"type={kind}")[1].split("type=")[0].splitlines()
    printed = [float(line.split("=")[-1]) for line in lines if "Average" in line]
    scores = Detection.empty().merge(*our_states(targets, results, kind)).compute()
    figures = scores.figures()
    assert tuple(figures) == FIGURES
    assert [round(value, 3) for value in figures.values()] == printed
    official = {"bbox": (0.5045806987, 0.6969727247), "segm": (0.3195452759, 0.5622883973)}[kind]
    assert (figures["AP"], figures["AP50"]) == pytest.approx(official, abs=1e-9)
    assert_equals_coco(scores, coco_eval(targets, results, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_random_cases_equal_coco(seed: int, kind: IouType) -> None:
    targets, results = random_case(seed, kind)
    if not results:
        pytest.skip("COCO.loadRes takes no empty list")
    evaluation = coco_eval(targets, results, kind)
    states = our_states(targets, results, kind)
    random.Random(seed).shuffle(states)
    whole = Detection.empty().merge(*states)
    assert_equals_coco(whole.compute(), evaluation)
    assert_matches_equal(whole, evaluation)


def assert_matches_equal(state: Detection, evaluation: Any) -> None:
    """Every bit of every record against COCOeval.evaluateImg's arrays."""
    found: dict[tuple[int, int], list[int]] = {}
    image = np.repeat(np.arange(len(state.image_key)), state.predictions)
    for row, (number, category) in enumerate(zip(image.tolist(), state.category_id.tolist(), strict=True)):
        found.setdefault((int(state.image_key[number]), category), []).append(row)
    seen = 0
    for record in evaluation.evalImgs:
        if record is None:
            continue
        area = next(a for a, limits in enumerate(AREAS.tolist()) if limits == record["aRng"])
        rows = np.array(found.get((record["image_id"], record["category_id"]), []), np.intp)
        shift = area * len(THRESHOLDS) + np.arange(len(THRESHOLDS))[:, None]
        np.testing.assert_array_equal(state.score[rows], record["dtScores"])
        np.testing.assert_array_equal((state.matched[rows] >> shift) & 1, record["dtMatches"] > 0)
        np.testing.assert_array_equal((state.ignored[rows] >> shift) & 1, record["dtIgnore"])
        seen += len(rows)
    assert seen == len(AREAS) * np.isin(state.category_id, (1, 2, 3)).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_a_hundred_predictions(kind: IouType) -> None:
    targets, results = random_case(5, kind, images=2, most=10)
    results = [{**result, "category_id": 1} for result in results for _ in range(25)]
    assert len(results) > 300
    state = Detection.empty().merge(*our_states(targets, results, kind))
    assert state.predictions.max() == 100
    assert_equals_coco(state.compute(), coco_eval(targets, results, kind))


def objects(boxes: list[list[float]], **more: Any) -> Objects:
    given = {"category_id": np.ones(len(boxes), np.int64), "bbox_N4": np.array(boxes, float).reshape(-1, 4), **more}
    return Objects(
        height=SIZE[0], width=SIZE[1], **{k: np.array(v) if k != "segmentation" else v for k, v in given.items()}
    )


def figures(pred: Objects, target: Objects, kind: IouType = "bbox") -> dict[str, float]:
    return Detection.from_image("a", pred, target, kind).compute().figures()


BOX = [10.0, 10.0, 40.0, 40.0]


def test_a_perfect_prediction_and_a_missed_target() -> None:
    assert figures(objects([BOX], score=[0.5]), objects([BOX]))["AP"] == pytest.approx(1)
    missed = figures(objects([], score=[]), objects([BOX]))
    assert (missed["AP"], missed["AR100"]) == (0.0, 0.0)


def test_a_category_without_targets_is_no_evidence() -> None:
    pred = objects([BOX, BOX], score=[0.5, 0.9], category_id=[1, 2])
    assert figures(pred, objects([BOX]))["AP"] == pytest.approx(1)
    nothing = figures(pred, objects([]))
    assert all(math.isnan(value) for value in nothing.values())
    assert Detection.empty().compute().categories == ()
    assert math.isnan(figures(objects([BOX], score=[0.5]), objects([BOX], crowd=[True]))["AP"])


def test_a_crowd_takes_any_number_and_counts_for_none() -> None:
    target = objects([BOX, [80, 60, 60, 40]], crowd=[False, True])
    inside = [[82, 62, 10, 10], [100, 70, 20, 20], [82, 62, 10, 10]]
    state = Detection.from_image("a", objects([BOX, *inside], score=[0.1, 0.9, 0.8, 0.7]), target, "bbox")
    assert state.compute().figures()["AP"] == pytest.approx(1)
    assert state.image_counts().tolist() == [[1, 0, 0]]


def test_one_prediction_for_each_target() -> None:
    state = Detection.from_image("a", objects([BOX, BOX], score=[0.9, 0.8]), objects([BOX]), "bbox")
    assert state.image_counts().tolist() == [[1, 1, 0]]
    assert state.image_counts(min_score=0.85).tolist() == [[1, 0, 0]]
    with pytest.raises(ValueError, match="threshold"):
        state.image_counts(0.3)


def test_the_last_of_equal_overlaps_is_taken() -> None:
    # IoU 0.6 with both targets: the second is taken, so the prediction that fits it alone finds it gone.
    targets = [[0.0, 0.0, 40.0, 40.0], [20.0, 0.0, 40.0, 40.0]]
    pred = objects([[10, 0, 40, 40], [26, 0, 40, 40]], score=[0.9, 0.8])
    assert Detection.from_image("a", pred, objects(targets), "bbox").image_counts().tolist() == [[1, 1, 1]]
    assert Detection.from_image("a", pred, objects(targets[::-1]), "bbox").image_counts().tolist() == [[2, 0, 0]]


def test_a_target_that_counts_goes_before_a_better_one_that_does_not() -> None:
    # Small range: the first target's area is outside, so the second is taken although its IoU is lower.
    target = objects([BOX, [10, 10, 40, 36]], area=[5000, 1000])
    state = Detection.from_image("a", objects([BOX], score=[0.9], area=[1000]), target, "bbox")
    assert state.compute().figures()["APs"] == pytest.approx(0.9)  # IoU 0.9: nine of ten thresholds


def test_size_bins_use_the_area_of_the_target() -> None:
    found = figures(objects([BOX], score=[0.9]), objects([BOX], area=[900]))
    assert (found["APs"], math.isnan(found["APm"])) == (pytest.approx(1), True)


def test_a_result_with_box_and_mask_is_binned_by_its_box() -> None:
    mask_HW = np.zeros(SIZE, bool)
    mask_HW[0:100, 0:100:4] = True
    item = {
        "category_id": 1,
        "score": 0.5,
        "bbox": [0, 0, 97, 100],
        "segmentation": {"size": list(SIZE), "counts": encode_rle(mask_HW)},
    }
    size = {"height": SIZE[0], "width": SIZE[1]}
    assert Objects.from_results([item], **size).shapes("segm")[1].tolist() == [9700]
    assert Objects.from_results([{**item, "bbox": []}], **size).shapes("segm")[1].tolist() == [2500]
    # A row of our table has both as well; its masks are binned as masks, as from a results file of their own.
    segment = {**item, "rle": encode_rle(mask_HW), "id": 1}
    table = Objects.from_segments([segment], **size)
    assert (table.shapes("bbox")[1].tolist(), table.shapes("segm")[1].tolist()) == ([9700], [2500])
    # Boxes without masks are masks of their own, and masks without boxes have tight ones (COCO.loadRes).
    assert Objects.from_results([{**item, "segmentation": None}], **size).rles()[0]["size"] == list(SIZE)
    boxes = Objects.from_results([{**item, "bbox": []}], **size).shapes("bbox")[0]
    assert boxes.tolist() == [[0, 0, 97, 100]]


def test_bad_input() -> None:
    good = objects([BOX], score=[0.5])
    with pytest.raises(PredictError, match="finite score"):
        figures(objects([BOX], score=[math.nan]), objects([BOX]))
    with pytest.raises(PredictError, match="finite score"):
        figures(objects([BOX]), objects([BOX]))
    other = Objects(height=5, width=5, category_id=np.zeros(0, np.int64), bbox_N4=np.zeros((0, 4)))
    with pytest.raises(TargetMismatchError, match="160x120"):
        figures(other, objects([BOX]))
    for bad in ({"size": [5, 5], "counts": "00"}, {"size": list(SIZE), "counts": "P"}, {"counts": "0"}, 3, [[1, 2]]):
        with pytest.raises(TargetMismatchError):
            figures(good, objects([BOX], segmentation=[bad]), "segm")
    with pytest.raises(TargetMismatchError, match="neither"):
        figures(good, Objects(height=SIZE[0], width=SIZE[1], category_id=np.ones(1, np.int64)), "segm")
    with pytest.raises(TargetMismatchError, match="category_id"):
        Objects.from_annotations([{"bbox": BOX}], height=1, width=1)
    with pytest.raises(PredictError, match="score"):
        Objects.from_results([{"bbox": BOX, "category_id": 1}], height=1, width=1)


def test_an_image_twice_is_refused() -> None:
    state = Detection.from_image("a", objects([BOX], score=[0.5]), objects([BOX]), "bbox")
    with pytest.raises(SchemaError, match="'a' twice"):
        state.merge(state)


def state_list(seed: int, kind: IouType = "bbox") -> list[Detection]:
    return our_states(*random_case(seed, kind), kind)


@LAW
@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), max_size=4), st.randoms(use_true_random=False))
def test_any_partition_and_order_is_the_same_value(seed: int, cuts: list[int], shuffle: random.Random) -> None:
    states = state_list(seed)
    whole = Detection.empty().merge(*states)
    shuffle.shuffle(states)
    edges = [0, *sorted(cuts), len(states)]
    parts = [Detection.empty().merge(*states[a:b]) for a, b in itertools.pairwise(edges)]
    shuffle.shuffle(parts)
    merged = Detection.empty()
    for part in parts:
        merged = merged.merge(part)
    assert merged == whole
    assert hash(merged) == hash(whole)
    assert merged.compute().precision_STKR.tobytes() == whole.compute().precision_STKR.tobytes()


@LAW
@given(st.integers(0, 2**32))
def test_laws(seed: int) -> None:
    a, b, c, *_ = state_list(seed)
    assert a.merge(b) == b.merge(a) != a
    assert a.merge(b).merge(c) == a.merge(b.merge(c)) == a.merge(b, c)
    assert a.merge(Detection.empty()) == a == Detection.empty().merge(a)


@LAW
@given(st.integers(0, 2**32))
def test_rows_are_lossless(seed: int) -> None:
    states = state_list(seed)
    whole = Detection.empty().merge(*states)
    rows = pa.array([state.to_row() for state in [*states, whole]] + [None], DETECTION)
    *again, last, nothing = rows.to_pylist()
    assert [Detection.from_row(row) for row in again] == states
    assert (Detection.from_row(last), nothing) == (whole, None)
    assert Detection.from_rows(rows[: len(states)]) == whole
    chunks = pa.chunked_array([rows[2:5], rows[:2], rows[-1:]])
    assert Detection.from_rows(chunks) == whole
    assert Detection.from_rows(rows[:0]) == Detection.empty() == Detection.from_row(Detection.empty().to_row())


@pytest.mark.parametrize(
    "change",
    [{"score": [0.5]}, {"image_key": ["a", "b"]}, {"targets": [9]}, {"predictions": None}, {"target_count": [1]}],
)
def test_rows_that_hold_no_records(change: dict[str, Any]) -> None:
    row = Detection.from_image("a", objects([BOX, BOX], score=[0.5, 0.4]), objects([BOX]), "bbox").to_row()
    with pytest.raises(SchemaError, match="detection records"):
        Detection.from_row({**row, **change})
    with pytest.raises(SchemaError, match="detection records"):
        Detection.from_rows(pa.array([1]))


@LAW
@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_weights_are_repetitions(seed: int, weights: list[int]) -> None:
    # Scores that differ: a repeated image's equal scores would otherwise be in another order.
    targets, results = random_case(seed, "bbox")
    scores = np.random.default_rng(seed).permutation(len(results)) / (len(results) + 1)
    results = [{**result, "score": float(score)} for result, score in zip(results, scores, strict=True)]
    states = our_states(targets, results, "bbox")
    whole = Detection.empty().merge(*states)
    repeated: list[Detection] = []
    for state, weight in zip(sorted(states, key=lambda state: state.image_key), weights, strict=True):
        repeated += [
            Detection.from_row({**state.to_row(), "image_key": [f"{state.image_key[0]}-{n}"]}) for n in range(weight)
        ]
    expected = Detection.empty().merge(*repeated).compute()
    got = whole.compute(np.array(weights))
    assert got.figures() == pytest.approx(expected.figures(), abs=1e-12, nan_ok=True)
    assert got.image_count == sum(weights)
    assert whole.compute(np.ones(5, np.int64)).figures() == pytest.approx(whole.compute().figures(), nan_ok=True)


def test_curves_and_categories() -> None:
    whole = Detection.empty().merge(*state_list(3))
    scores = whole.compute()
    per_category = scores.per_category()
    assert tuple(per_category) == scores.categories == tuple(whole.categories.tolist())
    mean = np.mean([figures["AP"] for figures in per_category.values()])
    assert mean == pytest.approx(scores.figures()["AP"])
    assert scores.precision_STKR.shape == (6, 10, len(scores.categories), 101)
    assert (np.diff(scores.precision_STKR[0], axis=-1) <= 0).all()
    with pytest.raises(ValueError, match="weights"):
        whole.compute(np.ones(2, np.int64))
