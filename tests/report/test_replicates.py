"""The replicates' figures are the states' figures; their intervals are those of an ordinary bootstrap."""

import random
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_helpers import SPACE, depth_score, detection_scores, mixed_rows, panoptic_score, semantic_score

from pipeline.errors import SchemaError
from pipeline.metrics.confusion import ClassCounts
from pipeline.metrics.depth import FIGURES as DEPTH_FIGURES
from pipeline.metrics.depth import Depth
from pipeline.metrics.detection import Detection
from pipeline.metrics.panoptic import PanopticState
from pipeline.metrics.score import SCORE
from pipeline.report.bootstrap import hash_images, interval, poisson_weights
from pipeline.report.replicates import LEAST_REPLICATES, Replicates, detection_replicates, semantic_figures
from pipeline.report.states import DETECTIONS, States


def merged(states: list[Any]) -> Any:
    return reduce(lambda left, right: left.merge(right), states)


def sections(scores: list[Any]) -> dict[str, Any]:
    states = States(SPACE, confusion=False)
    states.add(pa.array(scores, SCORE))
    return states.sections(states.detections())


def figure(tree: Any, path: str) -> float:
    for name in path.split("."):
        tree = tree[name]
    return float(tree)


def repeated(scores: list[Any], weights: list[int]) -> list[Any]:
    """Each score as often as it counts, detection records under other keys."""
    found = []
    for score, weight in zip(scores, weights, strict=True):
        for copy in range(weight):
            keyed = {
                kind: {**score[kind], "image_key": [f"{score[kind]['image_key'][0]}-{copy}"]}
                for kind in DETECTIONS
                if score.get(kind)
            }
            found.append({**score, **keyed})
    return found


def test_replicates_are_figures_of_repeated_images() -> None:
    scores = [row["score"] for row in mixed_rows(3, 40) if row["score"] and "error_type" not in row["score"]]
    # Scores that differ: a repeated image's equal scores would otherwise be in another order.
    rng = np.random.default_rng(0)
    for score in scores:
        for kind in DETECTIONS:
            if score.get(kind):
                own = np.array(score[kind]["score"]) + rng.random(len(score[kind]["score"])) / 1e6
                score[kind]["score"] = own.tolist()
                by_score = np.lexsort((-own, score[kind]["category_id"]))
                for name in ("category_id", "score", "matched", "ignored"):
                    score[kind][name] = [score[kind][name][at] for at in by_score]
    names = [f"image {n}" for n in range(len(scores))]
    replicates = Replicates(SPACE, 12)
    for start in range(0, len(scores), 7):
        replicates.add(names[start : start + 7], pa.array(scores[start : start + 7], SCORE))
    states = States(SPACE, confusion=False)
    states.add(pa.array(scores, SCORE))
    values = replicates.values(states.detections())
    assert len(values) == 6 + 1 + 2 * 9 + 2 * 3 + len(DEPTH_FIGURES)
    weight_BN = poisson_weights(hash_images(names), np.arange(12))
    for at, weights in enumerate(weight_BN.tolist()):
        expected = sections(repeated(scores, weights))
        got = {path: float(own[at]) for path, own in values.items()}
        assert got == pytest.approx({path: figure(expected, path) for path in values}, abs=1e-11, nan_ok=True)


@pytest.mark.parametrize("seed", range(10))
def test_figures_of_many_sums_at_once(seed: int) -> None:
    """Classes without evidence, in the target alone, and in the prediction alone."""
    rng = np.random.default_rng(seed)
    target, pred = rng.integers(0, 50, (2, 6, 4)) * rng.integers(0, 2, (2, 6, 4))
    sums = np.stack([rng.integers(0, np.minimum(target, pred) + 1), target, pred])
    found = semantic_figures(sums)
    assert found.keys() == {"mIoU", "mIoU_present", "fwIoU", "pixel_accuracy", "mean_accuracy", "dice"}
    for at in range(6):
        expected = ClassCounts.from_entries(np.arange(1, 5), sums[:, at].T).compute(SPACE)
        for name, values in found.items():
            assert values[at] == pytest.approx(expected[name], nan_ok=True), name


