"""The R-CNN family: torchvision's own models where they are the same, the papers' variants by hand."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.vgg import make_layers
from torchvision.ops import box_iou

from pipeline.config import ModelConfig
from pipeline.errors import PredictError
from pipeline.models.load import load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, PostContext, Prediction, Prompts
from pipeline.models.zoo.mask_heads import AveragePredictor, MlpMasks, multinomial_mask_loss, multinomial_masks
from pipeline.models.zoo.mnc import Stages, build_mnc, mask_overlaps
from pipeline.models.zoo.rcnn import (
    adapt_regions,
    build_fastrcnn,
    build_maskrcnn,
    detect_given,
    fast_rcnn_losses,
    jittered_boxes,
)
from pipeline.models.zoo.torchvision_detection import FAST_RCNN_LOSSES, MASK_RCNN_LOSSES, detect, rcnn_losses
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import load_taxonomy
from pipeline.training.targets import torchvision_target

SMALL = {"rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16, "box_score_thresh": 0.0}
FRAMES = [Frame(96, 128, 96, 128)] * 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed))


def make_targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(3, 96, 128, dtype=torch.uint8)
    masks[0, 5:60, 8:70], masks[1, 40:90, 60:125], masks[2, 20:80, 30:50] = 1, 1, 1
    return [torchvision_target(masks[:2], torch.tensor([1, 3])), torchvision_target(masks[2:], torch.tensor([2]))]


def built(function: Any, *arguments: Any, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return function(*arguments, **options)  # type: ignore[no-any-return]


def test_mask_rcnn_is_torchvisions() -> None:
    ours = built(build_maskrcnn, 5, backbone="resnet18", **SMALL)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    theirs = MaskRCNN(backbone, num_classes=5, **SMALL)
    theirs.load_state_dict(ours.state_dict())
    losses = []
    for module in (ours, theirs):
        torch.manual_seed(7)  # which anchors and proposals are learned from
        losses.append(rcnn_losses(module.train(), make_images(), FRAMES, make_targets()))
    assert set(losses[0]) == set(losses[1]) == set(MASK_RCNN_LOSSES)
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], msg=name)
    with torch.inference_mode():
        found, expected = (detect(module.eval(), make_images(), FRAMES) for module in (ours, theirs))
    for ours_of_one, theirs_of_one in zip(found, expected, strict=True):
        assert set(ours_of_one) == set(theirs_of_one)
        assert len(ours_of_one["scores"]) > 10
        for name, values in ours_of_one.items():
            torch.testing.assert_close(values, theirs_of_one[name], msg=name)


VARIANTS = [
    {"neck": "fpn", "roi": "pool", "mask_head": "fcn", "masks": "multinomial"},
    {"neck": "fpn", "roi": "warp", "mask_head": "mlp", "masks": "independent"},
    {"neck": "fpn", "roi": "align", "mask_head": "mlp", "masks": "multinomial"},
    {"neck": "c4", "roi": "align", "mask_head": "fcn", "masks": "independent"},
    {"neck": "c4", "roi": "warp", "mask_head": "fcn", "masks": "multinomial"},
    {"neck": "c4", "roi": "pool", "mask_head": "mlp", "masks": "independent"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options.values()))
def test_every_variant_learns_and_detects(options: dict[str, str]) -> None:
    module = built(build_maskrcnn, 4, backbone="resnet18", **options, **SMALL).train()
    torch.manual_seed(7)
    losses = rcnn_losses(module, make_images(), FRAMES, make_targets())
    assert set(losses) == set(MASK_RCNN_LOSSES)
    torch.stack([*losses.values()]).sum().backward()
    without = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    with torch.inference_mode():
        detections = detect(module.eval(), make_images(), FRAMES)
    for detection in detections:
        side = 28 if options["neck"] == "fpn" else 14
        count = len(detection["scores"])
        assert detection["masks"].shape == (count, 1, side, side)
        assert count >= 1
        assert all(0 <= detection[name].min() <= detection[name].max() <= 1 for name in ("scores", "masks"))
        assert {*detection["labels"].tolist()} <= {1, 2, 3}
    # An image without objects is learned from as well.
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 96, 128).byte()}
    losses = rcnn_losses(module.train(), make_images(), FRAMES, [empty, empty])
    assert losses["loss_mask"] == losses["loss_box_reg"] == 0
    assert all(bool(loss.isfinite()) for loss in losses.values())


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, 44.45),  # torchvision's maskrcnn_resnet50_fpn has 44.40, the rest is its frozen normalisation
        # ResNet-50 without its classes (23.51), RPN of 15 anchors at 1024 channels (9.52), classes and boxes
        # (2048 x 455: 0.93), masks (2048 x 256 x 2 x 2: 2.10, 256 x 91: 0.02)
        ({"neck": "c4"}, 36.08),
        # Instead of 4 convolutions, a transposed and a last one (2.65): 256 x 14 x 14, 1024, 1024, 91 x 28 x 28.
        ({"mask_head": "mlp"}, 44.45 - 2.65 + 51.38 + 1.05 + 73.13),
        ({"backbone": "resnext101_32x8d"}, 107.69),
        ({"backbone": "resnet101"}, 44.45 + 18.99),
    ],
)
def test_sizes(options: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        module = build_maskrcnn(91, **options)
    assert sum(value.numel() for value in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.02)


def test_c4_keeps_a_regions_size_and_shares_its_last_stage() -> None:
    module: Any = built(build_maskrcnn, 4, backbone="resnet18", neck="c4", **SMALL)
    assert [name for name in module.state_dict() if name.endswith("layer4.0.conv1.weight")] == [
        "roi_heads.box_head.layer4.0.conv1.weight"
    ]
    heads = module.roi_heads
    assert heads.box_head(torch.rand(2, 256, 7, 7)).shape == (2, 512, 7, 7)
    # The loss of masks is that of the positive boxes' own features, though those are computed with the others'.
    features = {name: values.detach() for name, values in module.eval().backbone(make_images()).items()}
    heads.training = True
    proposals = [target["boxes"] + torch.tensor([-2.0, 1.0, 3.0, 2.0]) for target in make_targets()]
    proposals = [torch.cat([boxes, torch.tensor([[0.0, 0.0, 20.0, 20.0]])]) for boxes in proposals]
    sizes = [(96, 128)] * 2
    torch.manual_seed(7)
    _, losses = heads(features, list(proposals), sizes, make_targets())
    torch.manual_seed(7)
    boxes, matched, labels, _ = heads.select_training_samples(list(proposals), make_targets())
    kept = [label > 0 for label in labels]
    assert [int(own.sum()) for own in kept] == [4, 2]
    own_boxes = [box[own] for box, own in zip(boxes, kept, strict=True)]
    logits = heads.mask_predictor(heads.box_head(heads.box_roi_pool(features, own_boxes, sizes)))
    expected = maskrcnn_loss(
        logits,
        own_boxes,
        [target["masks"] for target in make_targets()],
        [target["labels"] for target in make_targets()],
        [at[own] for at, own in zip(matched, kept, strict=True)],
    )
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_an_average_predictor_and_an_mlp_by_hand() -> None:
    predictor = built(AveragePredictor, 3, 2)
    values = torch.rand(4, 3, 7, 7)
    scores, deltas = predictor(values)
    mean = values.sum((2, 3)) / 49
    torch.testing.assert_close(scores, mean @ predictor.cls_score.weight.T + predictor.cls_score.bias)
    torch.testing.assert_close(deltas, mean @ predictor.bbox_pred.weight.T + predictor.bbox_pred.bias)
    masks = built(MlpMasks, 3 * 49, 2, side=5, hidden=6)
    logits = masks(values)
    assert logits.shape == (4, 2, 5, 5)
    hidden = masks.fc2(masks.fc1(values[1].flatten()).clamp_min(0)).clamp_min(0)
    # Class 1, row 2, column 3 of the second region.
    torch.testing.assert_close(logits[1, 1, 2, 3], masks.fc3(hidden)[25 + 2 * 5 + 3])


def test_multinomial_masks_by_hand() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[0, :, :4] = 1  # the left half of the box
    logits = torch.tensor([0.3, -0.2, 1.1]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    box, label, at = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([2]), torch.tensor([0])
    found = multinomial_mask_loss(logits, [box], [masks], [label], [at])
    log = np.log(np.exp([0.3, -0.2, 1.1]) / np.exp([0.3, -0.2, 1.1]).sum())
    # Cells on the left are class 2, on the right background, but for what bilinear sampling takes from the other side.
    share = maskrcnn_target(masks, box)
    assert share.tolist() == [pytest.approx([1, 0], abs=0.13)] * 2
    expected = -np.mean(share.numpy() * log[2] + (1 - share.numpy()) * log[0])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    (mask,) = multinomial_masks(logits, [label])
    assert mask.shape == (1, 1, 2, 2)
    assert mask.flatten().tolist() == pytest.approx([np.exp(log[2])] * 4)
    assert multinomial_mask_loss(logits[:0], [box[:0]], [masks], [label], [at[:0]]) == 0


def maskrcnn_target(masks: Tensor, box: Tensor) -> Tensor:
    """What torchvision's loss has as its target, read off its gradient: sigmoid minus target, over the cells."""
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    zero = torch.tensor([0])
    maskrcnn_loss(logits, [box], [masks], [torch.tensor([1])], [zero]).backward()
    return 0.5 - 4 * logits.grad[0, 1]


