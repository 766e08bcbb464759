"""Depth errors: AbsRel, SqRel, RMSE, RMSElog, log10, SILog and delta1-3, per image and over all pixels.

Eigen et al. 2014 define them. Each is computed per image and then averaged over images, as its official scripts do; the
sums over all pixels are kept beside it. g is the target's depth, p the prediction's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import SchemaError, TargetMismatchError
from pipeline.metrics.depth_align import DepthKind, DepthOptions, align, crop_window
from pipeline.metrics.exact import EXACT_SUM, ExactSum

__all__ = ["DEPTH_ERRORS", "FIGURES", "RATIO_EDGES", "Depth", "DepthOptions"]

FIGURES = (
    "AbsRel",  # mean |g - p| / g
    "SqRel",  # mean (g - p)**2 / g, in units of depth: what most papers print
    "SqRel_squared",  # mean (g - p)**2 / g**2, without a unit
    "RMSE",
    "RMSElog",
    "log10",  # mean |log10 g - log10 p|
    "SILog",  # 100 * sqrt(var(ln p - ln g)), as KITTI's benchmark prints it
    "delta1",  # share of pixels with max(g / p, p / g) < 1.25, 1.25**2, 1.25**3
    "delta2",
    "delta3",
)
# What is summed over pixels; the figures follow from these, the pixels and the counts below each delta.
SUMS = ("abs_rel", "sq_rel", "sq_rel_squared", "sq", "log", "sq_log", "abs_log10")
DELTAS = (1.25, 1.25**2, 1.25**3)
# Bins of ln(p / g): eight to a factor of 1.25, from a factor of 1.25**-5 to 1.25**5, and one on each side for the rest.
BINS_PER_DELTA, DELTA_SPAN = 8, 5
RATIO_EDGES = np.arange(-BINS_PER_DELTA * DELTA_SPAN, BINS_PER_DELTA * DELTA_SPAN + 1) * math.log(1.25) / BINS_PER_DELTA
RATIO_BINS = len(RATIO_EDGES) + 1

DEPTH_ERRORS = pa.struct(
    [
        ("images", pa.int64()),
        ("images_without_evidence", pa.int64()),
        ("pixels", pa.int64()),
        ("pixels_without_prediction", pa.int64()),
        ("per_image", pa.struct([(name, EXACT_SUM) for name in FIGURES])),
        ("per_pixel", pa.struct([(name, EXACT_SUM) for name in SUMS])),
        ("below_delta", pa.list_(pa.int64())),
        ("log_ratio", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Depth:
    """Sums over images and pixels; adding them is exact, so no order or grouping of the images changes a bit.

    images: those with a scored pixel. pixels_without_prediction: scored as min_depth. per_image: sums of FIGURES over
    images. per_pixel: sums of SUMS. below_delta: pixels below each of DELTAS. log_ratio: pixels by ln(p / g), the bins
    of RATIO_EDGES with one before and one after.
    """

    images: int = 0
    images_without_evidence: int = 0
    pixels: int = 0
    pixels_without_prediction: int = 0
    per_image: tuple[ExactSum, ...] = (ExactSum(),) * len(FIGURES)
    per_pixel: tuple[ExactSum, ...] = (ExactSum(),) * len(SUMS)
    below_delta: tuple[int, ...] = (0,) * len(DELTAS)
    log_ratio: tuple[int, ...] = (0,) * RATIO_BINS

    @classmethod
    def empty(cls) -> "Depth":
        return cls()

    @classmethod
    def from_image(
        cls,
        pred_HW: npt.NDArray[np.floating[Any]],
        target_HW: npt.NDArray[np.floating[Any]],
        options: DepthOptions | None = None,
        kind: DepthKind = "metric_m",
    ) -> "Depth":
        """Score one image. target_HW: depth, not finite where unknown (see `target_depth`). kind: what pred_HW holds.

        Raises TargetMismatchError where the sizes differ, PredictError for infinite depth without a max_depth.
        """
        options = options or DepthOptions()
        if pred_HW.shape != target_HW.shape or pred_HW.ndim != 2:
            raise TargetMismatchError(f"expected depth of the target's size {target_HW.shape}, got {pred_HW.shape}")
        window = crop_window(options.crop, *target_HW.shape)
        target, pred = target_HW[window], pred_HW[window]
        with np.errstate(invalid="ignore"):
            valid = (target > options.min_depth) & (target < (options.max_depth or math.inf))
        g, raw = target[valid].astype(np.float64), pred[valid].astype(np.float64)
        if not len(g):
            return cls(images_without_evidence=1)
        p = align(raw, g, kind, options)
        error = np.abs(g - p)
        log_ratio = np.log(p / g)
        sums = {
            "abs_rel": (error / g).sum(),
            "sq_rel": (error**2 / g).sum(),
            "sq_rel_squared": ((error / g) ** 2).sum(),
            "sq": (error**2).sum(),
            "log": log_ratio.sum(),
            "sq_log": (log_ratio**2).sum(),
            "abs_log10": np.abs(log_ratio).sum() / math.log(10),
        }
        ratio = np.maximum(g / p, p / g)
        below = tuple(int(np.count_nonzero(ratio < delta)) for delta in DELTAS)
        bins = np.clip(np.floor(log_ratio * (BINS_PER_DELTA / math.log(1.25))), -RATIO_BINS, RATIO_BINS)
        place = np.clip(bins.astype(np.int64) + RATIO_BINS // 2, 0, RATIO_BINS - 1)
        # The spread of one image is taken around its mean: the difference of sums would lose digits.
        figures = _figures({name: float(value) for name, value in sums.items()}, below, len(g))
        figures["SILog"] = 100 * float(log_ratio.std())
        return cls(
            images=1,
            pixels=len(g),
            pixels_without_prediction=int(np.isnan(raw).sum()),
            per_image=tuple(ExactSum.of([figures[name]]) for name in FIGURES),
            per_pixel=tuple(ExactSum.of([float(sums[name])]) for name in SUMS),
            below_delta=below,
            log_ratio=tuple(np.bincount(place, minlength=RATIO_BINS).tolist()),
        )

    def merge(self, other: "Depth") -> "Depth":
        return Depth(
            images=self.images + other.images,
            images_without_evidence=self.images_without_evidence + other.images_without_evidence,
            pixels=self.pixels + other.pixels,
            pixels_without_prediction=self.pixels_without_prediction + other.pixels_without_prediction,
            per_image=tuple(a.merge(b) for a, b in zip(self.per_image, other.per_image, strict=True)),
            per_pixel=tuple(a.merge(b) for a, b in zip(self.per_pixel, other.per_pixel, strict=True)),
            below_delta=tuple(a + b for a, b in zip(self.below_delta, other.below_delta, strict=True)),
            log_ratio=tuple(a + b for a, b in zip(self.log_ratio, other.log_ratio, strict=True)),
        )

    def compute(self) -> dict[str, float]:
        """Means over images, each of which counts the same. NaN without evidence."""
        return {name: total.divide(self.images) for name, total in zip(FIGURES, self.per_image, strict=True)}

    def compute_pixels(self) -> dict[str, float]:
        """The same figures over all pixels at once: larger images, and those with denser targets, count for more."""
        if not self.pixels:
            return dict.fromkeys(FIGURES, math.nan)
        sums = {name: total.compute() for name, total in zip(SUMS, self.per_pixel, strict=True)}
        return _figures(sums, self.below_delta, self.pixels)

    def delta_curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Thresholds on max(g / p, p / g), 1 to 1.25**5, and the share of pixels below each; NaN without evidence."""
        middle = RATIO_BINS // 2
        counts = np.array(self.log_ratio)
        either = counts[middle:-1] + counts[middle - 1 : 0 : -1]
        share = np.concatenate([[0], np.cumsum(either)]) / (self.pixels or math.nan)
        return np.exp(RATIO_EDGES[middle - 1 :]), share

    def to_row(self) -> dict[str, Any]:
        """A value of DEPTH_ERRORS."""
        return {
            "images": self.images,
            "images_without_evidence": self.images_without_evidence,
            "pixels": self.pixels,
            "pixels_without_prediction": self.pixels_without_prediction,
            "per_image": {name: total.to_row() for name, total in zip(FIGURES, self.per_image, strict=True)},
            "per_pixel": {name: total.to_row() for name, total in zip(SUMS, self.per_pixel, strict=True)},
            "below_delta": list(self.below_delta),
            "log_ratio": list(self.log_ratio),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Depth":
        """The inverse of `to_row`. Raises SchemaError for a row that is none."""
        try:
            state = cls(
                images=int(row["images"]),
                images_without_evidence=int(row["images_without_evidence"]),
                pixels=int(row["pixels"]),
                pixels_without_prediction=int(row["pixels_without_prediction"]),
                per_image=tuple(ExactSum.from_row(row["per_image"][name]) for name in FIGURES),
                per_pixel=tuple(ExactSum.from_row(row["per_pixel"][name]) for name in SUMS),
                below_delta=tuple(int(count) for count in row["below_delta"]),
                log_ratio=tuple(int(count) for count in row["log_ratio"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(f"expected sums of depth errors: {type(error).__name__}: {error}") from error
        if len(state.below_delta) != len(DELTAS) or len(state.log_ratio) != RATIO_BINS:
            raise SchemaError(f"expected {len(DELTAS)} and {RATIO_BINS} counts of depth errors")
        return state

    @classmethod
    def from_rows(cls, rows: pa.Array | pa.ChunkedArray) -> "Depth":
        """All rows of a column of DEPTH_ERRORS at once; nulls are left out. Raises SchemaError for another type and
        for values that are not finite."""
        if rows.type != DEPTH_ERRORS:
            raise SchemaError(f"expected a column of depth errors, got {rows.type}")
        chunks = rows.chunks if isinstance(rows, pa.ChunkedArray) else [rows]
        state = cls.empty()
        try:
            for chunk in chunks:
                state = state.merge(cls._fold(chunk.drop_null()))
        except ValueError as error:
            raise SchemaError(f"expected sums of depth errors: {error}") from error
        return state

    @classmethod
    def _fold(cls, rows: pa.StructArray) -> "Depth":
        columns = dict(zip((field.name for field in DEPTH_ERRORS), rows.flatten(), strict=True))

        def total(name: str) -> int:
            return int(columns[name].to_numpy(zero_copy_only=False).sum())

        def exact(name: str) -> tuple[ExactSum, ...]:
            # Each cell is a list of floats whose sum it is: one flat array holds the whole column's.
            return tuple(
                ExactSum.of(cells.flatten().to_numpy(zero_copy_only=False)) for cells in columns[name].flatten()
            )

        def counts(name: str, size: int) -> tuple[int, ...]:
            flat = np.asarray(columns[name].flatten().to_numpy(zero_copy_only=False), np.int64)
            if len(flat) != size * len(rows):
                raise SchemaError(f"expected {size} counts in each {name} of depth errors")
            return tuple(flat.reshape(-1, size).sum(axis=0).tolist())

        return cls(
            images=total("images"),
            images_without_evidence=total("images_without_evidence"),
            pixels=total("pixels"),
            pixels_without_prediction=total("pixels_without_prediction"),
            per_image=exact("per_image"),
            per_pixel=exact("per_pixel"),
            below_delta=counts("below_delta", len(DELTAS)),
            log_ratio=counts("log_ratio", RATIO_BINS),
        )


def _figures(sums: Mapping[str, float], below: tuple[int, ...], pixels: int) -> dict[str, float]:
    mean = {name: total / pixels for name, total in sums.items()}
    return {
        "AbsRel": mean["abs_rel"],
        "SqRel": mean["sq_rel"],
        "SqRel_squared": mean["sq_rel_squared"],
        "RMSE": math.sqrt(mean["sq"]),
        "RMSElog": math.sqrt(mean["sq_log"]),
        "log10": mean["abs_log10"],
        "SILog": 100 * math.sqrt(max(mean["sq_log"] - mean["log"] ** 2, 0.0)),
        **{f"delta{power}": count / pixels for power, count in enumerate(below, 1)},
    }
