"""U-Net's weight map as training uses it: made from an augmented example, so that its pixels are those the model sees.

Axes: H rows, W columns, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.training.augment import Example
from pipeline.training.losses.weight_map import boundary_weight_map

__all__ = ["BorderWeights"]


@dataclass(frozen=True, kw_only=True)
class BorderWeights:
    """classes: ids, in the model's taxonomy, of those whose objects are cells. class_weights: w_c, one per class.

    w0, sigma (pixels): as in `boundary_weight_map`. void_id: of the example's `semantic`.
    """

    classes: frozenset[int]
    class_weights: tuple[float, ...]
    void_id: int
    w0: float = 10.0
    sigma: float = 5.0

    def weighted(self, example: Example) -> Example:
        """The example with `pixel_weight` (H, W), float32, instead of its `panoptic`: w_c + the border's term, which
        holds the class weights, so that they are not to be applied again; 0 where the target is void."""
        index_HW, cell_HW = (_plain(example[name]) for name in ("semantic", "panoptic"))
        void_HW = index_HW == self.void_id
        class_weight_K = np.array(self.class_weights, np.float32)
        class_weight_HW = class_weight_K[np.where(void_HW, 0, index_HW)]
        weight_HW = boundary_weight_map(cell_HW, class_weight_HW, w0=self.w0, sigma=self.sigma)
        weight_HW[void_HW] = 0
        rest = {name: values for name, values in example.items() if name != "panoptic"}
        return {**rest, "pixel_weight": torch.from_numpy(weight_HW)}


def _plain(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(values.as_subclass(Tensor).numpy())
