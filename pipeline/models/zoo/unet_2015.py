"""The U-Net of the paper: valid convolutions, and mirrored surroundings for what lies beyond the image's edge.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

import torch
from torch import Tensor, nn

__all__ = ["UNet2015"]


class UNet2015(nn.Module):
    """U-Net (Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597).

    Two 3x3 convolutions without padding per level, halving by pooling, doubling by 2x2 transposed convolutions that
    halve the channels, and the encoder's features cropped and put beside the decoder's: 572 x 572 pixels in, 388 x 388
    out. Weights are drawn from N(0, 2 / inputs), as the paper's section 3 says.

    num_classes: K. width: channels at full size; they double from level to level. depth: how often the size is halved.
    dropout: of the two lowest levels of the contracting path in training (the paper names no share; the authors'
        released network has a half).
    """

    def __init__(self, num_classes: int, width: int = 64, depth: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        if num_classes < 2 or width < 1 or depth < 1:
            raise ValueError(
                f"num_classes must be 2 or more, width and depth 1 or more, got {num_classes}, {width}, {depth}"
            )
        self.depth = depth
        channels = [width * 2**level for level in range(depth + 1)]
        inputs = [3, *channels[:-1]]
        self.encoder = nn.ModuleList(_convs(before, after) for before, after in zip(inputs, channels, strict=True))
        upwards = channels[:-1][::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * after, after, 2, stride=2) for after in upwards)
        self.decoder = nn.ModuleList(_convs(2 * after, after) for after in upwards)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # Each output of a transposed convolution of stride 2 has one tap, so its inputs are its channels.
                taps = module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1
                nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def margin(self) -> int:
        """How many pixels on each side of its output the network looks at: 92 at depth 4."""
        return 6 * (1 << self.depth) - 4

    def output_size(self, size: int) -> int:
        """The smallest size of at least `size` that the network can give: 388 at depth 4 for 373 to 388."""
        step = 1 << self.depth
        return 4 - (4 - size) // step * step

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, for a normalised float image_BCHW of any size.

        What the network sees beyond an edge is the image mirrored in its outermost pixels, as in the paper's figure 2.
        """
        height, width = image_BCHW.shape[-2:]
        rows, columns = (self._surrounded(size, image_BCHW.device) for size in (height, width))
        return self.valid_forward(image_BCHW[..., rows, :][..., columns])[..., :height, :width]

    def valid_forward(self, image_BCHW: Tensor) -> Tensor:
        """The paper's network: logits_BKHW of the middle of image_BCHW, `margin` pixels smaller on each side.

        Raises ValueError for sizes at which a pooling would meet an odd number of pixels, or nothing would be left.
        """
        for size in image_BCHW.shape[-2:]:
            inner = size - 2 * self.margin
            if inner < 1 or self.output_size(inner) != inner:
                fitting = self.output_size(max(1, inner)) + 2 * self.margin
                raise ValueError(
                    f"expected a height and width that {self.depth} levels of valid convolutions can halve, such as "
                    f"{fitting}, got {size}"
                )
        features = image_BCHW
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            features = block(self.pool(features) if level else features)
            if level >= self.depth - 1:
                features = self.dropout(features)
            skips.append(features)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            features = up(features)
            features = block(torch.cat([_cropped(skips.pop(), features), features], dim=1))
        logits_BKHW: Tensor = self.head(features)
        return logits_BKHW

    def _surrounded(self, size: int, device: torch.device) -> Tensor:
        """Which pixel stands where, along one axis of what `valid_forward` is given for an image of `size` pixels.

        Where a small image is mirrored in both edges, its reflections go on and on.
        """
        places = torch.arange(-self.margin, self.output_size(size) + self.margin, device=device)
        period = max(1, 2 * (size - 1))
        folded = places.remainder(period)
        return torch.minimum(folded, period - folded)


def _convs(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3), nn.ReLU(inplace=True), nn.Conv2d(after, after, 3), nn.ReLU(inplace=True)
    )


def _cropped(skip: Tensor, like: Tensor) -> Tensor:
    """The middle of `skip`, of the height and width of `like`."""
    top, left = ((skip.shape[axis] - like.shape[axis]) // 2 for axis in (-2, -1))
    return skip[..., top : top + like.shape[-2], left : left + like.shape[-1]]
