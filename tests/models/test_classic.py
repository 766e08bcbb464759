"""The parts of the classic systems: crops, pyramids, views, merging, hypercolumns, refined masks, histograms."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from skimage.feature import hog
from tiny_models import TINY
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vgg16
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, nms

from pipeline.config_train import TrainConfig
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, Prompts
from pipeline.models.zoo.hog import HogSVM
from pipeline.models.zoo.hypercolumns import PixelClassifiers, grid_weights
from pipeline.models.zoo.overfeat import OverFeat, _assigned, merge_boxes
from pipeline.models.zoo.region_crops import RCNN, SDS, adapt_sds, with_context
from pipeline.models.zoo.region_heads import Kept, Sample, box_deltas, decode_boxes, maps, region_loss, sample_regions
from pipeline.models.zoo.spp import pyramid_pool, windows
from pipeline.sources.scenes import render_scene
from pipeline.training.backbone import backbone_stages
from pipeline.training.setup import start_model

CLASSIC = ("rcnn", "sppnet", "overfeat", "hypercolumns", "sds", "hog_svm")
DOCS = Path(__file__).parents[2] / "docs" / "classic.md"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(name: str, classes: int = 3, **options: Any) -> Any:
    """The tiny model of a name, of what its constructor takes."""
    given = {**TINY[name], **options}
    for other in ("resize", "score_threshold"):
        given.pop(other, None)
    return MODELS[name].build(classes, **given).eval()


def random_boxes(count: int, height: float, width: float) -> Tensor:
    corner, size = torch.rand(count, 2), 0.2 + 0.8 * torch.rand(count, 2)
    box = torch.cat([corner * (1 - size), corner * (1 - size) + size], 1)
    return box * torch.tensor([width, height, width, height])


# What they share.


def test_box_deltas_are_torchvisions() -> None:
    regions, boxes = random_boxes(20, 50, 70), random_boxes(20, 50, 70)
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    deltas = box_deltas(regions, boxes)
    torch.testing.assert_close(deltas, coder.encode([boxes], [regions])[0], rtol=1e-4, atol=1e-4)
    other = torch.randn(20, 4)
    decoded = decode_boxes(regions, torch.stack([deltas, other], 1))
    torch.testing.assert_close(decoded[:, 0], boxes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded[:, 1], coder.decode(other, [regions])[:, 0], rtol=1e-4, atol=1e-4)


def test_samples() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 40, 20]]), "labels": torch.tensor([2, 0])}
    # With the first object: 1, 0.5, 0.4; with the second: 0.75; with none: 0.
    rows = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [20, 0, 40, 15], [50, 50, 60, 60]]
    proposals = torch.tensor(rows, dtype=torch.float32)
    sample = sample_regions(proposals, target, background=3, count=100, positive_share=0.9)
    found = sorted(zip(sample.proposal_N.tolist(), sample.labels_N.tolist(), sample.object_N.tolist(), strict=True))
    assert found == [(0, 2, 0), (1, 2, 0), (2, 3, -1), (3, 0, 1), (4, 3, -1), (5, 2, 0), (6, 0, 1)]
    assert torch.equal(sample.boxes_N4, torch.cat([proposals, target["boxes"]])[sample.proposal_N])
    near = sample_regions(proposals, target, background=3, count=8, negatives=(0.1, 0.5))
    assert sorted(near.labels_N.tolist())[-1:] == [3]
    assert near.proposal_N[near.object_N < 0].tolist() == [2]
    assert (near.object_N >= 0).sum() == 2  # a quarter of 8
    around = sample_regions(proposals[:0], target, background=3, count=100, positive_share=1.0, around=10)
    assert len(around.boxes_N4) == 22
    assert sorted(around.proposal_N.tolist()) == [*range(22)]
    moved = (around.boxes_N4 - target["boxes"][around.object_N]).abs().amax(1)
    assert torch.equal(moved == 0, around.proposal_N < 2)
    assert moved.max() <= 4  # a fifth of 20 pixels
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert sample_regions(proposals, empty, background=3, count=2).labels_N.tolist() == [3, 3]


def test_region_loss_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 9, 9]])
    one = Sample(boxes[:2], torch.tensor([1, 2]), torch.tensor([0, -1]), torch.tensor([0, 1]))
    other = Sample(boxes[2:], torch.tensor([2]), torch.tensor([-1]), torch.tensor([0]))
    targets = [{"boxes": torch.tensor([[1.0, 0, 11, 10]])}, {"boxes": torch.zeros(0, 4)}]
    scores = torch.tensor([[0.0, 0, 0], [0, 0, math.log(2)], [0, 0, math.log(6)]])
    deltas = torch.zeros(3, 2, 4)
    deltas[0, 1, 2] = 0.5
    deltas[0, 0] = 100  # of another class: not looked at
    found = region_loss(scores, deltas, [one, other], targets)
    # The box is one pixel further right, 0.1 of its width, over 0.1: a shift of 1, where 0 was said.
    assert found["loss_box"].item() == pytest.approx((1 + 0.25) / 2 / 2)
    first = (math.log(3) + math.log(4 / 2)) / 2
    assert found["loss_classifier"].item() == pytest.approx((first + math.log(8 / 6)) / 2)


def test_kept_by_class() -> None:
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.2, 0.7]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [-9, 2, 8, 60]])[:, None].expand(-1, 2, -1)
    kept = Kept.of(probability, boxes, (40, 30), score_thresh=0.15, nms_thresh=0.5, limit=10)
    # The second box of class 0 overlaps the first by 9 / 11; its own of class 1 is kept.
    assert kept.region_D.tolist() == [0, 2, 1, 2]
    assert kept.labels_D.tolist() == [0, 1, 1, 0]
    assert kept.boxes_D4[1].tolist() == [0, 2, 8, 40]
    assert len(Kept.of(probability, boxes, (40, 30), score_thresh=0.15, nms_thresh=0.5, limit=1).scores_D) == 1


@torch.inference_mode()
@pytest.mark.parametrize("name", ["rcnn", "sppnet", "hypercolumns", "sds"])
def test_boxes_that_the_source_gives(name: str) -> None:
    model = build(name, proposals="prompts")
    image_BCHW = torch.randn(2, 3, 48, 64)
    frames = [Frame(96, 128, 48, 64, Prompts()), Frame(96, 128, 48, 64, Prompts(boxes=((20, 20, 90, 80),)))]
    none, found = model(image_BCHW, frames)
    assert {key: len(values) for key, values in none.items()} == dict.fromkeys(none, 0)
    assert sorted(found["labels"].tolist()) == [0, 1, 2]
    assert found["boxes"].shape == (3, 4)
    if name == "sds":
        assert found["boxes"].tolist() == [[10, 10, 45, 40]] * 3


@pytest.mark.parametrize("name", CLASSIC)
def test_images_without_objects_are_learned_from(name: str) -> None:
    """Every parameter has a gradient, and it is finite: another worker may have objects."""
    model = build(name).train()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 48, 64, dtype=torch.uint8),
    }
    losses = model.losses(torch.randn(1, 3, 48, 64), [Frame(48, 64, 48, 64)], [empty])
    assert set(losses) == set(MODELS[name].loss_factors)
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", ["rcnn", "sppnet", "overfeat", "hypercolumns", "sds"])
def test_imagenet_is_a_start(name: str) -> None:
    """Every tensor of the encoder is torchvision's, of its shape; the rest is new."""
    with torch.device("meta"):
        given, module = vgg16().state_dict(), MODELS[name].build(80)
    wanted = module.state_dict()
    placed = MODELS[name].adapt(given, wanted.keys())
    assert {key: tensor.shape for key, tensor in placed.items()} == {
        key: wanted[key].shape for key in wanted if "encoder." in key
    }
    convolutions = 2 * 13
    assert len(placed) == {"sppnet": convolutions, "sds": 2 * (convolutions + 4)}.get(name, convolutions + 4)


