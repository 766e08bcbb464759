"""torchvision's Mask R-CNN, run on our own batches: masks stay 28x28 in their boxes instead of full-size floats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from pipeline.models.spec import Frame

__all__ = ["build_maskrcnn_v2", "detect"]


def build_maskrcnn_v2(
    num_classes: int, box_score_thresh: float = 0.05, box_nms_thresh: float = 0.5, box_detections_per_img: int = 100
) -> nn.Module:
    """Mask R-CNN v2 on ResNet-50 FPN (Li et al. 2021, arXiv:2111.11429), random weights."""
    module: nn.Module = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        box_score_thresh=box_score_thresh,
        box_nms_thresh=box_nms_thresh,
        box_detections_per_img=box_detections_per_img,
    )
    return module


def detect(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """GeneralizedRCNN.forward without its own resizing and pasting: boxes stay in prepared pixels, masks in boxes."""
    model: Any = module
    sizes = [(frame.prepared_height, frame.prepared_width) for frame in frames]
    features = model.backbone(image_BCHW)
    images = ImageList(image_BCHW, sizes)
    proposals, _ = model.rpn(images, features)
    detections, _ = model.roi_heads(features, proposals, sizes)
    return [{key: torch.as_tensor(value) for key, value in detection.items()} for detection in detections]
