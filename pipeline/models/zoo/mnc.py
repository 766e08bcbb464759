"""Multi-task Network Cascades: boxes, then their masks, then what is in the masks (Dai, He, Sun 2016,
https://arxiv.org/abs/1512.04412).

Axes: B images, N regions, K outputs (background and classes), C channels, P rows and columns of a region's features,
M of its mask.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import batched_nms

from pipeline.models.zoo.rcnn import VggHead, body_of, region_proposals
from pipeline.models.zoo.roi_ops import RoIFeatures

__all__ = ["MNC_LOSSES", "CascadeHeads", "MovingProposals", "build_mnc", "mask_overlaps"]

# Section 3: L1 (two), L2, L3 (two: section 3.3's classifiers of boxes and of masks), all by 1.
MNC_LOSSES = {
    "loss_objectness": 1.0,
    "loss_rpn_box_reg": 1.0,
    "loss_mask": 1.0,
    "loss_box_class": 1.0,
    "loss_mask_class": 1.0,
}
FOUND_IOU = 0.5


class MovingProposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """torchvision's proposal network, but for its boxes: they pass on gradients, so that later stages move them.

    No offset of an anchor is moved by more than what its own loss may move it by (as the authors' code clips it): later
    stages see fewer boxes than there are anchors, and would otherwise pull boxes off their objects.
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As RegionProposalNetwork's. Raises ValueError for training without targets."""
        objectness, deltas = self.head(list(features.values()))
        anchors = self.anchor_generator(images, list(features.values()))
        counts = [level[0].numel() for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        moving = deltas.clone()
        if moving.requires_grad:
            # Smooth L1's gradient is at most 1, divided by the anchors that are learned from.
            limit = 1 / (self.fg_bg_sampler.batch_size_per_image * len(anchors))
            moving.register_hook(lambda gradient: gradient.clamp(-limit, limit))
        moved_BN4 = self.box_coder.decode(moving, anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(moved_BN4, objectness, images.image_sizes, counts)
        if not self.training:
            return boxes, {}
        if targets is None:
            raise ValueError("expected targets in training, got none")
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        loss_objectness, loss_box = self.compute_loss(
            objectness, deltas, labels, self.box_coder.encode(matched, anchors)
        )
        return boxes, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}


class CascadeHeads(RoIHeads):  # type: ignore[misc]
    """Stages 2 and 3: a mask of each box, and its class from the box's features and from those within the mask.

    Stage 2: two fully connected layers (256, M^2) on RoIWarp's 14 x 14. Stage 3: VGG16's fc6 and fc7 on these features
    max-pooled to 7 x 7, and others on the same times the mask, side by side. As in section 3.3, one classifier learns
    boxes (an object where the box overlaps with it by half) and one masks (where in addition the predicted mask does);
    the second one's are the scores.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int,
        mask_side: int,
        batch_size_per_image: int,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
    ) -> None:
        super().__init__(
            RoIFeatures("warp", (16,), 14),
            None,
            None,
            fg_iou_thresh=FOUND_IOU,
            bg_iou_thresh=FOUND_IOU,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
        )
        self.mask_side = mask_side
        self.mask_fc1 = nn.Linear(channels * 14 * 14, 256)
        self.mask_fc2 = nn.Linear(256, mask_side * mask_side)
        self.box_path = VggHead(channels * 7 * 7, hidden)
        self.mask_path = VggHead(channels * 7 * 7, hidden)
        self.box_classes = nn.Linear(2 * hidden, num_classes)
        self.mask_classes = nn.Linear(2 * hidden, num_classes)

    def stages(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mask_N1MM, box_logits_NK, mask_logits_NK; the masks as logits."""
        regions_NCPP = self.box_roi_pool(features, boxes, image_shapes)
        hidden = functional.relu(self.mask_fc1(regions_NCPP.flatten(1)))
        mask_N1MM = self.mask_fc2(hidden).view(-1, 1, self.mask_side, self.mask_side)
        inside_N1PP = functional.interpolate(
            mask_N1MM.sigmoid(), size=regions_NCPP.shape[-2:], mode="bilinear", align_corners=False
        )
        paths = [
            self.box_path(functional.max_pool2d(regions_NCPP, 2)),
            self.mask_path(functional.max_pool2d(regions_NCPP * inside_N1PP, 2)),
        ]
        joined = torch.cat(paths, dim=1)
        return mask_N1MM, self.box_classes(joined), self.mask_classes(joined)

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
            if targets is None:
                raise ValueError("expected targets in training, got none")
            return [], self._losses(features, proposals, image_shapes, targets)
        mask_N1MM, _, logits_NK = self.stages(features, proposals, image_shapes)
        counts = [len(boxes) for boxes in proposals]
        scores, masks = torch.split(logits_NK.softmax(1), counts), torch.split(mask_N1MM.sigmoid(), counts)
        return [self._kept(*image) for image in zip(proposals, scores, masks, strict=True)], {}

    def _kept(self, boxes_N4: Tensor, score_NK: Tensor, mask_N1MM: Tensor) -> dict[str, Tensor]:
        """Each class's boxes above the threshold that no better one of the class overlaps, the best of them all."""
        at_n, label_n = torch.where(score_NK[:, 1:] > self.score_thresh)
        label_n = label_n + 1
        score_n = score_NK[at_n, label_n]
        kept = batched_nms(boxes_N4[at_n].float(), score_n.float(), label_n, self.nms_thresh)[: self.detections_per_img]
        own = at_n[kept]
        return {"boxes": boxes_N4[own], "scores": score_n[kept], "labels": label_n[kept], "masks": mask_N1MM[own]}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        boxes, matched, label_N = self._sampled(proposals, targets)
        mask_N1MM, box_logits_NK, mask_logits_NK = self.stages(features, boxes, image_shapes)
        with torch.no_grad():
            images = [*zip(targets, boxes, matched, strict=True)]
            target_NMM = torch.cat(
                [
                    project_masks_on_boxes(target["masks"], box, at, self.mask_side)
                    if len(target["masks"])
                    else box.new_zeros(len(box), self.mask_side, self.mask_side)
                    for target, box, at in images
                ]
            )
            whole_N = torch.cat(
                [
                    target["masks"].sum((1, 2)).to(box)[at] if len(target["masks"]) else box.new_zeros(len(box))
                    for target, box, at in images
                ]
            )
            overlap_N = mask_overlaps(mask_N1MM[:, 0].sigmoid().float(), target_NMM, torch.cat(boxes), whole_N)
            mask_label_N = torch.where(overlap_N >= FOUND_IOU, label_N, 0)
        objects = label_N > 0
        loss_mask = (
            functional.binary_cross_entropy_with_logits(mask_N1MM[objects, 0].float(), target_NMM[objects].float())
            if bool(objects.any())
            else mask_N1MM.sum() * 0
        )
        return {
            "loss_mask": loss_mask,
            "loss_box_class": functional.cross_entropy(box_logits_NK, label_N),
            "loss_mask_class": functional.cross_entropy(mask_logits_NK, mask_label_N),
        }

    def _sampled(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Boxes to learn from, with their gradients; per image the object of each; and what each is, 0 for nothing."""
        truths = [target["boxes"].to(proposals[0].dtype) for target in targets]
        boxes = self.add_gt_proposals(proposals, truths)
        with torch.no_grad():
            names = [target["labels"] for target in targets]
            matched, labels = self.assign_targets_to_proposals([box.detach() for box in boxes], truths, names)
            chosen = self.subsample(labels)
        return (
            [box[at] for box, at in zip(boxes, chosen, strict=True)],
            [item[at] for item, at in zip(matched, chosen, strict=True)],
            torch.cat([label[at] for label, at in zip(labels, chosen, strict=True)]),
        )


def mask_overlaps(mask_NMM: Tensor, target_NMM: Tensor, boxes_N4: Tensor, whole_N: Tensor) -> Tensor:
    """Intersection over union of each box's mask (probability above 0.5) with its object, of which the box may hold
    only a part.

    target_NMM: the object's share of each cell. whole_N: the object's pixels, within the box and outside.
    """
    cell_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1]) / mask_NMM[0].numel()
    mask_NMM = (mask_NMM > 0.5).to(target_NMM.dtype)
    both_N = (mask_NMM * target_NMM).sum((1, 2)) * cell_N
    either_N = mask_NMM.sum((1, 2)) * cell_N + whole_N - both_N
    return both_N / either_N.clamp_min(torch.finfo(either_N.dtype).tiny)


class MNC(nn.Module):
    """The cascade, called by the names of torchvision's detectors."""

    def __init__(self, backbone: nn.Module, rpn: MovingProposals, roi_heads: CascadeHeads) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads


def build_mnc(
    num_classes: int,
    width: int = 64,
    hidden: int = 4096,
    mask_side: int = 28,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.3,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_test: int = 300,
    box_batch_size_per_image: int = 64,
) -> nn.Module:
    """MNC on VGG16 with three stages (Dai, He, Sun 2016), random weights.

    Trained end to end: stages 2 and 3 move the boxes of stage 1 through RoIWarp (section 3.2), stage 3 the masks of
    stage 2. Left out: the paper's stages 4 and 5 (2 and 3 once more, on boxes that stage 3 corrects) and its voting of
    masks; overlapping boxes of a class are settled by boxes.

    width, hidden: channels of VGG16's first stage, units of fc6 and fc7. mask_side: M. rpn_post_nms_top_n_test: boxes
    of an image that become objects. box_batch_size_per_image: those that are learned from.
    """
    body = body_of("vgg16", "c4", width)
    heads = CascadeHeads(
        body.channels,
        num_classes,
        hidden=hidden,
        mask_side=mask_side,
        batch_size_per_image=box_batch_size_per_image,
        score_thresh=box_score_thresh,
        nms_thresh=box_nms_thresh,
        detections_per_img=box_detections_per_img,
    )
    proposals: Any = region_proposals(body, rpn_post_nms_top_n_test, MovingProposals)
    return MNC(body.module, proposals, heads)