def test_one_class_against_the_background_is_a_sigmoid() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 7, 7, generator=generator)
    targets = make_targets()
    boxes = [target["boxes"] + 3 for target in targets]
    masks = [target["masks"] for target in targets]
    labels = [torch.ones(2).long(), torch.ones(1).long()]
    matched = [torch.tensor([0, 1]), torch.tensor([0])]
    difference = torch.stack([logits[:, 0], logits[:, 1] - logits[:, 0]], dim=1)
    torch.testing.assert_close(
        multinomial_mask_loss(logits, boxes, masks, labels, matched),
        maskrcnn_loss(difference, boxes, masks, labels, matched),
    )
    found = multinomial_masks(logits, labels)
    assert [len(mask) for mask in found] == [2, 1]
    torch.testing.assert_close(torch.cat(found)[:, 0], difference[:, 1].sigmoid())


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (build_maskrcnn, {"backbone": "vgg16"}, "backbone must be one of resnet18, .*, got 'vgg16'"),
        (build_maskrcnn, {"neck": "c5"}, "neck must be one of fpn, c4, got 'c5'"),
        (build_maskrcnn, {"roi": "crop"}, "roi must be one of align, pool, warp, got 'crop'"),
        (build_maskrcnn, {"mask_head": "fc"}, "mask_head must be fcn or mlp, got 'fc'"),
        (build_maskrcnn, {"masks": "softmax"}, "masks must be one of independent, multinomial, got 'softmax'"),
        (build_fastrcnn, {"neck": "fpn"}, "backbone vgg16 has a single map, neck c4, got 'fpn'"),
        (build_fastrcnn, {"backbone": "alexnet"}, "backbone must be vgg16 or one of .*, got 'alexnet'"),
        (build_fastrcnn, {"proposals": "rpn"}, "proposals must be one of .*, got 'rpn'"),
    ],
)
def test_options_that_do_not_exist(function: Any, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        function(4, **options)


TINY_FAST: dict[str, Any] = {"width": 2, "hidden": 8, "box_score_thresh": 0.0, "box_batch_size_per_image": 16}


def looked_at(module: Any, frames: list[Frame]) -> list[Tensor]:
    """The boxes that the heads are given."""
    seen: list[list[Tensor]] = []
    hook = module.roi_heads.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.inference_mode():
        detect_given(module.eval(), make_images()[: len(frames)], frames)
    hook.remove()
    return seen[0]


def test_fast_rcnn_looks_where_the_prompts_say() -> None:
    """In decoded pixels, twice as many across and three times as many down as the prepared image has."""
    module = built(build_fastrcnn, 4, **TINY_FAST)
    prompts = Prompts(boxes=((20.0, 30.0, 100.0, 150.0), (-9.0, 0.0, 300.0, 60.0)))
    frame = Frame(288, 256, 96, 128, prompts)
    (boxes,) = looked_at(module, [frame])
    assert boxes.tolist() == [[10, 10, 50, 50], [0, 0, 128, 20]]
    boxes, others = looked_at(module, [frame, dataclasses.replace(frame, prompts=Prompts(boxes=((0, 0, 9, 9),)))])
    assert (len(boxes), len(others)) == (2, 1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "expected prompts with the image (.prompts.json, or a column of them), got none"),
        (
            Prompts(boxes=((999.0, 0, 1200, 50),)),
            "expected box prompts within the image of 96x64 pixels, got 1 outside",
        ),
        (Prompts(), ""),
    ],
)
def test_without_proposals_there_is_an_error_of_the_row(prompts: Prompts | None, message: str) -> None:
    """Unless they say that there is nothing to look at."""
    config = ModelConfig(name="fastrcnn", options={**TINY_FAST, "resize": 64})
    model = load_model(config, seed=0, tile_pixels=1 << 20)
    image_HWC = np.full((64, 96, 3), 90, np.uint8)
    items = [prepare(image_HWC, model.preprocess)] * 2
    given = Prompts(boxes=((5.0, 5.0, 60.0, 60.0),))
    items = [
        dataclasses.replace(item, frame=dataclasses.replace(item.frame, prompts=own))
        for item, own in zip(items, (prompts, given), strict=True)
    ]
    first, prediction = Predict(model, device=torch.device("cpu"), batch_pixels=1 << 20, tile_pixels=1 << 20)(items)
    assert isinstance(prediction, Prediction)
    if message:
        assert isinstance(first, PredictError)
        assert message in str(first)
    else:
        assert isinstance(first, Prediction)
        assert first.instances is not None
        assert len(first.instances.scores_N) == 0


