"""The small U-Net as a model of metric depth.

Axes: B batch, C channels, H rows, W columns.
"""

from torch import Tensor, nn

from pipeline.models.zoo.log_depth import LogDepth
from pipeline.models.zoo.unet import UNetSmall

__all__ = ["DepthUNetSmall"]


class DepthUNetSmall(UNetSmall):
    """`UNetSmall` with one output: metres along the optical axis, between min_depth and max_depth.

    Every tensor but the head's has the shape and name that it has there, so a checkpoint of `unet_small` is a start.
    num_classes: not used; a depth model has one output. width, depth: as there. New weights predict about 10 m.
    """

    def __init__(
        self, num_classes: int, width: int = 16, depth: int = 4, min_depth: float = 0.1, max_depth: float = 100.0
    ) -> None:
        super().__init__(2, width, depth)
        self.head = nn.Conv2d(width, 1, 1)
        self.metres = LogDepth(min_depth, max_depth)
        self.metres.begin_after(self.head)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """depth_B1HW, float32 metres, for a normalised float image_BCHW whose H and W are multiples of 2 ** depth."""
        depth_B1HW: Tensor = self.metres(super().forward(image_BCHW))
        return depth_B1HW
