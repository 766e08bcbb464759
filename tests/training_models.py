"""Small models of the tasks that the registry has no small model for, as a user would bring them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo.torchvision_detection import MASK_RCNN_LOSSES, detect, rcnn_losses
from pipeline.models.zoo.unet import UNetSmall


class DepthSmall(nn.Module):
    """A U-Net whose first output is a depth in tens of metres."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNetSmall(2, width=4, depth=2)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return 10 * functional.softplus(self.unet(image_BCHW)[:, :1]) + 0.1


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(image_BCHW)}


def build_instances(num_classes: int) -> nn.Module:
    def pool(size: int) -> Any:
        return MultiScaleRoIAlign(["0"], output_size=size, sampling_ratio=1)

    module: nn.Module = MaskRCNN(
        Backbone(),
        rpn_anchor_generator=AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=pool(3),
        box_head=TwoMLPHead(8 * 9, 16),
        box_predictor=FastRCNNPredictor(16, num_classes),
        mask_roi_pool=pool(6),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, num_classes),
        box_detections_per_img=10,
    )
    return module


class Secretive(UNetSmall):
    """Says in its errors what it was given; a black image is one."""

    def __init__(self, num_classes: int, said: str) -> None:
        super().__init__(num_classes, width=4, depth=2)
        self.said = said

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if not self.training and not image_BCHW.any():
            raise RuntimeError(self.said)
        return super().forward(image_BCHW)


def build_secretive(
    num_classes: int,
    hf_token: str = "",
    storage: Mapping[str, Any] | None = None,
    vocab: str = "",
    use_mask_token: bool = True,
    parts: Mapping[str, Any] | None = None,
) -> nn.Module:
    return Secretive(num_classes, f"cannot reach it with {hf_token}, {storage}, {vocab}, {parts}")


SECRETIVE = ModelSpec(
    name="secretive",
    task="semantic",
    build=build_secretive,
    preprocess=Preprocess(pad_multiple=4, mean=(0.0, 0.0, 0.0)),
    taxonomy="scenes",
    license="Apache-2.0",
)
DEPTH = ModelSpec(
    name="depth_small",
    task="depth",
    build=lambda num_classes: DepthSmall(),
    preprocess=Preprocess(pad_multiple=4),
    taxonomy="scenes",
    license="Apache-2.0",
)
INSTANCES = ModelSpec(
    name="instances_small",
    task="instance",
    build=build_instances,
    forward=detect,
    losses=rcnn_losses,
    loss_factors=MASK_RCNN_LOSSES,
    background=True,
    preprocess=Preprocess(pad_multiple=8),
    taxonomy="coco80",
    num_classes=lambda taxonomy: max(taxonomy.ids) + 1,
    license="Apache-2.0",
)
