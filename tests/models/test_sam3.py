"""SAM 3: phrases as CLIP cuts them, instances as the library's model and processor give them, prompts and whole images
as SAM 2 has them, published names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_mask_generator import inputs, lively, masks_of, pipeline_masks
from tiny_models import TINY
from torch import nn
from transformers import (
    Sam2ImageProcessor,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Sam3TrackerModel,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from pipeline.errors import ConfigError, PredictError
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, PostContext, Preprocess, Prompts
from pipeline.models.zoo.clip_text import letters, read_pieces
from pipeline.models.zoo.mask_generator import GridOptions, generate, views
from pipeline.models.zoo.sam import Sam2, segments
from pipeline.models.zoo.sam3 import Sam3, adapt_sam3, build_sam3, find_concepts, tokens_of
from pipeline.sources.scenes import render_scene
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import Taxonomy, load_taxonomy

SIDE = 56
HALF = (0.5, 0.5, 0.5)
PREPROCESS = Preprocess(resize=SIDE, max_size=SIDE, pad_multiple=SIDE, mean=HALF, std=HALF)
BOXES = ((6.0, 4.0, 30.0, 28.0), (20.5, 10.25, 50.0, 52.0))
# Merges by their ranks, as CLIP's file has them.
MERGES = [("c", "a"), ("ca", "r</w>"), ("l", "i"), ("g", "h"), ("li", "gh"), ("ligh", "t</w>")]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def options(**more: Any) -> dict[str, Any]:
    post = {"resize", "max_size", "pad_multiple"}
    return {**{name: value for name, value in TINY["sam3"].items() if name not in post}, "queries": 6, **more}


def tiny(taxonomy: str | Taxonomy = "scenes", seed: int = 0, **more: Any) -> Sam3:
    """With random weights that tell queries and phrases apart."""
    torch.manual_seed(seed)
    space = load_taxonomy(taxonomy) if isinstance(taxonomy, str) else taxonomy
    module: Any = build_sam3(1, space, **options(**more))
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    found: Sam3 = module.eval()
    return found


def tracker(mode: str = "prompts", seed: int = 0, **more: Any) -> Sam2:
    torch.manual_seed(seed)
    module: Any = build_sam3(1, load_taxonomy("objects"), **options(mode=mode, **more))
    found: Any = lively(module, seed, 2.0)
    return found  # type: ignore[no-any-return]


def look(model: nn.Module, image_BCHW: torch.Tensor, frames: list[Frame]) -> list[dict[str, torch.Tensor]]:
    with torch.inference_mode():
        return find_concepts(model, image_BCHW, frames)


def processor_of(model: Sam3, pieces: Mapping[str, int], merges: list[tuple[str, str]]) -> Any:
    from transformers import CLIPTokenizer

    return Sam3Processor(
        Sam3ImageProcessor(size={"height": SIDE, "width": SIDE}), CLIPTokenizer(vocab=dict(pieces), merges=merges)
    )


def library_instances(
    model: Sam3, image_HWC: Any, *, threshold: float, pixels_BCSS: torch.Tensor | None = None, **given: Any
) -> list[dict[str, torch.Tensor]]:
    """transformers' whole forward pass for one image, and what its processor makes of it. pixels_BCSS: instead of those
    that the processor makes."""
    processor = processor_of(model, *letters())
    values = processor(images=Image.fromarray(image_HWC), return_tensors="pt", **given)
    sizes = values.pop("original_sizes").tolist()
    if pixels_BCSS is not None:
        values["pixel_values"] = pixels_BCSS
    with torch.inference_mode():
        output = model.detector(**values)
    found: list[dict[str, torch.Tensor]] = processor.post_process_instance_segmentation(
        output, threshold=threshold, target_sizes=sizes
    )
    return found


# --- words


def clip_file(folder: Path, **changes: Any) -> str:
    pieces, _ = letters()
    joined = ["".join(pair) for pair in MERGES]
    *bytes_, start, end = pieces
    vocab = {piece: number for number, piece in enumerate([*bytes_, *joined, start, end])}
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": MERGES, **changes}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return str(folder / "tokenizer.json")


def test_byte_pairs_by_hand(tmp_path: Path) -> None:
    """Sennrich et al. 2016: of a word's pairs the one that stands first in the list is merged, again and again."""
    pieces, merges = read_pieces(clip_file(tmp_path))
    tokens_PT, mask_PT = tokens_of(["Car", "traffic  LIGHT", "car's 12", "é"], pieces, merges)
    expected = [
        ["car</w>"],
        ["t", "r", "a", "f", "f", "i", "c</w>", "light</w>"],
        ["car</w>", "'", "s</w>", "1</w>", "2</w>"],
        ["Ã", "©</w>"],  # two bytes of UTF-8
    ]
    for tokens_T, mask_T, words in zip(tokens_PT, mask_PT, expected, strict=True):
        row = [pieces["<|startoftext|>"], *(pieces[word] for word in words), pieces["<|endoftext|>"]]
        assert tokens_T[mask_T].tolist() == row
        assert len(tokens_T) == 32
    old = clip_file(tmp_path, merges=[" ".join(pair) for pair in MERGES])
    assert read_pieces(old) == (pieces, MERGES)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"type": "WordPiece"}, "must be a BPE whose words end in </w>, got WordPiece"),
        ({"end_of_word_suffix": None}, "must be a BPE whose words end in </w>, got BPE, None"),
        ({"merges": [["x", "y"]]}, "no list of CLIP's pieces: it lacks xy"),
        ({"merges": [[1]]}, "no list of CLIP's pieces: it lacks 1"),
        ({"merges": 5}, "is no tokenizer.json: TypeError"),
        ({"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 10**9}, "merges": []}, "must number its 2 pieces from 0"),
        ({"vocab": [], "merges": []}, "is no tokenizer.json: AttributeError"),
        ({"vocab": {}, "merges": []}, r"it lacks <\|startoftext\|>, <\|endoftext\|>"),
    ],
)
def test_what_is_no_list_of_pieces(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_pieces(clip_file(tmp_path, **changes))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pieces(str(tmp_path / "none.json"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        read_pieces(str(tmp_path / "deep.json"))
    (tmp_path / "long.json").write_text(" " * 10_000_001)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pieces(str(tmp_path / "long.json"))


def test_the_vocabulary_says_what_the_text_model_knows(tmp_path: Path) -> None:
    """So weights that were trained with one do not load into a model without it."""
    name = "detector.text_encoder.text_model.embeddings.token_embedding.weight"
    sizes = [tiny(vocab=vocab).state_dict()[name].shape for vocab in ("", clip_file(tmp_path))]
    assert sizes == [(514, 32), (520, 32)]


# --- what is found


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 42)])
def test_instances_are_the_librarys(size: tuple[int, int]) -> None:
    """Scores, boxes and masks of every category that Sam3Model and Sam3Processor find, one category at a time.

    An image that is no square is resized twice here, first as it is prepared: the library is given what comes of it.
    """
    model = tiny(confidence_threshold=0.3, phrases_per_batch=3)
    width, height = size
    image_HWC = render_scene(4, width=width, height=height).image_HWC
    image_BCHW, frames = inputs([image_HWC], PREPROCESS)
    (found,) = look(model, image_BCHW, frames)
    pixels_BCSS = None if width == height else views(model, image_BCHW, frames, [(0, (0, 0, width, height))])  # type: ignore[arg-type]
    masks = masks_of(found, width, height)
    count = 0
    for name, category in model.names.items():
        (expected,) = library_instances(model, image_HWC, threshold=0.3, pixels_BCSS=pixels_BCSS, text=name)
        own = (found["labels"] == category).nonzero()[:, 0].tolist()
        torch.testing.assert_close(found["scores"][own], expected["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes"][own], expected["boxes"], rtol=1e-4, atol=1e-3)
        for place, mask_HW in zip(own, expected["masks"].bool().numpy(), strict=True):
            assert (masks[place] == mask_HW).all()
        count += len(own)
    assert count == len(found["scores"]) >= 6
    assert len(set(found["labels"].tolist())) >= 2
    assert sum(mask.any() for mask in masks) > 0
    assert len({mask.tobytes() for mask in masks}) > 2


