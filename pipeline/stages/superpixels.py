"""Superpixels of an image, and one label for each."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import RefineStage, SuperpixelsStage
from pipeline.models.extras import import_extra
from pipeline.stages.prepare import Prepared

__all__ = ["find_superpixels", "mean_probabilities", "vote_labels", "with_superpixels"]


def find_superpixels(image_CHW: Tensor, stage: SuperpixelsStage) -> Tensor:
    """The superpixel of each pixel (H, W; int32, from 0, on the CPU) of an image of 3 channels, uint8.

    SLIC (Achanta et al. 2012) or the graph-based segmentation of Felzenszwalb & Huttenlocher 2004, both scikit-image's.
    Raises ConfigError where that is missing.
    """
    segmentation = import_extra("skimage.segmentation", "classic")
    image_HWC = np.ascontiguousarray(image_CHW.permute(1, 2, 0).cpu().numpy())
    if stage.method == "slic":
        superpixel_HW = segmentation.slic(
            image_HWC, n_segments=stage.segments, compactness=stage.compactness, sigma=stage.sigma, start_label=0
        )
    else:
        superpixel_HW = segmentation.felzenszwalb(
            image_HWC, scale=stage.scale, sigma=stage.sigma, min_size=stage.min_size
        )
    found: npt.NDArray[np.int32] = np.ascontiguousarray(superpixel_HW, np.int32)
    return torch.from_numpy(found)


def with_superpixels(item: Prepared, stages: Sequence[RefineStage]) -> Prepared:
    """The image with the superpixels that its model's stages want, in their order: they follow from the image alone,
    so whoever prepares it finds them, and the accelerator does not wait. What cannot be found is left to the stage."""
    wanted = [stage for stage in stages if isinstance(stage, SuperpixelsStage)]
    try:
        return replace(item, superpixels=tuple(find_superpixels(item.image_CHW, stage) for stage in wanted))
    except (RuntimeError, MemoryError, ValueError):
        return item


def mean_probabilities(logits_KHW: Tensor, superpixel_HW: Tensor) -> Tensor:
    """Log of each superpixel's mean probabilities at all of its pixels (Farabet et al. 2013, section 4.1)."""
    probability_NK = logits_KHW.softmax(0).flatten(1).T
    superpixel_N = superpixel_HW.flatten().to(logits_KHW.device).long()
    sum_SK = probability_NK.new_zeros(int(superpixel_HW.max()) + 1, len(logits_KHW))
    sum_SK.index_add_(0, superpixel_N, probability_NK)
    mean_SK = sum_SK / superpixel_N.bincount(minlength=len(sum_SK))[:, None].clamp(min=1)
    return mean_SK.clamp(min=torch.finfo(torch.float32).tiny).log()[superpixel_N].T.reshape(logits_KHW.shape)


def vote_labels(index_HW: Tensor, superpixel_HW: Tensor, classes: int) -> Tensor:
    """Each superpixel takes the class of most of its pixels, the lowest of equals: (H, W) int64."""
    superpixel_HW = superpixel_HW.to(index_HW.device).long()
    cells = (int(superpixel_HW.max()) + 1) * classes
    votes_SK = (superpixel_HW * classes + index_HW).flatten().bincount(minlength=cells).view(-1, classes)
    return votes_SK.max(1).indices[superpixel_HW]
