"""Selective search against a direct implementation, and where region-based models look."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from skimage.segmentation import felzenszwalb
from torchvision.ops import box_convert, box_iou

from pipeline.errors import PredictError
from pipeline.models.spec import IMAGENET_MEAN, IMAGENET_STD, Frame, Prompts
from pipeline.models.zoo.proposals import Proposer, RawImages, grid_boxes, prompt_boxes
from pipeline.models.zoo.selective_search import ALL, _features, _texture, color_space, group, selective_search
from pipeline.sources.scenes import render_scene


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Slow:
    """Regions as pixels, everything counted anew for every pair in every step."""

    color_HWC: npt.NDArray[np.float64]
    texture_HWC: npt.NDArray[np.float64]
    similarity: tuple[str, ...]

    def histogram(self, values_HWC: npt.NDArray[np.float64], pixels: set[tuple[int, int]], bins: int) -> list[float]:
        counts = [0] * (bins * values_HWC.shape[2])
        for row, column in pixels:
            for channel, value in enumerate(values_HWC[row, column].tolist()):
                counts[channel * bins + min(math.floor(value * bins), bins - 1)] += 1
        return [count / sum(counts) for count in counts]

    def alike(self, one: set[tuple[int, int]], other: set[tuple[int, int]]) -> float:
        pixels = self.color_HWC.shape[0] * self.color_HWC.shape[1]
        total = 0.0
        for name, values_HWC, bins in (("color", self.color_HWC, 25), ("texture", self.texture_HWC, 10)):
            if name in self.similarity:
                pairs = zip(*(self.histogram(values_HWC, part, bins) for part in (one, other)), strict=True)
                total += sum(map(min, pairs))
        both = one | other
        if "size" in self.similarity:
            total += 1 - len(both) / pixels
        if "fill" in self.similarity:
            x1, y1, x2, y2 = corners(both)
            total += 1 - ((x2 - x1) * (y2 - y1) - len(both)) / pixels
        return total

    def boxes(self, label_HW: npt.NDArray[np.int32]) -> list[tuple[int, int, int, int]]:
        height, width = label_HW.shape
        regions = [
            {(row, column) for row in range(height) for column in range(width) if label_HW[row, column] == label}
            for label in range(label_HW.max() + 1)
        ]
        found = [corners(region) for region in regions]
        alive = [*range(len(regions))]
        while len(alive) > 1:
            pairs = [pair for pair in itertools.combinations(alive, 2) if touch(*(regions[one] for one in pair))]
            one, other = max(pairs, key=lambda pair: self.alike(regions[pair[0]], regions[pair[1]]))
            alive = [region for region in alive if region not in (one, other)] + [len(regions)]
            regions.append(regions[one] | regions[other])
            found.append(corners(regions[-1]))
        return found


def corners(pixels: set[tuple[int, int]]) -> tuple[int, int, int, int]:
    rows, columns = {row for row, _ in pixels}, {column for _, column in pixels}
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def touch(one: set[tuple[int, int]], other: set[tuple[int, int]]) -> bool:
    return any(
        {(row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)} & other for row, column in one
    )


@pytest.mark.parametrize("similarity", [ALL, ALL[1:], ("fill",), ("color",)])
@pytest.mark.parametrize("space", ["hsv", "rgi", "i"])
def test_grouping_is_the_papers(space: str, similarity: tuple[str, ...]) -> None:
    image_HWC = np.random.default_rng(4).integers(0, 256, (14, 18, 3), np.uint8)
    color_HWC = color_space(image_HWC, space)
    label_HW = felzenszwalb(color_HWC, scale=3, sigma=0.6, min_size=8, channel_axis=-1).astype(np.int32)
    assert 8 <= label_HW.max() + 1 <= 30
    grouping = group(_features(color_HWC, label_HW), similarity)
    assert [tuple(box) for box in grouping.boxes_R4.tolist()] == Slow(color_HWC, _texture(color_HWC), similarity).boxes(
        label_HW
    )
    assert grouping.members(len(grouping.boxes_R4) - 1).tolist() == [*range(label_HW.max() + 1)]


def test_color_spaces() -> None:
    image_HWC = np.array([[[255, 0, 0], [0, 0, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(color_space(image_HWC, "hsv")[0], [[0, 1, 1], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(color_space(image_HWC, "rgi")[0], [[1, 0, 1 / 3], [0, 0, 0], [1 / 3, 1 / 3, 1]])
    # Red is L 53.24, a 80.09, b 67.20 (D65).
    red = [53.24 / 100, (80.09 + 128) / 255, (67.20 + 128) / 255]
    np.testing.assert_allclose(color_space(image_HWC, "lab")[0, 0], red, atol=1e-3)
    assert color_space(image_HWC, "h").shape == color_space(image_HWC, "i").shape == (1, 3, 1)
    with pytest.raises(ValueError, match="colour space must be rgb"):
        color_space(image_HWC, "cmyk")


def test_regions() -> None:
    image_HWC = render_scene(5, width=96, height=72).image_HWC
    regions = selective_search(image_HWC)
    boxes = [tuple(box) for box in regions.boxes_R4.tolist()]
    assert len(set(boxes)) == len(boxes) > 100
    assert (0, 0, 96, 72) in boxes[:20]  # the last region of each grouping comes early
    sides = regions.boxes_R4[:, 2:] - regions.boxes_R4[:, :2]
    assert sides.min() >= 8
    for index in range(0, len(boxes), 10):
        mask_HW = regions.mask(index)
        assert mask_HW.shape == (72, 96)
        assert corners({(int(row), int(column)) for row, column in np.argwhere(mask_HW)}) == boxes[index]
    again, few = selective_search(image_HWC), selective_search(image_HWC, limit=7)
    assert np.array_equal(again.boxes_R4, regions.boxes_R4)
    assert np.array_equal(few.boxes_R4, regions.boxes_R4[:7])
    assert len(few.members) == len(few.map_R) == 7


def test_objects_are_among_the_regions() -> None:
    best = []
    for index in range(6):
        scene = render_scene(index, width=128, height=96)
        boxes_R4 = torch.from_numpy(selective_search(scene.image_HWC).boxes_R4).float()
        objects = [one.bbox for one in scene.segments if one.category_id >= 5 and one.area >= 100]
        targets_M4 = box_convert(torch.tensor(objects, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")
        best += box_iou(targets_M4, boxes_R4).max(1).values.tolist() if objects else []
    assert len(best) >= 5
    assert np.mean(best) > 0.7


@pytest.mark.parametrize("value", [0, 128])
def test_an_even_image_is_one_region(value: int) -> None:
    regions = selective_search(np.full((20, 30, 3), value, np.uint8))
    assert regions.boxes_R4.tolist() == [[0, 0, 30, 20]]


def test_what_selective_search_refuses() -> None:
    image_HWC = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"limit and min_size 1 or more, got 'fast', 0, 8"):
        selective_search(image_HWC, limit=0)
    with pytest.raises(ValueError, match=r"expected uint8 RGB of H, W, 3, got float64 \(20, 30, 3\)"):
        selective_search(image_HWC.astype(float))  # type: ignore[arg-type]


def test_pixels_come_back_exactly() -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    image_CHW = (torch.from_numpy(image_HWC).permute(2, 0, 1) / 255 - mean) / std
    padded_BCHW = torch.zeros(1, 3, 32, 32)
    padded_BCHW[0, :, :16, :24] = image_CHW
    (raw_HWC,) = RawImages(IMAGENET_MEAN, IMAGENET_STD)(padded_BCHW, [Frame(16, 24, 16, 24)])
    assert np.array_equal(raw_HWC, image_HWC)
    proposer = Proposer("selective_search", 50, "fast", IMAGENET_MEAN, IMAGENET_STD)
    (proposals,) = proposer(padded_BCHW, [Frame(16, 24, 16, 24)])
    assert np.array_equal(proposals.boxes_R4.numpy(), selective_search(image_HWC, limit=50).boxes_R4)
    masks_N1HW = proposals.masks([0, 1], 32, 32)
    assert masks_N1HW.shape == (2, 1, 32, 32)
    assert np.array_equal(masks_N1HW[1, 0, :16, :24].numpy() > 0, proposals.regions.mask(1))


def test_a_grid_covers_the_image() -> None:
    boxes_R4 = grid_boxes(60, 90, 10_000)
    assert boxes_R4[0].tolist() == [0, 0, 60, 60]
    assert boxes_R4.min() >= 0
    assert bool((boxes_R4[:, 2:] <= torch.tensor([90, 60]) + 1e-4).all())
    assert bool((boxes_R4[:, 2:] > boxes_R4[:, :2]).all())
    assert len({tuple(box) for box in boxes_R4.tolist()}) == len(boxes_R4)
    x, y = torch.meshgrid(torch.arange(90.0), torch.arange(60.0), indexing="xy")
    sides = boxes_R4[:, 2:] - boxes_R4[:, :2]
    small = boxes_R4[(sides - sides[-1]).abs().amax(1) < 1e-3][:, :, None, None]
    inside = (x >= small[:, 0]) & (x < small[:, 2]) & (y >= small[:, 1]) & (y < small[:, 3])
    assert bool(inside.any(0).all())
    few = grid_boxes(60, 90, 7)
    assert len(few) == 7
    assert torch.equal(few[[0, -1]], boxes_R4[[0, -1]])


def test_prompts_are_proposals() -> None:
    prompts = Prompts(boxes=((10, 20, 50, 60), (-5, 0, 30, 200), (90, 0, 120, 10), (3, 3, 3, 9)))
    frame = Frame(80, 100, 40, 50, prompts)
    boxes_R4 = prompt_boxes(frame)
    assert boxes_R4.tolist() == [[5, 10, 25, 30], [0, 0, 15, 40], [45, 0, 50, 5]]
    proposer = Proposer("prompts", 2, "fast", IMAGENET_MEAN, IMAGENET_STD).eval()
    given, none = proposer(torch.zeros(2, 3, 40, 50), [frame, Frame(80, 100, 40, 50, Prompts())])
    assert torch.equal(given.boxes_R4, boxes_R4[:2])
    assert none.boxes_R4.shape == (0, 4)
    with pytest.raises(PredictError, match="expected prompts with the image"):
        proposer(torch.zeros(1, 3, 40, 50), [Frame(80, 100, 40, 50)])
    masks_N1HW = given.masks([0], 40, 50)
    assert masks_N1HW.sum() == masks_N1HW[0, 0, 10:30, 5:25].sum() == 400
    _, background = proposer.train()(torch.zeros(2, 3, 40, 50), [frame, Frame(80, 100, 40, 50)])
    assert torch.equal(background.boxes_R4, grid_boxes(40, 50, 2))
    with pytest.raises(ValueError, match=r"proposals must be one of selective_search, grid, prompts.*'rpn', 5, 'fast'"):
        Proposer("rpn", 5, "fast", IMAGENET_MEAN, IMAGENET_STD)  # type: ignore[arg-type]
