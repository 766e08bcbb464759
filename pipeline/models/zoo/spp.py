"""SPP-net: the convolutions see the image once, and every region's part of their maps is pooled in a pyramid of bins.

Axes: B batch, C channels, H rows, W columns, N regions, K classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame
from pipeline.models.zoo.proposals import EXTRA, ProposalKind, Proposer
from pipeline.models.zoo.region_heads import (
    BoxHead,
    RegionModel,
    decode_boxes,
    maps,
    region_loss,
    vgg16,
)
from pipeline.models.zoo.selective_search import SearchMode

__all__ = ["EXTRA", "SPPNet", "pyramid_pool", "windows"]

STRIDE = 16
LEVELS = (1, 2, 3, 6)  # section 4.1: 50 bins


def windows(boxes_N4: Tensor, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Cells of the maps whose centres lie within a box, left, top, right, bottom, the latter two outside; at least the
    nearest one (appendix A, with the centres where these convolutions have them)."""
    first = torch.ceil((boxes_N4[:, :2] - (STRIDE - 1) / 2) / STRIDE)
    last = torch.floor((boxes_N4[:, 2:] - (STRIDE - 1) / 2) / STRIDE)
    middle = torch.floor((boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2 / STRIDE)
    empty = last < first
    limit = torch.tensor([columns - 1, rows - 1], device=boxes_N4.device)
    first, last = (torch.minimum(torch.where(empty, middle, edge).clamp(min=0), limit).long() for edge in (first, last))
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in torch.cat([first, last + 1], 1).tolist()]


def pyramid_pool(map_CHW: Tensor, boxes_N4: Tensor, levels: Sequence[int] = LEVELS) -> Tensor:
    """(N, C * bins): the maximum of each of n x n bins of a window, n in `levels` (section 3.3)."""
    pooled = []
    for x1, y1, x2, y2 in windows(boxes_N4, *map_CHW.shape[1:]):
        window_CHW = map_CHW[:, y1:y2, x1:x2]
        pooled.append(torch.cat([functional.adaptive_max_pool2d(window_CHW, bins).flatten() for bins in levels]))
    return torch.stack(pooled) if pooled else map_CHW.new_zeros(0, len(map_CHW) * sum(bins**2 for bins in levels))


class SPPNet(RegionModel):
    """Spatial pyramid pooling (He et al. 2014, https://arxiv.org/abs/1406.4729, section 4), on VGG16's convolutions.

    conv5 is computed once per image; a region's window of it is pooled into 1 + 4 + 9 + 36 bins, then two fully
    connected layers, softmax scores of the K classes and the background (support vector machines in the paper) and
    R-CNN's correction of the box. The convolutions learn as well, which the paper could not; `freeze` them to have it
    as it was. One scale, of the paper's five.

    proposals, max_proposals, search_mode: see Proposer. regions_per_image: learned from. box_nms_thresh,
    box_score_thresh, box_detections_per_img: see Kept. width, hidden: of VGG16 and the two layers.
    """

    def __init__(
        self,
        num_classes: int,
        proposals: ProposalKind = "selective_search",
        max_proposals: int = 2000,
        search_mode: SearchMode = "fast",
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
        super().__init__(
            num_classes,
            Proposer(proposals, max_proposals, search_mode, mean, std),
            regions_per_image=regions_per_image,
            box_score_thresh=box_score_thresh,
            box_nms_thresh=box_nms_thresh,
            box_detections_per_img=box_detections_per_img,
        )
        self.region_batch = region_batch
        self.encoder = vgg16(num_classes, width, hidden, fully=False)
        bins = sum(level**2 for level in LEVELS)
        self.layers = nn.Sequential(
            nn.Linear(8 * width * bins, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = BoxHead(hidden, num_classes)

    def score(self, map_CHW: Tensor, boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and box corrections of regions of one image's conv5."""
        scores, deltas = self.head(self.layers(pyramid_pool(map_CHW, boxes_N4)))
        return scores, deltas

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), best first."""
        maps_BCHW = maps(self.encoder, image_BCHW)[-1]
        found = []
        for map_CHW, proposals, frame in zip(maps_BCHW, self.proposer(image_BCHW, frames), frames, strict=True):
            boxes_R4 = proposals.boxes_R4
            parts = [self.score(map_CHW, part_N4) for part_N4 in torch.split(boxes_R4, self.region_batch)]
            scores, deltas = (torch.cat(values) for values in zip(*parts, strict=True))
            found.append(self.keep(scores, decode_boxes(boxes_R4, deltas.float()), frame).as_detection())
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box` (see `region_loss`); the background overlaps an object by 0.1 to 0.5, or is
        drawn from all below 0.5 in an image that has none of that."""
        maps_BCHW = maps(self.encoder, image_BCHW)[-1]
        samples, scores, deltas = [], [], []
        for map_CHW, proposals, target in zip(maps_BCHW, self.proposer(image_BCHW, frames), targets, strict=True):
            sample = self.sample(proposals, target, negatives=(0.1, 0.5))
            if bool((sample.object_N >= 0).all()):
                sample = self.sample(proposals, target)
            score, delta = self.score(map_CHW, sample.boxes_N4)
            samples.append(sample)
            scores.append(score)
            deltas.append(delta)
        return region_loss(torch.cat(scores), torch.cat(deltas), samples, targets)
