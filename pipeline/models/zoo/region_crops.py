"""R-CNN and SDS: every proposal is cut out of the image, warped to one size, and run through the network by itself.

Axes: B batch, C channels, H rows, W columns, N regions, S rows and columns of a crop, K classes, G cells of a grid.
"""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame
from pipeline.models.zoo.proposals import EXTRA, ProposalKind, Proposals, Proposer, box_masks
from pipeline.models.zoo.region_heads import (
    BoxHead,
    RegionModel,
    Sample,
    decode_boxes,
    fully_connected,
    maps,
    own_image,
    region_loss,
    vgg16,
)
from pipeline.models.zoo.selective_search import SearchMode
from pipeline.models.zoo.vgg import adapt_vgg16

__all__ = ["EXTRA", "RCNN", "SDS", "adapt_sds", "with_context"]

FC_CELLS = 7
TRAINING_SHARE = 0.25  # of the regions learned from that hold an object: 32 of 128 in R-CNN


def with_context(boxes_N4: Tensor, crop_size: int, context: int) -> Tensor:
    """Boxes grown so that, warped to `crop_size`, they have `context` pixels around them (R-CNN, appendix A)."""
    margin_N2 = (boxes_N4[:, 2:] - boxes_N4[:, :2]) * (context / (crop_size - 2 * context))
    return torch.cat([boxes_N4[:, :2] - margin_N2, boxes_N4[:, 2:] + margin_N2], 1)


class _Crops(nn.Module):
    """Crops of regions, and what VGG16 says of one."""

    def __init__(self, crop_size: int, context: int, dropout: float) -> None:
        super().__init__()
        if crop_size < 32 or not 0 <= 2 * context < crop_size:
            raise ValueError(f"crop_size must be 32 or more, context below half of it, got {crop_size}, {context}")
        self.crop_size, self.context = crop_size, context
        self.dropout = nn.Dropout(dropout)

    def cut(self, values_1CHW: Tensor, boxes_N4: Tensor) -> Tensor:
        """(N, C, S, S) of one image; 0, which is the mean colour, outside of it."""
        boxes_N4 = with_context(boxes_N4, self.crop_size, self.context)
        cut: Tensor = roi_align(values_1CHW, [boxes_N4.to(values_1CHW)], self.crop_size, aligned=True)
        return cut

    def cut_masks(self, masks_N1HW: Tensor, boxes_N4: Tensor) -> Tensor:
        """(N, 1, S, S), 1 inside: each box from its own mask."""
        boxes_N4 = with_context(boxes_N4, self.crop_size, self.context)
        cut: Tensor = roi_align(masks_N1HW, own_image(boxes_N4.to(masks_N1HW)), self.crop_size, aligned=True)
        return (cut >= 0.5).to(masks_N1HW)

    def forward(self, encoder: nn.ModuleDict, crop_NCSS: Tensor) -> Tensor:
        """fc7 (N, hidden)."""
        features = functional.max_pool2d(maps(encoder, crop_NCSS)[-1], 2)
        return fully_connected(encoder, functional.adaptive_avg_pool2d(features, FC_CELLS), self.dropout)


