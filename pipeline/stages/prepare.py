"""An image as one model wants it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.models.spec import Frame, Preprocess, Prompts

__all__ = ["Prepared", "prepare", "resized"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image as one model wants it: image_CHW uint8, resized but not yet padded or normalised.

    superpixels: of image_CHW, one map (int32) for each stage that follows the model and wants them; empty where they
    have not been looked for (superpixels.py).
    """

    image_CHW: Tensor
    frame: Frame
    padded: tuple[int, int]
    superpixels: tuple[Tensor, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.image_CHW.nbytes + sum(superpixel_HW.nbytes for superpixel_HW in self.superpixels)


def prepare(image_HWC: npt.NDArray[np.uint8], preprocess: Preprocess, prompts: Prompts | None = None) -> Prepared:
    """Resize on the CPU, in 8 bits; what is left (normalise, pad) happens on the device, on a quarter of the bytes."""
    height, width = image_HWC.shape[:2]
    target = preprocess.size(height, width)
    image_CHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)
    if target != (height, width):
        image_CHW = resized(image_CHW, target, antialias=preprocess.antialias)
    return Prepared(image_CHW, Frame(height, width, *target, prompts), preprocess.padded(*target))


def resized(image_CHW: Tensor, size: Sequence[int], *, antialias: bool) -> Tensor:
    """torchvision's bilinear resize of uint8; size: rows and columns."""
    # Imported here: it takes seconds, and models that take images as they are do without.
    from torchvision.transforms.v2 import functional as transforms

    values: Tensor = transforms.resize_image(image_CHW, list(size), antialias=antialias)
    return values
