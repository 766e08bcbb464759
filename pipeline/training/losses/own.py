"""Losses that come with a model: detectors compute theirs from proposals or matched queries, inside of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.training.losses.term import LossTerm, widened

__all__ = ["OwnLosses"]


@dataclass(frozen=True, kw_only=True)
class OwnLosses:
    """An `Objective`: the losses that `ModelSpec.losses` gives, each counted by its factor.

    factors: by the model's names. The divisor is the number of images: each loss is a mean over a batch's images.
    """

    factors: Mapping[str, float]

    def terms(self, output: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, LossTerm]:
        """output: scalars by name. Raises ValueError where the names are not those of `factors`."""
        if set(output) != set(self.factors):
            raise ValueError(f"expected the losses {sorted(self.factors)}, got {sorted(output)}")
        weights = self.weights(batch)
        return {name: LossTerm(widened(output[name]) * weights[name], weights[name]) for name in self.factors}

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """batch: `image` is image_BCHW."""
        image_BCHW: Tensor = batch["image"]
        count = torch.tensor(float(len(image_BCHW)), device=image_BCHW.device)
        return dict.fromkeys(self.factors, count)
