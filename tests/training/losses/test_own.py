"""Losses that come with a model: Mask R-CNN's are torchvision's own, without its resizing; factors, empty images."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from pipeline.models.spec import Frame
from pipeline.models.zoo.torchvision_detection import MASK_RCNN_LOSSES, rcnn_losses
from pipeline.training.losses.own import OwnLosses
from pipeline.training.losses.term import combine
from pipeline.training.targets import torchvision_target

SIZE = 64
ALL = OwnLosses(factors=MASK_RCNN_LOSSES)


class Body(nn.Sequential):
    """The smallest backbone that gives features as torchvision's pyramids do."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        return {"0": super().forward(image_BCHW)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    # Images of 64 pixels with mean 0 and deviation 1: torchvision's own transform leaves them as they are.
    return MaskRCNN(
        Body(),
        num_classes=4,
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=None,
    ).train()


def make_batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 5:30, 8:40], masks[1, 20:60, 30:62], masks[2, 40:41, 3:9] = 1, 1, 1
    targets = [
        torchvision_target(masks[:2], torch.tensor([1, 3])),
        torchvision_target(masks[2:], torch.tensor([2])),
    ]
    return torch.rand(2, 3, SIZE, SIZE, generator=generator), targets


def losses(model: nn.Module, image_BCHW: Tensor, targets: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)  # torchvision samples anchors and proposals with the global generator
    return rcnn_losses(model, image_BCHW, [Frame(SIZE, SIZE, SIZE, SIZE)] * len(image_BCHW), targets)


def test_they_are_torchvisions(model: nn.Module) -> None:
    image_BCHW, targets = make_batch()
    found = losses(model, image_BCHW, targets)
    torch.manual_seed(7)
    expected = model(list(image_BCHW), targets)
    assert set(found) == set(expected) == set(MASK_RCNN_LOSSES)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_the_sum_is_by_factors_and_reaches_all_parts(model: nn.Module) -> None:
    image_BCHW, targets = make_batch()
    found = losses(model, image_BCHW, targets)
    objective = OwnLosses(factors=MASK_RCNN_LOSSES | {"loss_mask": 0.5, "loss_objectness": 0.0})
    total = combine(objective.terms(found, {"image": image_BCHW}), objective.factors)
    expected = sum(found[name] for name in ("loss_classifier", "loss_box_reg", "loss_rpn_box_reg"))
    torch.testing.assert_close(total, expected + 0.5 * found["loss_mask"])
    model.zero_grad()
    combine(ALL.terms(found, {"image": image_BCHW}), ALL.factors).backward()
    slopes = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(slope is not None and slope.isfinite().all() for slope in slopes.values())
    for part in ("backbone.0", "rpn.head.cls_logits", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
        assert any(slope is not None and (slope != 0).any() for name, slope in slopes.items() if part in name), part


def test_images_without_objects_have_finite_losses(model: nn.Module) -> None:
    image_BCHW, _ = make_batch()
    nothing = torchvision_target(torch.zeros(0, SIZE, SIZE, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    found = losses(model, image_BCHW, [nothing, nothing])
    total = combine(ALL.terms(found, {"image": image_BCHW}), ALL.factors)
    model.zero_grad()
    total.backward()
    assert total.isfinite()
    assert found["loss_mask"] == 0
    assert found["loss_box_reg"] == 0


def test_losses_of_other_names_are_refused() -> None:
    image_BCHW = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected the losses \['loss_box_reg'.* got \['loss_keypoint'\]"):
        ALL.terms({"loss_keypoint": torch.tensor(1.0)}, {"image": image_BCHW})


def test_workers_are_weighted_by_their_images() -> None:
    """Three images here and one there: the mean of what torchvision gives for each batch, by images."""
    objective = OwnLosses(factors={"loss_mask": 1.0})
    large, small = {"image": torch.zeros(3, 3, 8, 8)}, {"image": torch.zeros(1, 3, 8, 8)}
    shared = {"loss_mask": (objective.weights(large)["loss_mask"] + objective.weights(small)["loss_mask"]) / 2}
    values = [
        combine(objective.terms({"loss_mask": torch.tensor(value)}, batch), objective.factors, shared)
        for value, batch in ((2.0, large), (6.0, small))
    ]
    assert float(sum(values) / 2) == pytest.approx((3 * 2 + 6) / 4)
