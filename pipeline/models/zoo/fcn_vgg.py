"""FCN on VGG16: a classification network whose classifier is convolutions, upsampled 32, 16 or 8 times.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.upsample import Enlarge, Upsampling
from pipeline.models.zoo.vgg import adapt_vgg16, check_options, conv_stages, he_init

__all__ = ["FCN", "adapt_fcn", "fcn8s", "fcn16s", "fcn32s"]

# The first convolution of the authors' networks has a padding of 100, which is 99 zeros around the image and then
# VGG16's own 1.
#
# Why so many: fc6 looks at 7x7 cells of 32 pixels without padding, so it takes 6 cells away, and without a margin
# nothing would be left of images under 192 pixels; 99 on each side are the 96 that it takes, and 3.
# Where things stand after that: cell j of a stride s covers pixels s j - 99 to s j - 99 + s - 1. fc6's unit j has its
# middle in cell j + 3, at pixel 32 (j + 3) + 15.5 - 99 = 32 j + 12.5. A transposed convolution of kernel 2 s and stride
# s puts value j at s j + s - 0.5, so 32s has that unit at 32 j + 31.5: pixel x is at x + 19. The other numbers follow
# in the same way, and are those of the authors' networks.
MARGIN = 99
FINAL_CROP = {32: 19, 16: 27, 8: 31}
# Where a stage's scores begin that lie on the upsampled ones: cells of that stage.
SKIPS = {32: (), 16: (("pool4", 5),), 8: (("pool4", 5), ("pool3", 9))}


class FCN(nn.Module):
    """FCN (Long, Shelhamer, Darrell 2015, https://arxiv.org/abs/1411.4038).

    VGG16 with its classifier as convolutions; 1x1 convolutions score the classes on fc7, and on pool4 and pool3, which
    the upsampled scores are added to. Scores begin at 0, so a network with a skip begins as the one without it: 16s is
    trained from a checkpoint of 32s, and 8s from one of 16s (`partial_weights`; the names are the same). Upsampling by
    2 begins as bilinear interpolation and learns; the last one is held at that (section 4.3). Poolings round up, as in
    the authors' Caffe, so that any size goes in.

    num_classes: K. stride: of the scores that are upsampled last, 32, 16 or 8. width: channels of VGG16's first stage.
    hidden: units of fc6 and fc7. upsample: `transposed` as in the paper, `bilinear` or `nearest`, which learn nothing;
    scores cannot be upsampled by `bed_of_nails` or `max_unpool`, which leave holes, and no pooling has K channels.
    dropout: behind fc6 and fc7. Raises ValueError for options that make no sense.
    """

    def __init__(
        self,
        num_classes: int,
        stride: int,
        width: int = 64,
        hidden: int = 4096,
        upsample: Upsampling = "transposed",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_options(num_classes, width=width, hidden=hidden)
        if stride not in FINAL_CROP:
            raise ValueError(f"stride must be 32, 16 or 8, got {stride}")
        self.stride = stride
        stages = conv_stages(width)
        self.pools = [f"pool{name.removeprefix('conv')}" for name in stages]
        stages["fc6"] = nn.Conv2d(8 * width, hidden, 7)
        stages["fc7"] = nn.Conv2d(hidden, hidden, 1)
        self.encoder = nn.ModuleDict(stages)
        he_init(self.encoder)
        channels = {"fc7": hidden, "pool4": 8 * width, "pool3": 4 * width}
        heads = ["fc7", *(name for name, _ in SKIPS[stride])]
        self.score = nn.ModuleDict({name: nn.Conv2d(channels[name], num_classes, 1) for name in heads})
        for head in self.score.parameters():
            nn.init.zeros_(head)
        self.up = nn.ModuleDict({name: Enlarge(num_classes, 2, upsample, learned=True) for name in heads[1:]})
        self.final = Enlarge(num_classes, stride, upsample)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, for a normalised float image_BCHW of any size."""
        height, width = image_BCHW.shape[-2:]
        features = functional.pad(image_BCHW, (MARGIN, MARGIN, MARGIN, MARGIN))
        pooled: dict[str, Tensor] = {}
        for pool, name in zip(self.pools, self.encoder, strict=False):
            features = functional.max_pool2d(self.encoder[name](features), 2, ceil_mode=True)
            pooled[pool] = features
        for name in ("fc6", "fc7"):
            features = self.dropout(functional.relu(self.encoder[name](features)))
        scores: Tensor = self.score["fc7"](features)
        for name, offset in SKIPS[self.stride]:
            scores = self.up[name](scores)
            scores = scores + _cropped(self.score[name](pooled[name]), offset, *scores.shape[-2:])
        return _cropped(self.final(scores), FINAL_CROP[self.stride], height, width)


def fcn32s(
    num_classes: int, width: int = 64, hidden: int = 4096, upsample: Upsampling = "transposed", dropout: float = 0.5
) -> FCN:
    """FCN-32s: the scores of fc7 alone."""
    return FCN(num_classes, 32, width, hidden, upsample, dropout)


def fcn16s(
    num_classes: int, width: int = 64, hidden: int = 4096, upsample: Upsampling = "transposed", dropout: float = 0.5
) -> FCN:
    """FCN-16s: and those of pool4."""
    return FCN(num_classes, 16, width, hidden, upsample, dropout)


def fcn8s(
    num_classes: int, width: int = 64, hidden: int = 4096, upsample: Upsampling = "transposed", dropout: float = 0.5
) -> FCN:
    """FCN-8s: and those of pool3."""
    return FCN(num_classes, 8, width, hidden, upsample, dropout)


adapt_fcn = adapt_vgg16()


def _cropped(values: Tensor, offset: int, height: int, width: int) -> Tensor:
    return values[..., offset : offset + height, offset : offset + width]
