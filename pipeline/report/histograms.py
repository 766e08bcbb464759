"""Histograms that any order and partition of the values fills alike: their edges do not hang on what comes first."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "LogHistogram", "ShareHistogram"]

Values = npt.NDArray[np.floating[Any]]

BINS = 20
# Fine bins of LogHistogram: 16 to a factor of two, from 2**-32 to 2**32, what is beyond in the outermost.
PER_OCTAVE, OCTAVES = 16, 32


class ShareHistogram:
    """Values from 0 to 1 in 20 bins of one width, 1 in the last."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: Values) -> None:
        """NaN is left out."""
        place = np.minimum((values[~np.isnan(values)] * BINS).astype(np.int64), BINS - 1)
        self._counts += np.bincount(np.maximum(place, 0), minlength=BINS)

    def compute(self) -> dict[str, Any] | None:
        """{edges (21), counts (20)}; None without values."""
        if not self._counts.any():
            return None
        return {"edges": [n / BINS for n in range(BINS + 1)], "counts": self._counts.tolist()}


class LogHistogram:
    """Positive values of any size in at most 20 bins of one ratio, which cover what occurs; 0 is in the first."""

    def __init__(self) -> None:
        self._counts = np.zeros(2 * OCTAVES * PER_OCTAVE, np.int64)

    def add(self, values: Values) -> None:
        """NaN is left out."""
        known = np.maximum(values[~np.isnan(values)], math.ldexp(1, -OCTAVES))
        place = np.floor(np.log2(known) * PER_OCTAVE).astype(np.int64) + OCTAVES * PER_OCTAVE
        self._counts += np.bincount(np.minimum(place, len(self._counts) - 1), minlength=len(self._counts))

    def compute(self) -> dict[str, Any] | None:
        """{edges (n + 1), counts (n)}, edges ascending; None without values."""
        occurs = np.flatnonzero(self._counts)
        if not len(occurs):
            return None
        first, last = int(occurs[0]), int(occurs[-1]) + 1
        step = -(-(last - first) // BINS)
        starts = np.arange(first, last, step)
        ends = [*starts.tolist(), int(starts[-1]) + step]
        return {
            "edges": [2.0 ** (end / PER_OCTAVE - OCTAVES) for end in ends],
            "counts": np.add.reduceat(self._counts[:last], starts).tolist(),
        }
