"""Mask R-CNN's loss: L_cls + L_box + L_mask and the proposals' own two, as torchvision computes them.

Query models (Mask2Former and its kin) are not here: their matching and losses come with the library that builds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from pipeline.training.losses.term import LossTerm, widened

__all__ = ["INSTANCE_LOSSES", "InstanceLoss", "detection_losses"]

# He et al. 2017, arXiv:1703.06870, section 3 (the first three); Ren et al. 2015, arXiv:1506.01497, eq. 1 (the others).
INSTANCE_LOSSES = {
    "loss_classifier": 1.0,
    "loss_box_reg": 1.0,
    "loss_mask": 1.0,
    "loss_objectness": 1.0,
    "loss_rpn_box_reg": 1.0,
}


def detection_losses(
    module: nn.Module, image_BCHW: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """GeneralizedRCNN.forward in training, without its own resizing and normalising: scalars by name.

    image_BCHW: normalised and padded. sizes: height and width of each image without padding. targets: as
    `torchvision_target` gives them, in the prepared image's pixels. Anchors and proposals are sampled with torch's
    global generator.
    """
    model: Any = module
    features = model.backbone(image_BCHW)
    images = ImageList(image_BCHW, list(sizes))
    proposals, proposal_losses = model.rpn(images, features, list(targets))
    _, head_losses = model.roi_heads(features, proposals, list(sizes), list(targets))
    return {**head_losses, **proposal_losses}


@dataclass(frozen=True, kw_only=True)
class InstanceLoss:
    """An `Objective`: the losses that `detection_losses` gives, each counted by its factor.

    factors: by torchvision's names. The divisor is the number of images: torchvision averages over the anchors and
    proposals that it samples, which is a fixed number per image (256 and 512) unless an image has too few of them, so
    a batch that is cut among workers gives nearly, not exactly, the gradient of the whole.
    """

    factors: Mapping[str, float] = field(default_factory=lambda: dict(INSTANCE_LOSSES))

    def terms(self, output: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, LossTerm]:
        """output: scalars by name. Raises ValueError where the names are not those of `factors`."""
        if set(output) != set(self.factors):
            raise ValueError(f"expected the losses {sorted(self.factors)}, got {sorted(output)}")
        weights = self.weights(batch)
        return {name: LossTerm(widened(output[name]) * weights[name], weights[name]) for name in self.factors}

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """batch: `image` is image_BCHW."""
        image_BCHW: Tensor = batch["image"]
        count = torch.tensor(float(len(image_BCHW)), device=image_BCHW.device)
        return dict.fromkeys(self.factors, count)
