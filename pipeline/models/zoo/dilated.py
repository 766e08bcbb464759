"""Dilated convolutions: VGG16 without its last poolings as the front end, and a module that gathers context.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.vgg import adapt_vgg16, check_options, conv_stages, he_init

__all__ = ["Context", "DilatedVGG", "adapt_dilated"]

ContextKind = Literal["none", "basic", "large"]
# Of the context module's 3x3 convolutions, and their outputs in units of K; a 1x1 convolution follows (table 1).
DILATIONS = (1, 1, 2, 4, 8, 16, 1)
WIDTHS = {"basic": (1, 1, 1, 1, 1, 1, 1), "large": (2, 2, 4, 8, 16, 32, 32)}
# Cells that its 3x3 convolutions take away on each side: their receptive field is 2 * 33 + 1 = 67.
CONTEXT_MARGIN = sum(DILATIONS)
# Pixels that the front end takes away on each side: 2 convolutions at full size, 2 at a half, 3 at a quarter, 3 at an
# eighth, 3 dilated by 2, and 7x7 dilated by 4, which reaches 3 * 4 cells.
MARGIN = 2 + 2 * 2 + 3 * 4 + 3 * 8 + 3 * 2 * 8 + 3 * 4 * 8
STRIDE = 8
NOISE = 0.01


class Context(nn.Module):
    """The context module (Yu & Koltun 2016, https://arxiv.org/abs/1511.07122, section 3): K maps in, K maps out.

    Seven 3x3 convolutions with a ReLU each, dilated by 1, 1, 2, 4, 8, 16, 1, and a 1x1 convolution; a frame of 33 zeros
    around the maps keeps their size. It begins as the identity of what is not negative: equation 4, or equation 5 where
    there are more maps, among which a class's value is divided, with a little noise beside it.

    channels: K. kind: `basic` keeps K maps throughout, `large` has 2, 2, 4, 8, 16, 32, 32 times as many.
    """

    def __init__(self, channels: int, kind: Literal["basic", "large"] = "basic") -> None:
        super().__init__()
        if kind not in WIDTHS:
            raise ValueError(f"context must be one of {', '.join(WIDTHS)}, got {kind!r}")
        outputs = [channels * factor for factor in WIDTHS[kind]]
        inputs = [channels, *outputs[:-1]]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, dilation=dilation)
            for before, after, dilation in zip(inputs, outputs, DILATIONS, strict=True)
        )
        self.layers.append(nn.Conv2d(outputs[-1], channels, 1))
        for layer in self.layers:
            _begin_as_identity(layer, channels)

    def forward(self, maps_BKHW: Tensor) -> Tensor:
        """(B, K, H, W)."""
        values = functional.pad(maps_BKHW, (CONTEXT_MARGIN, CONTEXT_MARGIN, CONTEXT_MARGIN, CONTEXT_MARGIN))
        for layer in self.layers[:-1]:
            values = functional.relu(layer(values))
        scores: Tensor = self.layers[-1](values)
        return scores


class DilatedVGG(nn.Module):
    """The front end of Yu & Koltun 2016 (section 4) and a context module behind it.

    VGG16 without its last two poolings and without any padding: what comes behind a left-out pooling is dilated by 2
    for each, so stage 5 by 2 and fc6 by 4. The image is mirrored in its edges for the 186 pixels that this takes away
    on each side. The context module gets the front end's scores; both learn at once, where the paper trains the front
    end first (begin with `context: none`, and go on from its checkpoint with `partial_weights`).

    num_classes: K. context: `none`, `basic` or `large`. width: channels of VGG16's first stage. hidden: units of fc6
    and fc7. dropout: behind fc6 and fc7. Raises ValueError for options that make no sense.
    """

    def __init__(
        self,
        num_classes: int,
        context: ContextKind = "basic",
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_options(num_classes, width=width, hidden=hidden)
        if context not in get_args(ContextKind):
            raise ValueError(f"context must be one of {', '.join(get_args(ContextKind))}, got {context!r}")
        stages = conv_stages(width, padded=False, dilations=(1, 1, 1, 1, 2))
        self.conv_names = [*stages]
        stages["fc6"] = nn.Conv2d(8 * width, hidden, 7, dilation=4)
        stages["fc7"] = nn.Conv2d(hidden, hidden, 1)
        self.encoder = nn.ModuleDict(stages)
        he_init(self.encoder)
        self.score = nn.Conv2d(hidden, num_classes, 1)
        nn.init.xavier_uniform_(self.score.weight)
        self.context = nn.Identity() if context == "none" else Context(num_classes, context)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, bilinear from an eighth of it.

        image_BCHW: normalised, float, H and W multiples of 8. Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"height and width must be multiples of {STRIDE}, got {height} x {width}")
        rows, columns = (_surrounded(size, image_BCHW.device) for size in (height, width))
        scores = self.context(self.front_forward(image_BCHW[..., rows, :][..., columns]))
        return functional.interpolate(scores, size=(height, width), mode="bilinear")

    def front_forward(self, image_BCHW: Tensor) -> Tensor:
        """The front end's scores_BKHW of the middle of image_BCHW, (H - 372) / 8 x (W - 372) / 8."""
        features = image_BCHW
        for at, name in enumerate(self.conv_names):
            features = self.encoder[name](features)
            if at < 3:
                features = functional.max_pool2d(features, 2)
        for name in ("fc6", "fc7"):
            features = self.dropout(functional.relu(self.encoder[name](features)))
        scores: Tensor = self.score(features)
        return scores


adapt_dilated = adapt_vgg16()


def _surrounded(size: int, device: torch.device) -> Tensor:
    """Which pixel stands where along an axis of `size` pixels with its margins, mirrored as often as it takes."""
    places = torch.arange(-MARGIN, size + MARGIN, device=device)
    period = max(1, 2 * (size - 1))
    folded = places.remainder(period)
    return torch.minimum(folded, period - folded)


@torch.no_grad()
def _begin_as_identity(layer: nn.Module, channels: int) -> None:
    """Output b takes channels / outputs of each input a of its class, a channels // inputs = b channels // outputs
    (equation 5, which is equation 4 where both are `channels`)."""
    weight = layer.get_parameter("weight")
    outputs, inputs, size = weight.shape[0], weight.shape[1], weight.shape[2]
    if outputs == inputs == channels:
        nn.init.zeros_(weight)
    else:
        nn.init.normal_(weight, std=NOISE * channels / outputs)
    of_output = torch.arange(outputs, device="cpu") * channels // outputs
    of_input = torch.arange(inputs, device="cpu") * channels // inputs
    same_OI = (of_output[:, None] == of_input).to(weight.device)
    middle = weight[:, :, size // 2, size // 2]
    middle.copy_(torch.where(same_OI, channels / outputs, middle))
    nn.init.zeros_(layer.get_parameter("bias"))
