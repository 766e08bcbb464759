"""DeepLab v1 and v2: a classification network at an eighth of the image's size, by convolutions with holes.

Their dense CRF is no part of the networks: it is a stage behind any of them.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from pipeline.models.adapt import backbone
from pipeline.models.zoo.upsample import from_grid
from pipeline.models.zoo.vgg import adapt_vgg16, check_options, conv_stages, he_init

__all__ = [
    "DeepLabResNet",
    "DeepLabVGG",
    "adapt_deeplab_resnet",
    "adapt_deeplab_vgg",
    "deeplab_v1_largefov",
    "deeplab_v2_resnet101",
    "deeplab_v2_vgg16",
]

OUTPUT_STRIDE = 8
# Of each stage's pooling: the last two keep the size, and the convolutions behind them are dilated instead.
POOL_STRIDES = (2, 2, 2, 1, 1)
SCORE_STD = 0.01


class DeepLabVGG(nn.Module):
    """DeepLab on VGG16 (Chen et al. 2015, https://arxiv.org/abs/1412.7062; 2018, https://arxiv.org/abs/1606.00915).

    Poolings are 3x3 with a padding of 1, as in the authors' networks; those behind stages 4 and 5 do not halve, and
    stage 5 is dilated by 2. fc6 is a dilated 3x3 convolution, with fc7 and the scores in one branch per rate, whose
    scores are added up: one of rate 12 is v1's LargeFOV, four of 6, 12, 18, 24 are v2's ASPP (figure 7).

    Units stand at pixels 0, 8, 16, ...; poolings round up, so that they reach past the last pixel at any size, and the
    logits are interpolated between them.

    num_classes: K. rates: dilations of fc6, one branch each. width: channels of VGG16's first stage. hidden: units of
    fc6 and fc7. mean_pool: a 3x3 mean behind the last pooling, as in v1's released LargeFOV. dropout: behind fc6 and
    fc7. Raises ValueError for options that make no sense.
    """

    def __init__(
        self,
        num_classes: int,
        rates: Sequence[int],
        width: int = 64,
        hidden: int = 1024,
        mean_pool: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_options(num_classes, width=width, hidden=hidden)
        _check_rates(rates)
        self.mean_pool = mean_pool
        stages: dict[str, nn.Module] = dict(conv_stages(width, dilations=(1, 1, 1, 1, 2)))
        self.conv_names = [*stages]
        stages["fc6"] = nn.ModuleList(nn.Conv2d(8 * width, hidden, 3, padding=rate, dilation=rate) for rate in rates)
        stages["fc7"] = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in rates)
        self.encoder = nn.ModuleDict(stages)
        he_init(self.encoder)
        self.score = nn.ModuleList(_score(hidden, num_classes, 1) for _ in rates)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, for a normalised float image_BCHW of any size."""
        height, width = image_BCHW.shape[-2:]
        return from_grid(self.coarse_forward(image_BCHW), OUTPUT_STRIDE, height, width)

    def coarse_forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the pixels 0, 8, 16, ... up to the first at or past the last one: 41 of 321."""
        features = image_BCHW
        for name, stride in zip(self.conv_names, POOL_STRIDES, strict=True):
            features = functional.max_pool2d(self.encoder[name](features), 3, stride, padding=1, ceil_mode=True)
        if self.mean_pool:
            features = functional.avg_pool2d(features, 3, 1, padding=1)
        encoder: Any = self.encoder
        branches: list[Tensor] = []
        for fc6, fc7, score in zip(encoder["fc6"], encoder["fc7"], self.score, strict=True):
            hidden = self.dropout(functional.relu(fc6(features)))
            branches.append(score(self.dropout(functional.relu(fc7(hidden)))))
        return _sum(branches)


class DeepLabResNet(nn.Module):
    """DeepLab v2 on a dilated ResNet (Chen et al. 2018, https://arxiv.org/abs/1606.00915, section 4.1.2).

    torchvision's ResNet of bottlenecks, whose last two stages are dilated by 2 and 4 instead of halving (but for each
    one's first block, which torchvision dilates as the stage before), and ASPP: one dilated 3x3 convolution to the
    classes per rate, added up. The paper's three scales of the image are left out.
    Units stand at pixels 0, 8, 16, ..., and the logits are interpolated between them and held beyond the last one.

    num_classes: K. rates: dilations of ASPP. layers: blocks of each stage, 3, 4, 23, 3 in ResNet-101. Raises ValueError
    for options that make no sense.
    """

    def __init__(
        self, num_classes: int, rates: Sequence[int] = (6, 12, 18, 24), layers: Sequence[int] = (3, 4, 23, 3)
    ) -> None:
        super().__init__()
        check_options(num_classes)
        _check_rates(rates)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must be four of 1 or more, got {list(layers)}")
        whole: Any = ResNet(Bottleneck, list(layers), replace_stride_with_dilation=[False, True, True])
        features = whole.fc.in_features
        del whole.avgpool, whole.fc
        # torchvision's order is the order of the forward pass.
        self.backbone = nn.Sequential(OrderedDict(whole.named_children()))
        self.score = nn.ModuleList(_score(features, num_classes, 3, rate) for rate in rates)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, for a normalised float image_BCHW of any size."""
        height, width = image_BCHW.shape[-2:]
        features = self.backbone(image_BCHW)
        return from_grid(_sum([score(features) for score in self.score]), OUTPUT_STRIDE, height, width)


def deeplab_v1_largefov(num_classes: int, width: int = 64, hidden: int = 1024, dropout: float = 0.5) -> DeepLabVGG:
    """DeepLab-LargeFOV: fc6 of 3x3, dilated by 12."""
    return DeepLabVGG(num_classes, (12,), width, hidden, mean_pool=True, dropout=dropout)


def deeplab_v2_vgg16(
    num_classes: int,
    rates: Sequence[int] = (6, 12, 18, 24),
    width: int = 64,
    hidden: int = 1024,
    dropout: float = 0.5,
) -> DeepLabVGG:
    """DeepLab v2's ASPP-L on VGG16; ASPP-S has rates 2, 4, 8, 12."""
    return DeepLabVGG(num_classes, rates, width, hidden, dropout=dropout)


def deeplab_v2_resnet101(
    num_classes: int, rates: Sequence[int] = (6, 12, 18, 24), layers: Sequence[int] = (3, 4, 23, 3)
) -> DeepLabResNet:
    """DeepLab v2's ASPP-L on ResNet-101."""
    return DeepLabResNet(num_classes, rates, layers)


# 4096 x 512 x 7 x 7 of fc6 become 1024 x 512 x 3 x 3.
adapt_deeplab_vgg = adapt_vgg16(taps=3, channels=4)
adapt_deeplab_resnet = backbone("backbone.")


def _score(before: int, num_classes: int, size: int, rate: int = 1) -> nn.Conv2d:
    score = nn.Conv2d(before, num_classes, size, padding=rate * (size // 2), dilation=rate)
    nn.init.normal_(score.weight, std=SCORE_STD)
    if score.bias is not None:
        nn.init.zeros_(score.bias)
    return score


def _sum(branches: Sequence[Tensor]) -> Tensor:
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


def _check_rates(rates: Sequence[int]) -> None:
    if not rates or min(rates) < 1:
        raise ValueError(f"rates must be one or more of 1 or more, got {list(rates)}")
