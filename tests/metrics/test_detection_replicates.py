"""The fast weighted AP equals `Detection.compute(weights)`, whatever the weights and the records."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from detection_oracle import our_states, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.detection import Detection
from pipeline.metrics.detection_match import IouType
from pipeline.metrics.detection_replicates import FIGURES, WeightedAP


def check(state: Detection, weights: np.ndarray) -> None:
    expected = state.compute(weights).figures()
    got = WeightedAP(state).compute(weights)
    assert got.tolist() == pytest.approx([expected[name] for name in FIGURES], abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 12), min_size=6, max_size=6), st.sampled_from(["bbox", "segm"]))
def test_any_weights(seed: int, weights: list[int], kind: IouType) -> None:
    state = Detection.empty().merge(*our_states(*random_case(seed, kind, images=6), kind))
    weighted = WeightedAP(state)
    for own in (weights, [1] * 6, [0] * 6):
        expected = state.compute(np.array(own)).figures()
        got = weighted.compute(np.array(own, np.uint8))
        assert got.tolist() == pytest.approx([expected[name] for name in FIGURES], abs=1e-12, nan_ok=True)


def test_many_predictions_of_each_category() -> None:
    targets, results = random_case(3, "bbox", images=40, most=30)
    state = Detection.empty().merge(*our_states(targets, results, "bbox"))
    assert len(state.score) > 1000
    for seed in range(20):
        check(state, np.random.default_rng(seed).poisson(1, 40))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_official_records(kind: IouType, shared_data: Path) -> None:
    folder = shared_data / "coco_ap"
    targets = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    state = Detection.empty().merge(*our_states(targets, results, kind))
    ap, ap50, _ = WeightedAP(state).compute(np.ones(100, np.int64)).tolist()
    official = {"bbox": (0.5045806987, 0.6969727247), "segm": (0.3195452759, 0.5622883973)}[kind]
    assert (ap, ap50) == pytest.approx(official, abs=1e-9)
    check(state, np.random.default_rng(0).poisson(1, 100))


def test_no_evidence() -> None:
    state = Detection.empty()
    assert all(math.isnan(value) for value in WeightedAP(state).compute(np.zeros(0, np.int64)))
    targets, _ = random_case(1, "bbox", images=3)
    missed = Detection.empty().merge(*our_states(targets, [], "bbox"))
    assert WeightedAP(missed).compute(np.ones(3, np.int64)).tolist() == [0, 0, 0]
    assert np.isnan(WeightedAP(missed).compute(np.zeros(3, np.int64))).all()
