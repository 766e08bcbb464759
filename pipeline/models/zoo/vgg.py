"""VGG16 as the classic segmentation networks take it apart: its convolutions stage by stage, its classifier as
convolutions.

These networks begin from ImageNet: `weights: torchvision:VGG16_Weights.IMAGENET1K_V1` (of DeconvNet,
`VGG16_BN_Weights`) and `partial_weights: true`.

Axes: C channels, K classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from pipeline.models.adapt import Adapt

__all__ = ["STAGES", "adapt_vgg16", "check_options", "conv_stages", "he_init"]

# Convolutions of each stage and their channels in units of the first stage's: Simonyan & Zisserman 2015
# (arXiv:1409.1556), configuration D.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


def conv_stages(
    width: int,
    *,
    batch_norm: bool = False,
    padded: bool = True,
    dilations: Sequence[int] = (1, 1, 1, 1, 1),
) -> "OrderedDict[str, nn.Module]":
    """VGG16's convolutions as `conv1` to `conv5`, without the poolings behind them.

    Layers are called by their numbers in torchvision's `vgg16().features`, or in `vgg16_bn()`'s with batch_norm.
    width: channels of the first stage, 64 in VGG16. padded: outputs of the inputs' size; else valid convolutions.
    dilations: of each stage's convolutions.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    before, number = 3, 0
    for at, (convolutions, factor) in enumerate(STAGES):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for _ in range(convolutions):
            dilation, after = dilations[at], factor * width
            block: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=dilation if padded else 0, dilation=dilation)]
            block += [nn.BatchNorm2d(after)] if batch_norm else []
            for layer in (*block, nn.ReLU(inplace=True)):
                layers[str(number)] = layer
                number += 1
            before = after
        stages[f"conv{at + 1}"] = nn.Sequential(layers)
        number += 1  # torchvision's pooling layer, which has no weights
    return stages


def he_init(module: nn.Module) -> None:
    """Weights of all convolutions as in He et al. 2015 (arXiv:1502.01852), biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def adapt_vgg16(*, taps: int = 1, channels: int = 1) -> Adapt:
    """For a model whose `encoder` has VGG16's stages (`conv_stages`) and its classifier as convolutions.

    What it gives: torchvision's `features.N.*` under `encoder.convS.N.*`; its `classifier.0`, 4096 x 25088, as the
    4096 x 512 x 7 x 7 of a convolution that on 7 x 7 features does the same, under every name below `encoder.fc6`; its
    `classifier.3` as a 1x1 convolution under every name below `encoder.fc7`. The thousand classes are left out. Any
    other checkpoint comes back as it is.

    taps, channels: every how many-th of fc6's rows and columns, and of fc6's and fc7's units, is kept (the decimation
    of Chen et al. 2015, arXiv:1412.7062, section 3.2: 3 and 4 leave 1024 x 512 x 3 x 3).
    """

    def adapt(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
        if not any(name.startswith("features.") for name in given):
            return dict(given)
        placed: dict[str, Tensor] = {}
        for name in wanted:
            part, _, rest = name.removeprefix("encoder.").partition(".")
            if not name.startswith("encoder."):
                continue
            kind = rest.rpartition(".")[2]
            if part.startswith("conv"):
                tensor = given.get(f"features.{rest}")
            elif part == "fc6":
                tensor = given.get(f"classifier.0.{kind}")
                if tensor is not None:
                    tensor = _spatial(tensor, taps)[::channels] if kind == "weight" else tensor[::channels]
            elif part == "fc7":
                tensor = given.get(f"classifier.3.{kind}")
                if tensor is not None:
                    tensor = tensor[::channels]
                    tensor = tensor[:, ::channels, None, None] if kind == "weight" else tensor
            else:
                tensor = None
            if tensor is not None:
                placed[name] = tensor
        return placed

    return adapt


def _spatial(weight: Tensor, taps: int) -> Tensor:
    """fc6's weight of units x (channels x 7 x 7) as a convolution's, with every `taps`-th of its rows and columns."""
    return weight.reshape(len(weight), -1, 7, 7)[:, :, ::taps, ::taps]


def check_options(num_classes: int, **sizes: Any) -> None:
    """Raise ValueError for fewer than 2 classes or a size below 1."""
    if num_classes < 2 or any(not isinstance(size, int) or size < 1 for size in sizes.values()):
        names = ", ".join(sizes)
        values = ", ".join(str(size) for size in sizes.values())
        raise ValueError(f"num_classes must be 2 or more, {names} 1 or more, got {num_classes}, {values}")
