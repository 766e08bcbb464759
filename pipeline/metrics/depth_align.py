"""Bringing a prediction into the target's units before it is scored: alignment, caps and crops as in the field."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, PredictError, TargetMismatchError

__all__ = ["Alignment", "Crop", "DepthKind", "DepthOptions", "align", "crop_window", "target_depth"]

Alignment = Literal["none", "median", "least_squares", "least_squares_disparity"]
Crop = Literal["none", "nyu_eigen", "kitti_garg", "kitti_eigen"]
DepthKind = Literal["metric_m", "relative", "inverse_relative"]
Floats = npt.NDArray[np.float64]

# Rows and columns of the 480x640 frame that Eigen et al. 2014 evaluate.
NYU_EIGEN = (480, 640, slice(45, 471), slice(41, 601))
# Shares of height and width, cut to whole pixels: Garg et al. 2016 and Eigen et al. 2014, as in Monodepth's evaluation.
KITTI_CROPS = {
    "kitti_garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


@dataclass(frozen=True, kw_only=True)
class DepthOptions:
    """What to score. Two reports compare only where these are the same.

    alignment: none; median (scale by the ratio of medians); least_squares (scale and shift, fitted in depth);
        least_squares_disparity (fitted in 1 / depth, as MiDaS). Each image has its own fit, over its scored pixels.
    min_depth, max_depth: target pixels outside are not scored (both ends excluded); predictions are clamped to them
        after alignment. max_depth None: no cap (the field uses 10 for NYU, 80 for KITTI).
    crop: the window that is scored.
    """

    alignment: Alignment = "none"
    min_depth: float = 1e-3
    max_depth: float | None = None
    crop: Crop = "none"

    def __post_init__(self) -> None:
        if not 0 < self.min_depth < (self.max_depth if self.max_depth is not None else float("inf")):
            raise ConfigError(f"expected 0 < min_depth < max_depth, got {self.min_depth} and {self.max_depth}")
        for name, value, known in (
            ("alignment", self.alignment, Alignment),
            ("crop", self.crop, Crop),
        ):
            choices: tuple[str, ...] = known.__args__  # type: ignore[attr-defined]
            if value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def target_depth(
    raw_HW: npt.NDArray[Any], *, scale: float = 1.0, invalid: tuple[float, ...] = (0.0,)
) -> npt.NDArray[np.float64]:
    """A stored target as depth: NaN where the stored value is one of `invalid` (7-Scenes has 0 and 65535), else
    value * scale (0.001 for millimetres, 1 / 256 for KITTI)."""
    depth_HW = raw_HW.astype(np.float64) * scale
    depth_HW[np.isin(raw_HW, np.asarray(invalid))] = np.nan
    return depth_HW


def crop_window(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that are scored. Raises TargetMismatchError where the crop is for another size."""
    if crop == "none":
        return slice(0, height), slice(0, width)
    if crop == "nyu_eigen":
        if (height, width) != NYU_EIGEN[:2]:
            raise TargetMismatchError(f"expected depth of 640x480 for the crop nyu_eigen, got {width}x{height}")
        return NYU_EIGEN[2:]
    top, bottom, left, right = KITTI_CROPS[crop]
    return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))


def align(pred_N: Floats, target_N: Floats, kind: DepthKind, options: DepthOptions) -> Floats:
    """Predicted depth of the scored pixels in the target's units, clamped; NaN (no prediction) becomes min_depth.

    pred_N: depth, or its inverse where `kind` is inverse_relative. Pixels without a finite prediction take no part in
    the fit. Raises PredictError where the prediction is infinite and no max_depth is set.
    """
    fitted = np.isfinite(pred_N)
    cap = float("inf") if options.max_depth is None else options.max_depth
    with np.errstate(divide="ignore", invalid="ignore"):
        if options.alignment == "least_squares_disparity":
            disparity_N = pred_N if kind == "inverse_relative" else 1 / pred_N
            fitted &= np.isfinite(disparity_N)
            scale, shift = _fit(disparity_N[fitted], 1 / target_N[fitted])
            disparity_N = scale * disparity_N + shift
            # Not below 1 / cap, where it would turn negative (MiDaS); without a cap, what is not positive is endless.
            depth_N = np.where(disparity_N > 0, 1 / np.maximum(disparity_N, 1 / cap), cap)
            depth_N[np.isnan(disparity_N)] = np.nan
        else:
            depth_N = 1 / np.maximum(pred_N, 0) if kind == "inverse_relative" else pred_N
            fitted &= np.isfinite(depth_N)
            if options.alignment == "median" and fitted.any():
                depth_N = depth_N * (np.median(target_N[fitted]) / np.median(depth_N[fitted]))
            elif options.alignment == "least_squares":
                scale, shift = _fit(depth_N[fitted], target_N[fitted])
                depth_N = scale * depth_N + shift
    clamped_N = np.clip(np.where(np.isnan(depth_N), options.min_depth, depth_N), options.min_depth, cap)
    if np.isinf(clamped_N).any():
        raise PredictError("predicted depth is infinite; set max_depth to say what it counts as")
    return clamped_N


def _fit(pred_N: Floats, target_N: Floats) -> tuple[float, float]:
    """Scale and shift of least squares; a constant prediction has scale 0."""
    if not len(pred_N):
        return 1.0, 0.0
    pred_mean, target_mean = pred_N.mean(), target_N.mean()
    centred_N = pred_N - pred_mean
    variance = float(centred_N @ centred_N)
    scale = float(centred_N @ (target_N - target_mean)) / variance if variance > 0 else 0.0
    return scale, float(target_mean - scale * pred_mean)