class RCNN(RegionModel):
    """Regions with CNN features (Girshick et al. 2014, https://arxiv.org/abs/1311.2524), on VGG16.

    A proposal is warped to crop_size x crop_size with `context` pixels around it (appendix A), whatever its shape; fc7
    gives softmax scores of the K classes and the background and a correction of the box in each class (appendix C).
    Where the paper fits a support vector machine per class and a ridge regression behind a fine-tuned network, in three
    steps, the network's own softmax and a linear layer do it here, learned at once.

    proposals, max_proposals, search_mode: see Proposer. regions_per_image: learned from. crop_batch: crops in one
    forward pass while labelling. box_nms_thresh, box_score_thresh, box_detections_per_img: see Kept. width, hidden: of
    VGG16. Raises ValueError for options that make no sense.
    """

    def __init__(
        self,
        num_classes: int,
        proposals: ProposalKind = "selective_search",
        max_proposals: int = 2000,
        search_mode: SearchMode = "fast",
        crop_size: int = 224,
        context: int = 16,
        regions_per_image: int = 64,
        crop_batch: int = 64,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.3,
        box_detections_per_img: int = 100,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__(
            num_classes,
            Proposer(proposals, max_proposals, search_mode, mean, std),
            regions_per_image=regions_per_image,
            box_score_thresh=box_score_thresh,
            box_nms_thresh=box_nms_thresh,
            box_detections_per_img=box_detections_per_img,
        )
        self.crop_batch = crop_batch
        self.crops = _Crops(crop_size, context, dropout)
        self.encoder = vgg16(num_classes, width, hidden)
        self.head = BoxHead(hidden, num_classes)

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), best first."""
        found = []
        for at, (proposals, frame) in enumerate(zip(self.proposer(image_BCHW, frames), frames, strict=True)):
            boxes_R4 = proposals.boxes_R4
            parts = [
                self.head(self.crops(self.encoder, self.crops.cut(image_BCHW[at : at + 1], part_N4)))
                for part_N4 in torch.split(boxes_R4, self.crop_batch)
            ]
            scores = torch.cat([scores for scores, _ in parts])
            decoded = decode_boxes(boxes_R4, torch.cat([deltas for _, deltas in parts]).float())
            found.append(self.keep(scores, decoded, frame).as_detection())
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box` (see `region_loss`): everything below an overlap of 0.5 is background."""
        samples = [
            self.sample(proposals, target, positive_share=TRAINING_SHARE)
            for proposals, target in zip(self.proposer(image_BCHW, frames), targets, strict=True)
        ]
        crops = [self.crops.cut(image_BCHW[at : at + 1], sample.boxes_N4) for at, sample in enumerate(samples)]
        scores, deltas = self.head(self.crops(self.encoder, torch.cat(crops)))
        return region_loss(scores, deltas, samples, targets)


