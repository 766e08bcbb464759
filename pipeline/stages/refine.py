"""What follows a semantic model: a CRF, superpixels, small regions, in the config's order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import CrfStage, RefineStage, SuperpixelsStage
from pipeline.stages.crf import crf
from pipeline.stages.regions import dissolve_small_regions
from pipeline.stages.superpixels import find_superpixels, mean_probabilities, vote_labels

__all__ = ["refine"]


def refine(
    logits_KHW: Tensor, image_CHW: Tensor, stages: Sequence[RefineStage], superpixels: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None]:
    """Class logits (float32, at the prepared size) and the image as the model saw it (uint8) -> (logits_KHW, index_HW).

    logits_KHW: after the last stage that gives probabilities. index_HW: the classes after the last stage, int64 places
    in the list of classes, or None where they are the logits' own. The order of stages is the config's to check.
    superpixels: the image's, as `with_superpixels` found them; they are looked for where there are none.
    Raises ConfigError where a library is missing.
    """
    index_HW: Tensor | None = None
    found = iter(superpixels)
    for stage in stages:
        if isinstance(stage, CrfStage):
            logits_KHW = crf(logits_KHW, image_CHW, stage)
            continue
        if isinstance(stage, SuperpixelsStage):
            superpixel_HW = next(found, None)
            if superpixel_HW is None:
                superpixel_HW = find_superpixels(image_CHW, stage)
            if stage.vote == "probabilities":
                logits_KHW = mean_probabilities(logits_KHW, superpixel_HW)
            else:
                index_HW = vote_labels(_labels(logits_KHW, index_HW), superpixel_HW, len(logits_KHW))
            continue
        labels = _labels(logits_KHW, index_HW)
        dissolved = dissolve_small_regions(
            labels.cpu().numpy(), min_area=stage.min_area, connectivity=stage.connectivity
        )
        index_HW = torch.from_numpy(dissolved).to(logits_KHW.device)
    return logits_KHW, index_HW


def _labels(logits_KHW: Tensor, index_HW: Tensor | None) -> Tensor:
    return logits_KHW.max(0).indices if index_HW is None else index_HW
