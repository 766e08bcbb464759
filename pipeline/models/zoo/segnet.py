"""SegNet: an encoder and its mirror image, joined by the places that pooling took its maxima from.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Set

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SegNet", "adapt_vgg"]

# Convolutions of each stage and their channels in units of `width`: VGG16, Simonyan & Zisserman 2015, configuration D.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class SegNet(nn.Module):
    """SegNet (Badrinarayanan, Kendall, Cipolla 2017, https://arxiv.org/abs/1511.00561).

    The encoder is VGG16 with batch normalisation, without its fully connected layers: 13 convolutions in five stages,
    whose layers are called by their numbers in torchvision's `vgg16_bn().features`. The decoder is its mirror image:
    each stage puts values back where the encoder's maxima were, zeros elsewhere, and convolves. The last convolution
    gives the logits, as in the authors' released networks. New weights are drawn as in He et al. 2015
    (arXiv:1502.01852), as the paper says. Inputs are normalised by mean and deviation; the paper's local contrast
    normalisation is left out.

    num_classes: K. width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        if num_classes < 2 or width < 1:
            raise ValueError(f"num_classes must be 2 or more, width 1 or more, got {num_classes}, {width}")
        self.encoder = nn.ModuleList()
        before, number = 3, 0
        for convolutions, factor in STAGES:
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for _ in range(convolutions):
                for layer in _conv(before, factor * width):
                    layers[str(number)] = layer
                    number += 1
                before = factor * width
            self.encoder.append(nn.Sequential(layers))
            number += 1  # torchvision's pooling layer, which has no weights
        self.decoder = nn.ModuleList()
        for at in reversed(range(len(STAGES))):
            convolutions, factor = STAGES[at]
            inner, after = factor * width, (STAGES[at - 1][1] * width if at else num_classes)
            blocks: list[nn.Module] = [layer for _ in range(convolutions - 1) for layer in _conv(inner, inner)]
            blocks += _conv(inner, after) if at else [nn.Conv2d(inner, after, 3, padding=1)]
            self.decoder.append(nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW for a normalised float image_BCHW whose H and W are multiples of 32.

        Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"height and width must be multiples of 32, got {height} x {width}")
        features = image_BCHW
        places: list[Tensor] = []
        for stage in self.encoder:
            features, indices = functional.max_pool2d(stage(features), 2, return_indices=True)
            places.append(indices)
        for stage in self.decoder:
            features = stage(functional.max_unpool2d(features, places.pop(), (2, 2)))
        return features


def adapt_vgg(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """The encoder's tensors of a VGG16 with batch normalisation under SegNet's names; its classifier is left out.

    given: `features.N.*`, as torchvision's vgg16_bn names them; any other checkpoint comes back as it is. wanted: the
    names that the module has.
    """
    if not any(name.startswith("features.") for name in given):
        return dict(given)
    # encoder.STAGE.N.rest
    place = {f"features.{name.split('.', 2)[2]}": name for name in wanted if name.startswith("encoder.")}
    return {place[name]: tensor for name, tensor in given.items() if name in place}


def _conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
