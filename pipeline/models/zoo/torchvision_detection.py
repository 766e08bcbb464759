"""torchvision's Faster and Mask R-CNN, run on our own batches: masks stay 28x28 in their boxes instead of full-size
floats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from pipeline.models.spec import Frame

__all__ = [
    "FASTER_RCNN_LOSSES",
    "FAST_RCNN_LOSSES",
    "MASK_RCNN_LOSSES",
    "build_fasterrcnn_v2",
    "build_maskrcnn_v2",
    "detect",
    "rcnn_losses",
]

# Girshick 2015, arXiv:1504.08083, eq. 1; Ren et al. 2015, arXiv:1506.01497, eq. 1; He et al. 2017, arXiv:1703.06870,
# section 3.
FAST_RCNN_LOSSES = {"loss_classifier": 1.0, "loss_box_reg": 1.0}
FASTER_RCNN_LOSSES = {**FAST_RCNN_LOSSES, "loss_objectness": 1.0, "loss_rpn_box_reg": 1.0}
MASK_RCNN_LOSSES = {**FASTER_RCNN_LOSSES, "loss_mask": 1.0}


def build_maskrcnn_v2(
    num_classes: int,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_test: int | None = None,
    box_batch_size_per_image: int | None = None,
) -> nn.Module:
    """Mask R-CNN v2 on ResNet-50 FPN (Li et al. 2021, arXiv:2111.11429), random weights.

    rpn_post_nms_top_n_test: proposals per image that become detections; box_batch_size_per_image: those that are
    learned from. None: torchvision's 1000 and 512.
    """
    return _built(
        maskrcnn_resnet50_fpn_v2,
        num_classes,
        box_score_thresh,
        box_nms_thresh,
        box_detections_per_img,
        rpn_post_nms_top_n_test,
        box_batch_size_per_image,
    )


def build_fasterrcnn_v2(
    num_classes: int,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_test: int | None = None,
    box_batch_size_per_image: int | None = None,
) -> nn.Module:
    """Faster R-CNN v2 on ResNet-50 FPN (Li et al. 2021, arXiv:2111.11429), random weights; options of Mask R-CNN v2."""
    return _built(
        fasterrcnn_resnet50_fpn_v2,
        num_classes,
        box_score_thresh,
        box_nms_thresh,
        box_detections_per_img,
        rpn_post_nms_top_n_test,
        box_batch_size_per_image,
    )


def _built(
    build: Callable[..., nn.Module],
    num_classes: int,
    box_score_thresh: float,
    box_nms_thresh: float,
    box_detections_per_img: int,
    rpn_post_nms_top_n_test: int | None,
    box_batch_size_per_image: int | None,
) -> nn.Module:
    counts = {
        "rpn_post_nms_top_n_test": rpn_post_nms_top_n_test,
        "box_batch_size_per_image": box_batch_size_per_image,
    }
    return build(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        box_score_thresh=box_score_thresh,
        box_nms_thresh=box_nms_thresh,
        box_detections_per_img=box_detections_per_img,
        **{name: count for name, count in counts.items() if count is not None},
    )


def detect(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """GeneralizedRCNN.forward without its own resizing and pasting: boxes stay in prepared pixels, masks in boxes."""
    model: Any = module
    sizes = [(frame.prepared_height, frame.prepared_width) for frame in frames]
    features = model.backbone(image_BCHW)
    images = ImageList(image_BCHW, sizes)
    proposals, _ = model.rpn(images, features)
    detections, _ = model.roi_heads(features, proposals, sizes)
    return [{key: torch.as_tensor(value) for key, value in detection.items()} for detection in detections]


def rcnn_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """GeneralizedRCNN.forward in training, without its own resizing and normalising: scalars by name.

    Anchors and proposals are sampled with torch's global generator. torchvision averages over those, a fixed number per
    image (256 and 512) unless an image has too few of them, so a batch that is cut among workers gives nearly, not
    exactly, the gradient of the whole.
    """
    model: Any = module
    sizes = [(frame.prepared_height, frame.prepared_width) for frame in frames]
    features = model.backbone(image_BCHW)
    images = ImageList(image_BCHW, sizes)
    proposals, proposal_losses = model.rpn(images, features, list(targets))
    _, head_losses = model.roi_heads(features, proposals, sizes, list(targets))
    return {**head_losses, **proposal_losses}