@pytest.mark.parametrize("name", CLASSIC)
def test_half_precision(name: str) -> None:
    """bf16 gives nearly the losses and boxes of float32: coordinates are never rounded to it."""
    model = build(name)
    image, frames = torch.randn(1, 3, 48, 64), [Frame(48, 64, 48, 64)]
    masks = torch.zeros(1, 48, 64, dtype=torch.uint8)
    masks[0, 10:40, 20:50] = 1
    target = {"boxes": torch.tensor([[20.0, 10, 50, 40]]), "labels": torch.tensor([1]), "masks": masks}
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            losses, (objects,) = model.losses(image, frames, [target]), model(image, frames)
        assert all(bool(tensor.isfinite().all()) for tensor in objects.values())
        found.append(losses)
    for key in found[0]:
        assert found[1][key].dtype == torch.float32
        torch.testing.assert_close(found[0][key], found[1][key], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (37, 3)])
@torch.inference_mode()
def test_images_of_any_size(name: str, height: int, width: int) -> None:
    """Whatever its sides, an image has an answer, with boxes inside of it."""
    model, spec = build(name), MODELS[name]
    if "max_proposals" in TINY[name]:
        model.proposer.kind = "selective_search"
    rows, columns = spec.preprocess.padded(height, width)
    image = torch.zeros(1, 3, rows, columns)
    image[:, :, :height, :width] = torch.randn(3, height, width)
    (found,) = model(image, [Frame(height, width, height, width)])
    assert len(found["boxes"])
    limit = torch.tensor([width, height, width, height])
    assert bool(((found["boxes"] >= 0) & (found["boxes"] <= limit)).all())


