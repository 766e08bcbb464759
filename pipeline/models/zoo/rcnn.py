"""The R-CNN family by its options: Mask R-CNN as its paper varies it, Fast R-CNN on given proposals; torchvision's
parts (BSD-3-Clause) where it has them.

Networks are called by torchvision's names (`backbone.body`, `backbone.fpn`, `rpn.head`, `roi_heads`), so that backbones
of torchvision's classification networks fit (`adapt_regions`).

Axes: B images, N boxes, C channels, H rows, W columns.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from pipeline.models.adapt import backbone as adapt_backbone
from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame
from pipeline.models.zoo.mask_heads import AveragePredictor, MaskHeads, MlpMasks
from pipeline.models.zoo.proposals import ProposalKind, Proposer
from pipeline.models.zoo.roi_ops import RoIFeatures
from pipeline.models.zoo.selective_search import SearchMode
from pipeline.models.zoo.vgg import conv_stages, he_init

__all__ = [
    "RESNETS",
    "Body",
    "FastRCNN",
    "VggHead",
    "adapt_regions",
    "body_of",
    "build_fastrcnn",
    "build_maskrcnn",
    "detect_given",
    "fast_rcnn_losses",
    "jittered_boxes",
    "region_proposals",
]

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
NECKS = ("fpn", "c4")
FPN_STRIDES = (4, 8, 16, 32)
FPN_CHANNELS = 256
# Ren et al. 2015, arXiv:1506.01497, and Lin et al. 2017, arXiv:1612.03144: one side for each level of a pyramid.
ANCHOR_SIDES = (32, 64, 128, 256, 512)
ASPECTS = (0.5, 1.0, 2.0)
# Boxes drawn around each target for Fast R-CNN to learn from.
JITTERED, JITTER = 16, 0.3


@dataclass(frozen=True)
class Body:
    """A backbone and what is left of its classification network for regions.

    module: image_BCHW -> maps by name, from the finest on, with `out_channels`. strides: of the maps that regions are
    cut from. levels: maps that proposals come from. rest: a ResNet's layer4 with stride 1, whose outputs have
    `rest_channels`; None where the maps hold all of the network.
    """

    module: nn.Module
    channels: int
    strides: tuple[int, ...]
    levels: int
    rest: nn.Module | None = None
    rest_channels: int = 0


class SingleMap(nn.Module):
    """A stack of layers as torchvision's detectors take a backbone: {"0": features_BCHW}."""

    def __init__(self, layers: "OrderedDict[str, nn.Module]", out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(layers)
        self.out_channels = out_channels

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(image_BCHW)}


class VggHead(nn.Module):
    """VGG16's fc6 and fc7 on a region's features (N, C, 7, 7), each with dropout (Girshick 2015, arXiv:1504.08083)."""

    def __init__(self, inputs: int, hidden: int = 4096, dropout: float = 0.5) -> None:
        super().__init__()
        self.fc6 = nn.Linear(inputs, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_NCPP: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(self.fc6(features_NCPP.flatten(1))))
        values: Tensor = self.dropout(functional.relu(self.fc7(hidden)))
        return values