class SDS(RegionModel):
    """Simultaneous detection and segmentation (Hariharan et al. 2014, https://arxiv.org/abs/1407.1808), on VGG16.

    Two networks see every region: one its box, the other its box with everything but the region at the mean colour;
    both learn at once (the paper's C). Their fc7, side by side, give softmax scores of the K classes and the background
    (support vector machines in the paper). The mask is refined: in each cell of a grid x grid over the
    box a logistic regression of the class, on those features and the region's own mask in the cells, says what is
    inside. It begins as the region. The paper's last step, a second logistic regression on superpixels, is left out,
    and its regions are MCG's.

    Of `proposals`, only selective_search gives regions; the others' are their boxes. grid: cells in a row. The other
    options are RCNN's; there is no correction of boxes, as in the paper.
    """

    def __init__(
        self,
        num_classes: int,
        proposals: ProposalKind = "selective_search",
        max_proposals: int = 2000,
        search_mode: SearchMode = "fast",
        grid: int = 10,
        crop_size: int = 224,
        context: int = 16,
        regions_per_image: int = 32,
        crop_batch: int = 32,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.3,
        box_detections_per_img: int = 100,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        if grid < 1:
            raise ValueError(f"grid must be 1 or more, got {grid}")
        super().__init__(
            num_classes,
            Proposer(proposals, max_proposals, search_mode, mean, std),
            regions_per_image=regions_per_image,
            box_score_thresh=box_score_thresh,
            box_nms_thresh=box_nms_thresh,
            box_detections_per_img=box_detections_per_img,
        )
        self.crop_batch, self.grid = crop_batch, grid
        self.crops = _Crops(crop_size, context, dropout)
        self.encoder = vgg16(num_classes, width, hidden)
        self.region_encoder = vgg16(num_classes, width, hidden)
        self.score = nn.Linear(2 * hidden, num_classes + 1)
        self.refine = nn.Linear(2 * hidden + grid * grid, num_classes * grid * grid)
        for layer in (self.score, self.refine):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self._begin_as_the_region()

    @torch.no_grad()
    def _begin_as_the_region(self) -> None:
        """A cell's first guess is what the region says of it: a logit of 2 inside, -2 outside."""
        cells = self.grid * self.grid
        own_KGG = self.refine.weight[:, -cells:].view(self.classes, cells, cells)
        own_KGG += 4 * torch.eye(cells, device=own_KGG.device)
        self.refine.bias.fill_(-2.0)

    def describe(self, image_1CHW: Tensor, boxes_N4: Tensor, masks_N1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 2 hidden) and the region's share of each cell (N, G G) of regions of one image."""
        crop_NCSS = self.crops.cut(image_1CHW, boxes_N4)
        inside_N1SS = self.crops.cut_masks(masks_N1HW, boxes_N4)
        whole = self.crops(self.encoder, crop_NCSS)
        region = self.crops(self.region_encoder, crop_NCSS * inside_N1SS)
        return torch.cat([whole, region], 1), self.cells(masks_N1HW, boxes_N4)

    def cells(self, masks_N1HW: Tensor, boxes_N4: Tensor) -> Tensor:
        """(N, G G), 0 to 1: how much of each cell of the box is inside of its mask."""
        cells: Tensor = roi_align(masks_N1HW.float(), own_image(boxes_N4.float()), self.grid, aligned=True)
        return cells.flatten(1)

    def refined(self, features_NF: Tensor, cells_NG: Tensor, labels_N: Tensor) -> Tensor:
        """Logits (N, G, G) of the masks of the classes labels_N."""
        logits_NK = self.refine(torch.cat([features_NF, cells_NG.to(features_NF)], 1))
        logits_NKGG = logits_NK.unflatten(1, (self.classes, self.grid, self.grid))
        logits_NGG: Tensor = logits_NKGG[torch.arange(len(labels_N), device=labels_N.device), labels_N]
        return logits_NGG

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), masks (N, 1, G, G)."""
        found = []
        for at, (proposals, frame) in enumerate(zip(self.proposer(image_BCHW, frames), frames, strict=True)):
            boxes_R4, image_1CHW = proposals.boxes_R4, image_BCHW[at : at + 1]
            parts = [
                self.describe(
                    image_1CHW,
                    boxes_R4[places],
                    proposals.masks(places.tolist(), *image_BCHW.shape[2:]),
                )
                for places in torch.split(torch.arange(len(boxes_R4)), self.crop_batch)
            ]
            features, cells = (torch.cat(values) for values in zip(*parts, strict=True))
            kept = self.keep(self.score(features), boxes_R4[:, None].expand(-1, self.classes, -1), frame)
            logits = self.refined(features[kept.region_D], cells[kept.region_D], kept.labels_D)
            found.append({**kept.as_detection(), "masks": logits.float().sigmoid()[:, None]})
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_classifier` (see `region_loss`), and `loss_mask`: the cross-entropy of the cells of positive regions,
        in their class, mean over those of an image."""
        classes = image_BCHW.new_zeros(())
        masks = image_BCHW.new_zeros(())
        for at, (proposals, target) in enumerate(zip(self.proposer(image_BCHW, frames), targets, strict=True)):
            sample = self.sample(proposals, target, positive_share=TRAINING_SHARE)
            features, cells = self.describe(
                image_BCHW[at : at + 1], sample.boxes_N4, self._masks(sample, proposals, target, image_BCHW)
            )
            scores = self.score(features).float()
            classes = classes + functional.cross_entropy(scores, sample.labels_N) / len(targets)
            positive = torch.nonzero(sample.object_N >= 0)[:, 0]
            logits = self.refined(features[positive], cells[positive], sample.labels_N[positive]).float()
            wanted_N1HW = target["masks"].to(image_BCHW)[sample.object_N[positive], None]
            wanted = self.cells(wanted_N1HW, sample.boxes_N4[positive]) >= 0.5
            # A sum over nothing is 0, and keeps the parameters in the graph.
            error = functional.binary_cross_entropy_with_logits(logits.flatten(1), wanted.float(), reduction="sum")
            masks = masks + error / max(wanted.numel(), 1) / len(targets)
        return {"loss_classifier": classes, "loss_mask": masks}

    def _masks(self, sample: Sample, proposals: Proposals, target: Mapping[str, Tensor], image_BCHW: Tensor) -> Tensor:
        """masks_N1HW of the sampled regions: the proposal's, of an object's own box the object's, else the box."""
        size, known, objects = image_BCHW.shape[2:], len(proposals.boxes_R4), len(target["masks"])
        parts = [torch.zeros(0, 1, *size).to(image_BCHW)]
        for box_4, number in zip(sample.boxes_N4, sample.proposal_N.tolist(), strict=True):
            if number < known:
                mask = proposals.masks([number], *size)
            elif number < known + objects:
                mask = target["masks"][number - known][None, None]
            else:
                mask = box_masks(box_4[None], *size)
            parts.append(mask.to(image_BCHW))
        return torch.cat(parts)


def adapt_sds(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """torchvision's VGG16 as the start of both networks; any other checkpoint as it is."""
    placed = adapt_vgg16()(given, wanted)
    if not any(name.startswith("features.") for name in given):
        return placed
    return {**placed, **{f"region_{name}": tensor.clone() for name, tensor in placed.items()}}
