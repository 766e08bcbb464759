"""Features of regions: torchvision's operations where it has them, RoIWarp against its paper's formula."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from pipeline.models.zoo.roi_ops import ROI_KINDS, RoIFeatures, roi_warp

IMAGES = [(128, 128), (128, 128)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def random_boxes(count: int, side: float, low: float = 1.0, seed: int = 0) -> Tensor:
    """Boxes in an image of `side` pixels."""
    corner_N2 = random(count, 2, seed=seed) * (side - low)
    size_N2 = low + random(count, 2, seed=seed + 1) * (side - low - corner_N2)
    return torch.cat([corner_N2, corner_N2 + size_N2], dim=1)


def rois(boxes: list[Tensor]) -> Tensor:
    return torch.cat([torch.cat([torch.full((len(own), 1), float(at)), own], 1) for at, own in enumerate(boxes)])


@pytest.mark.parametrize("size", [1, 7])
def test_one_map_is_cut_as_torchvision_cuts_it(size: int) -> None:
    features = {"0": random(2, 3, 16, 16), "pool": random(2, 3, 8, 8)}
    boxes = [random_boxes(5, 128), random_boxes(3, 128, seed=5)]
    align = RoIFeatures("align", (8,), size)(features, boxes, IMAGES)
    assert torch.equal(align, roi_align(features["0"], boxes, size, 1 / 8, 2))
    pool = RoIFeatures("pool", (8,), size)(features, boxes, IMAGES)
    assert torch.equal(pool, roi_pool(features["0"], boxes, size, 1 / 8))
    warp = RoIFeatures("warp", (8,), size)(features, boxes, IMAGES)
    assert torch.equal(warp, roi_warp(features["0"], rois(boxes), size, 1 / 8))


def test_levels_are_torchvisions() -> None:
    sizes = {"0": 200, "1": 100, "2": 50, "3": 25, "pool": 13}
    features = {name: random(2, 3, side, side, seed=at) for at, (name, side) in enumerate(sizes.items())}
    boxes = [random_boxes(40, 800), random_boxes(30, 800, seed=5)]
    expected = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, boxes, [(800, 800)] * 2)
    assert torch.equal(RoIFeatures("align", (4, 8, 16, 32), 7)(features, boxes, [(800, 800)] * 2), expected)


@pytest.mark.parametrize(
    ("side", "level"), [(10, 0), (111.9, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (790, 3)]
)
@pytest.mark.parametrize("kind", ROI_KINDS)
def test_a_box_is_cut_from_the_level_of_its_size(kind: str, side: float, level: int) -> None:
    features = {str(at): torch.full((1, 1, 200 >> at, 200 >> at), float(at)) for at in range(4)}
    boxes = [torch.tensor([[4.0, 4.0, 4 + side, 4 + side]])]
    found = RoIFeatures(kind, (4, 8, 16, 32), 2)(features, boxes, [(800, 800)])
    assert found.flatten().tolist() == pytest.approx([level] * 4)


def warped(features_CHW: Tensor, box: list[float], side: int, samples: int) -> Tensor:
    """Equations 4 and 5 of the paper as written there: a sum over all of the map, weighted by max(0, 1 - distance)."""
    x1, y1, x2, y2 = box
    total = side * samples
    out = torch.zeros(len(features_CHW), total, total, dtype=features_CHW.dtype)
    for v in range(total):
        for u in range(total):
            x, y = x1 + u / total * (x2 - x1), y1 + v / total * (y2 - y1)
            for row in range(features_CHW.shape[1]):
                for column in range(features_CHW.shape[2]):
                    weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                    out[:, v, u] += weight * features_CHW[:, row, column]
    return out.unfold(1, samples, samples).unfold(2, samples, samples).amax((3, 4))


@pytest.mark.parametrize("samples", [1, 2])
def test_warping_is_the_papers_formula(samples: int) -> None:
    features_BCHW = random(2, 3, 5, 6).double()
    # Within the map, beyond two of its edges, of less than one value, outside; images in no order.
    boxes = [[1.2, 0.7, 4.9, 3.3], [-1.5, -0.5, 3.0, 2.5], [2.0, 3.0, 9.0, 8.0], [2.3, 1.1, 2.4, 1.9], [7, 7, 9, 9]]
    owners = [1, 0, 1, 0, 0]
    rows = [[at, *(16 * edge for edge in box)] for at, box in zip(owners, boxes, strict=True)]
    rois_N5 = torch.tensor(rows, dtype=torch.float64)
    found = roi_warp(features_BCHW, rois_N5, 2, 1 / 16, samples)
    expected = [warped(features_BCHW[at], box, 2, samples) for at, box in zip(owners, boxes, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "samples"), [(7, 1), (1, 6), (3, 2)])
def test_warping_is_alignment_half_a_sample_further(size: int, samples: int) -> None:
    """RoIAlign with one sample per bin takes it at the bin's centre, RoIWarp at its upper left corner."""
    features_BCHW, total = random(1, 4, 16, 16).double(), size * samples
    boxes_N4 = random_boxes(20, 100, low=20).double() + 10
    half_N2 = (boxes_N4[:, 2:] - boxes_N4[:, :2]) / total / 2
    moved = roi_align(features_BCHW, [boxes_N4 - half_N2.repeat(1, 2)], total, 1 / 8, sampling_ratio=1)
    expected = torch.nn.functional.max_pool2d(moved, samples)
    torch.testing.assert_close(roi_warp(features_BCHW, rois([boxes_N4]).double(), size, 1 / 8, samples), expected)


