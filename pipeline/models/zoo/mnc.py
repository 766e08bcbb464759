"""Multi-task Network Cascades: boxes, their masks, what is in the masks, and both once more in boxes that this corrects
(Dai, He, Sun 2016, https://arxiv.org/abs/1512.04412; the authors' code: https://github.com/daijifeng001/MNC, MIT).

Axes: B images, N regions, K outputs (background and classes), C channels, P rows and columns of a region's features,
M of its mask.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image

from pipeline.models.zoo.rcnn import VggHead, body_of, region_proposals
from pipeline.models.zoo.roi_ops import RoIFeatures

__all__ = ["MNC_LOSSES", "CascadeHeads", "MovingProposals", "Stages", "build_mnc", "mask_overlaps"]

# Section 3: L1 (two), L2 and L4, L3 and L5 (three each: section 3.3's classifiers of boxes and of masks, and the
# correction of boxes, which three stages do without), all by 1.
MNC_LOSSES = {
    "loss_objectness": 1.0,
    "loss_rpn_box_reg": 1.0,
    "loss_mask": 1.0,
    "loss_box_class": 1.0,
    "loss_mask_class": 1.0,
    "loss_box_reg": 1.0,
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


class Stages(NamedTuple):
    """What stages 2 and 3, or 4 and 5, say of boxes. The masks are logits; deltas_NK4: corrections of a box by class,
    as torchvision's BoxCoder has them, None with three stages."""

    mask_N1MM: Tensor
    box_logits_NK: Tensor
    mask_logits_NK: Tensor
    deltas_NK4: Tensor | None = None