def body_of(backbone: str, neck: str, width: int = 64) -> Body:
    """`vgg16` up to conv5_3 (stride 16), or a ResNet of RESNETS.

    neck: `fpn` (Lin et al. 2017), or `c4`: a single map of stride 16, with the rest of the network in the heads.
    width: channels of VGG16's first stage; its weights are drawn as in He et al. 2015 (arXiv:1502.01852). Raises
    ValueError for names that are not known and VGG16 with `fpn`.
    """
    if neck not in NECKS:
        raise ValueError(f"neck must be one of {', '.join(NECKS)}, got {neck!r}")
    if backbone == "vgg16":
        if neck != "c4":
            raise ValueError(f"backbone vgg16 has a single map, neck c4, got {neck!r}")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for at, (name, stage) in enumerate(conv_stages(width).items(), 1):
            if at > 1:
                layers[f"pool{at - 1}"] = nn.MaxPool2d(2)
            layers[name] = stage
        stages = SingleMap(layers, 8 * width)
        he_init(stages)
        return Body(stages, 8 * width, (16,), 1)
    if backbone not in RESNETS:
        raise ValueError(f"backbone must be vgg16 or one of {', '.join(RESNETS)}, got {backbone!r}")
    network = getattr(resnet, backbone)(weights=None)
    channels = network.inplanes  # of layer4's output
    if neck == "fpn":
        names = {f"layer{at + 1}": str(at) for at in range(4)}
        inputs = [channels // 8, channels // 4, channels // 2, channels]
        return Body(BackboneWithFPN(network, names, inputs, FPN_CHANNELS), FPN_CHANNELS, FPN_STRIDES, 5)
    # He et al. 2017, appendix A: layer4's stride is taken out, so that it keeps a region's 7 x 7.
    for layer in network.layer4.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
    children = OrderedDict((name, layer) for name, layer in network.named_children())
    kept = [*children][: [*children].index("layer4")]
    single = SingleMap(OrderedDict((name, children[name]) for name in kept), channels // 2)
    return Body(single, channels // 2, (16,), 1, network.layer4, channels)


def region_proposals(
    body: Body, post_nms_top_n_test: int, kind: type[RegionProposalNetwork] = RegionProposalNetwork
) -> RegionProposalNetwork:
    """torchvision's proposal network with its defaults: a side per level of a pyramid, or all sides on a single map."""
    sides = tuple((side,) for side in ANCHOR_SIDES) if body.levels > 1 else (ANCHOR_SIDES,)
    anchors = AnchorGenerator(sides, (ASPECTS,) * len(sides))
    return kind(
        anchors,
        RPNHead(body.channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": post_nms_top_n_test},
        nms_thresh=0.7,
    )


def build_maskrcnn(
    num_classes: int,
    backbone: str = "resnet50",
    neck: str = "fpn",
    roi: str = "align",
    mask_head: str = "fcn",
    masks: str = "independent",
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    rpn_post_nms_top_n_test: int = 1000,
    box_batch_size_per_image: int = 512,
) -> nn.Module:
    """Mask R-CNN (He, Gkioxari, Dollar, Girshick 2017, arXiv:1703.06870), random weights.

    backbone: of RESNETS (table 2a). neck: `fpn`, or `c4`: features of layer3, and layer4 in the heads. roi: `align`,
    `pool` or `warp` (tables 2c, 2d). mask_head: `fcn` or `mlp` (table 2e). masks: `independent` or `multinomial` (table
    2b). Masks are 28 x 28 with `fpn` and 14 x 14 with `c4`, as in figure 4. Batch normalisation learns unless the
    training says otherwise (frozen_norms: the paper's). Raises ValueError for other names.
    """
    if backbone not in RESNETS:
        raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, got {backbone!r}")
    if mask_head not in ("fcn", "mlp"):
        raise ValueError(f"mask_head must be fcn or mlp, got {mask_head!r}")
    body = body_of(backbone, neck)
    parts: dict[str, Any] = _box_branch(body, num_classes, roi)
    if body.rest is None:
        side, inputs = 28, FPN_CHANNELS * 14 * 14
        parts["mask_roi_pool"] = RoIFeatures(roi, body.strides, 14)
        channels = FPN_CHANNELS
        parts["mask_head"] = nn.Identity() if mask_head == "mlp" else MaskRCNNHeads(channels, (channels,) * 4, 1)
    else:
        side, inputs, channels = 14, body.rest_channels * 7 * 7, body.rest_channels
    parts["mask_predictor"] = (
        MlpMasks(inputs, num_classes, side) if mask_head == "mlp" else MaskRCNNPredictor(channels, 256, num_classes)
    )
    heads = MaskHeads(
        **parts,
        **_sampling(box_batch_size_per_image, box_score_thresh, box_nms_thresh, box_detections_per_img),
        masks=masks,
    )
    transform = GeneralizedRCNNTransform(800, 1333, list(IMAGENET_MEAN), list(IMAGENET_STD))
    proposals = region_proposals(body, rpn_post_nms_top_n_test)
    module: nn.Module = GeneralizedRCNN(body.module, proposals, heads, transform)
    return module


class FastRCNN(nn.Module):
    """Fast R-CNN: a backbone, heads, and what says where to look."""

    def __init__(self, backbone: nn.Module, roi_heads: RoIHeads, proposer: Proposer) -> None:
        super().__init__()
        self.backbone = backbone
        self.roi_heads = roi_heads
        self.proposer = proposer


def build_fastrcnn(
    num_classes: int,
    backbone: str = "vgg16",
    neck: str = "c4",
    roi: str = "pool",
    proposals: ProposalKind = "prompts",
    max_proposals: int = 2000,
    search_mode: SearchMode = "fast",
    width: int = 64,
    hidden: int = 4096,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.3,
    box_detections_per_img: int = 100,
    box_batch_size_per_image: int = 64,
) -> nn.Module:
    """Fast R-CNN (Girshick 2015, arXiv:1504.08083), random weights.

    backbone: vgg16 (the paper's), whose fc6 and fc7 are the head, or one of RESNETS with a neck (`body_of`). roi:
    `pool` (the paper's), `align` or `warp`. proposals: where to look, at most max_proposals boxes of an image.
    `prompts`: the image's box prompts (`prompt_boxes`). `grid`: sliding windows of many
    sizes and shapes, half over each other (proposals.py). `selective_search`: the paper's, by search_mode. width,
    hidden: channels of VGG16's first stage, units of its fc6 and fc7. 64 proposals of each image are learned from, a
    quarter of them objects. Raises ValueError for other names, ConfigError where selective search lacks its extra.
    """
    body = body_of(backbone, neck, width)
    heads = RoIHeads(
        **_box_branch(body, num_classes, roi, hidden),
        **_sampling(box_batch_size_per_image, box_score_thresh, box_nms_thresh, box_detections_per_img),
    )
    return FastRCNN(body.module, heads, Proposer(proposals, max_proposals, search_mode, IMAGENET_MEAN, IMAGENET_STD))


def detect_given(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """Fast R-CNN's detections per image, in prepared pixels. Raises PredictError as Proposer does."""
    model: Any = module
    sizes = [(frame.prepared_height, frame.prepared_width) for frame in frames]
    proposals = [item.boxes_R4 for item in model.proposer(image_BCHW, frames)]
    detections, _ = model.roi_heads(model.backbone(image_BCHW), proposals, sizes)
    return list(detections)


def fast_rcnn_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Fast R-CNN's losses, from torchvision's sampling of: the model's proposals (a grid where they are prompts and an
    image has none), boxes around each target (`jittered_boxes`), and the targets. Drawn with torch's global generator.
    """
    model: Any = module
    sizes = [(frame.prepared_height, frame.prepared_width) for frame in frames]
    proposals = [
        torch.cat([item.boxes_R4, jittered_boxes(target["boxes"].float(), *size, JITTERED)])
        for item, target, size in zip(model.proposer(image_BCHW, frames), targets, sizes, strict=True)
    ]
    _, losses = model.roi_heads(model.backbone(image_BCHW), proposals, sizes, list(targets))
    return dict(losses)


def jittered_boxes(boxes_N4: Tensor, height: int, width: int, count: int) -> Tensor:
    """`count` boxes around each: centres moved by up to 0.3 of a side, sides by up to a factor of 1.35 either way.

    So overlaps with the box itself go from nearly 1 to about 0.3, on both sides of what counts as found. Drawn with
    torch's global generator; those of which the image's edge leaves less than a pixel are left out.
    """
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    centres_N2 = boxes_N4[:, :2] + sizes_N2 / 2
    draws_NJ4 = 2 * JITTER * torch.rand(len(boxes_N4), count, 4, device=boxes_N4.device) - JITTER
    centres_NJ2 = centres_N2[:, None] + draws_NJ4[..., :2] * sizes_N2[:, None]
    sizes_NJ2 = sizes_N2[:, None] * draws_NJ4[..., 2:].exp()
    moved_J4 = torch.cat([centres_NJ2 - sizes_NJ2 / 2, centres_NJ2 + sizes_NJ2 / 2], dim=-1).flatten(0, 1)
    moved_J4 = torch.minimum(moved_J4.clamp_min(0), moved_J4.new_tensor([width, height, width, height]))
    return moved_J4[(moved_J4[:, 2:] - moved_J4[:, :2] >= 1).all(1)]


def adapt_regions(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Published weights of a classification network where this family has them; its last classifier is left out.

    A ResNet's below `backbone.body.`, and layer4 there or below `roi_heads.box_head.`; VGG16's convolutions below
    `backbone.body.convS.`, its `classifier.0` and `.3` as every `fc6` and `fc7` of the heads. Any other checkpoint
    comes back as it is.
    """
    if not any(name.startswith("features.") for name in given):
        return adapt_backbone("backbone.body.", "roi_heads.box_head.")(given, wanted)
    placed: dict[str, Tensor] = {}
    for name in wanted:
        *path, layer, kind = name.split(".")
        if name.startswith("backbone.body.conv"):
            source = f"features.{layer}.{kind}"
        elif layer in ("fc6", "fc7") and "roi_heads" in path:
            source = f"classifier.{0 if layer == 'fc6' else 3}.{kind}"
        else:
            continue
        if source in given:
            placed[name] = given[source]
    return placed


def _box_branch(body: Body, num_classes: int, roi: str, hidden: int = 4096) -> dict[str, Any]:
    """How a region's class and box are found: RoIHeads' box_roi_pool, box_head and box_predictor."""
    parts: dict[str, Any] = {"box_roi_pool": RoIFeatures(roi, body.strides, 7)}
    if body.rest is not None:
        parts["box_head"] = nn.Sequential(OrderedDict(layer4=body.rest))
        parts["box_predictor"] = AveragePredictor(body.rest_channels, num_classes)
    elif body.levels > 1:
        parts["box_head"] = TwoMLPHead(body.channels * 7 * 7, 1024)
        parts["box_predictor"] = FastRCNNPredictor(1024, num_classes)
    else:
        parts["box_head"] = VggHead(body.channels * 7 * 7, hidden)
        parts["box_predictor"] = FastRCNNPredictor(hidden, num_classes)
    return parts


def _sampling(batch_size: int, score_thresh: float, nms_thresh: float, detections: int) -> dict[str, Any]:
    """RoIHeads' numbers: which regions are learned from, and which are kept."""
    return {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": batch_size,
        "positive_fraction": 0.25,
        "bbox_reg_weights": None,
        "score_thresh": score_thresh,
        "nms_thresh": nms_thresh,
        "detections_per_img": detections,
    }