def test_warping_has_gradients_to_features_and_boxes() -> None:
    features_BCHW = random(2, 2, 5, 5).double().requires_grad_()
    rois_N5 = torch.tensor([[0, 5.1, 3.3, 40.7, 33.9], [1, 11.3, 2.9, 29.5, 60.1]], dtype=torch.float64)
    boxes_N4 = rois_N5[:, 1:].clone().requires_grad_()

    def cut(features: Tensor, boxes: Tensor) -> Tensor:
        return roi_warp(features, torch.cat([rois_N5[:, :1], boxes], 1), 2, 1 / 16)

    assert torch.autograd.gradcheck(cut, (features_BCHW, boxes_N4), eps=1e-6, atol=1e-6)
    cut(features_BCHW, boxes_N4).sum().backward()
    assert bool((boxes_N4.grad != 0).any(1).all())


@pytest.mark.parametrize("kind", ROI_KINDS)
@pytest.mark.parametrize("strides", [(8,), (4, 8)])
def test_no_box_has_no_features_and_every_level_its_gradient(kind: str, strides: tuple[int, ...]) -> None:
    features = {str(at): random(2, 3, 16 >> at, 16 >> at).requires_grad_() for at in range(len(strides))}
    found = RoIFeatures(kind, strides, 7)(features, [torch.zeros(0, 4), torch.zeros(0, 4)], IMAGES)
    assert found.shape == (0, 3, 7, 7)
    found.sum().backward()
    assert all(values.grad is not None and not values.grad.any() for values in features.values())


@pytest.mark.parametrize("kind", ROI_KINDS)
def test_half_precision(kind: str) -> None:
    """Features of an autocast backbone, boxes in float32."""
    features = {"0": random(1, 3, 16, 16)}
    boxes = [random_boxes(5, 128)]
    module = RoIFeatures(kind, (8,), 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module({"0": features["0"].bfloat16()}, boxes, IMAGES)
    torch.testing.assert_close(found.float(), module(features, boxes, IMAGES), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "strides", "message"),
    [
        ("crop", (8,), "roi must be one of align, pool, warp, got 'crop'"),
        ("align", (), "strides must be ascending powers of 2"),
        ("align", (8, 4), "strides must be ascending powers of 2"),
        ("align", (4, 16), "strides must be ascending powers of 2"),
        ("align", (6,), "strides must be ascending powers of 2"),
    ],
)
def test_what_it_refuses(kind: str, strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoIFeatures(kind, strides, 7)
