"""A small U-Net for semantic segmentation, the model that maskmill trains itself.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

import torch
from torch import Tensor, nn

__all__ = ["UNetSmall"]


class UNetSmall(nn.Module):
    """U-Net (Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597), cut down to run on a laptop's cores.

    What differs from the paper: padded convolutions, so that the logits have the input's size; batch normalisation;
    channels stop growing at `4 * width`; the decoder upsamples bilinearly and has one convolution per stage, because
    half of a U-Net's work is its decoder's second convolutions at full size.

    num_classes: K. width: channels at full size. depth: how often the size is halved.
    """

    def __init__(self, num_classes: int, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        if num_classes < 2 or width < 1 or depth < 1:
            raise ValueError(
                f"num_classes must be 2 or more, width and depth 1 or more, got {num_classes}, {width}, {depth}"
            )
        self.depth = depth
        channels = [width * min(2**level, 4) for level in range(depth + 1)]
        inputs = [3, *channels[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv(before, after), _conv(after, after))
            for before, after in zip(inputs, channels, strict=True)
        )
        self.decoder = nn.ModuleList(
            _conv(channels[level + 1] + channels[level], channels[level]) for level in reversed(range(depth))
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW for a normalised float image_BCHW whose H and W are multiples of 2 ** depth.

        Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % 2**self.depth or width % 2**self.depth:
            raise ValueError(f"height and width must be multiples of {2**self.depth}, got {height} x {width}")
        skips: list[Tensor] = []
        features = image_BCHW
        for level, block in enumerate(self.encoder):
            features = block(self.pool(features) if level else features)
            skips.append(features)
        skips.pop()
        for block in self.decoder:
            features = block(torch.cat([self.up(features), skips.pop()], dim=1))
        logits_BKHW: Tensor = self.head(features)
        return logits_BKHW


def _conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )
