"""Losses of metric depth equal torch's and their formulas; pixels without a target leave no trace."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.metrics.depth import Depth
from pipeline.training.losses.depth import pixel_loss, silog, valid_depth
from pipeline.training.losses.midas import scale_shift_invariant
from pipeline.training.losses.term import LossTerm

LAW = settings(deadline=None, max_examples=25)
Loss = Callable[[Tensor, Tensor, Tensor], LossTerm]


def ssi(alignment: Any) -> Loss:
    return lambda pred, target, valid: scale_shift_invariant(pred, target, valid, alignment=alignment)


LOSSES: dict[str, Loss] = {
    "l1": pixel_loss,
    "l2": lambda pred, target, valid: pixel_loss(pred, target, valid, kind="l2"),
    "smooth_l1": lambda pred, target, valid: pixel_loss(pred, target, valid, kind="smooth_l1", beta=0.3),
    "log_l1": lambda pred, target, valid: pixel_loss(pred, target, valid, kind="log_l1"),
    "silog": silog,
    "ssi robust": ssi("robust"),
    "ssi least squares": ssi("least_squares"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# What a target may hold where it holds nothing, or nothing to learn from with a max_depth of 10.
NO_TARGET = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-3, 10.0, 11.0)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred_BHW = 0.5 + 5 * torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    target_BHW = 0.5 + 5 * torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    for index, value in enumerate(NO_TARGET):
        target_BHW[index % 3, index % 6, : 1 + index % 4] = value
    return pred_BHW.to(dtype), target_BHW.to(dtype), valid_depth(target_BHW, max_depth=10)


def test_valid_is_finite_and_between_the_bounds() -> None:
    target_BHW = torch.tensor([[[*NO_TARGET, 0.5, 9.99]]], dtype=torch.float64)
    assert valid_depth(target_BHW, max_depth=10)[0, 0].tolist() == [False] * 8 + [True] * 2
    assert valid_depth(target_BHW)[0, 0].tolist() == [False] * 6 + [True] * 4


def test_log_l1_is_the_mean_log_ratio() -> None:
    pred_BHW = torch.tensor([[[2.0, 8.0, 1e-6, 5.0]]], dtype=torch.float64)
    target_BHW = torch.tensor([[[4.0, 2.0, 1.0, math.nan]]], dtype=torch.float64)
    term = pixel_loss(pred_BHW, target_BHW, valid_depth(target_BHW), kind="log_l1")
    assert float(term.total) == pytest.approx(math.log(2) + math.log(4) + math.log(1000))
    assert float(term.weight) == 3


@LAW
@given(st.integers(0, 10**6))
def test_pixel_losses_are_torchs(seed: int) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(seed)
    known = pred_BHW[valid_BHW], target_BHW[valid_BHW]
    for name, expected in (
        ("l1", functional.l1_loss(*known)),
        ("l2", functional.mse_loss(*known)),
        ("smooth_l1", functional.smooth_l1_loss(*known, beta=0.3)),
    ):
        torch.testing.assert_close(LOSSES[name](pred_BHW, target_BHW, valid_BHW).mean(), expected)


@LAW
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.85, 1.0]))
def test_silog_is_eigens_formula(seed: int, variance_focus: float) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(seed)
    errors = []
    for pred_HW, target_HW, valid_HW in zip(pred_BHW.numpy(), target_BHW.numpy(), valid_BHW.numpy(), strict=True):
        d = np.log(pred_HW[valid_HW]) - np.log(target_HW[valid_HW])
        errors.append((d**2).sum() / len(d) - variance_focus * d.sum() ** 2 / len(d) ** 2)
    mean = silog(pred_BHW, target_BHW, valid_BHW, variance_focus=variance_focus).mean()
    assert float(mean) == pytest.approx(np.mean(errors), rel=1e-10)


def test_silog_of_real_depth_is_the_official_metric(shared_data: Path) -> None:
    pred_HW, target_HW = (np.load(shared_data / "depth_pair" / f"{name}.npy").squeeze() for name in ("pred", "depth"))
    pred_BHW, target_BHW = torch.from_numpy(pred_HW)[None], torch.from_numpy(target_HW)[None]
    mean = silog(pred_BHW, target_BHW, valid_depth(target_BHW), variance_focus=1).mean()
    assert 100 * math.sqrt(mean) == pytest.approx(Depth.from_image(pred_HW, target_HW).compute()["SILog"], rel=1e-5)
    assert 100 * math.sqrt(mean) == pytest.approx(18.870581, abs=1e-4)


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e2])
def test_full_variance_focus_does_not_see_the_scale(factor: float) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(0, torch.float32)
    expected = silog(pred_BHW, target_BHW, valid_BHW, variance_focus=1).mean()
    scaled = silog(pred_BHW * factor, target_BHW, valid_BHW, variance_focus=1).mean()
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=0)


def gradient(loss: Loss, pred_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor) -> tuple[Tensor, Tensor]:
    pred_BHW = pred_BHW.detach().requires_grad_()
    mean = loss(pred_BHW, target_BHW, valid_BHW).mean()
    return mean.detach(), torch.autograd.grad(mean, pred_BHW)[0]


@every_loss
@pytest.mark.parametrize("stray", [0.0, -5.0, 1e30, math.nan, math.inf])
def test_pixels_without_a_target_leave_no_trace(loss: Loss, stray: float) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(1)
    mean, slope_BHW = gradient(loss, pred_BHW, target_BHW, valid_BHW)
    other_mean, other_BHW = gradient(loss, pred_BHW.masked_fill(~valid_BHW, stray), target_BHW, valid_BHW)
    assert (other_BHW[~valid_BHW] == 0).all()
    torch.testing.assert_close(other_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_BHW, slope_BHW, rtol=1e-12, atol=0)
    assert (slope_BHW[valid_BHW] != 0).any()


@every_loss
def test_no_target_at_all_is_0_with_a_gradient_of_0(loss: Loss) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(2)
    mean, slope_BHW = gradient(loss, pred_BHW, torch.full_like(target_BHW, math.nan), torch.zeros_like(valid_BHW))
    assert mean == 0
    assert (slope_BHW == 0).all()
    alone = loss(pred_BHW[:2], target_BHW[:2], valid_BHW[:2]).mean()
    valid_BHW[2] = False
    torch.testing.assert_close(loss(pred_BHW, target_BHW, valid_BHW).mean(), alone)


@every_loss
@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_finite_differences(loss: Loss, seed: int) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(seed)
    assert torch.autograd.gradcheck(lambda x: loss(x, target_BHW, valid_BHW).mean(), pred_BHW.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pred_BHW = (0.5 + 5 * torch.rand(1, 250, 280, generator=generator)).to(dtype)
    target_BHW = 0.5 + 5 * torch.rand(1, 250, 280, generator=generator)
    valid_BHW = valid_depth(target_BHW)
    with torch.autocast("cpu", dtype=dtype):
        term = loss(pred_BHW, target_BHW, valid_BHW)
    assert (term.total.dtype, term.weight.dtype) == (torch.float32, torch.float32)
    expected = loss(pred_BHW.double(), target_BHW.double(), valid_BHW).mean()
    torch.testing.assert_close(term.mean(), expected.float(), rtol=2e-5, atol=0)
    assert gradient(loss, pred_BHW, target_BHW, valid_BHW)[1].dtype == dtype


@every_loss
def test_depth_of_another_size_is_refused(loss: Loss) -> None:
    pred_BHW, target_BHW, valid_BHW = batch(0)
    with pytest.raises(ValueError, match=r"expected depth of \(3, 6, 7\), got \(3, 6, 6\)"):
        loss(pred_BHW[..., :6], target_BHW, valid_BHW)


def test_predictions_of_silog_are_at_least_a_millimetre() -> None:
    pred_BHW = torch.tensor([[[-1.0, 0.0, 1e-4, 1.0]]], requires_grad=True)
    target_BHW = torch.ones(1, 1, 4)
    loss = silog(pred_BHW, target_BHW, valid_depth(target_BHW), variance_focus=0).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(3 / 4 * math.log(1e-3) ** 2)
    assert pred_BHW.grad is not None
    assert pred_BHW.grad.isfinite().all()