# R-CNN and SDS.


def test_a_crop_has_its_context() -> None:
    boxes = torch.tensor([[40.0, 20, 64, 68]])
    grown = with_context(boxes, 32, 4)
    # 24 pixels of 32 are the box; 4 on each side are 1 / 6 of it.
    assert grown.tolist() == [[36, 12, 68, 76]]
    model = RCNN(2, proposals="grid", crop_size=32, context=4, width=2, hidden=4)
    image_1CHW = torch.randn(1, 3, 100, 110)
    square = torch.tensor([[40.0, 20, 64, 44]])  # at its own size: no resampling
    torch.testing.assert_close(model.crops.cut(image_1CHW, square)[0], image_1CHW[0, :, 16:48, 36:68])
    outside = model.crops.cut(image_1CHW, torch.tensor([[-10.0, 10, 14, 34]]))[0]
    assert outside[:, :, :13].abs().max() == 0  # the mean colour
    torch.testing.assert_close(outside[:, :, 15:], image_1CHW[0, :, 6:38, 1:18])


@torch.inference_mode()
def test_rcnn_sees_each_region_alone() -> None:
    model = build("rcnn", proposals="grid", box_nms_thresh=1.0, box_detections_per_img=1000, crop_batch=7)
    image_BCHW = torch.randn(1, 3, 48, 64)
    (found,) = model(image_BCHW, [Frame(48, 64, 48, 64)])
    boxes_R4 = model.proposer(image_BCHW, [Frame(48, 64, 48, 64)])[0].boxes_R4
    assert len(found["boxes"]) == 3 * len(boxes_R4)
    crop = model.crops.cut(image_BCHW, boxes_R4[4:5])
    features = functional.max_pool2d(maps(model.encoder, crop)[-1], 2)
    features = model.encoder["fc6"](functional.adaptive_avg_pool2d(features, 7)).relu()
    features = model.encoder["fc7"](features).relu().flatten(1)
    score = model.head.score(features).softmax(1)[0, :3]
    boxes = decode_boxes(boxes_R4[4:5], model.head.box(features).view(1, 3, 4))[0]
    for label in range(3):
        same = found["labels"] == label
        at = (found["boxes"][same] - boxes[label].clamp(min=0)).abs().sum(1).argmin()
        torch.testing.assert_close(found["scores"][same][at], score[label])


@torch.inference_mode()
def test_sds_begins_as_the_region() -> None:
    model = SDS(2, proposals="grid", grid=4, crop_size=32, context=4, width=2, hidden=4)
    model.refine.weight[:, :-16] = 0  # what the network says of it
    mask_N1HW = torch.zeros(1, 1, 60, 60)
    mask_N1HW[0, 0, 10:30, 20:40] = 1
    boxes = torch.tensor([[20.0, 10, 60, 50]])
    features, cells = model.describe(torch.randn(1, 3, 60, 60), boxes, mask_N1HW)
    inside = torch.zeros(4, 4)
    inside[:2, :2] = 1
    torch.testing.assert_close(cells.view(4, 4), inside)
    logits = model.refined(features, cells, torch.tensor([1]))
    torch.testing.assert_close(logits[0] > 0, inside > 0)


