"""MiDaS's losses of depth whose scale and shift are unknown (Ranftl et al. 2020, arXiv:1907.01341, section 5).

Prediction and target are disparities (1 / depth) in the paper; nothing here depends on that. The paper's figure of one
image is a mean over its M valid pixels; terms are the sum over images, to be divided by the number of those with a
valid pixel.

Axes: B batch, H rows, W columns, M valid pixels of one image.
"""

from typing import Literal

import torch
from torch import Tensor

from pipeline.training.losses.depth import comparable
from pipeline.training.losses.term import LossTerm, no_loss

__all__ = ["Alignment", "align_least_squares", "gradient_matching", "normalise_robust", "scale_shift_invariant"]

Alignment = Literal["least_squares", "robust"]
# Under this share of the values' size their spread is rounding of float32, and no scale can be told from it.
SPREAD = 1e-6


def scale_shift_invariant(
    pred_BHW: Tensor,
    target_BHW: Tensor,
    valid_BHW: Tensor,
    *,
    alignment: Alignment = "robust",
    trim: float = 0.2,
    gradient_scales: int = 4,
    gradient_factor: float = 0.5,
) -> LossTerm:
    """L_ssi + alpha L_reg: the data term of each image after its own alignment, and gradient matching.

    alignment: `least_squares` is L_ssimse, sum(d^2) / (2 M) after `align_least_squares`. `robust` is
        L_ssimae, sum(|d|) / (2 M) of what `normalise_robust` gives; with `trim` it is L_ssitrim.
    trim: the share of the largest residuals that is left out of a robust data term; the paper's 0.2 keeps U_m = 0.8 M.
    gradient_scales: K, 4 in the paper; 0 leaves gradient matching out. gradient_factor: alpha, 0.5 in the paper.
    """
    pred_BHW, target_BHW = comparable(pred_BHW, target_BHW, valid_BHW, 0.0)
    total = no_loss(pred_BHW)
    for pred_HW, target_HW, valid_HW in zip(pred_BHW, target_BHW, valid_BHW, strict=True):
        if valid_HW.any():
            if alignment == "least_squares":
                residual_HW = align_least_squares(pred_HW, target_HW, valid_HW) - target_HW
                data = residual_HW[valid_HW].square().mean() / 2
            else:
                residual_HW = normalise_robust(pred_HW, valid_HW) - normalise_robust(target_HW, valid_HW)
                data = _trimmed_mean(residual_HW[valid_HW].abs(), trim) / 2
            total = total + data
            if gradient_scales:
                total = total + gradient_factor * gradient_matching(residual_HW, valid_HW, scales=gradient_scales)
    return LossTerm(total, valid_BHW.flatten(1).any(1).sum().to(total.dtype))


def align_least_squares(pred_HW: Tensor, target_HW: Tensor, valid_HW: Tensor) -> Tensor:
    """s * pred + t, with the s and t that minimise the squared error over the valid pixels, in closed form.

    Written with centred values: the paper's 2 x 2 normal equations lose all digits of float32 where the shift is large
    beside the spread. A constant prediction has s = 0.
    """
    pred_M, target_M = pred_HW[valid_HW], target_HW[valid_HW]
    pred_mean, target_mean = pred_M.mean(), target_M.mean()
    centred_M = pred_M - pred_mean
    variance = centred_M.square().mean()
    flat = variance <= (SPREAD * pred_mean.detach()).square()
    scale = (centred_M * (target_M - target_mean)).mean() / torch.where(flat, 1, variance)
    return torch.where(flat, 0, scale) * (pred_HW - pred_mean) + target_mean


def normalise_robust(values_HW: Tensor, valid_HW: Tensor) -> Tensor:
    """(values - median) / mean absolute deviation from it, both over the valid pixels.

    The median of an even number is the lower one of the middle two. Constant values become 0.
    """
    values_M = values_HW[valid_HW]
    median = values_M.median()
    deviation = (values_M - median).abs().mean()
    flat = deviation <= SPREAD * median.detach().abs()
    return torch.where(flat, 0, (values_HW - median) / torch.where(flat, 1, deviation))


def gradient_matching(residual_HW: Tensor, valid_HW: Tensor, *, scales: int = 4) -> Tensor:
    """L_reg of one image: at `scales` resolutions, each half the one before (every second row and column), the
    sum of |dR/dx| + |dR/dy| over neighbours that are both valid, divided by the valid pixels of that resolution.

    The paper prints one M for all resolutions; the authors' code takes each one's own, so that coarse ones count as
    much as fine ones, and so does this.
    """
    total = no_loss(residual_HW)
    for scale in range(scales):
        step = 2**scale
        part_HW, known_HW = residual_HW[::step, ::step], valid_HW[::step, ::step]
        across = torch.where(known_HW[:, 1:] & known_HW[:, :-1], part_HW[:, 1:] - part_HW[:, :-1], 0).abs().sum()
        down = torch.where(known_HW[1:] & known_HW[:-1], part_HW[1:] - part_HW[:-1], 0).abs().sum()
        total = total + (across + down) / known_HW.sum().clamp_min(1)
    return total


def _trimmed_mean(values_M: Tensor, trim: float) -> Tensor:
    """The sum of the smallest (1 - trim) M values, rounded down, divided by M."""
    kept = int(len(values_M) * (1 - trim))
    return values_M.sort().values[:kept].sum() / len(values_M)
