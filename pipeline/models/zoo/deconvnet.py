"""DeconvNet: VGG16 down to one vector, and its mirror image back up.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.upsample import Upsample, Upsampling
from pipeline.models.zoo.vgg import STAGES, adapt_vgg16, check_options, conv_stages, he_init

__all__ = ["DeconvNet", "adapt_deconvnet"]

# fc6 looks at 7x7 cells of 32 pixels.
SMALLEST = 224


class DeconvNet(nn.Module):
    """DeconvNet (Noh, Hong, Han 2015, https://arxiv.org/abs/1505.04366).

    VGG16 with batch normalisation and its classifier as convolutions (fc6 of 7x7 without padding, fc7 of 1x1), a 7x7
    transposed convolution that undoes fc6, and VGG16's stages backwards with unpooling and 3x3 transposed convolutions;
    batch normalisation and a ReLU behind each. 224 x 224 pixels become one vector and 224 x 224 logits
    again; larger images have more vectors. New weights are drawn as in He et al. 2015 (arXiv:1502.01852). The paper's
    training in two stages on object proposals, and its ensemble of proposals, are no part of the network.

    num_classes: K. width: channels of VGG16's first stage. hidden: units of fc6 and fc7. upsample: between the stages
    of the decoder: `max_unpool` as in the paper, `bed_of_nails`, `nearest`, `bilinear` or `transposed`. Raises
    ValueError for options that make no sense.
    """

    def __init__(
        self, num_classes: int, width: int = 64, hidden: int = 4096, upsample: Upsampling = "max_unpool"
    ) -> None:
        super().__init__()
        check_options(num_classes, width=width, hidden=hidden)
        channels = [factor * width for _, factor in STAGES]
        stages = conv_stages(width, batch_norm=True)
        self.conv_names = [*stages]
        stages["fc6"] = nn.Conv2d(channels[-1], hidden, 7)
        stages["fc6_norm"] = nn.BatchNorm2d(hidden)
        stages["fc7"] = nn.Conv2d(hidden, hidden, 1)
        stages["fc7_norm"] = nn.BatchNorm2d(hidden)
        self.encoder = nn.ModuleDict(stages)
        self.widen = nn.Sequential(
            nn.ConvTranspose2d(hidden, channels[-1], 7), nn.BatchNorm2d(channels[-1]), nn.ReLU(inplace=True)
        )
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for at in reversed(range(len(STAGES))):
            after = channels[max(0, at - 1)]
            outputs = [channels[at]] * (STAGES[at][0] - 1) + [after]
            inputs = [channels[at], *outputs[:-1]]
            blocks = [layer for pair in zip(inputs, outputs, strict=True) for layer in _deconv(*pair)]
            self.up.append(Upsample(channels[at], upsample))
            self.decoder.append(nn.Sequential(*blocks))
        self.score = nn.Conv2d(channels[0], num_classes, 1)
        he_init(self.encoder)
        he_init(self.widen)
        he_init(self.decoder)
        he_init(self.score)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, for a normalised float image_BCHW whose H and W are multiples of 32.

        An image of less than 224 pixels is filled up to that with zeros, below and to the right. Raises ValueError for
        other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"height and width must be multiples of 32, got {height} x {width}")
        features = functional.pad(image_BCHW, (0, max(0, SMALLEST - width), 0, max(0, SMALLEST - height)))
        places: list[Tensor] = []
        for name in self.conv_names:
            features, indices = functional.max_pool2d(self.encoder[name](features), 2, return_indices=True)
            places.append(indices)
        for name in ("fc6", "fc7"):
            features = functional.relu(self.encoder[f"{name}_norm"](self.encoder[name](features)))
        features = self.widen(features)
        for up, stage in zip(self.up, self.decoder, strict=True):
            features = stage(up(features, places.pop()))
        logits_BKHW: Tensor = self.score(features)
        return logits_BKHW[..., :height, :width]


adapt_deconvnet = adapt_vgg16()


def _deconv(before: int, after: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
