"""torchvision's semantic models: FCN, DeepLabv3 and LR-ASPP, without their auxiliary heads and with any class count."""

from typing import Any

from torch import nn
from torchvision.models import get_model

__all__ = ["builder"]


def builder(name: str) -> Any:
    """A `build` for the torchvision model `name`."""

    def build(num_classes: int) -> nn.Module:
        module: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
        return module

    return build
