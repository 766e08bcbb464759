"""AP, AP50 and AP75 of the same records under many weightings of the images: what a bootstrap asks for.

What does not hang on the weights is sorted and cut once. Precision only rises where a target is found, so a curve is
taken at its hits alone, and the curves of all categories and thresholds lie one after the other in the same arrays.

Axes beside those of detection.py: I images, H hits, S curves (threshold, category).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.metrics.detection import RECALLS, THRESHOLDS, Detection
from pipeline.metrics.detection_match import AREAS

__all__ = ["FIGURES", "WeightedAP"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FIGURES = ("AP", "AP50", "AP75")
POINTS = len(RECALLS)


class WeightedAP:
    """The first three figures of `Detection.compute(weights)`, for one weighting after the other."""

    def __init__(self, state: Detection) -> None:
        self.categories = state.categories
        image = np.repeat(np.arange(len(state.image_key)), state.predictions)
        place = np.searchsorted(self.categories, state.category_id)
        # By category, then score, then image, as `Detection` has them; without those of categories without targets.
        order = np.lexsort((-state.score, place))
        order = order[np.isin(state.category_id[order], self.categories)]
        place = place[order]
        self._image_D = image[order]
        start_K = np.searchsorted(place, np.arange(len(self.categories)))

        shift_T1 = np.arange(len(THRESHOLDS))[:, None]
        ignored_TD = ((state.ignored[order] >> shift_T1) & 1).astype(bool)
        matched_TD = ((state.matched[order] >> shift_T1) & 1).astype(bool)
        threshold_H, self._place_H = np.nonzero(matched_TD & ~ignored_TD)
        category_H = place[self._place_H]
        self._category_H = category_H
        self._curve_H = threshold_H * len(self.categories) + category_H
        self._first_H = np.searchsorted(self._curve_H, self._curve_H)
        self._start_H = start_K[category_H]
        # Predictions that do not count, and for each hit which of them lie between its category's start and itself.
        threshold_J, place_J = np.nonzero(ignored_TD)
        self._ignored_J = self._image_D[place_J]
        size = len(order) + 1
        key_J = threshold_J * size + place_J
        self._from_H = np.searchsorted(key_J, threshold_H * size + self._start_H)
        self._to_H = np.searchsorted(key_J, threshold_H * size + self._place_H)

        target_image = np.repeat(np.arange(len(state.image_key)), state.targets)
        known = np.isin(state.target_category_id, self.categories)
        self._target_image_G = target_image[known]
        self._target_place_G = np.searchsorted(self.categories, state.target_category_id[known])
        self._target_count_G = state.target_count[:: len(AREAS)][known].astype(np.int64)

    def compute(self, weights: npt.NDArray[np.integer[Any]]) -> Floats:
        """FIGURES, (3,), as if image i of the records occurred weights[i] times; NaN without targets that count."""
        weight_I = np.asarray(weights, np.int64)
        target_K = self._targets(weight_I)
        known_K = target_K > 0
        if not known_K.any():
            return np.full(len(FIGURES), np.nan)
        precision_TK = self._precision(weight_I, target_K).reshape(len(THRESHOLDS), -1)[:, known_K]
        return np.array([precision_TK.mean(), precision_TK[0].mean(), precision_TK[5].mean()])

    def _targets(self, weight_I: Ints) -> Ints:
        counts = self._target_count_G * weight_I[self._target_image_G]
        # The weights are sums of whole numbers below 2**53, so float64 holds them exactly.
        return np.bincount(self._target_place_G, counts, len(self.categories)).astype(np.int64)

    def _precision(self, weight_I: Ints, target_K: Ints) -> Floats:
        """Mean precision over the recall points of each curve, (S,)."""
        weight_D = weight_I[self._image_D]
        seen = _running(weight_D)
        found = _running(weight_D[self._place_H])
        ignored = _running(weight_I[self._ignored_J])
        hit_H = found[1:] - found[self._first_H]
        all_H = seen[self._place_H + 1] - seen[self._start_H] - ignored[self._to_H] + ignored[self._from_H]
        precision_H = hit_H / np.maximum(all_H, 1)
        # The last recall point that each hit reaches, by the float comparison of COCOeval.
        recall_H = hit_H / np.maximum(target_K, 1)[self._category_H]
        point_H = np.searchsorted(RECALLS, recall_H, "right") - 1
        best_SR = np.zeros((len(THRESHOLDS) * len(target_K), POINTS))
        cell_H = self._curve_H * POINTS + point_H
        change = np.flatnonzero(np.diff(cell_H, prepend=-1))
        if len(change):
            best_SR.ravel()[cell_H[change]] = np.maximum.reduceat(precision_H, change)
        envelope_SR: Floats = np.maximum.accumulate(best_SR[:, ::-1], axis=1)
        mean_S: Floats = envelope_SR.mean(axis=1)
        return mean_S


def _running(values: Ints) -> Ints:
    """Sums of the first 0, 1, 2, ... values."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums
