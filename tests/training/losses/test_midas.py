"""MiDaS's losses equal their equations written out in numpy, and do not see what they are invariant to."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.training.losses.midas import (
    align_least_squares,
    gradient_matching,
    normalise_robust,
    scale_shift_invariant,
)

LAW = settings(deadline=None, max_examples=25)
Array = np.ndarray[Any, Any]


def image(seed: int, height: int = 11, width: int = 14) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    valid_HW = rng.random((height, width)) < 0.7
    valid_HW[0, :3] = True
    return rng.normal(size=(height, width)), rng.random((height, width)) * 3, valid_HW


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.from_numpy(array)[None] for array in arrays]


def least_squares(pred_M: Array, target_M: Array) -> tuple[float, float]:
    design = np.stack([pred_M, np.ones_like(pred_M)], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(design, target_M, rcond=None)
    return float(scale), float(shift)


def robust(values_HW: Array, valid_HW: Array) -> Array:
    values_M = np.sort(values_HW[valid_HW])
    median = values_M[(len(values_M) - 1) // 2]
    return (values_HW - median) / np.abs(values_M - median).mean()


def gradient_term(residual_HW: Array, valid_HW: Array, scales: int) -> float:
    total = 0.0
    for scale in range(scales):
        part, known = residual_HW[:: 2**scale, :: 2**scale], valid_HW[:: 2**scale, :: 2**scale]
        differences = 0.0
        for y, x in np.argwhere(known):
            for down, across in ((0, 1), (1, 0)):
                if y + down < known.shape[0] and x + across < known.shape[1] and known[y + down, x + across]:
                    differences += abs(part[y + down, x + across] - part[y, x])
        total += differences / max(1, known.sum())
    return total


@LAW
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 4]))
def test_least_squares_is_its_equations(seed: int, scales: int) -> None:
    pred_HW, target_HW, valid_HW = image(seed)
    scale, shift = least_squares(pred_HW[valid_HW], target_HW[valid_HW])
    residual_HW = scale * pred_HW + shift - target_HW
    expected = (residual_HW[valid_HW] ** 2).sum() / (2 * valid_HW.sum())
    expected += 0.5 * gradient_term(residual_HW, valid_HW, scales)
    term = scale_shift_invariant(
        *tensors(pred_HW, target_HW, valid_HW), alignment="least_squares", gradient_scales=scales
    )
    assert float(term.mean()) == pytest.approx(expected, rel=1e-9)


@LAW
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([0, 4]))
def test_robust_is_its_equations(seed: int, trim: float, scales: int) -> None:
    pred_HW, target_HW, valid_HW = image(seed)
    residual_HW = robust(pred_HW, valid_HW) - robust(target_HW, valid_HW)
    errors = sorted(np.abs(residual_HW[valid_HW]).tolist())
    expected = math.fsum(errors[: int((1 - trim) * len(errors))]) / (2 * len(errors))
    expected += 0.7 * gradient_term(residual_HW, valid_HW, scales)
    term = scale_shift_invariant(
        *tensors(pred_HW, target_HW, valid_HW), trim=trim, gradient_scales=scales, gradient_factor=0.7
    )
    assert float(term.mean()) == pytest.approx(expected, rel=1e-9)


@LAW
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_shift_of_the_prediction_change_nothing(seed: int, scale: float, shift: float) -> None:
    pred_HW, target_HW, valid_HW = image(seed)
    moved_HW = scale * pred_HW + shift
    for options in ({"alignment": "robust"}, {"alignment": "least_squares"}):
        expected = scale_shift_invariant(*tensors(pred_HW, target_HW, valid_HW), **options).mean()  # type: ignore[arg-type]
        moved = scale_shift_invariant(*tensors(moved_HW, target_HW, valid_HW), **options).mean()  # type: ignore[arg-type]
        assert float(moved) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("alignment", ["robust", "least_squares"])
def test_a_prediction_that_is_right_up_to_scale_and_shift_has_no_loss(alignment: Any) -> None:
    _, target_HW, valid_HW = image(0)
    loss = scale_shift_invariant(*tensors(7 * target_HW + 3, target_HW, valid_HW), alignment=alignment).mean()
    assert float(loss) == pytest.approx(0, abs=1e-12)


def test_trimming_forgives_the_largest_errors() -> None:
    """A tenth of the target is nonsense: with 0.2 trimmed the data term is that of clean depth."""
    rng = np.random.default_rng(0)
    target_HW = np.linspace(1, 2, 400).reshape(20, 20)
    broken_HW = target_HW.copy()
    broken_HW[rng.random((20, 20)) < 0.1] = 50
    arrays = tensors(target_HW, broken_HW, np.ones((20, 20), bool))
    # The mean deviation of the target is inflated, so even good pixels differ by a scale; compare the two losses.
    trimmed = scale_shift_invariant(*arrays, gradient_scales=0, trim=0.2).mean()
    whole = scale_shift_invariant(*arrays, gradient_scales=0, trim=0.0).mean()
    assert float(trimmed) < 0.6 * float(whole)


def test_float32_holds_a_large_shift() -> None:
    """Disparities of 1e4 with a spread of 1: the normal equations of the paper lose them in float32."""
    rng = np.random.default_rng(0)
    target_HW, valid_HW = rng.random((30, 30)), np.ones((30, 30), bool)
    pred_HW = (1e4 + target_HW + 0.1 * rng.normal(size=(30, 30))).astype(np.float32)
    exact = scale_shift_invariant(*tensors(pred_HW.astype(np.float64), target_HW, valid_HW), alignment="least_squares")
    single = scale_shift_invariant(*tensors(pred_HW, target_HW.astype(np.float32), valid_HW), alignment="least_squares")
    assert float(single.mean()) == pytest.approx(float(exact.mean()), rel=1e-3)


DEGENERATE: dict[str, tuple[Array, Array, Array]] = {
    "constant prediction": (np.full((8, 8), 3.0), image(1, 8, 8)[1], np.ones((8, 8), bool)),
    "prediction of 0": (np.zeros((8, 8)), image(1, 8, 8)[1], np.ones((8, 8), bool)),
    "nearly constant prediction": (
        1e5 + 1e-3 * image(1, 8, 8)[0],
        image(1, 8, 8)[1],
        np.ones((8, 8), bool),
    ),
    "constant target": (image(1, 8, 8)[0], np.full((8, 8), 2.0), np.ones((8, 8), bool)),
    "both constant": (np.full((8, 8), 3.0), np.full((8, 8), 2.0), np.ones((8, 8), bool)),
    "one pixel": (*image(1, 8, 8)[:2], np.arange(64).reshape(8, 8) == 9),
    "two equal pixels": (np.full((8, 8), 3.0), image(1, 8, 8)[1], np.arange(64).reshape(8, 8) < 2),
    "most are equal": (np.where(np.arange(64) < 60, 1.0, 2.0).reshape(8, 8), image(1, 8, 8)[1], np.ones((8, 8), bool)),
    "nothing valid": (*image(1, 8, 8)[:2], np.zeros((8, 8), bool)),
    "one row": (*image(1, 1, 9)[:2], np.ones((1, 9), bool)),
}


@pytest.mark.parametrize("case", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("alignment", ["robust", "least_squares"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_degenerate_images_have_finite_losses_and_gradients(
    case: tuple[Array, Array, Array], alignment: Any, dtype: Any
) -> None:
    pred, target, valid = tensors(case[0].astype(dtype), case[1].astype(dtype), case[2])
    loss = scale_shift_invariant(pred.requires_grad_(), target, valid, alignment=alignment).mean()
    loss.backward()
    assert loss.isfinite()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    assert pred.grad.abs().max() < 1e3


def test_alignment_of_a_constant_is_the_targets_mean() -> None:
    pred, target, valid = (value[0] for value in tensors(np.full((4, 4), 9.0), *image(3, 4, 4)[1:]))
    torch.testing.assert_close(align_least_squares(pred, target, valid), target[valid].mean().expand(4, 4))
    assert (normalise_robust(pred, valid) == 0).all()


def test_gradient_matching_sees_no_edge_of_what_is_not_valid() -> None:
    residual_HW = torch.zeros(8, 8)
    valid_HW = torch.ones(8, 8, dtype=torch.bool)
    residual_HW[:, 4:], valid_HW[:, 4:] = 100.0, False
    assert float(gradient_matching(residual_HW, valid_HW)) == 0
    valid_HW[0, 4] = True
    # One pair, over 33 valid pixels; at half the size it is one of 9, then of 3, and at the coarsest no neighbour.
    expected = 100 / 33 + 100 / 9 + 100 / 3
    assert float(gradient_matching(residual_HW, valid_HW)) == pytest.approx(expected)
