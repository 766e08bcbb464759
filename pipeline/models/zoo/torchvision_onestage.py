"""torchvision's detectors in one stage, RetinaNet and FCOS, run on our own batches as Mask R-CNN is."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from pipeline.models.adapt import backbone
from pipeline.models.spec import Frame

__all__ = [
    "FCOS_LOSSES",
    "RETINANET_LOSSES",
    "adapt_fcos",
    "build_fcos",
    "build_retinanet_v2",
    "detect_once",
    "fcos_losses",
    "retinanet_losses",
]

# Lin et al. 2017, arXiv:1708.02002, section 4.1; Tian et al. 2019, arXiv:1904.01355, eq. 2 and section 3.3.
RETINANET_LOSSES = {"classification": 1.0, "bbox_regression": 1.0}
FCOS_LOSSES = {"classification": 1.0, "bbox_regression": 1.0, "bbox_ctrness": 1.0}
BODY = backbone("backbone.body.")
COUNTER = "num_batches_tracked"


def build_retinanet_v2(
    num_classes: int,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 300,
    topk_candidates: int = 1000,
) -> nn.Module:
    """RetinaNet v2 on ResNet-50 FPN (Lin et al. 2017, arXiv:1708.02002; its box loss is GIoU), random weights.

    num_classes: outputs, which are ids of categories; none of them is the background, id 0 just has no category.
    topk_candidates: of each level, before overlapping boxes are dropped.
    """
    module: nn.Module = retinanet_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        score_thresh=box_score_thresh,
        nms_thresh=box_nms_thresh,
        detections_per_img=box_detections_per_img,
        topk_candidates=topk_candidates,
    )
    return module


def build_fcos(
    num_classes: int,
    box_score_thresh: float = 0.2,
    box_nms_thresh: float = 0.6,
    box_detections_per_img: int = 100,
    topk_candidates: int = 1000,
) -> nn.Module:
    """FCOS on ResNet-50 FPN (Tian et al. 2019, arXiv:1904.01355), random weights; options as of `build_retinanet_v2`.

    Its backbone's batch normalisation learns. Published weights were trained with frozen one, which is the same in
    evaluation.
    """
    module: nn.Module = fcos_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        score_thresh=box_score_thresh,
        nms_thresh=box_nms_thresh,
        detections_per_img=box_detections_per_img,
        topk_candidates=topk_candidates,
    )
    return module


def adapt_fcos(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """As `backbone`, with the counters that frozen batch normalisation does not have."""
    placed = BODY(given, wanted)
    counters = {
        name: torch.tensor(0)
        for name in wanted
        if name.endswith(COUNTER) and name.removesuffix(COUNTER) + "running_mean" in placed
    }
    return {**counters, **placed}


def detect_once(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """RetinaNet's or FCOS' forward in evaluation without its own resizing: boxes (N, 4) stay in prepared pixels, with
    scores (N) and labels (N; ids, also of no category)."""
    model: Any = module
    features, outputs, anchors = _heads(model, image_BCHW, frames)
    cells = [level.shape[-2] * level.shape[-1] for level in features]
    each = outputs["cls_logits"].shape[1] // sum(cells)  # anchors of a cell
    counts = [count * each for count in cells]
    detections: list[dict[str, Tensor]] = model.postprocess_detections(
        {name: list(torch.split(values, counts, dim=1)) for name, values in outputs.items()},
        [list(torch.split(one, counts)) for one in anchors],
        _sizes(frames),
    )
    return detections


def retinanet_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Focal and GIoU loss, each divided by an image's own matched anchors, then averaged over the images."""
    model: Any = module
    _, outputs, anchors = _heads(model, image_BCHW, frames)
    losses: dict[str, Tensor] = model.compute_loss(list(targets), outputs, anchors)
    return losses


def fcos_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Focal, GIoU and centre-ness loss, divided by the matched points of the whole batch: a batch that is cut among
    workers gives nearly, not exactly, the gradient of the whole."""
    model: Any = module
    features, outputs, anchors = _heads(model, image_BCHW, frames)
    cells = [level.shape[-2] * level.shape[-1] for level in features]
    losses: dict[str, Tensor] = model.compute_loss(list(targets), outputs, anchors, cells)
    return losses


def _heads(
    model: Any, image_BCHW: Tensor, frames: Sequence[Frame]
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    features = list(model.backbone(image_BCHW).values())
    return features, model.head(features), model.anchor_generator(ImageList(image_BCHW, _sizes(frames)), features)


def _sizes(frames: Sequence[Frame]) -> list[tuple[int, int]]:
    return [(frame.prepared_height, frame.prepared_width) for frame in frames]
