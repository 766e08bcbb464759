"""Hypercolumns: what a pixel of an object is, from the values above it in several layers at once.

Axes: B batch, C channels, H rows, W columns, N regions, K classes, G classifiers of a grid, M rows and columns of a
mask.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame
from pipeline.models.zoo.proposals import EXTRA, ProposalKind, Proposer
from pipeline.models.zoo.region_heads import (
    BoxHead,
    RegionModel,
    decode_boxes,
    fully_connected,
    maps,
    own_image,
    region_loss,
    vgg16,
)
from pipeline.models.zoo.selective_search import SearchMode

__all__ = ["EXTRA", "Hypercolumns", "PixelClassifiers", "grid_weights"]

FC_CELLS = 7
# Cells of a region's part of each level's maps, before they are brought to the mask's size.
LEVEL_CELLS = {"pool2": 28, "conv4": 14}
STRIDES = {"pool2": 4, "conv4": 8}


def grid_weights(grid: int, size: int) -> Tensor:
    """weight_GMM: how much each of grid x grid classifiers counts at each of size x size pixels: bilinear between the
    centres of their cells. Each pixel's sum to 1."""
    place_M = ((torch.arange(size) + 0.5) / size * grid - 0.5).clamp(0, grid - 1)
    weight_gM = (1 - (place_M - torch.arange(grid)[:, None]).abs()).clamp(min=0)
    return (weight_gM[:, None, :, None] * weight_gM[None, :, None, :]).flatten(0, 1)


class PixelClassifiers(nn.Module):
    """Logistic regressions on hypercolumns: for each class one in each cell of a grid over the box.

    A linear classifier of a hypercolumn is a sum of linear classifiers of its levels, so each level has a 1x1
    convolution at its own resolution, and those are brought to the mask's size and summed. A pixel's
    probability is the mean of the neighbouring cells', weighted by `grid_weights`. channels: of each level's maps,
    by name.
    """

    def __init__(self, channels: Mapping[str, int], num_classes: int, grid: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(num_classes, grid * grid, count) * 0.01)
                for name, count in channels.items()
            }
        )
        self.bias = nn.Parameter(torch.zeros(num_classes, grid * grid))
        self.register_buffer("grid_GMM", grid_weights(grid, size), persistent=False)

    def forward(self, levels: Mapping[str, Tensor], labels_N: Tensor) -> Tensor:
        """probability_NMM of the masks of the classes labels_N. levels: values_NCmm by name, of any size m."""
        logits_NGMM = self.bias[labels_N][:, :, None, None]
        for name, values_NCmm in levels.items():
            score_NGmm = torch.einsum("ngc,nchw->nghw", self.weights[name][labels_N], values_NCmm)
            logits_NGMM = logits_NGMM + functional.interpolate(
                score_NGmm, size=(self.size, self.size), mode="bilinear", align_corners=False
            )
        probability_NMM: Tensor = (logits_NGMM.float().sigmoid() * self.get_buffer("grid_GMM")).sum(1)
        return probability_NMM