def test_the_grid_is_the_whole_image_and_parts_of_it() -> None:
    module: Any = built(build_fastrcnn, 4, **TINY_FAST, proposals="grid")
    (boxes,) = looked_at(module, [Frame(96, 128, 96, 128)])
    assert 500 <= len(boxes) <= 2000
    assert bool(((boxes >= 0) & (boxes <= torch.tensor([128.0, 96, 128, 96]) + 1e-4)).all())
    # Wherever an object of a quarter of the image lies, a window overlaps with it by half.
    objects = torch.tensor([[x, y, x + 64.0, y + 48.0] for x in range(0, 65, 8) for y in range(0, 49, 8)])
    assert box_iou(objects, boxes).amax(1).min() > 0.5


def test_boxes_around_targets_are_on_both_sides_of_found() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[20.0, 20, 60, 80], [0, 0, 30, 20], [120, 90, 128, 96]])
    found = jittered_boxes(boxes, 96, 128, 200)
    assert len(found) == 600
    assert bool(((found >= 0) & (found <= torch.tensor([128.0, 96, 128, 96]))).all())
    overlap = box_iou(found[:200], boxes[:1])
    assert 0.2 < overlap.min() < 0.4 < 0.85 < overlap.max() < 1
    assert 0.2 < (overlap < 0.5).float().mean() < 0.8
    assert jittered_boxes(boxes[:0], 96, 128, 9).shape == (0, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"roi": "warp"}, {"backbone": "resnet18", "neck": "c4"}, {"backbone": "resnet18", "neck": "fpn"}],
    ids=str,
)
def test_fast_rcnn_learns(options: dict[str, Any]) -> None:
    module = built(build_fastrcnn, 4, **TINY_FAST, **options).train()
    losses = fast_rcnn_losses(module, make_images(), FRAMES, make_targets())
    assert set(losses) == set(FAST_RCNN_LOSSES)
    torch.stack([*losses.values()]).sum().backward()
    assert [name for name, value in module.named_parameters() if value.grad is None] == []
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}] * 2
    assert fast_rcnn_losses(module, make_images(), FRAMES, empty)["loss_box_reg"] == 0


