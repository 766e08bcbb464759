"""Depth errors equal the official values and formulas; sums are exact whatever the order and grouping of the images."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, PredictError, SchemaError, TargetMismatchError
from pipeline.metrics.depth import DEPTH_ERRORS, FIGURES, RATIO_EDGES, Depth, DepthOptions
from pipeline.metrics.depth_align import crop_window, target_depth

LAW = settings(deadline=None, max_examples=30)

OFFICIAL = {
    "AbsRel": 0.1404982,
    "RMSE": 0.6180007,
    "SILog": 18.870581,
    "delta1": 0.777264,
    "delta2": 0.964724,
    "delta3": 0.999621,
    "SqRel": 0.0986683,
    "log10": 0.0620487,
}


@pytest.fixture(scope="module")
def pair(shared_data: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    folder = shared_data / "depth_pair"
    return np.load(folder / "pred.npy").squeeze(), np.load(folder / "depth.npy").squeeze()


def test_official_values(pair: tuple[Any, Any]) -> None:
    state = Depth.from_image(*pair)
    for figures in (state.compute(), state.compute_pixels()):
        assert tuple(figures) == FIGURES
        assert {name: figures[name] for name in OFFICIAL} == pytest.approx(OFFICIAL, abs=1e-5)


@pytest.mark.parametrize(("alignment", "abs_rel"), [("median", 0.1559), ("least_squares", 0.1117)])
def test_official_alignments(pair: tuple[Any, Any], alignment: Any, abs_rel: float) -> None:
    options = DepthOptions(alignment=alignment)
    assert Depth.from_image(*pair, options).compute()["AbsRel"] == pytest.approx(abs_rel, abs=5e-5)
    # An alignment takes back what it can fit.
    pred, target = pair
    moved = pred * 3.7 + (0.4 if alignment == "least_squares" else 0)
    figures = Depth.from_image(moved.astype(np.float64), target, options).compute()
    assert figures["AbsRel"] == pytest.approx(abs_rel, abs=5e-5)


def naive(p: npt.NDArray[Any], g: npt.NDArray[Any]) -> dict[str, float]:
    """The formulas as the papers print them."""
    ratio = np.maximum(p / g, g / p)
    d = np.log(p) - np.log(g)
    return {
        "AbsRel": np.mean(np.abs(g - p) / g),
        "SqRel": np.mean((g - p) ** 2 / g),
        "SqRel_squared": np.mean((g - p) ** 2 / g**2),
        "RMSE": np.sqrt(np.mean((g - p) ** 2)),
        "RMSElog": np.sqrt(np.mean(d**2)),
        "log10": np.mean(np.abs(np.log10(g) - np.log10(p))),
        "SILog": 100 * np.sqrt(np.var(d)),
        **{f"delta{n}": np.mean(ratio < 1.25**n) for n in (1, 2, 3)},
    }


def images(seed: int, count: int = 6) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        target_HW = rng.uniform(0.5, 9, (7, 5))
        target_HW[rng.random((7, 5)) < 0.3] = np.nan
        found.append((target_HW * rng.uniform(0.5, 2, (7, 5)), target_HW))
    return [(np.where(np.isnan(pred), 1.0, pred), target) for pred, target in found]


def test_means_are_over_images() -> None:
    cases = images(0)
    total = Depth.empty()
    for case in cases:
        total = total.merge(Depth.from_image(*case))
    kept = [(pred[~np.isnan(target)], target[~np.isnan(target)]) for pred, target in cases]
    singles = [naive(*case) for case in kept]
    expected = {name: np.mean([single[name] for single in singles]) for name in FIGURES}
    assert total.compute() == pytest.approx(expected, rel=1e-12)
    pooled = naive(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
    assert total.compute_pixels() == pytest.approx(pooled, rel=1e-9)
    assert total.pixels == sum(len(target) for _, target in kept)


def one(pred: list[float], target: list[float], **options: Any) -> Depth:
    kind = options.pop("kind", "metric_m")
    return Depth.from_image(np.array([pred]), np.array([target]), DepthOptions(**options), kind)


def test_deltas_are_strict() -> None:
    assert one([1.25, 1.0, 1.2], [1.0, 1.25, 1.0]).compute()["delta1"] == pytest.approx(1 / 3)


def test_no_valid_pixel_is_no_evidence() -> None:
    state = one([1, 1], [math.nan, 0])
    assert (state.images, state.images_without_evidence, state.pixels) == (0, 1, 0)
    assert all(math.isnan(value) for value in (*state.compute().values(), *state.compute_pixels().values()))
    assert np.isnan(state.delta_curve()[1]).all()
    good = one([2], [1])
    assert good.merge(state).compute() == good.compute()


def test_caps_clamp_predictions_and_mask_targets() -> None:
    # Targets at and beyond the caps are not scored; predictions beyond them are clamped, not left out.
    state = one([1, 50, 50, 5, -3], [5, 5, 10, 12, 1], max_depth=10, min_depth=0.5)
    assert state.pixels == 3
    assert state.compute()["AbsRel"] == pytest.approx((4 / 5 + 5 / 5 + 0.5) / 3)


def test_pixels_without_a_prediction_are_scored_and_counted() -> None:
    state = one([math.nan, 2], [1, 2], min_depth=0.1)
    assert (state.pixels, state.pixels_without_prediction) == (2, 1)
    assert state.compute()["AbsRel"] == pytest.approx(0.9 / 2)
    # They take no part in the fit.
    assert one([math.nan, 2, 4], [1, 4, 8], alignment="median").compute()["delta1"] == pytest.approx(2 / 3)
    assert one([math.inf, 2], [9, 2], max_depth=10).compute()["AbsRel"] == pytest.approx(1 / 9 / 2)
    with pytest.raises(PredictError, match="max_depth"):
        one([math.inf, 2], [9, 2])
    nothing = one([math.nan, math.nan], [1, 2], alignment="least_squares_disparity", min_depth=0.5)
    assert nothing.compute()["AbsRel"] == pytest.approx((0.5 + 0.75) / 2)


def test_the_median_is_over_scored_pixels() -> None:
    assert one([1, 2, 100], [2, 4, math.nan], alignment="median").compute()["AbsRel"] == 0


def test_a_fit_in_disparity() -> None:
    target = np.array([1.0, 2.0, 4.0, 5.0])
    for kind, pred in (("inverse_relative", 3 / target + 0.7), ("relative", 1 / (3 / target + 0.7))):
        state = one([*pred], [*target], alignment="least_squares_disparity", kind=kind)
        assert state.compute()["AbsRel"] == pytest.approx(0, abs=1e-12)
    # A fit of 1, 0, 0, 0 is below zero at its end: that is endless depth, so it counts as the cap.
    steep: dict[str, Any] = {"alignment": "least_squares_disparity", "kind": "inverse_relative"}
    capped = one([0, 1, 2, 3], [1, 100, 100, 100], max_depth=200, **steep)
    fitted = np.array([1 / 0.703, 1 / 0.406, 1 / 0.109, 200])
    assert capped.compute()["RMSE"] == pytest.approx(naive(fitted, np.array([1, 100, 100, 100]))["RMSE"])
    with pytest.raises(PredictError, match="max_depth"):
        one([0, 1, 2, 3], [1, 100, 100, 100], **steep)


def test_inverse_depth_without_a_fit_is_turned_over() -> None:
    assert one([0.5, 0.25], [2, 4], kind="inverse_relative").compute()["AbsRel"] == 0
    assert one([1, 0.5], [2, 4], kind="inverse_relative", alignment="median").compute()["AbsRel"] == 0
    assert one([0, 0.5], [7, 2], kind="inverse_relative", max_depth=8).compute()["AbsRel"] == pytest.approx(1 / 14)


def test_a_constant_prediction_is_fitted_by_the_mean() -> None:
    assert one([3, 3], [2, 4], alignment="least_squares").compute()["RMSE"] == pytest.approx(1)


def test_crops() -> None:
    assert crop_window("nyu_eigen", 480, 640) == (slice(45, 471), slice(41, 601))
    # As Monodepth cuts them to whole pixels: shares of 370 are 151.0 and 366.99, of 1224 43.99 and 1180.0.
    assert crop_window("kitti_garg", 370, 1224) == (slice(151, 366), slice(43, 1180))
    assert crop_window("kitti_eigen", 370, 1224) == (slice(122, 337), slice(43, 1180))
    assert crop_window("none", 3, 4) == (slice(0, 3), slice(0, 4))
    with pytest.raises(TargetMismatchError, match="640x480"):
        crop_window("nyu_eigen", 224, 224)
    target_HW = np.ones((480, 640))
    state = Depth.from_image(target_HW, target_HW, DepthOptions(crop="nyu_eigen"))
    assert state.pixels == (471 - 45) * (601 - 41)


def test_several_invalid_codes() -> None:
    raw_HW = np.array([[0, 1500, 65535, 2000]], np.uint16)
    depth_HW = target_depth(raw_HW, scale=0.001, invalid=(0, 65535))
    np.testing.assert_allclose(depth_HW, [[math.nan, 1.5, math.nan, 2]])
    assert Depth.from_image(np.ones((1, 4)), depth_HW).pixels == 2


def test_bad_input() -> None:
    with pytest.raises(TargetMismatchError, match=r"\(2, 2\)"):
        Depth.from_image(np.ones((1, 2)), np.ones((2, 2)))
    with pytest.raises(TargetMismatchError):
        Depth.from_image(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
    for bad in ({"alignment": "mean"}, {"crop": "eigen"}, {"min_depth": 0}, {"min_depth": 5, "max_depth": 4}):
        with pytest.raises(ConfigError):
            DepthOptions(**bad)


def test_the_curve_meets_the_deltas(pair: tuple[Any, Any]) -> None:
    state = Depth.from_image(*pair)
    thresholds, share = state.delta_curve()
    figures = state.compute()
    for power in (1, 2, 3):
        at = int(np.argmin(abs(thresholds - 1.25**power)))
        assert thresholds[at] == pytest.approx(1.25**power)
        assert share[at] == pytest.approx(figures[f"delta{power}"], abs=1e-4)
    assert thresholds[0] == 1
    assert (np.diff(share) >= 0).all()
    log_ratio = np.log(pair[0].astype(float) / pair[1])
    edges = np.concatenate([[-np.inf], RATIO_EDGES, [np.inf]])
    np.testing.assert_array_equal(state.log_ratio, np.histogram(log_ratio, edges)[0])


def states(seed: int) -> list[Depth]:
    found = [Depth.from_image(*case, DepthOptions(max_depth=7)) for case in images(seed)]
    return [*found, one([1], [math.nan])]


@LAW
@given(st.integers(0, 2**32), st.integers(0, 7), st.randoms(use_true_random=False))
def test_any_partition_and_order_is_the_same_value(seed: int, cut: int, shuffle: random.Random) -> None:
    parts = states(seed)
    whole = Depth.empty()
    for part in parts:
        whole = whole.merge(part)
    shuffle.shuffle(parts)
    left, right = Depth.empty(), Depth.empty()
    for part in parts[:cut]:
        left = part.merge(left)
    for part in parts[cut:]:
        right = right.merge(part)
    assert right.merge(left) == whole
    assert (right.merge(left).compute(), hash(left.merge(right))) == (whole.compute(), hash(whole))


@LAW
@given(st.integers(0, 2**32))
def test_laws(seed: int) -> None:
    a, b, c, *_ = states(seed)
    assert a.merge(b) == b.merge(a) != a
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(Depth.empty()) == a == Depth.empty().merge(a)


@LAW
@given(st.integers(0, 2**32))
def test_rows_are_lossless(seed: int) -> None:
    parts = states(seed)
    whole = Depth.empty()
    for part in parts:
        whole = whole.merge(part)
    rows = pa.array([part.to_row() for part in [*parts, whole]] + [None], DEPTH_ERRORS)
    *again, last, _ = rows.to_pylist()
    assert [Depth.from_row(row) for row in again] == parts
    assert Depth.from_row(last) == whole
    assert Depth.from_rows(rows[: len(parts)]) == whole
    assert Depth.from_rows(pa.chunked_array([rows[3 : len(parts)], rows[:3], rows[-1:]])) == whole
    assert Depth.from_rows(rows[:0]) == Depth.empty() == Depth.from_row(Depth.empty().to_row())


def test_a_row_of_one_image_is_readable() -> None:
    row = one([2], [1]).to_row()
    assert row["per_image"]["AbsRel"] == [1.0]
    assert row["per_pixel"]["sq"] == [1.0]


@pytest.mark.parametrize("change", [{"images": None}, {"per_image": {}}, {"below_delta": [1]}, {"log_ratio": []}])
def test_rows_that_hold_no_sums(change: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="depth errors"):
        Depth.from_row({**Depth.empty().to_row(), **change})
    with pytest.raises(SchemaError, match="depth errors"):
        Depth.from_rows(pa.array([1]))
