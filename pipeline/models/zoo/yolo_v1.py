"""YOLO v1 (Redmon, Divvala, Girshick, Farhadi 2016, arXiv:1506.02640): one grid of boxes from one pass.

Axes: B batch, S rows and columns of the grid, P predictors of a cell, K classes, N objects.
A cell's 5 P + K numbers are P times x, y (of a box's centre, 0 to 1 within the cell), the square roots of its width and
height (shares of the image), and its confidence; then the K class probabilities.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import batched_nms, box_iou

from pipeline.models.spec import Frame
from pipeline.models.zoo.detections import center_boxes, corner_boxes, stretch

__all__ = ["YOLO_LOSSES", "YoloV1", "decode_grid", "detect_yolo", "encode_grid", "grid_losses", "yolo_losses"]

# Equation 3: lambda_coord 5, lambda_noobj 0.5.
YOLO_LOSSES = {"center": 5.0, "size": 5.0, "object": 1.0, "no_object": 0.5, "class": 1.0}

CELL = 64  # pixels
# Figure 3: (kernel, channels, stride), None = 2x2 max pooling. The first 20 convolutions are those that the authors
# train on ImageNet; they end at a stride of 32.
TRUNK: tuple[tuple[int, int, int] | None, ...] = (
    (7, 64, 2),
    None,
    (3, 192, 1),
    None,
    (1, 128, 1),
    (3, 256, 1),
    (1, 256, 1),
    (3, 512, 1),
    None,
    *((1, 256, 1), (3, 512, 1)) * 4,
    (1, 512, 1),
    (3, 1024, 1),
    None,
    *((1, 512, 1), (3, 1024, 1)) * 2,
)
NECK: tuple[tuple[int, int, int] | None, ...] = ((3, 1024, 1), (3, 1024, 2), (3, 1024, 1), (3, 1024, 1))


class YoloV1(nn.Module):
    """Image_B3HW of image_size x image_size -> grid_BSSV, V = 5 predictors + num_classes.

    backbone: `darknet`, the paper's first 20 convolutions, or the name of a network of torchvision whose features have
    a stride of 32, such as resnet50 or vgg16. width: factor of all channels of ours. batch_norm: after each convolution
    of ours; the paper has none. image_size: pixels, a multiple of 64; the grid has a cell for each 64, 7 x 7 at 448.
    predictors: boxes of a cell. hidden: units of the first fully connected layer. box_score_thresh, box_nms_thresh,
    box_detections_per_img: which boxes are detections. Raises ValueError.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "darknet",
        width: float = 1.0,
        batch_norm: bool = False,
        image_size: int = 448,
        predictors: int = 2,
        hidden: int = 4096,
        dropout: float = 0.5,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
    ) -> None:
        super().__init__()
        if image_size < CELL or image_size % CELL:
            raise ValueError(f"image_size must be a multiple of {CELL}, got {image_size}")
        if width <= 0 or predictors < 1 or hidden < 1:
            raise ValueError(f"width, predictors and hidden must be above 0, got {width}, {predictors} and {hidden}")
        self.grid, self.predictors, self.num_classes = image_size // CELL, predictors, num_classes
        self.image_size = image_size
        self.score_thresh, self.nms_thresh = box_score_thresh, box_nms_thresh
        self.detections_per_img = box_detections_per_img
        if backbone == "darknet":
            self.backbone, channels = _convolutions(TRUNK, 3, width, batch_norm)
        else:
            self.backbone, channels = _torchvision_features(backbone)
        self.neck, channels = _convolutions(NECK, channels, width, batch_norm)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * self.grid**2, hidden),
            nn.LeakyReLU(0.1),
            nn.Dropout(dropout),
            nn.Linear(hidden, self.grid**2 * (5 * predictors + num_classes)),
        )

    def forward(self, image_B3HW: Tensor) -> Tensor:
        values: Tensor = self.head(self.neck(self.backbone(image_B3HW)))
        return values.view(len(values), self.grid, self.grid, -1)