class NarrowVgg(nn.Module):
    """torchvision's VGG16 with 2 channels in its first stage and 8 units in fc6 and fc7."""

    def __init__(self) -> None:
        super().__init__()
        stages = [(2, 2), (2, 4), (3, 8), (3, 16), (3, 16)]
        layers = [layer for count, channels in stages for layer in (*[channels] * count, "M")]
        self.features = make_layers(layers)  # type: ignore[arg-type]
        self.classifier = nn.Sequential(
            nn.Linear(16 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5)
        )


def test_the_whole_image_as_a_region_is_what_vgg16_says_of_it() -> None:
    """RoIPool of all of conv5_3 is VGG16's last pooling, so fc7 is VGG16's with VGG16's weights."""
    network = built(NarrowVgg).eval()
    module: Any = build_fastrcnn(4, **TINY_FAST).eval()
    state = module.state_dict()
    adapted = adapt_regions(network.state_dict(), state.keys())
    heads = {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    assert {name.rpartition(".")[0] for name in set(state) - set(adapted)} - {"proposer.raw", ""} == heads
    module.load_state_dict({**state, **adapted})
    image_BCHW = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        # The last of its 14 rows and columns counts, as in the authors' code.
        regions = module.roi_heads.box_roi_pool(module.backbone(image_BCHW), [torch.tensor([[0.0, 0, 208, 208]])], [])
        found = module.roi_heads.box_head(regions)
        expected = network.classifier[:6](network.features(image_BCHW).flatten(1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("neck", "place"), [("fpn", "backbone.body."), ("c4", "roi_heads.box_head.")])
def test_a_resnets_weights_find_their_places(neck: str, place: str) -> None:
    from torchvision.models import resnet18

    with torch.device("meta"):
        wanted = build_maskrcnn(4, backbone="resnet18", neck=neck).state_dict()
        given = resnet18().state_dict()
    adapted = adapt_regions(given, wanted.keys())
    assert len(adapted) == len(given) - 2  # but for fc
    assert all(values.shape == wanted[name].shape for name, values in adapted.items())
    assert sum(name.startswith(f"{place}layer4") for name in adapted) == sum("layer4" in name for name in given)
    assert adapt_regions(wanted, wanted.keys()) == wanted


def test_outputs_that_are_no_category_are_dropped() -> None:
    """COCO left out ids (12 among them), so that heads have outputs of no category."""
    detection = {
        "boxes": torch.tensor([[0.0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 6, 6]]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([12, 1, 90]),
    }
    for name in ("fasterrcnn_resnet50_fpn_v2", "maskrcnn", "fastrcnn", "mnc"):
        postprocess = MODELS[name].postprocess
        assert postprocess is not None
        (prediction,) = postprocess([detection], FRAMES[:1], PostContext(taxonomy=load_taxonomy("coco80")))
        assert prediction.instances is not None
        assert prediction.instances.category_ids_N.tolist() == [1, 90]


TINY_MNC: dict[str, Any] = {"width": 2, "hidden": 8, "mask_side": 14, **SMALL}


def test_later_stages_of_mnc_move_the_boxes() -> None:
    module: Any = built(build_mnc, 4, **TINY_MNC).train()
    rpn, deltas = module.rpn, module.rpn.head.bbox_pred.weight

    def gradient(loss: str) -> Tensor | None:
        module.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        rcnn_losses(module, make_images(), FRAMES, make_targets())[loss].backward()
        return None if deltas.grad is None else deltas.grad.clone()

    moved = {name: gradient(name) for name in ("loss_mask", "loss_box_class", "loss_mask_class", "loss_box_reg")}
    assert all(values is not None and bool(values.any()) for values in moved.values())

    # Otherwise it is torchvision's proposal network.
    features = {name: values.detach() for name, values in module.backbone(make_images()).items()}
    found = []
    for kind in (type(rpn), RegionProposalNetwork):
        torch.manual_seed(7)
        images = ImageList(make_images(), [(96, 128)] * 2)
        found.append(kind.forward(rpn, images, features, make_targets()))
    (boxes, losses), (expected_boxes, expected_losses) = found
    assert all(torch.equal(one, other) for one, other in zip(boxes, expected_boxes, strict=True))
    assert losses == expected_losses
    assert not expected_boxes[0].requires_grad
    # However much a box matters, its anchor's offsets are moved by no more than their own loss moves them.
    bias, inside = rpn.head.bbox_pred.bias, int((boxes[0][:, 0] > 0).sum())
    for factor, expected in ((1e6, inside / 512), (1e-9, 0.0)):
        (gradient,) = torch.autograd.grad(factor * boxes[0][:, 0].sum(), bias, retain_graph=True)
        assert gradient.view(15, 4)[:, 0].sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_mnc_sees_what_is_inside_the_mask() -> None:
    module: Any = built(build_mnc, 4, **TINY_MNC).eval()
    heads, seen = module.roi_heads, {}
    for name in ("box_path", "mask_path"):
        getattr(heads, name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    features = {"0": torch.rand(1, 16, 6, 8)}
    boxes = [torch.tensor([[3.0, 4, 90, 80]])]
    half = torch.full((14, 14), -50.0)
    half[:, 7:] = 50
    for logits, columns in ((torch.full((14, 14), 50.0), 7), (torch.full((14, 14), -50.0), 0), (half, -3)):
        heads.mask_fc2.weight.data.zero_()
        heads.mask_fc2.bias.data.copy_(logits.flatten())
        with torch.inference_mode():
            mask_N1MM = heads.stages(features, boxes, [(96, 128)]).mask_N1MM
        assert torch.equal(mask_N1MM[0, 0], logits)
        whole, inside = seen["box_path"], seen["mask_path"]
        expected = torch.zeros_like(whole)
        if columns > 0:
            expected = whole
        elif columns < 0:  # the fourth of 7 columns holds one column of the mask's left half, one of its right
            expected[..., columns:] = whole[..., columns:]
            inside, expected = inside[..., [0, 1, 2, 4, 5, 6]], expected[..., [0, 1, 2, 4, 5, 6]]
        torch.testing.assert_close(inside, expected)


def test_mask_overlaps_by_hand() -> None:
    """A box of 8 x 4 pixels in 2 x 2 cells of 8 pixels; the object has 20 pixels, 12 of them in the box."""
    masks = torch.tensor([[[0.9, 0.2], [0.6, 0.5]], [[0.1, 0.2], [0.3, 0.4]], [[0.9, 0.9], [0.9, 0.9]]])
    target = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]] * 3)
    boxes = torch.tensor([[10.0, 10, 18, 14]] * 3)
    found = mask_overlaps(masks, target, boxes, torch.tensor([20.0] * 3))
    # Two cells: 16 pixels, 12 shared; none; all four: 32 pixels, 12 shared.
    assert found.tolist() == pytest.approx([12 / (16 + 20 - 12), 0, 12 / (32 + 20 - 12)])


def test_mnc_detects_the_best_of_each_class() -> None:
    module: Any = built(build_mnc, 3, **{**TINY_MNC, "stages": 3, "box_score_thresh": 0.3})
    heads = module.roi_heads.eval()
    boxes = torch.tensor([[0.0, 0, 40, 40], [1, 0, 41, 40], [60, 60, 90, 90]])
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]]))
    masks = torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 14, 14)
    heads.stages = lambda *_: Stages(masks, logits, logits)
    ((detection,), _) = heads({}, [boxes], [(96, 128)])
    # The second box is the better one of class 1, the first the only one of class 2.
    assert detection["labels"].tolist() == [1, 2]
    assert detection["scores"].tolist() == pytest.approx([0.7, 0.4])
    assert detection["boxes"].tolist() == boxes[[1, 0]].tolist()
    torch.testing.assert_close(detection["masks"][:, 0, 0, 0], functional.sigmoid(torch.tensor([1.0, 0.0])))


