"""SAM and SAM 2 from boxes and points: the library's own answers; published weights under our names."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_mask_generator import PREPROCESS, SIDE, inputs, masks_of, tiny_sam, tiny_sam2
from transformers import Sam2ImageProcessor, Sam2Processor, SamImageProcessor, SamProcessor

from pipeline.errors import PredictError
from pipeline.masks import decode_rle
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, PostContext, Prompts
from pipeline.models.zoo.sam import Sam, adapt_sam, adapt_sam2, build_sam, build_sam2, prompted, segments
from pipeline.sources.scenes import render_scene
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import load_taxonomy

BOXES = ((10.0, 5.0, 60.0, 50.0), (30.5, 20.25, 90.0, 70.0), (0.0, 0.0, 96.0, 72.0))
POINTS = ((40.0, 30.0, 1), (80.0, 60.0, 0))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def processor_of(sam: Sam) -> Any:
    if type(sam) is Sam:
        return SamProcessor(SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}))
    return Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}), target_size=SIDE)


def library_masks(sam: Sam, image_HWC: Any, *, several: bool = False, **prompts: Any) -> tuple[Any, Any]:
    """transformers' model and processor: masks_PKHW and scores_PK."""
    processor = processor_of(sam)
    given = processor(images=Image.fromarray(image_HWC), return_tensors="pt", **prompts)
    shapes = [given["original_sizes"], *([given["reshaped_input_sizes"]] if "reshaped_input_sizes" in given else [])]
    wanted = {"pixel_values", "input_boxes", "input_points", "input_labels"}
    values = {name: value for name, value in given.items() if name in wanted}
    for name in ("input_boxes", "input_points"):
        if name in values:
            values[name] = values[name].float()
    with torch.inference_mode():
        output = sam.model(**values, multimask_output=several)
        (masks_PKHW,) = processor.post_process_masks(list(output.pred_masks), *shapes)
    return masks_PKHW, output.iou_scores[0]


# SAM 2 stretches what our preparation has already resized: only of a square image are the bytes the same.
@pytest.mark.parametrize(("build", "size"), [(tiny_sam, (96, 72)), (tiny_sam2, (96, 96))])
def test_boxes_and_points_are_the_librarys(build: Any, size: tuple[int, int]) -> None:
    sam = build(3)
    image_HWC = render_scene(2, width=size[0], height=size[1]).image_HWC
    item = prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES, points=POINTS))
    assert item.frame.prompts.boxes == BOXES
    image_BCHW, _ = inputs([image_HWC], PREPROCESS)
    with torch.inference_mode():
        (found,) = prompted(sam, image_BCHW, [item.frame])
    masks = masks_of(found, *size)
    expected, scores = library_masks(sam, image_HWC, input_boxes=[[list(box) for box in BOXES]])
    for mask_HW, other_HW in zip(masks[:3], expected[:, 0].numpy(), strict=True):
        assert (mask_HW == other_HW).all()
    torch.testing.assert_close(found["scores"][:3], scores[:, 0], rtol=1e-5, atol=1e-5)
    expected, scores = library_masks(
        sam, image_HWC, input_points=[[[list(point[:2]) for point in POINTS]]], input_labels=[[[1, 0]]]
    )
    assert (masks[3] == expected[0, 0].numpy()).all()
    torch.testing.assert_close(found["scores"][3:], scores[0], rtol=1e-5, atol=1e-5)
    assert len({mask.tobytes() for mask in masks}) > 1


def test_one_point_gets_the_surest_of_three() -> None:
    sam = tiny_sam(1)
    image_HWC = render_scene(0, width=96, height=72).image_HWC
    image_BCHW, _ = inputs([image_HWC], PREPROCESS)
    frame = prepare(image_HWC, PREPROCESS, Prompts(points=((40.0, 30.0, 1),))).frame
    with torch.inference_mode():
        (found,) = prompted(sam, image_BCHW, [frame])
    expected, scores = library_masks(
        sam, image_HWC, several=True, input_points=[[[[40.0, 30.0]]]], input_labels=[[[1]]]
    )
    (mask_HW,) = masks_of(found, 96, 72)
    assert (mask_HW == expected[0, scores[0].argmax()].numpy()).all()
    assert found["scores"].item() == pytest.approx(scores.max().item(), abs=1e-5)


