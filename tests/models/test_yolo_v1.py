"""YOLO v1: the paper's sizes, its loss by hand on a small grid, and targets that come back from their grid."""

from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor
from torchvision.models import resnet18

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame
from pipeline.models.zoo.detections import center_boxes, corner_boxes, stretch
from pipeline.models.zoo.yolo_v1 import YoloV1, decode_grid, detect_yolo, encode_grid, grid_losses, yolo_losses


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weights(*layers: tuple[int, int, int]) -> int:
    """Of convolutions (kernel, channels in and out) with biases."""
    return sum(kernel * kernel * before * after + after for kernel, before, after in layers)


def test_the_papers_network() -> None:
    """Figure 3: 24 convolutions, 7 x 7 x 1024 features, 4096 units, 7 x 7 x 30 numbers for the 20 classes of VOC."""
    with torch.device("meta"):
        module = YoloV1(20)
        assert module.backbone(torch.zeros(1, 3, 448, 448)).shape == (1, 1024, 14, 14)
        assert module.neck(torch.zeros(1, 1024, 14, 14)).shape == (1, 1024, 7, 7)
        assert module(torch.zeros(2, 3, 448, 448)).shape == (2, 7, 7, 30)
    parts = [*module.backbone, *module.neck]
    assert sum(isinstance(part, torch.nn.Conv2d) for part in module.backbone) == 20
    assert sum(isinstance(part, torch.nn.Conv2d) for part in parts) == 24
    expected = weights(
        (7, 3, 64),
        (3, 64, 192),
        (1, 192, 128),
        (3, 128, 256),
        (1, 256, 256),
        (3, 256, 512),
        *[(1, 512, 256), (3, 256, 512)] * 4,
        (1, 512, 512),
        (3, 512, 1024),
        *[(1, 1024, 512), (3, 512, 1024)] * 2,
        *[(3, 1024, 1024)] * 4,
        (1, 7 * 7 * 1024, 4096),
        (1, 4096, 7 * 7 * 30),
    )
    assert expected == 271_703_550
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_targets_come_back_from_their_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    size_N2 = 0.05 + 0.4 * torch.rand(6, 2, generator=generator)
    # One object in each of six cells of the 7 x 7.
    cells_N2 = torch.tensor([[0, 0], [6, 6], [3, 1], [1, 3], [5, 0], [2, 6]])
    boxes_N4 = torch.cat([(cells_N2 + 0.05 + 0.9 * torch.rand(6, 2, generator=generator)) / 7, size_N2], dim=1)
    labels_N = torch.tensor([4, 0, 2, 2, 1, 3])
    grid_SSV = encode_grid(boxes_N4, labels_N, grid=7, predictors=2, num_classes=5)
    assert grid_SSV.shape == (7, 7, 15)
    found_SSP4, confidence_SSP, probability_SSK = decode_grid(grid_SSV, predictors=2)
    assert confidence_SSP.sum() == 12
    for box, (column, row), label in zip(boxes_N4, cells_N2.tolist(), labels_N.tolist(), strict=True):
        for predictor in range(2):
            torch.testing.assert_close(found_SSP4[row, column, predictor], box)
        assert probability_SSK[row, column].tolist() == [float(place == label) for place in range(5)]


def test_an_object_on_the_last_edge_and_two_in_a_cell() -> None:
    boxes_N4 = torch.tensor([[1.0, 1.0, 0.2, 0.2], [0.9, 0.9, 0.5, 0.5]])
    grid_SSV = encode_grid(boxes_N4, torch.tensor([1, 0]), grid=2, predictors=1, num_classes=2)
    # The first takes the cell: centre at its far corner, roots of its size, confidence, class 1.
    torch.testing.assert_close(grid_SSV[1, 1], torch.tensor([1, 1, 0.2**0.5, 0.2**0.5, 1, 0, 1]))
    assert grid_SSV.count_nonzero() == 6


def test_the_loss_by_hand() -> None:
    """Two cells by two, two predictors, one class more than one. The object fills the upper left cell."""
    grid_SSV = torch.zeros(2, 2, 12)
    target_SSV = encode_grid(
        torch.tensor([[0.25, 0.25, 0.5, 0.5]]), torch.tensor([1]), grid=2, predictors=2, num_classes=2
    )
    # Box 1 covers a quarter of the object, box 2 all of it but is twice as wide: IoU 1/4 and 1/2.
    grid_SSV[0, 0] = torch.tensor([0.25, 0.25, 0.5, 0.5, 0.9, 1.0, 0.5, 1.0, 0.5**0.5, 0.3, 0.2, 0.6])
    grid_SSV[1, 0, [4, 9]] = torch.tensor([0.5, 0.1])
    losses = grid_losses(grid_SSV, target_SSV, predictors=2)
    expected = {
        "center": 0.5**2,  # the centre of box 2 lies on the cell's right edge
        "size": (1 - 0.5**0.5) ** 2,
        "object": (0.3 - 0.5) ** 2,  # as confident as its IoU
        "no_object": 0.9**2 + 0.5**2 + 0.1**2,  # box 1, and those of the cell below
        "class": 0.2**2 + 0.4**2,
    }
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    assert float(sum(MODELS["yolo_v1"].loss_factors[name] * value for name, value in losses.items())) == pytest.approx(
        5 * (0.25 + 0.085786) + 0.04 + 0.5 * 1.07 + 0.2, rel=1e-4
    )