def test_neighbours_and_batches_of_phrases_change_nothing() -> None:
    images = [render_scene(index, width=SIDE, height=SIDE).image_HWC for index in range(3)]
    model = tiny(confidence_threshold=0.0)
    together = look(model, *inputs(images, PREPROCESS))
    model.phrases_per_batch = 2
    for image_HWC, found in zip(images, together, strict=True):
        (alone,) = look(model, *inputs([image_HWC], PREPROCESS))
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(found["labels"], alone["labels"])
        differing = [
            int((one != other).sum())
            for one, other in zip(masks_of(found, SIDE, SIDE), masks_of(alone, SIDE, SIDE), strict=True)
        ]
        assert max(differing) <= 2
    assert len({found["scores"].numpy().tobytes() for found in together}) == 3


def test_a_text_restricts_the_vocabulary() -> None:
    model = tiny()
    image_HWC = render_scene(4, width=SIDE, height=SIDE).image_HWC
    image_BCHW, frames = inputs([image_HWC], PREPROCESS)
    (found,) = look(model, image_BCHW, frames)
    first, *_, last = model.names
    frame = prepare(image_HWC, PREPROCESS, Prompts(text=f" {last.upper()} . {first}")).frame
    calls: list[int] = []
    handle = model.detector.detr_encoder.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(len(kwargs["text_features"])), with_kwargs=True
    )
    (some,) = look(model, image_BCHW, [frame])
    handle.remove()
    assert calls == [2]  # the others are not looked for at all
    wanted = {model.names[first], model.names[last]}
    assert set(some["labels"].tolist()) == wanted
    same = torch.isin(found["labels"], torch.tensor([*wanted]))
    torch.testing.assert_close(some["scores"], found["scores"][same], rtol=1e-4, atol=1e-5)
    with pytest.raises(PredictError, match=r"prompts.text: 'dragon' is no category"):
        look(model, image_BCHW, [prepare(image_HWC, PREPROCESS, Prompts(text="dragon")).frame])


