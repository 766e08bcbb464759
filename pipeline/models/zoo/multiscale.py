"""One small network over three sizes of the image, whose features together say what a pixel is.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.vgg import check_options

__all__ = ["MultiscaleCNN", "gaussian_pyramid", "laplacian_pyramid", "locally_normalised"]

Pyramid = Literal["laplacian", "gaussian"]
SCALES = 3
# Burt & Adelson 1983: the five taps of their pyramid, with a = 3/8.
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class MultiscaleCNN(nn.Module):
    """After the multiscale network of Farabet, Couprie, Najman, LeCun 2013 (https://doi.org/10.1109/TPAMI.2012.231).

    The image becomes a Laplacian pyramid of three bands, each brought to mean 0 and deviation 1 in the surroundings of
    each pixel. One network with the same weights for all three (7x7 convolutions with 16, 64, 256 filters, tanh and 2x2
    pooling behind the first two) gives 256 features of each; the coarser ones are enlarged to the
    finest, and a perceptron with one hidden layer classifies the 768 together. Votes of superpixels are no part of
    the network.

    Where ours is other than the paper: all filters see all maps, of RGB; the paper's see chosen ones, of YUV. Both are
    trained at once; the paper trains the features with a linear classifier first.

    num_classes: K. width: filters of the first convolution; the others have 4 and 16 times as many. hidden: units of
    the perceptron, 0 for a linear classifier. pyramid: `laplacian`, or `gaussian` for the image itself at each size.
    window: side of the surroundings, odd, in pixels; 0 to leave values as they are. Raises ValueError for options that
    make no sense.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 16,
        hidden: int = 1024,
        pyramid: Pyramid = "laplacian",
        window: int = 15,
    ) -> None:
        super().__init__()
        check_options(num_classes, width=width)
        if pyramid not in get_args(Pyramid):
            raise ValueError(f"pyramid must be one of {', '.join(get_args(Pyramid))}, got {pyramid!r}")
        if hidden < 0 or window < 0 or (window and window % 2 == 0):
            raise ValueError(f"hidden must be 0 or more, window 0 or odd, got {hidden}, {window}")
        self.pyramid, self.window = pyramid, window
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 7, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 4 * width, 7, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(4 * width, 16 * width, 7, padding=3),
        )
        together = SCALES * 16 * width
        self.classifier: nn.Module = nn.Conv2d(together, num_classes, 1)
        if hidden:
            self.classifier = nn.Sequential(
                nn.Conv2d(together, hidden, 1), nn.Tanh(), nn.Conv2d(hidden, num_classes, 1)
            )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, bilinear from a quarter of it.

        image_BCHW: normalised, float, H and W multiples of 16. Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(f"height and width must be multiples of 16, got {height} x {width}")
        logits = self.classifier(self.pyramid_features(image_BCHW))
        return functional.interpolate(logits, size=(height, width), mode="bilinear")

    def pyramid_features(self, image_BCHW: Tensor) -> Tensor:
        """Features of all scales, the finest first: (B, 48 width, H / 4, W / 4)."""
        bands = (laplacian_pyramid if self.pyramid == "laplacian" else gaussian_pyramid)(image_BCHW)
        if self.window:
            bands = [locally_normalised(band, self.window) for band in bands]
        maps = [self.features(band) for band in bands]
        size = maps[0].shape[-2:]
        coarser = [functional.interpolate(values, size=size, mode="bilinear") for values in maps[1:]]
        return torch.cat([maps[0], *coarser], dim=1)


def gaussian_pyramid(image_BCHW: Tensor, scales: int = SCALES) -> list[Tensor]:
    """The image, a half of it, a quarter of it, ...: blurred by five taps, and 2x2 pixels averaged."""
    levels = [image_BCHW]
    for _ in range(scales - 1):
        levels.append(functional.avg_pool2d(_blurred(levels[-1]), 2))
    return levels


def laplacian_pyramid(image_BCHW: Tensor, scales: int = SCALES) -> list[Tensor]:
    """Of each level of the Gaussian pyramid what the next coarser one, enlarged, does not say; of the last, all.

    Going back up from the last and adding gives the image.
    """
    levels = gaussian_pyramid(image_BCHW, scales)
    bands = [
        fine - functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        for fine, coarse in pairwise(levels)
    ]
    return [*bands, levels[-1]]


def locally_normalised(values_BCHW: Tensor, window: int, smallest: float = 1e-2) -> Tensor:
    """Mean 0 and deviation 1 in the window around each pixel, channel by channel.

    Windows are cut at the edges. smallest: deviations under it are taken for it, so that a plain surface stays plain.
    """
    mean = _window_mean(values_BCHW, window)
    variance = _window_mean(values_BCHW.square(), window) - mean.square()
    # Rounding may leave a little less than 0.
    deviation = variance.clamp(min=smallest**2).sqrt()
    return (values_BCHW - mean) / deviation


def _window_mean(values: Tensor, window: int) -> Tensor:
    return functional.avg_pool2d(values, window, 1, padding=window // 2, count_include_pad=False)


def _blurred(values_BCHW: Tensor) -> Tensor:
    taps = torch.tensor(TAPS, device=values_BCHW.device, dtype=values_BCHW.dtype)
    kernel = torch.outer(taps, taps).expand(values_BCHW.shape[1], 1, -1, -1)
    framed = functional.pad(values_BCHW, (2, 2, 2, 2), mode="replicate")
    return functional.conv2d(framed, kernel, groups=values_BCHW.shape[1])