def test_a_perfect_grid_costs_nothing() -> None:
    boxes_N4 = torch.tensor([[0.2, 0.3, 0.4, 0.1], [0.7, 0.8, 0.2, 0.3]])
    target_SSV = encode_grid(boxes_N4, torch.tensor([0, 2]), grid=4, predictors=1, num_classes=3)
    losses = grid_losses(target_SSV, target_SSV, predictors=1)
    torch.testing.assert_close(torch.stack([*losses.values()]), torch.zeros(5))


class Fixed(torch.nn.Module):
    """Answers with one grid, and remembers what it saw."""

    def __init__(self, grid_SSV: Tensor, predictors: int, **fields: Any) -> None:
        super().__init__()
        self.grid_SSV = torch.nn.Parameter(grid_SSV)
        self.image_size, self.grid, self.predictors = 64 * len(grid_SSV), len(grid_SSV), predictors
        self.num_classes = grid_SSV.shape[2] - 5 * predictors
        self.score_thresh, self.nms_thresh, self.detections_per_img = 0.05, 0.5, 100
        for name, value in fields.items():
            setattr(self, name, value)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.seen = image_BCHW
        return self.grid_SSV[None].expand(len(image_BCHW), -1, -1, -1)


def test_detections_are_the_targets() -> None:
    """Boxes in prepared pixels of an image that is padded and not square, each once though two predictors say it."""
    frame = Frame(60, 200, 30, 100)
    boxes_N4 = torch.tensor([[10.0, 4.0, 40.0, 28.0], [55.0, 0.0, 95.0, 12.0]])
    grid_SSV = encode_grid(center_boxes(boxes_N4, frame), torch.tensor([3, 1]), grid=7, predictors=2, num_classes=4)
    grid_SSV[..., [2, 4]] *= 0.9  # the first predictor is less sure, and its boxes are narrower
    module = Fixed(grid_SSV, 2)
    image_BCHW = torch.randn(1, 3, 32, 128)
    (found,) = detect_yolo(module, image_BCHW, [frame])
    assert module.seen.shape == (1, 3, 448, 448)
    order = found["labels"].argsort(descending=True)
    torch.testing.assert_close(found["boxes"][order], boxes_N4)
    assert found["scores"].tolist() == [1, 1]
    assert found["labels"][order].tolist() == [3, 1]
    losses = yolo_losses(module, image_BCHW, [frame], [{"boxes": boxes_N4, "labels": torch.tensor([3, 1])}])
    # Only the narrower boxes cost something: nobody asked them, and they are 0.9 sure.
    expected = {"center": 0, "size": 0, "object": 0, "no_object": 2 * 0.9**2, "class": 0}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, abs=1e-5)


def test_scores_stay_within_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    grid_SSV = 3 * torch.randn(3, 3, 13, generator=generator)
    (found,) = detect_yolo(Fixed(grid_SSV, 2), torch.zeros(1, 3, 192, 192), [Frame(192, 192, 192, 192)])
    assert 0 < len(found["scores"]) <= 100
    assert found["scores"].diff().max() <= 0
    assert 0.05 < found["scores"].min() < found["scores"].max() <= 1
    assert (found["boxes"].min(), found["boxes"].max()) == (0, 192)


def test_images_without_objects() -> None:
    module = Fixed(torch.randn(2, 2, 7), 1)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = yolo_losses(module, torch.zeros(1, 3, 128, 128), [Frame(128, 128, 128, 128)], [empty])
    assert {name for name, value in losses.items() if value} == {"no_object"}
    assert losses["no_object"].item() == pytest.approx(module.grid_SSV[..., 4].square().sum().item())


def test_stretching() -> None:
    image_BCHW = torch.randn(2, 3, 64, 96)
    frames = [Frame(64, 96, 64, 64), Frame(30, 40, 30, 40)]
    squares_BCHW = stretch(image_BCHW, frames, 64)
    assert torch.equal(squares_BCHW[0], image_BCHW[0, :, :, :64])
    # What lies in the padding is not seen.
    other_BCHW = image_BCHW.clone()
    other_BCHW[1, :, 30:] = 9
    other_BCHW[1, :, :, 40:] = 9
    assert torch.equal(stretch(other_BCHW, frames, 64)[1], squares_BCHW[1])
    boxes_N4 = 30 * torch.rand(5, 4)
    torch.testing.assert_close(corner_boxes(center_boxes(boxes_N4, frames[1]), frames[1]), boxes_N4)


def test_a_backbone_of_torchvision(tmp_path: Any) -> None:
    """A classification network's weights fill it; the rest of the network is the paper's."""
    torch.manual_seed(1)
    given = resnet18(weights=None)
    module = YoloV1(3, backbone="resnet18", width=0.05, image_size=128, hidden=8, batch_norm=True)
    assert module(torch.zeros(2, 3, 128, 128)).shape == (2, 2, 2, 13)
    state = MODELS["yolo_v1"].adapt(given.state_dict(), set(module.state_dict()))
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("backbone.")]
    with torch.no_grad():
        image_BCHW = torch.randn(1, 3, 128, 128)
        features = torch.nn.Sequential(*list(given.eval().children())[:-2])(image_BCHW)
        torch.testing.assert_close(module.eval().backbone(image_BCHW), features)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 64, got 100"),
        ({"predictors": 0}, "width, predictors and hidden must be above 0"),
        ({"backbone": "resnet999"}, "backbone must be darknet or a network of torchvision"),
        ({"backbone": "vit_b_16"}, "model 'yolo_v1' cannot be built"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    config = ModelConfig(name="yolo_v1", options={**TINY["yolo_v1"], **options})
    with pytest.raises(ConfigError) as caught:
        load_model(config, seed=0, tile_pixels=1 << 20)
    assert part in str(caught.value)