def test_phrases_are_read_once_and_anew_after_other_weights() -> None:
    model, other = tiny(), tiny(seed=1)
    image_BCHW, frames = inputs([render_scene(4, width=SIDE, height=SIDE).image_HWC], PREPROCESS)
    calls: list[int] = []
    model.detector.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    (first,) = look(model, image_BCHW, frames)
    look(model, image_BCHW, frames)
    assert len(calls) == -(-(len(model.names) + 1) // model.phrases_per_batch)
    (expected,) = look(other, image_BCHW, frames)
    model.load_state_dict(other.state_dict())
    (again,) = look(model, image_BCHW, frames)
    assert torch.equal(again["scores"], expected["scores"])
    assert not torch.equal(again["scores"], first["scores"])


def test_examples_are_the_librarys() -> None:
    """Boxes with a category's name, and boxes alone, which the processor calls visual."""
    image_HWC = render_scene(4, width=SIDE, height=SIDE).image_HWC
    image_BCHW, _ = inputs([image_HWC], PREPROCESS)
    boxes = [[list(box) for box in BOXES]]
    for taxonomy, text in (("scenes", "car"), ("objects", "")):
        model = tiny(taxonomy, mode="exemplars", confidence_threshold=0.0)
        frame = prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES, text=text)).frame
        (found,) = look(model, image_BCHW, [frame])
        given = {"text": text} if text else {}
        (expected,) = library_instances(model, image_HWC, threshold=0.0, input_boxes=boxes, **given)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
        for mask_HW, other_HW in zip(masks_of(found, SIDE, SIDE), expected["masks"].bool().numpy(), strict=True):
            assert (mask_HW == other_HW).all()
        assert len(found["scores"]) == 6
        assert set(found["labels"].tolist()) == {model.names[text] if text else 1}
        (other,) = look(model, image_BCHW, [prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES[:1], text=text)).frame])
        assert other["scores"].tolist() != found["scores"].tolist()


