"""Boundary IoU and boundary PQ: by hand, against a slow erosion, against the reference's figures, laws."""

import math
from pathlib import Path

import numpy as np
import pytest
from dense_helpers import (
    blocky,
    boundary,
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

from pipeline.errors import TargetMismatchError
from pipeline.metrics.boundary import (
    BOUNDARY,
    BoundaryCounts,
    boundary_distance,
    boundary_iou,
    interior,
    mask_boundary,
    panoptic_states,
)
from pipeline.metrics.panoptic import PANOPTIC, PanopticState

SPACE = taxonomy()


@pytest.mark.parametrize(
    ("height", "width", "ratio", "expected"),
    [
        (480, 640, 0.02, 16),
        (10, 10, 0.02, 1),
        (1, 1, 0.02, 1),
        (1024, 2048, 0.02, 46),
        (75, 100, 0.02, 2),  # 2.5 rounds to even, as the reference's int(round(...)) does
        (480, 640, 0.005, 4),
    ],
)
def test_distance(height: int, width: int, ratio: float, expected: int) -> None:
    assert boundary_distance(height, width, ratio) == expected


def test_boundary_by_hand() -> None:
    mask_HW = np.zeros((7, 9), np.uint8)
    mask_HW[1:6, 0:6] = 1
    assert mask_boundary(mask_HW).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0],  # the image's border counts as boundary
        [1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert boundary_iou(mask_HW, mask_HW) == 1.0
    assert boundary_iou(mask_HW, mask_HW * 0) == 0.0
    assert math.isnan(boundary_iou(mask_HW * 0, mask_HW * 0))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.02, 0.05, 0.2, 0.6]))
def test_equal_to_a_slow_erosion(seed: int, height: int, width: int, ratio: float) -> None:
    map_HW = blocky(seed, height, width, [0, 1, 2, 3])
    distance = boundary_distance(height, width, ratio)
    edge_HW = ~interior(map_HW, distance)
    for value in range(4):
        expected = boundary(map_HW == value, ratio)
        assert np.array_equal((map_HW == value) & edge_HW, expected)
        assert np.array_equal(mask_boundary(map_HW == value, ratio), expected)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 30), st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]))
def test_class_counts(seed: int, height: int, width: int, dtype: type) -> None:
    target_HW = blocky(seed, height, width, [0, 1, 2, 255])
    pred_HW = blocky(seed + 1, height, width, [0, 1, 2, 9])
    state = BoundaryCounts.from_maps(target_HW.astype(dtype), pred_HW.astype(dtype), taxonomy((0, 1), (2,)), ratio=0.08)
    counted = target_HW != 255
    rows = state.compute((0, 1, 2))["per_class"]
    for category in (0, 1, 2):
        target = boundary(target_HW == category, 0.08) & counted
        pred = boundary(pred_HW == category, 0.08) & counted
        row = rows[category]
        assert (row["intersection"], row["target"], row["pred"]) == ((target & pred).sum(), target.sum(), pred.sum())
        union = (target | pred).sum()
        assert row["IoU"] == pytest.approx((target & pred).sum() / union if union else math.nan, nan_ok=True)


def test_void_unknown_and_means() -> None:
    target_HW = np.array([[0, 0, 0, 255, 7]], np.uint8)
    pred_HW = np.array([[0, 0, 1, 1, 1]], np.uint8)
    with pytest.raises(TargetMismatchError, match=r"outside the label space: \[7\]"):
        BoundaryCounts.from_maps(target_HW, pred_HW, taxonomy((0, 1), (2,)))
    state = BoundaryCounts.from_maps(target_HW, pred_HW, (0, 1, 2), ignore=[255], unknown_is_void=True)
    figures = state.compute((0, 1, 2))
    assert {key: figures[key] for key in ("mIoU", "mIoU_present", "n", "n_present", "n_without_evidence")} == {
        "mIoU": pytest.approx(1 / 3),
        "mIoU_present": pytest.approx(2 / 3),
        "n": 2,
        "n_present": 1,
        "n_without_evidence": 1,
    }
    with pytest.raises(TargetMismatchError, match="target is 5x1"):
        BoundaryCounts.from_maps(target_HW, pred_HW.T, SPACE)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(4, 30), st.integers(4, 30), st.sampled_from([0.02, 0.1]))