class Hypercolumns(RegionModel):
    """Hypercolumns for masks (Hariharan et al. 2015, https://arxiv.org/abs/1411.5752, section 3), on VGG16.

    Proposals are classified and their boxes corrected from 7x7 cells of conv5 and two fully connected layers, where the
    paper takes the detections of SDS; in each box that is kept, pool2, conv4 and fc7 together say which of 50x50 pixels
    are the object's. Each level is classified by 1x1 convolutions (the paper's system with bounding boxes; its n x n
    ones and its second network over candidates' masks are left out).

    proposals, max_proposals, search_mode: see Proposer. grid: cells in a row, each with its own classifiers. mask_size:
    pixels in a row. regions_per_image: learned from. The others are RCNN's.
    """

    def __init__(
        self,
        num_classes: int,
        proposals: ProposalKind = "selective_search",
        max_proposals: int = 2000,
        search_mode: SearchMode = "fast",
        grid: int = 5,
        mask_size: int = 50,
        regions_per_image: int = 64,
        region_batch: int = 256,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.3,
        box_detections_per_img: int = 100,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        if grid < 1 or mask_size < grid:
            raise ValueError(f"grid must be 1 or more, mask_size no less, got {grid}, {mask_size}")
        super().__init__(
            num_classes,
            Proposer(proposals, max_proposals, search_mode, mean, std),
            regions_per_image=regions_per_image,
            box_score_thresh=box_score_thresh,
            box_nms_thresh=box_nms_thresh,
            box_detections_per_img=box_detections_per_img,
        )
        self.region_batch = region_batch
        self.encoder = vgg16(num_classes, width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = BoxHead(hidden, num_classes)
        channels = {"pool2": 2 * width, "conv4": 8 * width, "fc7": hidden}
        self.pixels = PixelClassifiers(channels, num_classes, grid, mask_size)

    def fc7(self, map_1CHW: Tensor, boxes_N4: Tensor) -> Tensor:
        """(N, hidden) of regions of one image's conv5."""
        cells = [
            roi_align(map_1CHW.float(), [part_N4], FC_CELLS, spatial_scale=1 / 16, aligned=True)
            for part_N4 in torch.split(boxes_N4, self.region_batch)
        ]
        return torch.cat([fully_connected(self.encoder, cells_NC77, self.dropout) for cells_NC77 in cells])

    def masks(self, levels: Sequence[Tensor], at: int, boxes_N4: Tensor, labels_N: Tensor, fc7_NF: Tensor) -> Tensor:
        """probability_NMM within boxes of image `at`. levels: from `maps`."""
        taken = {"pool2": functional.max_pool2d(levels[1][at : at + 1], 2), "conv4": levels[3][at : at + 1]}
        columns = {
            name: roi_align(
                map_1CHW.float(),
                [boxes_N4],
                LEVEL_CELLS[name],
                spatial_scale=1 / STRIDES[name],
                aligned=True,
            )
            for name, map_1CHW in taken.items()
        }
        probability_NMM: Tensor = self.pixels({**columns, "fc7": fc7_NF[:, :, None, None]}, labels_N)
        return probability_NMM

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), masks (N, 1, M, M)."""
        levels = maps(self.encoder, image_BCHW)
        found = []
        for at, (proposals, frame) in enumerate(zip(self.proposer(image_BCHW, frames), frames, strict=True)):
            scores, deltas = self.head(self.fc7(levels[-1][at : at + 1], proposals.boxes_R4))
            kept = self.keep(scores, decode_boxes(proposals.boxes_R4, deltas.float()), frame)
            # The column's top level sees the corrected box.
            fc7_NF = self.fc7(levels[-1][at : at + 1], kept.boxes_D4)
            masks_NMM = self.masks(levels, at, kept.boxes_D4, kept.labels_D, fc7_NF)
            found.append({**kept.as_detection(), "masks": masks_NMM[:, None]})
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box` (see `region_loss`), and `loss_mask`: the cross-entropy of the pixels of
        positive regions, in their class, mean over those of an image."""
        levels = maps(self.encoder, image_BCHW)
        samples, scores, deltas = [], [], []
        masks = image_BCHW.new_zeros(())
        for at, (proposals, target) in enumerate(zip(self.proposer(image_BCHW, frames), targets, strict=True)):
            sample = self.sample(proposals, target)
            fc7_NF = self.fc7(levels[-1][at : at + 1], sample.boxes_N4)
            score, delta = self.head(fc7_NF)
            samples.append(sample)
            scores.append(score)
            deltas.append(delta)
            positive = torch.nonzero(sample.object_N >= 0)[:, 0]
            boxes_N4, labels_N = sample.boxes_N4[positive], sample.labels_N[positive]
            probability_NMM = self.masks(levels, at, boxes_N4, labels_N, fc7_NF[positive])
            wanted_N1HW = target["masks"].float()[sample.object_N[positive], None].to(image_BCHW.device)
            wanted_NMM = roi_align(wanted_N1HW, own_image(boxes_N4), self.pixels.size, aligned=True)[:, 0] >= 0.5
            # Of the mean of sigmoids, which has no logit: autocast refuses the library's own.
            right_NMM = torch.where(wanted_NMM, probability_NMM, 1 - probability_NMM)
            error = -right_NMM.clamp(min=1e-6).log().sum()
            masks = masks + error / max(right_NMM.numel(), 1) / len(targets)
        return {**region_loss(torch.cat(scores), torch.cat(deltas), samples, targets), "loss_mask": masks}