def _convolutions(
    plan: Sequence[tuple[int, int, int] | None], channels: int, width: float, batch_norm: bool
) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for item in plan:
        if item is None:
            layers.append(nn.MaxPool2d(2))
            continue
        kernel, wanted, stride = item
        out = max(1, round(wanted * width))
        convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=not batch_norm)
        nn.init.kaiming_normal_(convolution.weight, a=0.1, nonlinearity="leaky_relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        layers += [convolution, *([nn.BatchNorm2d(out)] if batch_norm else []), nn.LeakyReLU(0.1)]
        channels = out
    return nn.Sequential(*layers), channels


def _torchvision_features(name: str) -> tuple[nn.Sequential, int]:
    """A classification network up to its pooling, by torchvision's names, and its channels."""
    try:
        network: Any = get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"backbone must be darknet or a network of torchvision: {error}") from error
    children = network.features.named_children() if hasattr(network, "features") else network.named_children()
    parts: list[tuple[str, nn.Module]] = []
    for part, child in children:
        if part in ("avgpool", "fc"):
            break
        parts.append((part, child))
    features = nn.Sequential(OrderedDict(parts))
    with torch.no_grad():
        shape = features.eval()(torch.zeros(1, 3, CELL, CELL)).shape
    if len(shape) != 4 or shape[2:] != (2, 2):
        raise ValueError(f"backbone {name} must have a stride of 32, it makes {CELL} pixels {tuple(shape)}")
    return features.train(), shape[1]


def encode_grid(boxes_N4: Tensor, labels_N: Tensor, *, grid: int, predictors: int, num_classes: int) -> Tensor:
    """Objects (centre x, y, width, height as shares of the image; places of classes) -> grid_SSV as the network is to
    answer: every predictor of an object's cell has its box, with confidence 1. The first object of a cell takes it."""
    grid_SSV = boxes_N4.new_zeros(grid, grid, 5 * predictors + num_classes)
    cells_N2 = (boxes_N4[:, :2] * grid).floor().clamp(0, grid - 1)
    taken = set()
    places = cells_N2.long().tolist()
    for box, cell, (column, row), label in zip(boxes_N4, cells_N2, places, labels_N.tolist(), strict=True):
        if (row, column) in taken:
            continue
        taken.add((row, column))
        one = torch.cat([box[:2] * grid - cell, box[2:].sqrt(), box.new_ones(1)])
        grid_SSV[row, column, : 5 * predictors] = one.repeat(predictors)
        grid_SSV[row, column, 5 * predictors + label] = 1
    return grid_SSV


def decode_grid(grid_SSV: Tensor, *, predictors: int) -> tuple[Tensor, Tensor, Tensor]:
    """boxes_SSP4 (centre x, y, width, height as shares of the image), confidence_SSP and probability_SSK as given."""
    size = len(grid_SSV)
    box_SSP5 = grid_SSV[..., : 5 * predictors].reshape(size, size, predictors, 5)
    steps = torch.arange(size, dtype=grid_SSV.dtype, device=grid_SSV.device)
    rows_SS, columns_SS = torch.meshgrid(steps, steps, indexing="ij")
    corner_SS12 = torch.stack([columns_SS, rows_SS], dim=-1)[:, :, None]
    center_SSP2 = (box_SSP5[..., :2] + corner_SS12) / size
    boxes_SSP4 = torch.cat([center_SSP2, box_SSP5[..., 2:4].square()], dim=-1)
    return boxes_SSP4, box_SSP5[..., 4], grid_SSV[..., 5 * predictors :]


