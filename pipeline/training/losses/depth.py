"""Losses of metric depth: L1, L2 and smooth L1 by pixel, L1 of its logarithm, and the scale-invariant log error.

Axes: B batch, H rows, W columns. Targets are depth in metres, NaN where it is unknown; pixels that are unknown, or not
between min_depth and max_depth, have no gradient and are in no divisor.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.training.losses.term import LossTerm, widened

__all__ = ["PixelLoss", "pixel_loss", "silog", "valid_depth"]

PixelLoss = Literal["l1", "l2", "smooth_l1", "log_l1"]
SMALLEST_PRED = 1e-3


def valid_depth(target_BHW: Tensor, *, min_depth: float = 1e-3, max_depth: float | None = None) -> Tensor:
    """Which pixels have a target, (B, H, W) bool: finite, over min_depth and under max_depth (as they are scored)."""
    valid_BHW = torch.isfinite(target_BHW) & (target_BHW > min_depth)
    return valid_BHW if max_depth is None else valid_BHW & (target_BHW < max_depth)


def pixel_loss(
    pred_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor, *, kind: PixelLoss = "l1", beta: float = 1.0
) -> LossTerm:
    """|d|, d^2, or smooth L1 of d = pred - target (Girshick 2015, arXiv:1504.08083, eq. 3: d^2 / (2 beta) under beta,
    |d| - beta / 2 over it): the sum over the valid pixels, to be divided by their number.

    log_l1: |log pred - log target|, whose optimum is the median, as that of l1, but which counts a metre by how near
    it is, as AbsRel does. Predictions under 0.001 as in `silog`.
    """
    pred_BHW, target_BHW = comparable(pred_BHW, target_BHW, valid_BHW, 1.0)
    if kind == "log_l1":
        pred_BHW, target_BHW, kind = pred_BHW.clamp_min(SMALLEST_PRED).log(), target_BHW.log(), "l1"
    if kind == "l1":
        loss = functional.l1_loss(pred_BHW, target_BHW, reduction="sum")
    elif kind == "l2":
        loss = functional.mse_loss(pred_BHW, target_BHW, reduction="sum")
    else:
        loss = functional.smooth_l1_loss(pred_BHW, target_BHW, reduction="sum", beta=beta)
    return LossTerm(loss, valid_BHW.sum().to(loss.dtype))


def silog(pred_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor, *, variance_focus: float = 0.5) -> LossTerm:
    """Scale-invariant log error of an image (Eigen et al. 2014, arXiv:1406.2283, eq. 4): mean(g^2) - lambda mean(g)^2
    with g = log pred - log target over its valid pixels; the sum over images, to be divided by the number of those with
    a valid pixel.

    variance_focus: lambda; 0 is the plain squared log error, 1 does not see the scale, the paper trains with 0.5 (and
    later work with 0.85). Predictions under 0.001 count as that and have no gradient: the model must end in something
    that is positive.
    """
    pred_BHW, target_BHW = comparable(pred_BHW, target_BHW, valid_BHW, 1.0)
    g_BHW = torch.where(valid_BHW, pred_BHW.clamp_min(SMALLEST_PRED).log() - target_BHW.log(), 0)
    count_B = valid_BHW.sum((1, 2)).to(g_BHW.dtype)
    divisor_B = count_B.clamp_min(1)
    mean_B = g_BHW.sum((1, 2)) / divisor_B
    # mean(g^2) - lambda mean(g)^2 without the difference of two large numbers where the scale is far off.
    centred_BHW = torch.where(valid_BHW, g_BHW - mean_B[:, None, None], 0)
    loss_B = centred_BHW.square().sum((1, 2)) / divisor_B + (1 - variance_focus) * mean_B.square()
    return LossTerm(loss_B.sum(), (count_B > 0).sum().to(loss_B.dtype))


def comparable(pred_BHW: Tensor, target_BHW: Tensor, valid_BHW: Tensor, neutral: float) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, and `neutral` where the target is not valid: a NaN that is multiplied by 0 afterwards
    would still be NaN, in the loss or in its gradient. Raises ValueError where sizes differ."""
    if pred_BHW.shape != target_BHW.shape:
        raise ValueError(f"expected depth of {tuple(target_BHW.shape)}, got {tuple(pred_BHW.shape)}")
    pred_BHW = widened(pred_BHW)
    neutral_BHW = torch.full_like(pred_BHW, neutral)
    target_BHW = target_BHW.to(pred_BHW.dtype)
    return torch.where(valid_BHW, pred_BHW, neutral_BHW), torch.where(valid_BHW, target_BHW, neutral_BHW)