def test_an_image_with_empty_prompts_has_no_segments_and_does_not_disturb_its_neighbours() -> None:
    sam = tiny_sam(1)
    images = [render_scene(index, width=96, height=72).image_HWC for index in range(3)]
    image_BCHW, frames = inputs(images, PREPROCESS)
    size = PREPROCESS.size(72, 96)
    asked = [Frame(72, 96, *size, prompts) for prompts in (Prompts(), Prompts(boxes=BOXES[:1]), Prompts(text="a"))]
    with torch.inference_mode():
        found = prompted(sam, image_BCHW, asked)
        (alone,) = prompted(sam, image_BCHW[1:2], asked[1:2])
        with pytest.raises(PredictError, match=r"expected prompts with the image \(\.prompts\.json, or a column"):
            prompted(sam, image_BCHW[:1], frames[:1])
    assert [len(one["lengths"]) for one in found] == [0, 1, 0]
    assert torch.equal(found[1]["runs"], alone["runs"])
    context = PostContext(taxonomy=load_taxonomy("objects"), score_threshold=0.0)
    predictions = segments(found, asked, context)
    counts = [len(one.instances.rles or ()) for one in predictions if one.instances is not None]
    assert counts == [0, 1, 0]
    only = predictions[1].instances
    assert only is not None
    assert only.category_ids_N.tolist() == [1]
    assert only.scores_N.tolist() == [1.0]  # what the model says of it is above 1
    (rle,) = only.rles or ()
    assert decode_rle(rle, width=96, height=72).any()


def test_the_best_come_first_and_no_more_than_asked() -> None:
    text = b"aabbb"
    found = {
        "scores": torch.tensor([0.2, 0.9]),
        "runs": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "lengths": torch.tensor([2, 3]),
    }
    taxonomy = load_taxonomy("objects")
    frames = [Frame(4, 4, 4, 4)]

    def kept(**options: Any) -> Any:
        (prediction,) = segments([found], frames, PostContext(taxonomy=taxonomy, **options))
        assert prediction.instances is not None
        return prediction.instances.rles

    assert kept(score_threshold=0.0) == ("bbb", "aa")
    assert kept(score_threshold=0.5) == ("bbb",)
    assert kept(score_threshold=0.0, max_segments=1) == ("bbb",)


@pytest.mark.parametrize(("build", "adapt"), [(tiny_sam, adapt_sam), (tiny_sam2, adapt_sam2)])
def test_published_names(build: Any, adapt: Any) -> None:
    ours, theirs = build(0), build(5)
    published = dict(theirs.model.state_dict())
    if adapt is adapt_sam:
        del published["prompt_encoder.shared_embedding.positional_embedding"]
    else:
        published["memory_attention.layers.0.linear1.weight"] = torch.zeros(1)
        published["no_object_pointer"] = torch.zeros(1)
    ours.load_state_dict(adapt(published, ours.state_dict().keys()))
    loaded = dict(ours.model.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in published.items() if name in loaded)
    assert len(published) >= len(loaded) - 1
    if adapt is adapt_sam:
        shared = ours.model.shared_image_embedding.positional_embedding
        assert torch.equal(ours.model.prompt_encoder.shared_embedding.positional_embedding, shared)
    own = ours.state_dict()
    assert adapt(own, own.keys()).keys() == own.keys()


@pytest.mark.parametrize(
    ("build", "options", "complaint"),
    [
        (build_sam, {"size": "giant"}, "size must be one of base, large, huge, got 'giant'"),
        (build_sam, {"mode": "boxes"}, "mode must be automatic or prompts, got 'boxes'"),
        (build_sam, {"image_size": 100}, "image_size must be a multiple of patch_size 16, got 100"),
        (build_sam2, {"global_layers": [3]}, "global_layers must not be the first of a stage"),
        (build_sam2, {"image_size": 100}, "image_size must be a multiple of 32, got 100"),
    ],
)
def test_options_that_make_no_sense(build: Any, options: dict[str, Any], complaint: str) -> None:
    small = {"hidden_size": 32, "heads": 1, "layers": 1} if build is build_sam else {"hidden_size": 8}
    with pytest.raises(ValueError, match=complaint):
        build(1, **{**small, **options})


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    # transformers' documentation and the papers: SAM 94, 312 and 641 M; SAM 2.1 38.9, 46, 80.8 and 224.4 M, of which
    # what follows objects through videos is 7.5 M, the same in each.
    [
        ("sam", "base", 93.7),
        ("sam", "large", 312.3),
        ("sam", "huge", 641.1),
        ("sam2", "tiny", 31.4),
        ("sam2", "small", 38.5),
        ("sam2", "base-plus", 73.3),
        ("sam2", "large", 216.9),
    ],
)
def test_published_sizes(name: str, size: str, millions: float) -> None:
    spec = MODELS[name]
    with torch.device("meta"):
        module = spec.module(load_taxonomy("objects"), {"size": size})
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert np.prod(module.fit(300, 400)) == (1024 * 768 if name == "sam" else 1024**2)
