"""The last layer of a model of metric depth: any number becomes metres."""

import math

import torch
from torch import Tensor, nn

__all__ = ["FIRST_DEPTH", "LogDepth"]

# Metres that new weights begin with, by their last bias: between rooms and streets.
FIRST_DEPTH = 10.0


class LogDepth(nn.Module):
    """Metres from unbounded values: min_depth * (max_depth / min_depth) ** sigmoid(value).

    So the logarithm of depth is what is predicted, evenly between the bounds: an error of a tenth costs as much near as
    far, and no depth is 0, negative or endless.
    """

    def __init__(self, min_depth: float, max_depth: float) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth < math.inf:
            raise ValueError(f"expected 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
        self.min_depth = min_depth
        self.max_depth = max_depth

    def begin_after(self, layer: nn.Conv2d, depth: float = FIRST_DEPTH) -> None:
        """Let the layer before this one, its weights new, give about `depth` metres."""
        if layer.bias is not None:
            nn.init.constant_(layer.bias, self.value_of(depth))

    def value_of(self, depth: float) -> float:
        """What becomes `depth` metres, or the middle of the range on a logarithmic scale where that is outside."""
        if not self.min_depth < depth < self.max_depth:
            return 0.0
        share = math.log(depth / self.min_depth) / math.log(self.max_depth / self.min_depth)
        return math.log(share / (1 - share))

    def forward(self, values: Tensor) -> Tensor:
        # In float32: half precision would round the exponent by a percent of the depth.
        share = values.float().sigmoid()
        return self.min_depth * torch.exp(math.log(self.max_depth / self.min_depth) * share)