@torch.inference_mode()
def test_sds_hides_what_is_not_the_region() -> None:
    model = SDS(2, proposals="grid", grid=4, crop_size=32, context=0, width=2, hidden=4).eval()
    image = torch.randn(1, 3, 64, 64)
    mask_N1HW = torch.zeros(1, 1, 64, 64)
    mask_N1HW[..., :32] = 1
    boxes = torch.tensor([[0.0, 0, 64, 64]])
    changed = image.clone()
    changed[..., 32:] += 5
    (before, _), (after, _) = (model.describe(one, boxes, mask_N1HW) for one in (image, changed))
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before[:, :4], after[:, :4])


def test_both_networks_of_sds_begin_from_imagenet() -> None:
    model = SDS(2, proposals="grid", crop_size=32, context=0, width=2, hidden=4)
    weight = torch.randn(2, 3, 3, 3)
    placed = adapt_sds({"features.0.weight": weight}, model.state_dict().keys())
    assert set(placed) == {"encoder.conv1.0.weight", "region_encoder.conv1.0.weight"}
    assert all(torch.equal(tensor, weight) for tensor in placed.values())
    assert adapt_sds({"score.bias": weight}, model.state_dict().keys()).keys() == {"score.bias"}


# SPP-net.


def test_windows() -> None:
    # Centres of cells stand at 7.5, 23.5, 39.5, ...
    boxes = torch.tensor([[0.0, 0, 64, 32], [8, 7, 40, 24], [24, 24, 30, 30], [60, 40, 64, 48], [900, 0, 950, 9]])
    assert windows(boxes, 3, 4) == [(0, 0, 4, 2), (1, 0, 3, 2), (1, 1, 2, 2), (3, 2, 4, 3), (3, 0, 4, 1)]


def test_the_pyramid() -> None:
    map_CHW = torch.arange(2 * 6 * 6.0).view(2, 6, 6)
    (pooled,) = pyramid_pool(map_CHW, torch.tensor([[0.0, 0, 96, 96]]), (1, 2, 3))
    whole, halves, thirds = pooled.split([2, 8, 18])
    assert whole.tolist() == [35, 71]
    assert halves[:4].tolist() == [14, 17, 32, 35]
    assert thirds[:9].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    # A window of one cell fills every bin.
    (one,) = pyramid_pool(map_CHW, torch.tensor([[16.0, 32, 32, 48]]))
    assert one.tolist() == [value for bins in (1, 4, 9, 36) for value in [13.0] * bins + [49.0] * bins]


# OverFeat.


@torch.inference_mode()
def test_pooling_at_every_offset() -> None:
    """A pooling of stride 1 and a dilated convolution are the paper's shifted poolings, interleaved."""
    model = OverFeat(2, scales=[1.0], view=2, width=2, hidden=5, regressor_hidden=4).eval()
    nn.init.normal_(model.score.weight)
    image = torch.randn(1, 3, 112, 144)
    scores, _, views_N4 = model.views(image)
    conv5 = maps(model.encoder, image)[-1]
    grid = scores.T.view(3, 4, 6)  # 112 / 16 - 3 and 144 / 16 - 3
    for down in range(2):
        for right in range(2):
            features = functional.max_pool2d(conv5[..., down:, right:], 2)
            for name in ("fc6", "fc7"):
                layer = model.encoder[name]
                features = functional.conv2d(features, layer.weight, layer.bias).relu()
            expected = model.score(features)[0]
            torch.testing.assert_close(grid[:, down::2, right::2], expected)
    assert views_N4[0].tolist() == [0, 0, 64, 64]
    assert views_N4[7].tolist() == [16, 16, 80, 80]