def test_replicates_of_classes_are_figures_of_repeated_images() -> None:
    scores = [semantic_score(seed) | panoptic_score(seed) for seed in range(12)]
    names = [f"image {n}" for n in range(12)]
    replicates = Replicates(SPACE, 10)
    replicates.add(names[:5], pa.array(scores[:5], SCORE))
    replicates.add(names[5:], pa.array(scores[5:], SCORE))
    values = replicates.class_values()
    paths = {f"{section}.{name}" for section in ("panoptic", "boundary_panoptic") for name in ("PQ", "SQ", "RQ")}
    assert set(values) == {"semantic.IoU", "semantic.accuracy", "boundary.IoU"} | paths
    for at, weights in enumerate(poisson_weights(hash_images(names), np.arange(10)).tolist()):
        expected = sections(repeated(scores, weights))
        for path, value_BK in values.items():
            section, _, name = path.rpartition(".")
            per_class = expected[section]["per_class"]
            assert [per_class[str(c.id)][name] for c in SPACE.categories] == pytest.approx(
                value_BK[at].tolist(), abs=1e-12, nan_ok=True
            ), path


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], Callable[[list[Any]], float]]] = {
    "semantic.mIoU": (
        semantic_score,
        lambda scores: merged([ClassCounts.from_row(score["classes"]) for score in scores]).compute(SPACE)["mIoU"],
    ),
    "panoptic.All.PQ": (
        panoptic_score,
        lambda scores: merged([PanopticState.from_row(score["panoptic"]) for score in scores]).compute(SPACE)["All"][
            "PQ"
        ],
    ),
    "depth.AbsRel": (
        depth_score,
        lambda scores: merged([Depth.from_row(score["depth"]) for score in scores]).compute()["AbsRel"],
    ),
}


@pytest.mark.parametrize("path", KINDS)
def test_intervals_are_those_of_an_ordinary_bootstrap(path: str) -> None:
    """Drawing as many images as there are with replacement, 500 times, and computing each draw's figure anew."""
    make, compute = KINDS[path]
    scores = [make(seed) for seed in range(60)]
    names = [f"image {n}" for n in range(60)]
    replicates = Replicates(SPACE, 2000)
    replicates.add(names, pa.array(scores, SCORE))
    low, high = interval(replicates.values({})[path]) or (0, 0)
    draw = random.Random(0)
    drawn = np.array([compute(draw.choices(scores, k=60)) for _ in range(500)])
    expected_low, expected_high = np.percentile(drawn, [2.5, 97.5])
    # The 2.5th percentile of 500 draws of a normal figure has a standard error of 0.12 of its deviation, of 2000 half.
    noise = 4 * 0.14 * drawn.std()
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=noise)
    assert high - low == pytest.approx(expected_high - expected_low, rel=0.25)


def test_the_interval_of_ap() -> None:
    scores = detection_scores(5, 40)
    names = [f"image {n}" for n in range(40)]
    replicates = Replicates(SPACE, 1000)
    replicates.add(names, pa.array(scores, SCORE))
    states = [Detection.from_row(score["segm"]) for score in scores]
    whole = Detection.empty().merge(*states)
    low, high = interval(replicates.values({"segm": whole})["detection.segm.AP"]) or (0, 0)
    rng = np.random.default_rng(0)
    drawn = np.array(
        [whole.compute(np.bincount(rng.integers(0, 40, 40), minlength=40)).figures()["AP"] for _ in range(300)]
    )
    expected = np.percentile(drawn, [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=4 * 0.17 * drawn.std())


def test_images_of_other_kinds_do_not_count() -> None:
    """A score without a state adds nothing to it: as if the image were not there."""
    alone, beside = Replicates(SPACE, 50), Replicates(SPACE, 50)
    scores = [semantic_score(seed) for seed in range(8)]
    alone.add([f"a{n}" for n in range(8)], pa.array(scores, SCORE))
    beside.add([f"a{n}" for n in range(8)], pa.array(scores, SCORE))
    beside.add([f"b{n}" for n in range(8)], pa.array([depth_score(seed) for seed in range(8)], SCORE))
    assert np.array_equal(alone.values({})["semantic.mIoU"], beside.values({})["semantic.mIoU"], equal_nan=True)


def test_replicates_of_very_many_predictions() -> None:
    assert [detection_replicates(size, 1000) for size in (0, 200_000, 800_000, 10**9)] == [1000, 1000, 250, 100]
    assert detection_replicates(10**9, 20) == 20
    assert LEAST_REPLICATES == 100


def test_categories_outside_the_label_space() -> None:
    entry = {"category_id": 9, "intersection": 1, "target": 1, "pred": 1}
    with pytest.raises(SchemaError, match=r"categories that test lacks: \[9\]"):
        Replicates(SPACE, 2).add(["a"], pa.array([{"classes": {"classes": [entry]}}], SCORE))