class CascadeHeads(RoIHeads):  # type: ignore[misc]
    """Stages 2 and 3: a mask of each box, and its class from the box's features and from those within the mask. Stages
    4 and 5: the same, by the same weights, of the boxes as the best class of stage 3 corrects them.

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
        corrects: bool,
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
        self.box_deltas = nn.Linear(2 * hidden, 4 * num_classes) if corrects else None

    def stages(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Stages:
        """Masks and classes of boxes, and how they should be corrected."""
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
        deltas_NK4 = None if self.box_deltas is None else self.box_deltas(joined).view(len(joined), -1, 4)
        return Stages(mask_N1MM, self.box_classes(joined), self.mask_classes(joined), deltas_NK4)

    def corrected(self, boxes: list[Tensor], found: Stages, image_shapes: list[tuple[int, int]]) -> list[Tensor]:
        """Each box as the class, but the background, that its mask most likely holds would have it, within the image.

        Gradients go to the boxes and to the corrections, to these by no more than what their own loss may move them by
        (as in MovingProposals, and the authors' code).
        """
        if found.deltas_NK4 is None:
            raise ValueError("expected corrections of boxes, which three stages do not make")
        best_N = found.mask_logits_NK[:, 1:].argmax(1) + 1
        deltas_N4 = found.deltas_NK4[torch.arange(len(best_N), device=best_N.device), best_N]
        if deltas_N4.requires_grad and len(deltas_N4):
            deltas_N4 = deltas_N4.clone()
            limit = 1 / len(deltas_N4)
            deltas_N4.register_hook(lambda gradient: gradient.clamp(-limit, limit))  # type: ignore[no-untyped-call]
        moved_N4 = self.box_coder.decode_single(deltas_N4, torch.cat(boxes))
        parts = torch.split(moved_N4, [len(image) for image in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As RoIHeads': (detections, {}) in evaluation, ([], losses) in training. Detections are those of stage 3 and
        of stage 5 together, of which the better ones stay, as the authors have it. Raises ValueError for training
        without targets."""
        if self.training:
            if targets is None:
                raise ValueError("expected targets in training, got none")
            return [], self._losses(features, proposals, image_shapes, targets)
        boxes, parts = proposals, []
        for last in (self.box_deltas is None, True):
            found = self.stages(features, boxes, image_shapes)
            counts = [len(image) for image in boxes]
            scores, masks = (
                torch.split(values, counts) for values in (found.mask_logits_NK.softmax(1), found.mask_N1MM.sigmoid())
            )
            parts.append([*zip(boxes, scores, masks, strict=True)])
            if last:
                break
            boxes = self.corrected(boxes, found, image_shapes)
        images = (zip(*passes, strict=True) for passes in zip(*parts, strict=True))
        return [self._kept(*(torch.cat(values) for values in image)) for image in images], {}

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
        """Of stages 2 and 3, and of 4 and 5 on all of their boxes as they are corrected, summed."""
        boxes, matched, labels = self._assigned(proposals, targets)
        with torch.no_grad():
            chosen = self.subsample(labels)
        boxes, matched, labels = (
            [image[at] for image, at in zip(images, chosen, strict=True)] for images in (boxes, matched, labels)
        )
        found = self.stages(features, boxes, image_shapes)
        losses = self._pass_losses(found, boxes, matched, labels, targets)
        if self.box_deltas is None:
            return losses
        boxes, matched, labels = self._assigned(self.corrected(boxes, found, image_shapes), targets)
        again = self._pass_losses(self.stages(features, boxes, image_shapes), boxes, matched, labels, targets)
        return {name: loss + again[name] for name, loss in losses.items()}

    def _pass_losses(
        self,
        found: Stages,
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        label_N, mask_N1MM = torch.cat(labels), found.mask_N1MM
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
            "loss_box_class": functional.cross_entropy(found.box_logits_NK, label_N),
            "loss_mask_class": functional.cross_entropy(found.mask_logits_NK, mask_label_N),
            "loss_box_reg": self._box_loss(found.deltas_NK4, boxes, matched, label_N, targets),
        }

    def _box_loss(
        self,
        deltas_NK4: Tensor | None,
        boxes: list[Tensor],
        matched: list[Tensor],
        label_N: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Smooth L1 of the corrections that objects should have, by their class; a mean over all boxes."""
        if deltas_NK4 is None:
            return label_N.new_zeros((), dtype=torch.float32)
        objects = torch.where(label_N > 0)[0]
        own_n4 = deltas_NK4[objects, label_N[objects]].float()
        with torch.no_grad():
            wanted_N4 = torch.cat(
                [
                    target["boxes"][at].to(box) if len(target["boxes"]) else box
                    for target, box, at in zip(targets, boxes, matched, strict=True)
                ]
            )
            target_n4 = self.box_coder.encode_single(wanted_N4[objects], torch.cat(boxes)[objects])
        return functional.smooth_l1_loss(own_n4, target_n4.float(), reduction="sum") / max(len(label_N), 1)

    def _assigned(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes to learn from with those of the targets, gradients and all; and of each image's, which object each is
        of, and what it is: 0 for nothing."""
        truths = [target["boxes"].to(proposals[0].dtype) for target in targets]
        boxes = self.add_gt_proposals(proposals, truths)
        with torch.no_grad():
            names = [target["labels"] for target in targets]
            matched, labels = self.assign_targets_to_proposals([box.detach() for box in boxes], truths, names)
        return boxes, matched, labels


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
    stages: int = 5,
    width: int = 64,
    hidden: int = 4096,
    mask_side: int = 28,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.3,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_test: int = 300,
    box_batch_size_per_image: int = 64,
) -> nn.Module:
    """MNC on VGG16 (Dai, He, Sun 2016), random weights.

    Trained end to end: later stages move the boxes of stage 1 through RoIWarp (section 3.2), those of stage 3 too, and
    the masks of stages 2 and 4. Left out is the paper's voting of masks: overlapping boxes of a class are settled by
    boxes.

    stages: 5, or 3, which ends with the classes of the first boxes and learns no correction of them (section 3.4).
    width, hidden: channels of VGG16's first stage, units of fc6 and fc7. mask_side: M. rpn_post_nms_top_n_test: boxes
    of an image that become objects. box_batch_size_per_image: those that are learned from. Raises ValueError for
    another number of stages.
    """
    if stages not in (3, 5):
        raise ValueError(f"stages must be 3 or 5, got {stages}")
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
        corrects=stages == 5,
    )
    proposals: Any = region_proposals(body, rpn_post_nms_top_n_test, MovingProposals)
    return MNC(body.module, proposals, heads)
