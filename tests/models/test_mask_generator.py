"""The automatic mask generator: the masks of transformers' pipeline, and its parts by hand."""

import dataclasses
import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Sam2ImageProcessor, SamImageProcessor
from transformers.pipelines import MaskGenerationPipeline

from pipeline.masks import decode_rle
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, Preprocess
from pipeline.models.zoo.mask_generator import (
    GridOptions,
    Segments,
    areas,
    crop_boxes,
    fill_and_clean,
    generate,
    mask_boxes,
    point_grid,
    segments_of,
    takes_grid,
    views,
)
from pipeline.models.zoo.sam import Sam, build_sam, build_sam2
from pipeline.sources.scenes import render_scene
from pipeline.stages.prepare import prepare

SIDE = 64
PREPROCESS = Preprocess(resize=SIDE, max_size=SIDE, pad_multiple=SIDE)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def lively(sam: Sam, seed: int, gain: float) -> Sam:
    """With random weights that tell points apart, and positive IoUs, for the pipeline takes 0 for no threshold."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in sam.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5, generator=generator)
    head = sam.model.mask_decoder.iou_prediction_head
    head.sigmoid_output = False
    with torch.no_grad():
        head.proj_out.bias += 20
    return sam.eval()


def tiny_sam(seed: int = 0) -> Sam:
    sam = build_sam(
        1,
        hidden_size=32,
        layers=2,
        heads=2,
        global_layers=[1],
        window_size=2,
        image_size=SIDE,
        prompt_size=32,
        decoder_mlp=32,
    )
    return lively(sam, seed, 2.0)


def tiny_sam2(seed: int = 0) -> Sam:
    sam = build_sam2(
        1,
        hidden_size=8,
        heads=1,
        blocks=[1, 2, 2, 1],
        global_layers=[4],
        windows=[4, 2, 2, 1],
        image_size=SIDE,
        prompt_size=32,
        decoder_mlp=32,
    )
    return lively(sam, seed, 2.0)


def inputs(images: list[npt.NDArray[np.uint8]], preprocess: Preprocess) -> tuple[torch.Tensor, list[Frame]]:
    """image_BCHW normalised and padded, as a worker makes it, and the frames."""
    prepared = [prepare(image_HWC, preprocess) for image_HWC in images]
    image_BCHW = torch.zeros(len(images), 3, *np.max([item.padded for item in prepared], 0))
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    for target_CHW, item in zip(image_BCHW, prepared, strict=True):
        part_CHW = (item.image_CHW.float() - mean) / std
        target_CHW[:, : part_CHW.shape[1], : part_CHW.shape[2]] = part_CHW
    return image_BCHW, [item.frame for item in prepared]


def ours(
    sam: Sam, images: list[npt.NDArray[np.uint8]], options: GridOptions, preprocess: Preprocess = PREPROCESS
) -> Any:
    with torch.inference_mode():
        return generate(sam, *inputs(images, preprocess), options)


def masks_of(found: Segments, width: int, height: int) -> list[npt.NDArray[np.bool_]]:
    text, ends = found["runs"].numpy().tobytes().decode(), found["lengths"].cumsum(0).tolist()
    pairs = zip(ends, found["lengths"].tolist(), strict=True)
    return [decode_rle(text[end - length : end], width=width, height=height) for end, length in pairs]


def pipeline_masks(
    sam: Sam,
    image_HWC: npt.NDArray[np.uint8],
    options: GridOptions,
    nms: float,
    *,
    side: int = SIDE,
    normalised: Preprocess = PREPROCESS,
) -> Any:
    if type(sam) is Sam:
        processor: Any = SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    else:
        processor = Sam2ImageProcessor(
            size={"height": side, "width": side}, image_mean=normalised.mean, image_std=normalised.std
        )
    return MaskGenerationPipeline(model=sam.model, image_processor=processor, device="cpu")(
        Image.fromarray(image_HWC),
        points_per_crop=options.points_per_side,
        points_per_batch=options.points_per_batch,
        crops_n_layers=options.crop_layers,
        crop_overlap_ratio=options.crop_overlap,
        crop_n_points_downscale_factor=options.crop_points_downscale,
        pred_iou_thresh=options.pred_iou_thresh,
        stability_score_thresh=options.stability_score_thresh,
        stability_score_offset=options.stability_score_offset,
        crops_nms_thresh=nms,
    )


# A square for SAM 2: the pipeline scales its points as if the image kept its shape, though it is stretched.
@pytest.mark.parametrize(("build", "size"), [(tiny_sam, (96, 72)), (tiny_sam, (48, 100)), (tiny_sam2, (96, 96))])
@pytest.mark.parametrize("nms", [0.7, 0.97])
def test_masks_are_the_pipelines(build: Any, size: tuple[int, int], nms: float) -> None:
    width, height = size
    counts = []
    for seed in range(3):
        sam = build(seed)
        images = [render_scene(index, width=width, height=height).image_HWC for index in (seed, seed + 1)]
        options = GridOptions(
            points_per_side=8,
            points_per_batch=24,
            pred_iou_thresh=19.5,
            stability_score_thresh=0.5,
            stability_score_offset=0.05,
            box_nms_thresh=nms,
        )
        for image_HWC, found in zip(images, ours(sam, images, options), strict=True):
            expected = pipeline_masks(sam, image_HWC, options, nms)
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)
            masks = masks_of(found, width, height)
            assert len(masks) == len(expected["masks"])
            differing = [
                (mask != np.asarray(other)).sum() for mask, other in zip(masks, expected["masks"], strict=True)
            ]
            assert max(differing, default=0) <= 1  # a batch of images is summed in another order
            counts.append(len(masks))
    assert sum(counts) >= 6 if nms == 0.7 else sum(counts) >= 20


def test_crops_are_the_pipelines() -> None:
    """Without suppression, which the pipeline does in another order, and with points that lie as they do there.

    It resizes a crop's bytes, we what is normalised already: masks may differ at their edges.
    """
    sam, size = tiny_sam(1), (120, 120)
    image_HWC = render_scene(1, width=size[0], height=size[1]).image_HWC
    options = GridOptions(
        points_per_side=4,
        crop_layers=1,
        pred_iou_thresh=1.0,
        stability_score_thresh=0.3,
        stability_score_offset=0.05,
        box_nms_thresh=1.0,
        crop_nms_thresh=1.0,
    )
    (found,) = ours(sam, [image_HWC], options, Preprocess(pad_multiple=8))
    expected = pipeline_masks(sam, image_HWC, options, 1.0)
    assert len(expected["masks"]) - len(found["scores"]) in range(-2, 3)
    ious = []
    masks = masks_of(found, *size)
    for other in map(np.asarray, expected["masks"]):
        ious.append(max((mask & other).sum() / max((mask | other).sum(), 1) for mask in masks))
    assert len(ious) >= 10
    assert np.median(ious) > 0.97


def test_crop_boxes_by_hand() -> None:
    # Overlap: 0.5 of the short side, 40; each crop is half of (width + 40), and the last ones end at the border.
    assert crop_boxes(80, 100, 1, 0.5) == [
        (0, (0, 0, 100, 80)),
        (1, (0, 0, 70, 60)),
        (1, (0, 20, 70, 80)),
        (1, (30, 0, 100, 60)),
        (1, (30, 20, 100, 80)),
    ]
    assert [len(crop_boxes(80, 100, layers, 0.3)) for layers in range(4)] == [1, 5, 21, 85]


def test_the_grid_by_hand() -> None:
    assert point_grid(2, torch.device("cpu")).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert GridOptions(points_per_side=32, crop_points_downscale=2).points_of(2) == 8


def test_boxes_and_areas_by_hand() -> None:
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[2, 4, 0] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 5, 2], [0, 0, 0, 0], [0, 4, 0, 4]]
    assert areas(masks).tolist() == [8, 0, 1]


def test_holes_are_filled_and_islands_go() -> None:
    mask_HW = np.zeros((10, 12), bool)
    mask_HW[1:8, 1:8] = True
    mask_HW[3, 3] = mask_HW[4, 4] = False  # two pixels that touch at a corner are one hole of two
    mask_HW[9, 11] = True
    cleaned_HW = fill_and_clean(mask_HW, 3)
    assert cleaned_HW[3, 3]
    assert cleaned_HW[4, 4]
    assert not cleaned_HW[9, 11]
    assert cleaned_HW.sum() == 49
    assert fill_and_clean(mask_HW, 2)[3, 3] == False  # noqa: E712
    assert fill_and_clean(mask_HW, 0) is mask_HW
    alone_HW = np.zeros((10, 12), bool)
    alone_HW[2, 2] = alone_HW[6, 6] = alone_HW[6, 7] = True
    assert np.argwhere(fill_and_clean(alone_HW, 20)).tolist() == [[6, 6], [6, 7]]  # the largest stays


class _Painter:
    """Answers point k of the grid with the k-th mask, whatever the image."""

    image_size = 8

    def __init__(self, logits_NMM: torch.Tensor, scores_N: torch.Tensor) -> None:
        self.logits_NMM, self.scores_N = logits_NMM, scores_N

    def fit(self, height: int, width: int) -> tuple[int, int]:
        return 8, 8

    def embed(self, image_BCSS: torch.Tensor) -> list[tuple[torch.Tensor]]:
        return [(image[None],) for image in image_BCSS]

    def decode(self, embedding: Any, *, points_PK2: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        places = (points_PK2[:, 0, 1] // 4 * 2 + points_PK2[:, 0, 0] // 4).long()
        return self.logits_NMM[places][:, None], self.scores_N[places][:, None]

    def enlarge(self, logits_NMM: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return logits_NMM


def test_each_rule_by_hand() -> None:
    """Four points of an image of 8x8: a square, nearly the same with a lower score, an unstable one, an unsure one."""
    logits = torch.full((4, 8, 8), -9.0)
    logits[0, 1:5, 1:5] = 9
    logits[1, 1:5, 1:5] = 9
    logits[1, 4, 4] = -9
    logits[2, 5:8, 5:8] = 0.5
    logits[3, 6:8, 0:2] = 9
    painter: Any = _Painter(logits, torch.tensor([0.95, 0.9, 0.99, 0.5]))
    image_BCHW, frames = torch.zeros(1, 3, 8, 8), [Frame(8, 8, 8, 8)]

    def kept(**options: Any) -> list[float]:
        (found,) = generate(painter, image_BCHW, frames, GridOptions(points_per_side=2, **options))
        return [round(score, 2) for score in found["scores"].tolist()]

    assert kept() == [0.95]
    assert kept(box_nms_thresh=1.0) == [0.95, 0.9]
    assert kept(stability_score_offset=0.4) == [0.99, 0.95]
    assert kept(pred_iou_thresh=0.3) == [0.95, 0.5]
    (found,) = generate(painter, image_BCHW, frames, GridOptions(points_per_side=2))
    (mask_HW,) = masks_of(found, 8, 8)
    assert mask_HW[1:5, 1:5].all()
    assert mask_HW.sum() == 16


def test_a_mask_that_touches_the_edge_of_a_crop_goes() -> None:
    """With crops, the painter's mask is in all five views; only what is not cut by a crop's inner edge stays."""
    logits = torch.full((4, 64, 64), 9.0)

    class Whole(_Painter):
        image_size = 64

        def fit(self, height: int, width: int) -> tuple[int, int]:
            return 64, 64

        def enlarge(self, logits_NMM: torch.Tensor, height: int, width: int) -> torch.Tensor:
            return logits_NMM[:, :1, :1].expand(-1, height, width)

        def decode(
            self, embedding: Any, *, points_PK2: torch.Tensor, **given: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return logits[: len(points_PK2)][:, None], torch.ones(len(points_PK2), 1)

    painter: Any = Whole(logits, torch.ones(4))
    (found,) = generate(
        painter, torch.zeros(1, 3, 64, 64), [Frame(64, 64, 64, 64)], GridOptions(points_per_side=2, crop_layers=1)
    )
    assert [mask_HW.all() for mask_HW in masks_of(found, 64, 64)] == [True]


def test_views_are_parts_of_the_prepared_image() -> None:
    sam = tiny_sam()
    image_BCHW = torch.rand(2, 3, 64, 64)
    frames = [Frame(96, 128, 48, 64), Frame(64, 64, 64, 64)]
    found = views(sam, image_BCHW, frames, [(0, (0, 0, 128, 96)), (1, (0, 0, 64, 64)), (1, (16, 0, 48, 32))])
    assert torch.equal(found[0, :, :48], image_BCHW[0, :, :48])
    assert not found[0, :, 48:].any()
    assert torch.equal(found[1], image_BCHW[1])
    part = image_BCHW[1:, :, 0:32, 16:48]
    assert torch.allclose(found[2:], nn.functional.interpolate(part, (64, 64), mode="bilinear"), atol=1e-5)


def test_segments_are_tensors() -> None:
    found = segments_of(torch.tensor([0.5, 0.25]), ["abc", "de"])
    assert {name: value.tolist() for name, value in found.items()} == {
        "scores": [0.5, 0.25],
        "runs": [*b"abcde"],
        "lengths": [3, 2],
    }
    assert [len(value) for value in segments_of(torch.zeros(0), []).values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"points_per_side": 0}, "points_per_side must be 1 or more, got 0"),
        ({"crop_layers": 9}, "crop_layers must be 4 or less"),
        ({"min_area": -1}, "min_area must be 0 or more, got -1"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh must be from 0 to 1, got 1.5"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GridOptions(**options)


def test_options_of_the_grid_are_options_of_what_is_built() -> None:
    @takes_grid(GridOptions(min_area=7))
    def build(num_classes: int, size: str = "base", *, grid: GridOptions) -> tuple[int, str, GridOptions]:
        return num_classes, size, grid

    assert build(3) == (3, "base", GridOptions(min_area=7))
    assert build(3, "large", points_per_side=4) == (3, "large", GridOptions(min_area=7, points_per_side=4))
    parameters = inspect.signature(build).parameters
    fields = [field.name for field in dataclasses.fields(GridOptions)]
    assert [*parameters] == ["num_classes", "size", *fields]
    assert (parameters["min_area"].default, parameters["points_per_side"].default) == (7, 32)
    with pytest.raises(ValueError, match="points_per_side must be 1 or more, got 0"):
        build(3, points_per_side=0)
    with pytest.raises(TypeError, match="points"):
        build(3, points=0)


@pytest.mark.parametrize(("name", "iou"), [("sam", 0.88), ("sam2", 0.8), ("sam3", 0.8)])
def test_the_promptable_models_take_the_same_options(name: str, iou: float) -> None:
    parameters = inspect.signature(MODELS[name].build).parameters
    given = {field.name: parameters[field.name].default for field in dataclasses.fields(GridOptions)}
    assert given == dataclasses.asdict(GridOptions(pred_iou_thresh=iou))