def direct_merge(boxes: list[Tensor], scores: list[float], threshold: float) -> list[tuple[list[float], float]]:
    """The paper's loop, over all pairs every time."""
    alive = [(box, score) for box, score in zip(boxes, scores, strict=True)]
    while len(alive) > 1:
        best, pair = math.inf, (0, 0)
        for one in range(len(alive)):
            for other in range(one + 1, len(alive)):
                a, b = alive[one][0], alive[other][0]
                distance = math.dist(((a[:2] + a[2:]) / 2).tolist(), ((b[:2] + b[2:]) / 2).tolist())
                diagonal = (math.dist(a[:2], a[2:]) + math.dist(b[:2], b[2:])) / 2
                match = distance / diagonal + 1 - float(box_iou(a[None], b[None]))
                if match < best:
                    best, pair = match, (one, other)
        if best > threshold:
            break
        (a, first), (b, second) = alive[pair[0]], alive[pair[1]]
        alive = [item for at, item in enumerate(alive) if at not in pair] + [((a + b) / 2, first + second)]
    return sorted((box.tolist(), score) for box, score in alive)


def test_merging() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [2, 0, 12, 10]])
    merged, scores = merge_boxes(boxes, torch.tensor([0.5, 0.25, 1.0]), threshold=0.8)
    assert merged.tolist() == [[1, 0, 11, 10], [50, 50, 60, 60]]
    assert scores.tolist() == [1.5, 0.25]
    assert len(merge_boxes(boxes, torch.ones(3), threshold=0.1)[0]) == 3
    assert len(merge_boxes(boxes[:0], torch.ones(0), threshold=0.8)[0]) == 0
    boxes, scores = random_boxes(25, 100, 100), torch.rand(25)
    merged, sums = merge_boxes(boxes, scores, threshold=0.8)
    expected = direct_merge([*boxes], scores.tolist(), 0.8)
    assert 1 < len(merged) < 20
    found = sorted(zip(merged.tolist(), sums.tolist(), strict=True))
    np.testing.assert_allclose([box for box, _ in found], [box for box, _ in expected], rtol=1e-4)
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-5)


def test_which_views_have_an_object() -> None:
    views = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50], [90, 90, 99, 99]])
    objects = torch.tensor([[0.0, 0, 10, 10], [40, 40, 42, 42]])
    object_N, background_N = _assigned(views, objects)
    assert object_N.tolist() == [0, -1, 1, -1]  # the third as it is the small object's nearest
    assert background_N.tolist() == [False, False, False, True]  # the second overlaps by a third


# Hypercolumns.


def test_grid_weights() -> None:
    weights = grid_weights(3, 12)
    torch.testing.assert_close(weights.sum(0), torch.ones(12, 12))
    assert weights.view(3, 3, 12, 12)[0, 2, :2, -2:].min() == 1  # at the corner one classifier alone
    # Pixel 3 of 12 stands at 3.5 / 12 * 3 - 0.5 = 0.375 between the first two.
    torch.testing.assert_close(weights.view(3, 3, 12, 12)[:, 0, 3, 0], torch.tensor([0.625, 0.375, 0]))
    assert torch.equal(grid_weights(1, 5), torch.ones(1, 5, 5))


@torch.inference_mode()
def test_sums_of_levels_are_classifiers_of_hypercolumns() -> None:
    """As the paper defines it: upsample the maps, stack them to columns, classify each pixel in each cell's way."""
    model = PixelClassifiers({"a": 4, "b": 6, "c": 5}, num_classes=3, grid=2, size=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    levels = {"a": torch.randn(2, 4, 8, 8), "b": torch.randn(2, 6, 4, 4), "c": torch.randn(2, 5, 1, 1)}
    labels = torch.tensor([2, 0])
    column_NCMM = torch.cat([functional.interpolate(one, size=(8, 8), mode="bilinear") for one in levels.values()], 1)
    weight_KGC = torch.cat([model.weights[name] for name in levels], 2)
    found = model(levels, labels)
    for at, label in enumerate(labels.tolist()):
        expected = torch.zeros(8, 8)
        for cell in range(4):
            logit_MM = torch.einsum("c,chw->hw", weight_KGC[label, cell], column_NCMM[at]) + model.bias[label, cell]
            expected += logit_MM.sigmoid() * grid_weights(2, 8)[cell]
        torch.testing.assert_close(found[at], expected)


# Histograms of oriented gradients.


@torch.inference_mode()
def test_a_window_is_scikit_images_descriptor() -> None:
    model = HogSVM(2, window_height=48, window_width=32)
    image_HWC = render_scene(3, width=32, height=48).image_HWC
    margins, boxes = model.windows(image_HWC)
    assert boxes.tolist() == [[0, 0, 32, 48]]
    options = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (2, 2), "block_norm": "L2-Hys"}
    descriptor = hog(image_HWC, transform_sqrt=True, channel_axis=-1, **options)
    # From channel, row, column to the library's row, column, then the block's values.
    weight = model.margin.weight.permute(0, 2, 3, 1).flatten(1)
    expected = weight @ torch.from_numpy(descriptor).float() + model.margin.bias
    torch.testing.assert_close(margins[0], expected, rtol=1e-4, atol=1e-5)


