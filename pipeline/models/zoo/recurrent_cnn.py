"""A small network that gets its own scores back and goes over the image again.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.vgg import check_options

__all__ = ["RecurrentCNN"]


class RecurrentCNN(nn.Module):
    """After the recurrent network of Pinheiro & Collobert 2014 (https://proceedings.mlr.press/v32/pinheiro14.html).

    One network of three convolutions (tanh and 2x2 pooling behind the first two) sees the image and K maps of scores,
    and gives K maps of scores. They are 0 for the first pass and what the pass before gave for each further one, so
    that with every pass a pixel's scores depend on more of the image, with no more weights. The losses of all
    passes are added up in training: each is a head of the output.

    Where ours is other than the paper: filters of an odd size, so that they have a middle; padding, so that sizes stay;
    scores come back at the image's size by bilinear interpolation, where the paper shrinks the image to the scores or
    shifts and interleaves.

    num_classes: K. passes: how often the network is applied. width: filters of the first convolution; the second has
    twice as many. kernel: their size, odd. Raises ValueError for options that make no sense.
    """

    def __init__(self, num_classes: int, passes: int = 3, width: int = 25, kernel: int = 7) -> None:
        super().__init__()
        check_options(num_classes, passes=passes, width=width, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.num_classes, self.passes = num_classes, passes
        self.net = nn.Sequential(
            nn.Conv2d(3 + num_classes, width, kernel, padding=kernel // 2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, num_classes, 1),
        )

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """logits_BKHW by the name of their pass: `out`, the last one's, at the input's size; `pass1`, `pass2`, ..., the
        earlier ones', at a quarter of it.

        The loss counts each by `loss.semantic.heads`, which must name them; 1 for each is the paper's sum. image_BCHW:
        normalised, float, H and W multiples of 4. Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % 4 or width % 4:
            raise ValueError(f"height and width must be multiples of 4, got {height} x {width}")
        scores = image_BCHW.new_zeros(len(image_BCHW), self.num_classes, height, width)
        heads: dict[str, Tensor] = {}
        for number in range(1, self.passes + 1):
            coarse = self.net(torch.cat([image_BCHW, scores.to(image_BCHW.dtype)], dim=1))
            scores = functional.interpolate(coarse, size=(height, width), mode="bilinear")
            heads[f"pass{number}"] = coarse
        heads.pop(f"pass{self.passes}")
        return {"out": scores, **heads}
