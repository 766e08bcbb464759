"""Mask R-CNN's second stage with the choices of its paper (He et al. 2017, arXiv:1703.06870, table 2), on torchvision's
RoIHeads.

Axes: N regions, K outputs (background and classes), C channels, M rows and columns of a mask in its box.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    project_masks_on_boxes,
)

__all__ = [
    "MASK_KINDS",
    "AveragePredictor",
    "MaskHeads",
    "MaskKind",
    "MlpMasks",
    "multinomial_mask_loss",
    "multinomial_masks",
]

MaskKind = Literal["independent", "multinomial"]
MASK_KINDS: tuple[str, ...] = get_args(MaskKind)


class AveragePredictor(FastRCNNPredictor):  # type: ignore[misc]  # torchvision has no types
    """Classes and boxes from the mean over a region's features (N, C, P, P), as in a ResNet's own classifier."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x.mean((2, 3)))
        return scores, deltas


class MlpMasks(nn.Module):
    """logits_NKMM by two fully connected layers and a third for all masks' pixels (table 2e, `fc: 1024, 1024, K M^2`).

    inputs: values of one region's features, all together.
    """

    def __init__(self, inputs: int, num_classes: int, side: int, hidden: int = 1024) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.side = side
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, num_classes * side * side)

    def forward(self, features_NCPP: Tensor) -> Tensor:
        hidden = functional.relu(self.fc2(functional.relu(self.fc1(features_NCPP.flatten(1)))))
        logits: Tensor = self.fc3(hidden)
        return logits.view(-1, self.num_classes, self.side, self.side)


def multinomial_mask_loss(
    logits_NKMM: Tensor,
    boxes: Sequence[Tensor],
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    matched: Sequence[Tensor],
) -> Tensor:
    """Softmax cross-entropy of each pixel over the classes and the background (table 2b, `softmax`); 0 without boxes.

    A pixel's target is the region's class by the share of the pixel that the mask covers, and background by the rest,
    as torchvision's binary loss has it; with one class the two are the same function of the difference of the logits.
    Arguments are those of torchvision's `maskrcnn_loss`: per image boxes (n, 4), masks (g, H, W), labels (g), and the
    object that each box is matched to (n).
    """
    if not len(logits_NKMM):
        return logits_NKMM.sum() * 0
    side = logits_NKMM.shape[-1]
    label_N = torch.cat([label[at] for label, at in zip(labels, matched, strict=True)])
    target_NMM = torch.cat(
        [project_masks_on_boxes(mask, box, at, side) for mask, box, at in zip(masks, boxes, matched, strict=True)]
    )
    log_NKMM = functional.log_softmax(logits_NKMM.float(), dim=1)
    inside_NMM = log_NKMM[torch.arange(len(label_N), device=label_N.device), label_N]
    return -(target_NMM * inside_NMM + (1 - target_NMM) * log_NKMM[:, 0]).mean()


def multinomial_masks(logits_NKMM: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
    """Per image (n, 1, M, M): the probability of the region's class among the classes and the background."""
    label_N = torch.cat([*labels])
    probability_NKMM = logits_NKMM.float().softmax(1)
    chosen_N1MM = probability_NKMM[torch.arange(len(label_N), device=label_N.device), label_N][:, None]
    return list(torch.split(chosen_N1MM, [len(label) for label in labels]))


class MaskHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's RoIHeads with another loss of masks, or with a mask branch that grows from the box branch.

    masks: `independent` (a sigmoid per class, torchvision's) or `multinomial`. Where `mask_roi_pool` is None, masks are
    predicted from what `box_head` makes of a region (a ResNet's layer4 in Mask R-CNN C4), whose weights and, in
    training, whose values are then shared between boxes and masks. Other arguments are RoIHeads'.
    """

    def __init__(self, *arguments: Any, masks: str = "independent", **parts: Any) -> None:
        if masks not in MASK_KINDS:
            raise ValueError(f"masks must be one of {', '.join(MASK_KINDS)}, got {masks!r}")
        super().__init__(*arguments, **parts)
        self.masks = masks

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As RoIHeads': (detections, {}) in evaluation, ([], losses) in training. Raises ValueError for training
        without targets."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        boxes, scores, labels = self.postprocess_detections(*self.box_predictor(regions), proposals, image_shapes)
        logits_NKMM = self.mask_predictor(self._mask_features(features, boxes, image_shapes))
        find = multinomial_masks if self.masks == "multinomial" else maskrcnn_inference
        detections = [
            {"boxes": box, "scores": score, "labels": label, "masks": mask}
            for box, score, label, mask in zip(boxes, scores, labels, find(logits_NKMM, labels), strict=True)
        ]
        return detections, {}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        boxes, matched, labels, deltas = self.select_training_samples(proposals, targets)
        regions = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        class_logits, box_deltas = self.box_predictor(regions)
        loss_classifier, loss_box_reg = fastrcnn_loss(class_logits, box_deltas, labels, deltas)

        found = [label > 0 for label in labels]
        mask_boxes = [box[own] for box, own in zip(boxes, found, strict=True)]
        mask_features = (
            regions[torch.cat(found)]
            if self.mask_roi_pool is None
            else self._mask_features(features, mask_boxes, image_shapes)
        )
        loss = multinomial_mask_loss if self.masks == "multinomial" else maskrcnn_loss
        loss_mask = loss(
            self.mask_predictor(mask_features),
            mask_boxes,
            [target["masks"] for target in targets or ()],
            [target["labels"] for target in targets or ()],
            [at[own] for at, own in zip(matched, found, strict=True)],
        )
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}

    def _mask_features(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        if self.mask_roi_pool is None:
            values: Tensor = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        else:
            values = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        return values