def detect_yolo(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """The network on images stretched to its size; per image boxes (N, 4; prepared pixels, within the image), scores
    (N; confidence x class probability, each held to 0..1) and labels (N; places), best first, after non-maximum
    suppression in each class (section 2.3)."""
    model: Any = module
    grid_BSSV = module(stretch(image_BCHW, frames, model.image_size)).float()
    return [_detections(grid_SSV, frame, model) for grid_SSV, frame in zip(grid_BSSV, frames, strict=True)]


def _detections(grid_SSV: Tensor, frame: Frame, model: Any) -> dict[str, Tensor]:
    boxes_SSP4, confidence_SSP, probability_SSK = decode_grid(grid_SSV, predictors=model.predictors)
    scores_SSPK = confidence_SSP.clamp(0, 1)[..., None] * probability_SSK.clamp(0, 1)[:, :, None]
    scores_MK, boxes_M4 = scores_SSPK.flatten(0, 2), boxes_SSP4.flatten(0, 2)
    place_N, labels_N = torch.nonzero(scores_MK > model.score_thresh, as_tuple=True)
    scores_N = scores_MK[place_N, labels_N]
    size = boxes_M4.new_tensor([frame.prepared_width, frame.prepared_height] * 2)
    boxes_N4 = corner_boxes(boxes_M4[place_N], frame).clamp(min=0).minimum(size)
    kept = batched_nms(boxes_N4, scores_N, labels_N, model.nms_thresh)[: model.detections_per_img]
    return {"boxes": boxes_N4[kept], "scores": scores_N[kept], "labels": labels_N[kept]}


def grid_losses(grid_SSV: Tensor, target_SSV: Tensor, *, predictors: int) -> dict[str, Tensor]:
    """Equation 3 of one image by its terms, without their factors: sums of squared errors.

    target_SSV: of `encode_grid`. Of a cell's predictors the one whose box has the highest IoU with the object is
    responsible for it, and is to be as confident as that IoU.
    """
    boxes_SSP4, confidence_SSP, probability_SSK = decode_grid(grid_SSV, predictors=predictors)
    wanted_SSP4, _, wanted_SSK = decode_grid(target_SSV, predictors=predictors)
    taken_SS = target_SSV[..., 4] > 0
    picked_MP4, wanted_M4 = boxes_SSP4[taken_SS], wanted_SSP4[taken_SS][:, 0]
    with torch.no_grad():
        iou_MP = torch.stack([_iou(picked_MP4[:, place], wanted_M4) for place in range(predictors)], dim=1)
        best_M = iou_MP.argmax(1)
    every_M = torch.arange(len(best_M), device=best_M.device)
    raw_M5 = grid_SSV[taken_SS][:, : 5 * predictors].reshape(-1, predictors, 5)[every_M, best_M]
    raw_target_M5 = target_SSV[taken_SS][:, :5]
    idle_MP = torch.ones_like(iou_MP, dtype=torch.bool)
    idle_MP[every_M, best_M] = False
    return {
        "center": (raw_M5[:, :2] - raw_target_M5[:, :2]).square().sum(),
        "size": (raw_M5[:, 2:4] - raw_target_M5[:, 2:4]).square().sum(),
        "object": (raw_M5[:, 4] - iou_MP[every_M, best_M]).square().sum(),
        "no_object": confidence_SSP[~taken_SS].square().sum() + confidence_SSP[taken_SS][idle_MP].square().sum(),
        "class": (probability_SSK - wanted_SSK)[taken_SS].square().sum(),
    }


def _iou(boxes_M4: Tensor, others_M4: Tensor) -> Tensor:
    whole = Frame(1, 1, 1, 1)
    iou_MM: Tensor = box_iou(corner_boxes(boxes_M4, whole), corner_boxes(others_M4, whole))
    return iou_MM.diagonal()


def yolo_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The terms of equation 3, means over the images."""
    model: Any = module
    grid_BSSV = module(stretch(image_BCHW, frames, model.image_size)).float()
    terms = []
    for grid_SSV, frame, target in zip(grid_BSSV, frames, targets, strict=True):
        target_SSV = encode_grid(
            center_boxes(target["boxes"], frame),
            target["labels"],
            grid=model.grid,
            predictors=model.predictors,
            num_classes=model.num_classes,
        )
        terms.append(grid_losses(grid_SSV, target_SSV, predictors=model.predictors))
    return {name: torch.stack([term[name] for term in terms]).mean() for name in YOLO_LOSSES}