def test_mnc_learns_from_empty_images() -> None:
    module = built(build_mnc, 4, **TINY_MNC).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 96, 128).byte()}
    losses = rcnn_losses(module, make_images(), FRAMES, [empty, make_targets()[0]])
    assert all(bool(loss.isfinite()) for loss in losses.values())
    losses = rcnn_losses(module, make_images(), FRAMES, [empty, empty])
    assert losses["loss_mask"] == 0
    torch.stack([*losses.values()]).sum().backward()
    assert [name for name, value in module.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("stages", [3, 5])
def test_mnc_size(stages: int) -> None:
    with torch.device("meta"):
        module = build_mnc(91, stages)
    counts = (
        14_714_688  # VGG16's convolutions
        + 512 * 512 * 9 + 512 + (512 + 1) * 15 * 5  # proposals: 15 anchors
        + (512 * 196 + 1) * 256 + (256 + 1) * 784  # masks
        + 2 * ((25_088 + 1) * 4096 + (4096 + 1) * 4096)  # fc6 and fc7 of boxes and of masks
        + 2 * (8192 + 1) * 91  # two classifiers
        + (stages == 5) * (8192 + 1) * 4 * 91  # corrections; stages 4 and 5 share all weights with 2 and 3
    )  # fmt: skip
    assert sum(value.numel() for value in module.parameters()) == counts


def test_mnc_corrects_boxes_by_their_best_class() -> None:
    """By hand: a quarter of a box's width to the right, twice as high; within the image."""
    heads: Any = built(build_mnc, 4, **TINY_MNC).roi_heads
    boxes = [torch.tensor([[10.0, 20, 50, 60]]), torch.tensor([[60.0, 50, 120, 90], [0, 0, 8, 8]])]
    deltas = torch.zeros(3, 4, 4)
    deltas[0, 2] = torch.tensor([2.5, 0, 0, 5 * math.log(2)])  # the coder's weights are 10, 10, 5, 5
    deltas[1, 1] = torch.tensor([2.5, 0, 0, 5 * math.log(2)])
    deltas[:, 0] = 100  # of the background: never taken
    logits = torch.tensor([[9.0, 1, 2, 0], [9, 3, 2, 0], [9, 0, 0, 3]])
    moved = heads.corrected(boxes, Stages(torch.zeros(3, 1, 14, 14), logits, logits, deltas), [(96, 128)] * 2)
    torch.testing.assert_close(moved[0], torch.tensor([[20.0, 0, 60, 80]]))
    torch.testing.assert_close(moved[1], torch.tensor([[75.0, 30, 128, 96], [0, 0, 8, 8]]))


@pytest.mark.parametrize("stages", [3, 5])
@torch.inference_mode()
def test_mnc_looks_again_in_the_corrected_boxes(stages: int) -> None:
    """Stage 5 reads by stage 3's weights, in the boxes that this has corrected; of both the better ones stay."""
    options = {**TINY_MNC, "stages": stages, "box_nms_thresh": 1.0, "box_detections_per_img": 1000}
    module: Any = built(build_mnc, 4, **options).eval()
    heads, shapes = module.roi_heads, [(96, 128)] * 2
    if stages == 5:
        heads.box_deltas.bias.data.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    looked = heads.stages
    heads.stages = lambda *given: seen.append((given[1], looked(*given))) or seen[-1][1]
    features = {"0": torch.rand(2, 16, 6, 8, generator=torch.Generator().manual_seed(1))}
    boxes = [torch.tensor([[3.0, 4, 90, 80], [20, 10, 60, 50]]), torch.tensor([[0.0, 0, 128, 96]])]
    detections, _ = heads(features, boxes, shapes)
    assert len(seen) == (1 if stages == 3 else 2)
    found = [looked(features, given, shapes) for given, _ in seen]
    assert all(torch.equal(one.mask_N1MM, other.mask_N1MM) for (_, one), other in zip(seen, found, strict=True))
    for at, detection in enumerate(detections):
        assert len(detection["boxes"]) == 3 * sum(len(given[at]) for given, _ in seen)
        assert detection["scores"].tolist() == sorted(detection["scores"].tolist(), reverse=True)
        assert detection["masks"].shape[1:] == (1, 14, 14)
        known = torch.cat([given[at] for given, _ in seen])
        assert {tuple(box) for box in detection["boxes"].tolist()} == {tuple(box) for box in known.tolist()}
    if stages == 5:
        (first, _), (second, _) = seen
        assert first is boxes
        expected = heads.corrected(boxes, found[0], shapes)
        assert all(torch.equal(one, other) for one, other in zip(second, expected, strict=True))
        assert not torch.equal(second[0], boxes[0])


def test_gradients_of_all_stages_go_through_the_boxes() -> None:
    """Of losses in stages 4 and 5 alone, through RoIWarp in corrected boxes, to the corrections of stage 3 and to the
    offsets of stage 1; to corrections by a bounded amount."""
    module: Any = built(build_mnc, 4, **TINY_MNC).train()
    heads, shapes = module.roi_heads, [(96, 128)] * 2
    features = {name: values.detach() for name, values in module.backbone(make_images()).items()}
    torch.manual_seed(7)
    proposals, _ = module.rpn(ImageList(make_images(), shapes), features, make_targets())
    proposals = [image[:8] for image in proposals]
    first = heads.stages(features, proposals, shapes)
    moved = heads.corrected(proposals, first, shapes)
    second = heads.stages(features, moved, shapes)
    given = [heads.box_deltas.weight, module.rpn.head.bbox_pred.weight]
    for values in (second.mask_N1MM, second.box_logits_NK, second.mask_logits_NK, second.deltas_NK4):
        for gradient in torch.autograd.grad(values.square().sum(), given, retain_graph=True):
            assert bool(gradient.isfinite().all())
            assert bool(gradient.any())
    assert first.deltas_NK4 is not None
    (gradient,) = torch.autograd.grad(1e6 * torch.cat(moved).sum(), first.deltas_NK4, retain_graph=True)
    assert gradient.abs().max().item() == pytest.approx(1 / 16)


def test_five_stages_learn_better_boxes_than_the_first_ones() -> None:
    """On one batch; the boxes of stage 1 are what they are."""
    module: Any = built(build_mnc, 4, **{**TINY_MNC, "width": 4, "hidden": 32}).train()
    module.roi_heads.box_path.dropout.p = module.roi_heads.mask_path.dropout.p = 0.0
    heads, shapes, targets = module.roi_heads, [(96, 128)] * 2, make_targets()
    features = {name: values.detach() for name, values in module.backbone(make_images()).items()}
    # Every object's box, moved to the right by a fifth of its width.
    near = []
    for target in targets:
        boxes = target["boxes"]
        near.append(boxes + (boxes[:, 2:3] - boxes[:, :1]) / 5 * torch.tensor([1.0, 0, 1, 0]))
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        torch.manual_seed(7)
        losses = heads(features, near, shapes, targets)[1]
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        values.append(losses["loss_box_reg"].item())
    assert values[-1] < values[0] / 2
    with torch.inference_mode():
        moved = heads.corrected(near, heads.stages(features, near, shapes), shapes)
    for before, after, target in zip(near, moved, targets, strict=True):
        old, new = (box_iou(boxes, target["boxes"]).diagonal() for boxes in (before, after))
        assert bool((new > old + 0.1).all())


def test_mnc_has_three_stages_or_five() -> None:
    with pytest.raises(ValueError, match="stages must be 3 or 5, got 4"):
        build_mnc(4, stages=4)
    losses = rcnn_losses(built(build_mnc, 4, **TINY_MNC, stages=3).train(), make_images(), FRAMES, make_targets())
    assert losses["loss_box_reg"] == 0
    assert losses.keys() == MODELS["mnc"].loss_factors.keys()