def test_scales_of_the_sliding_window() -> None:
    model = HogSVM(1, window_height=32, window_width=16, scale_step=2.0)
    assert model.sizes(128, 200) == [(128, 200), (64, 100), (32, 50)]
    assert model.sizes(16, 100) == [(16, 100)]
    margins, boxes = model.windows(np.zeros((16, 100, 3), np.uint8))  # continued to 32 x 100
    assert len(margins) == len(boxes) == (100 - 16) // 8 + 1
    assert boxes[-1].tolist() == [80, 0, 96, 32]
    with pytest.raises(ValueError, match="multiples of 8 from 16"):
        HogSVM(1, window_height=30)


def test_hinge_loss_by_hand() -> None:
    model = HogSVM(2, window_height=32, window_width=32)
    nn.init.zeros_(model.margin.weight)
    model.margin.bias.data = torch.tensor([-0.25, 2.0])
    target = {"boxes": torch.tensor([[0.0, 0, 32, 32]]), "labels": torch.tensor([1])}
    image = torch.randn(1, 3, 32, 96)
    found = model.losses(image, [Frame(32, 96, 32, 96)], [target])["loss_hinge"].item()
    # Class 0 has negatives alone, at 1 - 0.25; class 1 negatives at 1 + 2, and the object at 0.
    assert found == pytest.approx((0.75 + (3.0 + 0.0) / 2) / 2)


def test_hog_learns_to_find_an_object() -> None:
    """A cross on a plain ground: after a few steps it is found where it is."""
    torch.manual_seed(1)
    model = HogSVM(1, window_height=32, window_width=32, scale_step=4.0, box_score_thresh=0.5)
    image_BCHW = torch.full((1, 3, 64, 96), -1.0)
    image_BCHW[:, :, 28:36, 44:68] = 1
    image_BCHW[:, :, 20:44, 52:60] = 1
    target = {"boxes": torch.tensor([[40.0, 16, 72, 48]]), "labels": torch.tensor([0])}
    frames = [Frame(64, 96, 64, 96)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        model.losses(image_BCHW, frames, [target])["loss_hinge"].backward()
        optimizer.step()
    with torch.inference_mode():
        (found,) = model(image_BCHW, frames)
    assert box_iou(found["boxes"][:1], target["boxes"]).item() == 1
    assert found["scores"][0] > 0.6
    assert len(nms(found["boxes"], found["scores"], 0.3)) == len(found["boxes"])


# The guide.


def snippets() -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)]


def test_the_guides_configs_are_valid(tmp_path: Path) -> None:
    configs = {tree["model"]["name"]: tree for tree in snippets() if "epochs" in tree}
    assert sorted(configs) == sorted(CLASSIC)
    for name, tree in configs.items():
        config = TrainConfig.model_validate({**tree, "output": {"uri": str(tmp_path)}, "partial_weights": False})
        small = {**TINY[name], **{key: value for key, value in config.model.options.items() if key == "proposals"}}
        plain = config.model.model_copy(update={"options": small, "weights": "none"})
        model, _ = start_model(config.model_copy(update={"model": plain}))
        assert set(config.model.options) <= set(build_options(name)), name
        assert model.taxonomy.name == "scenes"
        assert config.freeze.stages in (0, len(backbone_stages(model.module)) if name != "hog_svm" else 0)


def build_options(name: str) -> set[str]:
    import inspect

    post = {"score_threshold", "max_segments", "resize", "max_size", "pad_multiple"}
    return set(inspect.signature(MODELS[name].build).parameters) | post