def test_examples_need_boxes_of_one_category() -> None:
    model = tiny(mode="exemplars")
    image_HWC = render_scene(4, width=SIDE, height=SIDE).image_HWC
    image_BCHW, frames = inputs([image_HWC] * 2, PREPROCESS)
    with pytest.raises(PredictError, match="expected prompts with the image"):
        look(model, image_BCHW[:1], frames[:1])
    for text in ("", "car. person"):
        with pytest.raises(PredictError, match=rf"expected the one category that prompts.boxes show, got '{text}'"):
            look(model, image_BCHW[:1], [prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES, text=text)).frame])
    prompts = (Prompts(text="car"), Prompts(boxes=BOXES, text="car"))
    nothing, some = look(model, image_BCHW, [prepare(image_HWC, PREPROCESS, one).frame for one in prompts])
    assert [len(nothing[name]) for name in ("scores", "lengths", "labels", "boxes")] == [0] * 4
    (alone,) = look(model, image_BCHW[:1], [prepare(image_HWC, PREPROCESS, prompts[1]).frame])
    torch.testing.assert_close(some["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
    (empty,) = look(model, image_BCHW[:1], [prepare(image_HWC, PREPROCESS, prompts[0]).frame])
    assert len(empty["scores"]) == 0


def test_the_best_come_first_with_their_boxes() -> None:
    model = tiny(confidence_threshold=0.2)
    image_BCHW, frames = inputs([render_scene(4, width=SIDE, height=SIDE).image_HWC], PREPROCESS)
    (found,) = look(model, image_BCHW, frames)
    context = PostContext(taxonomy=load_taxonomy("scenes"), score_threshold=0.3, max_segments=5)
    (prediction,) = segments([found], frames, context)
    instances = prediction.instances
    assert instances is not None
    order = torch.argsort(found["scores"], descending=True, stable=True)[:5]
    assert instances.scores_N.tolist() == found["scores"][order].tolist()
    assert instances.category_ids_N.tolist() == found["labels"][order].tolist()
    assert instances.boxes_N4.tolist() == found["boxes"][order].tolist()


@pytest.mark.parametrize("mode", ["vocabulary", "exemplars"])
def test_half_precision(mode: str) -> None:
    model = tiny(mode=mode, confidence_threshold=0.0)
    image_HWC = render_scene(4, width=SIDE, height=SIDE).image_HWC
    image_BCHW, _ = inputs([image_HWC], PREPROCESS)
    frame = prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES, text="car")).frame
    (whole,) = look(model, image_BCHW, [frame])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (half,) = look(model, image_BCHW, [frame])
    torch.testing.assert_close(half["scores"], whole["scores"], rtol=0, atol=0.1)
    assert not torch.equal(half["scores"], whole["scores"])


# --- as SAM 2


def test_boxes_and_points_are_the_trackers() -> None:
    from transformers import Sam2Processor

    model = tracker()
    assert isinstance(model.model, Sam3TrackerModel)
    image_HWC = render_scene(2, width=SIDE, height=SIDE).image_HWC
    image_BCHW, _ = inputs([image_HWC], PREPROCESS)
    points = ((20.0, 30.0, 1), (40.0, 12.0, 0))
    (found,) = look(model, image_BCHW, [prepare(image_HWC, PREPROCESS, Prompts(boxes=BOXES, points=points)).frame])
    processor = Sam2Processor(
        Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=HALF, image_std=HALF), target_size=SIDE
    )
    masks, scores = [], []
    for given in (
        {"input_boxes": [[list(box) for box in BOXES]]},
        {"input_points": [[[[20.0, 30.0], [40.0, 12.0]]]], "input_labels": [[[1, 0]]]},
    ):
        values = processor(images=Image.fromarray(image_HWC), return_tensors="pt", **given)
        sizes = values.pop("original_sizes")
        values = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
        with torch.inference_mode():
            output = model.model(**values, multimask_output=False)
        masks += [*processor.post_process_masks(list(output.pred_masks), sizes)[0][:, 0].numpy()]
        scores.append(output.iou_scores[0, :, 0])
    torch.testing.assert_close(found["scores"], torch.cat(scores), rtol=1e-5, atol=1e-5)
    for mask_HW, other_HW in zip(masks_of(found, SIDE, SIDE), masks, strict=True):
        assert (mask_HW == other_HW).all()
    assert len({mask.tobytes() for mask in masks}) == 3


def test_masks_of_whole_images_are_the_generators_and_the_pipelines() -> None:
    grid = GridOptions(points_per_side=4, pred_iou_thresh=19.5, stability_score_thresh=0.5, stability_score_offset=0.05)
    given = {
        name: getattr(grid, name)
        for name in ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "stability_score_offset")
    }
    model = tracker("automatic", seed=1, **given)
    image_HWC = render_scene(1, width=SIDE, height=SIDE).image_HWC
    image_BCHW, frames = inputs([image_HWC], PREPROCESS)
    (found,) = look(model, image_BCHW, frames)
    with torch.inference_mode():
        (expected,) = generate(Sam2(model.model, SIDE, "automatic", grid), image_BCHW, frames, grid)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert len(found["scores"]) >= 2
    theirs = pipeline_masks(model, image_HWC, grid, grid.box_nms_thresh, side=SIDE, normalised=PREPROCESS)
    torch.testing.assert_close(found["scores"], theirs["scores"], rtol=0, atol=1e-4)
    for mask_HW, other_HW in zip(masks_of(found, SIDE, SIDE), theirs["masks"], strict=True):
        assert int((mask_HW != np.asarray(other_HW)).sum()) <= 1


# --- weights


