"""What the models that label regions share: VGG16, samples to learn from, box regression, and what is kept.

Outputs are places in the taxonomy's list; the last one, after those, is the background.

Axes: N regions, K classes, M objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from pipeline.models.spec import Frame
from pipeline.models.zoo.proposals import Proposals, Proposer
from pipeline.models.zoo.vgg import check_options, conv_stages, he_init

__all__ = [
    "BoxHead",
    "Kept",
    "RegionModel",
    "Sample",
    "box_deltas",
    "decode_boxes",
    "detect_frames",
    "fully_connected",
    "maps",
    "module_losses",
    "own_image",
    "region_loss",
    "sample_regions",
    "vgg16",
]

# Girshick 2015 (arXiv:1504.08083) divides what is regressed by its deviation over the data; these are its numbers.
DELTA_STD = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_SCALE = 4.135  # log(1000 / 16): a region grows by no more
FC_CELLS = 7


def vgg16(num_classes: int, width: int, hidden: int, *, fully: bool = True) -> nn.ModuleDict:
    """conv1 to conv5, and with `fully` fc6 (7x7) and fc7 (1x1), by the names that `adapt_vgg16` knows.

    num_classes is only checked. Raises ValueError for sizes that make no sense.
    """
    check_options(num_classes, width=width, hidden=hidden)
    stages = conv_stages(width)
    if fully:
        stages["fc6"] = nn.Conv2d(8 * width, hidden, FC_CELLS)
        stages["fc7"] = nn.Conv2d(hidden, hidden, 1)
    encoder = nn.ModuleDict(stages)
    he_init(encoder)
    return encoder


def maps(encoder: nn.ModuleDict, image_BCHW: Tensor) -> list[Tensor]:
    """Outputs of conv1 to conv5, before the poolings behind them: strides 1, 2, 4, 8, 16."""
    found: list[Tensor] = []
    features = image_BCHW
    for stage in range(1, 6):
        if found:
            features = functional.max_pool2d(features, 2)
        features = encoder[f"conv{stage}"](features)
        found.append(features)
    return found


def fully_connected(encoder: nn.ModuleDict, pooled_NC77: Tensor, dropout: nn.Dropout) -> Tensor:
    """fc6 and fc7 on 7x7 cells: (N, hidden)."""
    features = pooled_NC77
    for name in ("fc6", "fc7"):
        features = dropout(functional.relu(encoder[name](features)))
    return features.flatten(1)


class BoxHead(nn.Module):
    """Linear class scores (N, K + 1), and for each class a correction of the region's box (N, K, 4)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, num_classes + 1)
        self.box = nn.Linear(features, 4 * num_classes)
        for layer, std in ((self.score, 0.01), (self.box, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features_NF: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(features_NF), self.box(features_NF).unflatten(1, (-1, 4))


@dataclass(frozen=True, slots=True)
class Sample:
    """Regions of one image to learn from, those with an object first.

    boxes_N4. labels_N: classes, K for background. object_N: the object that a region has most in common with, -1 for
    background. proposal_N: which proposal it is; the numbers after those are the objects' own boxes, then boxes around
    them.
    """

    boxes_N4: Tensor
    labels_N: Tensor
    object_N: Tensor
    proposal_N: Tensor


def sample_regions(
    proposals_R4: Tensor,
    target: Mapping[str, Tensor],
    *,
    background: int,
    count: int,
    positive_share: float = 0.25,
    negatives: tuple[float, float] = (0.0, 0.5),
    around: int = 0,
) -> Sample:
    """`count` regions at most, drawn with torch's generator: objects' own boxes among them.

    Positive: an intersection over union of 0.5 or more with an object; background: within `negatives`, upper bound
    left out. count: at most `positive_share` of it is positive, the rest background. around: boxes drawn around each
    object beside its own, for proposals that seldom overlap one by a half.
    """
    boxes_M4 = target["boxes"].to(proposals_R4)
    boxes_R4 = torch.cat([proposals_R4, boxes_M4, _moved(boxes_M4.repeat(around, 1))])
    if len(boxes_M4):
        overlap_R, object_R = box_iou(boxes_R4, boxes_M4).max(1)
    else:
        overlap_R, object_R = boxes_R4.new_zeros(len(boxes_R4)), torch.zeros(len(boxes_R4), dtype=torch.int64)
        object_R = object_R.to(boxes_R4.device)
    positive = _drawn(torch.nonzero(overlap_R >= 0.5)[:, 0], max(1, round(count * positive_share)))
    low, high = negatives
    negative = _drawn(torch.nonzero((overlap_R >= low) & (overlap_R < high))[:, 0], count - len(positive))
    chosen = torch.cat([positive, negative])
    is_object = torch.arange(len(chosen), device=chosen.device) < len(positive)
    object_N = torch.where(is_object, object_R[chosen], -1)
    labels_N = torch.full_like(chosen, background)
    labels_N[: len(positive)] = target["labels"].to(chosen)[object_N[: len(positive)]]
    return Sample(boxes_R4[chosen], labels_N, object_N, chosen)


def _moved(boxes_N4: Tensor) -> Tensor:
    """Each edge by a fifth of the box's size at most, inwards or outwards."""
    moves_N4 = (2 * torch.rand(boxes_N4.shape) - 1).to(boxes_N4) / 5
    return boxes_N4 + moves_N4 * (boxes_N4[:, 2:] - boxes_N4[:, :2]).repeat(1, 2)


def _drawn(places: Tensor, count: int) -> Tensor:
    # On the CPU, so that the draw is the same on every device.
    return places[torch.randperm(len(places))[:count].to(places.device)]


def box_deltas(regions_N4: Tensor, boxes_N4: Tensor) -> Tensor:
    """What turns regions into boxes (R-CNN, appendix C): shifts of the centre in units of the region's size, and the
    logarithm of the change of size, over their usual deviation."""
    size, wanted = regions_N4[:, 2:] - regions_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]
    shift = ((boxes_N4[:, 2:] + boxes_N4[:, :2]) - (regions_N4[:, 2:] + regions_N4[:, :2])) / 2 / size
    return torch.cat([shift, torch.log(wanted / size)], 1) / regions_N4.new_tensor(DELTA_STD)


def decode_boxes(regions_N4: Tensor, deltas_NK4: Tensor) -> Tensor:
    """The inverse of `box_deltas`, for every class: (N, K, 4)."""
    deltas_NK4 = deltas_NK4 * regions_N4.new_tensor(DELTA_STD)
    size = (regions_N4[:, 2:] - regions_N4[:, :2])[:, None]
    middle = ((regions_N4[:, 2:] + regions_N4[:, :2]) / 2)[:, None] + deltas_NK4[..., :2] * size
    half = size * deltas_NK4[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([middle - half, middle + half], 2)


def region_loss(
    scores_NC: Tensor, deltas_NK4: Tensor, samples: Sequence[Sample], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Softmax cross-entropy of the classes, and squared error of the boxes of positive regions in their own class.

    Both over the regions of an image, then the mean over the images. Regions of all images in a row.
    """
    classes, boxes = scores_NC.sum() * 0, deltas_NK4.sum() * 0
    start = 0
    for sample, target in zip(samples, targets, strict=True):
        count = len(sample.labels_N)
        scores, deltas = scores_NC[start : start + count].float(), deltas_NK4[start : start + count].float()
        start += count
        if not count:
            continue
        classes = classes + functional.cross_entropy(scores, sample.labels_N) / len(samples)
        positive = torch.nonzero(sample.object_N >= 0)[:, 0]
        wanted = box_deltas(sample.boxes_N4[positive], target["boxes"].to(deltas)[sample.object_N[positive]])
        error = (deltas[positive, sample.labels_N[positive]] - wanted).square().sum()
        boxes = boxes + error / count / len(samples)
    return {"loss_classifier": classes, "loss_box": boxes}


def own_image(boxes_N4: Tensor) -> Tensor:
    """Boxes as `roi_align` wants them where the n-th box is of the n-th image: (N, 5). Any number of them, 0 too."""
    return torch.cat([torch.arange(len(boxes_N4), device=boxes_N4.device)[:, None].to(boxes_N4), boxes_N4], 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one image's regions, best first. boxes_D4, scores_D, labels_D; region_D: whose they are."""

    boxes_D4: Tensor
    scores_D: Tensor
    labels_D: Tensor
    region_D: Tensor

    def as_detection(self) -> dict[str, Tensor]:
        return {"boxes": self.boxes_D4, "scores": self.scores_D, "labels": self.labels_D}

    @classmethod
    def of(
        cls,
        probability_NK: Tensor,
        boxes_NK4: Tensor,
        size: tuple[int, int],
        *,
        score_thresh: float,
        nms_thresh: float,
        limit: int,
    ) -> "Kept":
        """Boxes of every region and class of at least `score_thresh`, within the image, without those that overlap a
        better one of their class by more than `nms_thresh`; the best `limit`. size: height, width."""
        region, label = torch.nonzero(probability_NK >= score_thresh, as_tuple=True)
        boxes = clip_boxes_to_image(boxes_NK4[region, label].float(), size)
        scores = probability_NK[region, label].float()
        whole = torch.nonzero((boxes[:, 2:] > boxes[:, :2]).all(1))[:, 0]
        region, label, boxes, scores = region[whole], label[whole], boxes[whole], scores[whole]
        kept = batched_nms(boxes, scores, label, nms_thresh)[:limit]
        return cls(boxes[kept], scores[kept], label[kept], region[kept])


class RegionModel(nn.Module):
    """What labels an image's proposed regions: who proposes, how many are learned from, and what is kept.

    box_score_thresh, box_nms_thresh, box_detections_per_img: see `Kept.of`.
    """

    def __init__(
        self,
        num_classes: int,
        proposer: Proposer,
        *,
        regions_per_image: int,
        box_score_thresh: float,
        box_nms_thresh: float,
        box_detections_per_img: int,
    ) -> None:
        super().__init__()
        self.classes, self.proposer, self.count = num_classes, proposer, regions_per_image
        self.limits = {"score_thresh": box_score_thresh, "nms_thresh": box_nms_thresh}
        self.detections = box_detections_per_img

    def keep(self, scores_NC: Tensor, boxes_NK4: Tensor, frame: Frame) -> Kept:
        """Of class scores with the background's behind them, and the boxes of every class."""
        size = (frame.prepared_height, frame.prepared_width)
        probability_NK = scores_NC.float().softmax(1)[:, : self.classes]
        return Kept.of(probability_NK, boxes_NK4, size, limit=self.detections, **self.limits)

    def sample(self, proposals: Proposals, target: Mapping[str, Tensor], **how: Any) -> Sample:
        """Regions to learn from: `sample_regions`, whose options `how` are."""
        boxes_R4, around = proposals.boxes_R4, self.proposer.around
        return sample_regions(boxes_R4, target, background=self.classes, count=self.count, around=around, **how)


def detect_frames(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Any:
    """The forward pass of a module that wants to know the images' sizes and prompts."""
    return module(image_BCHW, frames)


def module_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`losses` of the module itself."""
    model: Any = module
    found: dict[str, Tensor] = model.losses(image_BCHW, frames, targets)
    return found