def test_boundary_panoptic(seed: int, height: int, width: int, ratio: float) -> None:
    arguments = scene(seed, height, width)
    mask, edge = panoptic_states(*arguments, SPACE, ratio=ratio)
    assert mask == PanopticState.from_segments(*arguments, SPACE)
    check_panoptic(edge, slow_panoptic(*arguments, ratio))


def test_the_smaller_iou_decides() -> None:
    """A square that is shifted by one pixel: the mask matches, its boundary does not."""
    target_HW = np.zeros((40, 40), np.int32)
    target_HW[5:35, 5:35] = 1
    pred_HW = np.roll(target_HW, 1, (0, 1))
    segments = [{"id": 1, "category_id": 1, "area": 900, "iscrowd": 0}]
    # The target's map is covered, so that no void leaves the union.
    target_HW[target_HW == 0] = 2
    other = {"id": 2, "category_id": 2, "area": 700, "iscrowd": 1}
    mask, edge = panoptic_states(target_HW, [*segments, other], pred_HW, segments, SPACE)
    assert mask.compute(SPACE)["per_class"][1]["PQ"] == pytest.approx(29**2 / (2 * 900 - 29**2))
    row = edge.compute(SPACE)["per_class"][1]
    assert (row["tp"], row["fp"], row["fn"]) == (0, 1, 1)
    assert boundary_iou(target_HW == 1, pred_HW == 1) < 0.5


@pytest.mark.shared
def test_figures_of_boundary_iou_api(shared_data: Path) -> None:
    """What `pq_compute_single_core(iou_type="boundary", dilation_ratio=0.02)` gives for panoptic4."""
    folder = shared_data / "panoptic4"
    space = coco_taxonomy(folder / "coco_gt.json")
    state = PanopticState.empty()
    pairs = zip(
        coco_panoptic(folder / "coco_gt.json", folder / "coco_gt"),
        coco_panoptic(folder / "coco_pred.json", folder / "coco_pred"),
        strict=True,
    )
    for target, pred in pairs:
        state = state.merge(panoptic_states(*target, *pred, space)[1])
    expected = {"PQ": 0.44510955259805035, "SQ": 0.504809946460332, "RQ": 0.576923076923077, "n": 6}
    assert state.compute(space)["All"] == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.shared
def test_coco128_against_itself_rolled(shared_data: Path) -> None:
    """boundary-iou-api's figures for coco128's targets against the same maps rolled by 5 pixels down and right."""
    path = shared_data / "coco128" / "panoptic.json"
    space = coco_taxonomy(path)
    mask, edge = PanopticState.empty(), PanopticState.empty()
    for segment_HW, segments in coco_panoptic(path, path.with_suffix("")):
        states = panoptic_states(segment_HW, segments, np.roll(segment_HW, 5, (0, 1)), segments, space)
        mask, edge = mask.merge(states[0]), edge.merge(states[1])
    assert mask.compute(space)["All"]["PQ"] == pytest.approx(0.5788789788716681, abs=1e-12, rel=0)
    expected = {"PQ": 0.46354458094127865, "SQ": 0.5915673477392034, "RQ": 0.7352107504645972, "n": 119}
    assert edge.compute(space)["All"] == pytest.approx(expected, abs=1e-12, rel=0)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(3, 6))
def test_laws(seed: int, images: int) -> None:
    scenes = [scene(seed + n, 20, 25) for n in range(images)]
    edges = [panoptic_states(*arguments, SPACE)[1] for arguments in scenes]
    check_laws(edges, PanopticState.empty(), PANOPTIC, seed, lambda state: state.compute(SPACE))
    counts = [
        BoundaryCounts.from_maps(arguments[0] % 4, arguments[2] % 5, range(4), ignore=[0]) for arguments in scenes
    ]
    check_laws(counts, BoundaryCounts.empty(), BOUNDARY, seed, lambda state: state.compute(range(4)))
