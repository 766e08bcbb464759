"""Models of queries: their readings are transformers', their weights the published ones, their losses the papers'."""

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.masks import decode_rle
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, Instances, PostContext, Prediction
from pipeline.models.zoo import hf_universal
from pipeline.models.zoo.hf_universal import adapt_universal
from pipeline.models.zoo.universal_post import Queries, instances, panoptic
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy

NAMES = ("maskformer", "mask2former", "oneformer", "eomt")
# Places 0 to 2 are things, 3 to 5 stuff.
KINDS = Taxonomy(
    name="kinds",
    source="",
    categories=tuple(
        Category(id=10 * place + 1, name=f"class{place}", kind="thing" if place < 3 else "stuff", color=(0, 0, place))
        for place in range(6)
    ),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def outputs(size: int, *, queries: int = 14, seed: int = 0, sure: float = 4.0) -> tuple[Tensor, Tensor]:
    """Random logits of two images: classes_BQC of 6 classes and no object, and smooth masks_BQhw."""
    generator = torch.Generator().manual_seed(seed)
    classes_BQC = torch.randn(2, queries, 7, generator=generator) * sure
    coarse = torch.randn(2, queries, 5, 5, generator=generator) * 6 - 6
    return classes_BQC, nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def context(**changes: Any) -> PostContext:
    return PostContext(**{"taxonomy": KINDS, "score_threshold": 0.5, **changes})


def masks(found: Instances | None, frame: Frame) -> list[np.ndarray[Any, Any]]:
    assert found is not None
    assert found.rles is not None
    return [decode_rle(rle, width=frame.width, height=frame.height) for rle in found.rles]


def library(processor: str, **options: Any) -> Any:
    return getattr(importlib.import_module("transformers"), processor)(**options)


def as_library(classes_BQC: Tensor, masks_BQhw: Tensor) -> Any:
    return SimpleNamespace(
        class_queries_logits=classes_BQC, masks_queries_logits=masks_BQhw.clone(), patch_offsets=None
    )


@pytest.mark.parametrize("overlap", [0.8, 0.3, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_segments_are_those_of_the_paper(seed: int, overlap: float) -> None:
    """EoMT's processor has the authors' rule, on masks at the image's size, with a part of the input padded."""
    classes_BQC, masks_BQhw = outputs(16, seed=seed)
    # 640 pixels in the longer side, of a square of 64: as its processor resizes.
    frames = [Frame(40, 50, 51, 64), Frame(64, 32, 64, 32)]
    processor = library("EomtImageProcessor", size={"shortest_edge": 64, "longest_edge": 64})
    expected = processor.post_process_panoptic_segmentation(
        as_library(classes_BQC, masks_BQhw),
        target_sizes=[(frame.height, frame.width) for frame in frames],
        threshold=0.5,
        overlap_mask_area_threshold=overlap,
        stuff_classes=[3, 4, 5],
    )
    output = Queries(classes_BQC, masks_BQhw, padded=(64, 64), overlap_threshold=overlap)
    predictions = panoptic(output, frames, context())
    kept = 0
    for prediction, frame, wanted in zip(predictions, frames, expected, strict=True):
        found = prediction.instances
        assert found is not None
        ours = {
            (category, mask_HW.tobytes()): score
            for category, score, mask_HW in zip(
                found.category_ids_N.tolist(), found.scores_N.tolist(), masks(found, frame), strict=True
            )
        }
        theirs = {
            (KINDS.ids[info["label_id"]], (wanted["segmentation"] == info["id"]).numpy().tobytes()): info
            for info in wanted["segments_info"]
        }
        assert ours.keys() == theirs.keys()
        kept += len(ours)
        for key, info in theirs.items():
            # Of stuff that is fused they give the first query's score, we the best one's.
            assert ours[key] == pytest.approx(info["score"], abs=1e-5) or (key[0] > 30 and ours[key] > info["score"])
        assert found.scores_N.tolist() == sorted(found.scores_N.tolist(), reverse=True)
        assert len({category for category in found.category_ids_N.tolist() if category > 30}) == sum(
            found.category_ids_N > 30
        )
    assert kept >= (3 if overlap > 0.5 else 8)


@pytest.mark.parametrize("processor", ["MaskFormerImageProcessor", "Mask2FormerImageProcessor"])
def test_segments_are_the_other_processors_where_those_follow_the_paper(processor: str) -> None:
    """They count a mask's pixels after weighting it, and keep what lies outside of the mask: of sure queries that
    share the image the segments are the same."""
    size = 384
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    inside = [(rows // 192 == row) & (columns // 192 == column) for row, column in corners]
    inside.append((rows - 192).abs() + (columns - 192).abs() < 60)
    strength = torch.tensor([9.0, 8, 7, 6, 10])
    masks_BQhw = torch.stack([torch.where(mask, strength[at], -9.0) for at, mask in enumerate(inside)])[None]
    classes_BQC = torch.zeros(1, 5, 7)
    for query, place in enumerate([0, 0, 4, 4, 1]):
        classes_BQC[0, query, place] = 60
    expected = library(processor).post_process_panoptic_segmentation(
        as_library(classes_BQC, masks_BQhw), target_sizes=[(size, size)], label_ids_to_fuse={3, 4, 5}
    )[0]
    (prediction,) = panoptic(
        Queries(classes_BQC, masks_BQhw, padded=(size, size)), [Frame(size, size, size, size)], context()
    )
    found = prediction.instances
    assert found is not None
    frame = Frame(size, size, size, size)
    ours = {
        (category, mask_HW.tobytes())
        for category, mask_HW in zip(found.category_ids_N.tolist(), masks(found, frame), strict=True)
    }
    theirs = {
        (KINDS.ids[info["label_id"]], (expected["segmentation"] == info["id"]).numpy().tobytes())
        for info in expected["segments_info"]
    }
    assert ours == theirs
    assert sorted(category for category, _ in ours) == [1, 1, 11, 41]


def test_label_maps_are_the_processors() -> None:
    classes_BQC, masks_BQhw = outputs(16)
    sizes = [(64, 64), (64, 64)]
    expected = library("MaskFormerImageProcessor").post_process_semantic_segmentation(
        as_library(classes_BQC, masks_BQhw), target_sizes=sizes
    )
    predictions = panoptic(Queries(classes_BQC, masks_BQhw, padded=(64, 64)), [Frame(64, 64, 64, 64)] * 2, context())
    for prediction, wanted in zip(predictions, expected, strict=True):
        assert prediction.label_HW is not None
        assert len(np.unique(prediction.label_HW)) >= 3
        assert (prediction.label_HW == np.array(KINDS.ids)[wanted.numpy()]).all()
    # And Mask2Former's, which brings masks to 384 pixels first, where they have that size.
    classes_BQC, masks_BQhw = outputs(384, seed=1)
    (wanted, _) = library("Mask2FormerImageProcessor").post_process_semantic_segmentation(
        as_library(classes_BQC, masks_BQhw), target_sizes=[(384, 384)] * 2
    )
    frame = Frame(384, 384, 384, 384)
    first, _ = panoptic(Queries(classes_BQC, masks_BQhw, padded=(384, 384)), [frame] * 2, context())
    assert first.label_HW is not None
    assert (first.label_HW == np.array(KINDS.ids)[wanted.numpy()]).all()


def test_padding_is_in_no_label_map_and_in_no_quality() -> None:
    """The same image at a padded and at its own size."""
    classes_BQC, masks_BQhw = outputs(16)
    whole = Frame(32, 32, 32, 32)
    padded = torch.full((2, 14, 24, 24), 30.0)
    padded[:, :, :16, :16] = masks_BQhw
    one = panoptic(Queries(classes_BQC, masks_BQhw, padded=(16, 16)), [replace_size(whole, 16)] * 2, context())
    other = panoptic(Queries(classes_BQC, padded, padded=(24, 24)), [replace_size(whole, 16)] * 2, context())
    for first, second in zip(one, other, strict=True):
        assert first.label_HW is not None
        assert second.label_HW is not None
        assert (first.label_HW == second.label_HW).all()
        assert first.quality == second.quality
        assert first.instances is not None
        assert second.instances is not None
        assert first.instances.rles == second.instances.rles


def replace_size(frame: Frame, prepared: int) -> Frame:
    return replace(frame, prepared_height=prepared, prepared_width=prepared)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_instances_are_mask2formers(threshold: float) -> None:
    """With overlaps, which its map of segments would lose; all classes are things here, as in COCO's instances."""
    classes_BQC, masks_BQhw = outputs(384, sure=2.0, seed=3)
    expected = library("Mask2FormerImageProcessor").post_process_instance_segmentation(
        as_library(classes_BQC, masks_BQhw), threshold=threshold, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    things = replace(KINDS, categories=tuple(replace(one, kind="thing") for one in KINDS.categories))
    frame = Frame(384, 384, 384, 384)
    output = Queries(classes_BQC, masks_BQhw, padded=(384, 384))
    predictions = instances(output, [frame] * 2, context(taxonomy=things, score_threshold=threshold))
    overlaps = 0
    for prediction, wanted in zip(predictions, expected, strict=True):
        found = prediction.instances
        assert found is not None
        ours = {
            (category, mask_HW.tobytes()): score
            for category, score, mask_HW in zip(
                found.category_ids_N.tolist(), found.scores_N.tolist(), masks(found, frame), strict=True
            )
        }
        theirs = {
            (KINDS.ids[info["label_id"]], mask_HW.bool().numpy().tobytes()): info["score"]
            for info, mask_HW in zip(wanted["segments_info"], wanted["segmentation"], strict=True)
        }
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == pytest.approx(theirs[key], abs=1e-5) for key in ours)
        assert found.scores_N.tolist() == sorted(found.scores_N.tolist(), reverse=True)
        overlaps += int((wanted["segmentation"].sum(0) > 1).any())
        (limited, _) = instances(output, [frame] * 2, context(taxonomy=things, score_threshold=0.0, max_segments=3))
        assert limited.instances is not None
        assert len(limited.instances.scores_N) == 3
    assert overlaps


def test_stuff_is_no_instance() -> None:
    classes_BQC, masks_BQhw = outputs(16)
    frame = Frame(16, 16, 16, 16)
    predictions = instances(Queries(classes_BQC, masks_BQhw, padded=(16, 16)), [frame] * 2, context())
    categories = [id_ for one in predictions for id_ in one.instances.category_ids_N.tolist()]  # type: ignore[union-attr]
    assert set(categories) <= {1, 11, 21}
    assert categories


def test_nothing_is_sure() -> None:
    output = Queries(torch.zeros(1, 4, 7), torch.zeros(1, 4, 8, 8), padded=(8, 8))
    frame = Frame(9, 5, 8, 8)
    for read in (panoptic, instances):
        (prediction,) = read(output, [frame], context())
        assert isinstance(prediction, Prediction)
        assert prediction.instances is not None
        assert prediction.instances.rles == ()
        assert prediction.instances.boxes_N4.shape == (0, 4)
    (prediction,) = panoptic(output, [frame], context())
    assert prediction.label_HW is not None
    assert (prediction.label_HW == 1).all()


def test_classes_stand_in_the_order_of_the_published_heads() -> None:
    """COCO's 80 things first, then its 53 kinds of stuff, each by id: banner is the first of these, rug the last."""
    categories = load_taxonomy("coco_panoptic").categories
    assert [one.kind for one in categories] == ["thing"] * 80 + ["stuff"] * 53
    assert [one.id for one in categories] == sorted(one.id for one in categories)
    assert [categories[at].name for at in (0, 79, 80, 132)] == ["person", "toothbrush", "banner", "rug-merged"]
    assert [one.id for one in categories[:80]] == list(load_taxonomy("coco80").ids)


def loaded(name: str, **options: Any) -> LoadedModel:
    return load_model(ModelConfig(name=name, options={**TINY[name], **options}), seed=0, tile_pixels=1 << 20)


# What versions of transformers before 5 called the parts that were renamed since, which is what is published.
OLD_NAMES = (
    (".encoder.swin.", ".encoder."),
    (".relative_position_bias.relative_position_bias_table", ".self.relative_position_bias_table"),
)


def published(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are published: under older names, with what only training reads."""
    old: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if name in ("mask2former", "oneformer") and ".encoder.swin." in key:
            for new, was in (*OLD_NAMES, (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense.")):
                key = key.replace(new, was)
            for new, was in zip("qkv", ("query", "key", "value"), strict=True):
                key = key.replace(f".attention.{new}_proj.", f".attention.self.{was}.")
            key = key.replace(".attention.o_proj.", ".attention.output.dense.")
        elif name != "eomt" and "pixel_level_module.encoder" not in key:
            key = key.replace(".o_proj.", ".out_proj.")
            key = key.replace(".mlp.fc1.", ".fc1.").replace(".mlp.fc2.", ".fc2.")
        old[key] = tensor
    old["criterion.empty_weight"] = torch.ones(134)
    if name == "oneformer":
        old["criterion.logit_scale"] = torch.ones(())
        old["model.text_mapper.prompt_ctx.weight"] = torch.ones(16, 32)
    if name != "eomt":
        part = "model" if name == "maskformer" else "swin"
        old[f"model.pixel_level_module.encoder.{part}.layernorm.weight"] = torch.ones(64)
    return old


@pytest.mark.parametrize("name", NAMES)
def test_published_names(name: str) -> None:
    state = dict(loaded(name).module.state_dict())
    adapted = adapt_universal(published(name, state), state.keys())
    assert adapted.keys() == state.keys()
    assert all(torch.equal(adapted[key], tensor) for key, tensor in state.items())
    assert adapt_universal(state, state.keys()) == state
    assert "other" in adapt_universal({"other": torch.ones(1)}, state.keys())


def library_model(name: str, module: Any) -> Any:
    """The library's own class with the same options and weights."""
    own = type(module)(module.config).eval()
    missing, _ = own.load_state_dict(module.state_dict(), strict=False)
    assert all(key.startswith("criterion") or "layernorm" in key for key in missing)
    return own


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_answers_are_the_librarys(name: str) -> None:
    model = loaded(name)
    image_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    output = model.spec.forward(model.module, image_BCHW, [Frame(64, 64, 64, 64)] * 2)
    given = {}
    if name == "oneformer":
        given["task_inputs"] = torch.zeros(2, 77)
        given["task_inputs"][:, :7] = torch.tensor([49406, 518, 10549, 533, 1072, 24755, 49407])
    expected = library_model(name, model.module)(image_BCHW, output_hidden_states=True, **given)
    assert output["classes"].shape == (2, 6, 134)
    torch.testing.assert_close(output["classes"], expected.class_queries_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["masks"], expected.masks_queries_logits, rtol=1e-4, atol=1e-5)


def targets() -> list[dict[str, Tensor]]:
    """Two images of 48x64 in an input of 64x64: two segments, and three."""
    made = []
    for count in (2, 3):
        masks_NHW = torch.zeros(count, 48, 64, dtype=torch.uint8)
        for at in range(count):
            masks_NHW[at, :, at * 64 // count : (at + 1) * 64 // count] = 1
        made.append({"masks": masks_NHW, "labels": torch.arange(count) + 78, "boxes": torch.zeros(count, 4)})
    return made


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_librarys(name: str) -> None:
    """Their sum by the factors is what the library returns."""
    model = loaded(name)
    image_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    given = {"task_inputs": model.module.task_tokens[[0, 0]]} if name == "oneformer" else {}
    torch.manual_seed(5)
    assert model.spec.losses is not None
    found = model.spec.losses(model.module, image_BCHW, [Frame(48, 64, 48, 64)] * 2, targets())
    assert found.keys() == model.spec.loss_factors.keys()
    torch.manual_seed(5)
    expected = model.module(
        image_BCHW,
        mask_labels=[nn.functional.pad(target["masks"].float(), (0, 0, 0, 16)) for target in targets()],
        class_labels=[target["labels"] for target in targets()],
        output_hidden_states=True,
        **given,
    ).loss
    total = sum(factor * float(found[key]) for key, factor in model.spec.loss_factors.items())
    assert total == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_segments_can_be_learned_from(name: str) -> None:
    """Alone in its batch, as a worker without images passes it through."""
    model = loaded(name)
    module = model.module.train().requires_grad_(True)
    assert model.spec.losses is not None
    empty = {"masks": torch.zeros(0, 64, 64, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}
    found = model.spec.losses(module, torch.zeros(1, 3, 64, 64), [Frame(64, 64, 64, 64)], [empty])
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(loss) for loss in found.values())
    assert [key for key, value in module.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_padded_images_has_gradients_of_any_size(name: str) -> None:
    """Zeros that stay zeros through a layer norm would have 300 times more of it in every one."""
    model = loaded(name)
    module = model.module.train().requires_grad_(True)
    image_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    image_BCHW[:, :, 32:] = 0
    torch.manual_seed(5)
    assert model.spec.losses is not None
    found = model.spec.losses(module, image_BCHW, [Frame(32, 64, 32, 64)] * 2, targets())
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert max(float(value.grad.norm()) for value in module.parameters()) < 1000  # type: ignore[union-attr]


def test_eomt_takes_its_square_alone() -> None:
    model = loaded("eomt")
    for function in (model.spec.forward, lambda *args: model.spec.losses(*args, [])):  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"expected an input of 64 x 64, got 64 x 128: .*pad_multiple"):
            function(model.module, torch.zeros(1, 3, 64, 128), [Frame(64, 128, 64, 128)])
    preprocess = MODELS["eomt"].preprocess
    for size in ((480, 640), (1000, 500), (30, 20), (640, 640)):
        assert preprocess.padded(*preprocess.size(*size)) == (640, 640)


@pytest.mark.parametrize("name", ["maskformer", "mask2former", "oneformer"])
@torch.inference_mode()
def test_resnets_are_backbones(name: str) -> None:
    changes = {"depths": [1, 1, 1, 1], "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32]}
    model = loaded(name, backbone="resnet50", backbone_options=changes)
    image_BCHW = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    module = model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    output = model.spec.forward(module, image_BCHW, [Frame(64, 96, 64, 96)])
    assert output["masks"].shape == (1, 6, 16, 24)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mask2former", {"backbone": "swin"}, "backbone must be one of swin_tiny, .*resnet101, got 'swin'"),
        ("mask2former", {"queries": 0}, "queries, layers.* 1 or more, got 134|got 133, 0"),
        ("maskformer", {"overlap_threshold": 1.5}, "overlap_threshold from 0 to 1, got 0.5 and 1.5"),
        ("oneformer", {"mask_threshold": 1.0}, "mask_threshold must be between 0 and 1"),
        ("eomt", {"image_size": 60}, "image_size a multiple of 16, got 1 and 60"),
        ("eomt", {"query_layers": 3}, "query_layers must be at most 2"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(name, **options)


def test_thresholds_come_from_the_options() -> None:
    model = loaded("mask2former", mask_threshold=0.6, overlap_threshold=0.7)
    output = model.spec.forward(model.module, torch.zeros(1, 3, 64, 64), [Frame(64, 64, 64, 64)])
    assert (output.mask_threshold, output.overlap_threshold, output.padded) == (0.6, 0.7, (64, 64))
    assert loaded("mask2former").version != model.version
    assert MODELS["mask2former"].options == {"score_threshold": 0.8}
    assert hf_universal.MASK2FORMER_LOSSES["loss_mask"] == 5.0