def tiny_video(model: Sam3, images: Sam2) -> Any:
    """transformers' Sam3VideoModel, of which the published file is, of the size of two of ours."""
    vision = images.model.config.vision_config.to_dict()
    config = Sam3VideoConfig(
        detector_config=model.detector.config.to_dict(),
        tracker_config={
            "vision_config": {**vision, "scale_factors": [4.0, 2.0, 1.0, 0.5]},
            "prompt_encoder_config": images.model.config.prompt_encoder_config.to_dict(),
            "mask_decoder_config": images.model.config.mask_decoder_config.to_dict(),
            "image_size": SIDE,
            "memory_attention_hidden_size": 32,
            "memory_attention_feed_forward_hidden_size": 32,
            "memory_attention_num_layers": 1,
            "memory_attention_rope_feat_sizes": [4, 4],
            "memory_encoder_hidden_size": 32,
            "memory_encoder_output_channels": 8,
            "mask_downsampler_embed_dim": 32,
            "memory_fuser_embed_dim": 32,
            "memory_fuser_intermediate_dim": 32,
        },
    )
    torch.manual_seed(3)
    return Sam3VideoModel(config).eval()


def test_published_names() -> None:
    """All of the video model's tensors that images need, each in its place: both answer what its parts answer."""
    model, images = tiny(), tracker()
    video = tiny_video(model, images)
    published = dict(video.state_dict())
    assert {name.split(".")[0] for name in published} == {"detector_model", "tracker_model", "tracker_neck"}
    for module in (model, images):
        state = adapt_sam3(published, module.state_dict().keys())
        module.load_state_dict(state)
        assert adapt_sam3(state, module.state_dict().keys()).keys() == state.keys()
    loaded = model.detector.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("detector_model.")], tensor)
               for name, tensor in published.items() if name.startswith("detector_model."))  # fmt: skip
    image_BCHW, _ = inputs([render_scene(4, width=SIDE, height=SIDE).image_HWC], PREPROCESS)
    with torch.inference_mode():
        seen = video.detector_model.vision_encoder(image_BCHW)
        levels, _ = video.get_vision_features_for_tracker(seen)
        (ours,) = images.embed(image_BCHW)
        assert torch.equal(ours[-1].flatten(2).permute(2, 0, 1), levels[-1] + video.tracker_model.no_memory_embedding)
        for own, theirs in zip(ours[:-1], levels[:-1], strict=True):
            assert torch.equal(own.flatten(2).permute(2, 0, 1), theirs)


def test_names_of_the_librarys_models_for_images() -> None:
    model, images = tiny(), tracker()
    for module, part in ((model, model.detector), (images, images.model)):
        given = {name: tensor + 1 for name, tensor in part.state_dict().items()}
        state = adapt_sam3(given, module.state_dict().keys())
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[name], tensor + 1) for name, tensor in module.state_dict().items())


def test_sizes_are_the_librarys() -> None:
    """Its defaults are facebook/sam3's."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Sam3Model(Sam3Config()).state_dict().items()}
        ours = MODELS["sam3"].module(load_taxonomy("coco80"), {}).state_dict()
        video = Sam3VideoModel(Sam3VideoConfig()).state_dict()
        images = MODELS["sam3"].module(load_taxonomy("objects"), {"mode": "prompts"}).state_dict()
    differing = {
        name for name, tensor in ours.items() if tuple(tensor.shape) != expected[name.removeprefix("detector.")]
    }
    assert ours.keys() == {f"detector.{name}" for name in expected}
    assert differing == {"detector.text_encoder.text_model.embeddings.token_embedding.weight"}
    state = adapt_sam3(video, images.keys())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in images.items()
    }


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"mode": "boxes"}, "mode must be one of vocabulary, exemplars, prompts, automatic, got 'boxes'"),
        ({"image_size": 60}, "image_size must be a multiple of patch_size 14, got 60"),
        ({"phrases_per_batch": 0}, "phrases_per_batch must be 1 or more, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be 1 or more, got 0"),
        ({"mode": "automatic"}, r"masks of mode automatic have no classes.*got 8 \(scenes\)"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny(**given)


def test_names_that_are_too_long() -> None:
    pieces, merges = letters()
    with pytest.raises(ValueError, match=r"category 'a{31}' has 31 word pieces, expected 1 to 30"):
        tokens_of(["a" * 31], pieces, merges)
    with pytest.raises(ValueError, match="category ' ' has 0 word pieces"):
        tokens_of([" "], pieces, merges)
