"""A label map and instances as one panoptic map: the rule alone, and the model that is made of two others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from pycocotools import mask as coco_mask
from tiny_models import TINY
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, SchemaError
from pipeline.masks import decode_rle, encode_rle
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, Instances, Prediction
from pipeline.models.zoo.panoptic_merge import IGNORED, Outputs, adapt_merge, join_weights, merge_losses
from pipeline.segments import merge_panoptic
from pipeline.sources.scenes import render_scene
from pipeline.stages.encode import encode_instances
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import load_taxonomy

SCENES = load_taxonomy("scenes")  # 0 to 4 are stuff, 5 to 7 things
WIDTH, HEIGHT = 40, 30
UNET: dict[str, Any] = {"name": "unet_small", "width": 4, "depth": 2}
RCNN: dict[str, Any] = {"rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16, "box_score_thresh": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def combined(
    label_HW: npt.NDArray[Any], instances: Sequence[Mapping[str, Any]], confidence: float, overlap: float, limit: int
) -> dict[int, list[tuple[int, bytes]]]:
    """The rule by run lengths and sets of pixels instead of a map: the masks that each category ends with."""
    shape = list(label_HW.shape)
    taken: Any = coco_mask.encode(np.zeros(shape, np.uint8, order="F"))
    result: dict[int, list[tuple[int, bytes]]] = {}

    def keep(category: int, rle: Any) -> None:
        free_HW = (coco_mask.decode(rle) == 1) & (coco_mask.decode(taken) == 0)
        result.setdefault(category, []).append((int(free_HW.sum()), free_HW.tobytes()))

    for one in sorted((one for one in instances if one["score"] >= confidence), key=lambda one: -one["score"]):
        rle = {"size": shape, "counts": one["rle"].encode()}
        shared = coco_mask.area(coco_mask.merge([taken, rle], intersect=True)) / coco_mask.area(rle)
        if one["category_id"] >= 5 and shared <= overlap:
            keep(one["category_id"], rle)
            taken = coco_mask.merge([taken, rle])
    for category in range(5):
        rle = coco_mask.encode(np.asfortranarray(label_HW == category, np.uint8))
        left = coco_mask.area(rle) - coco_mask.area(coco_mask.merge([taken, rle], intersect=True))
        if left and left >= limit:
            keep(category, rle)
    return {category: sorted(found) for category, found in result.items()}


def drawn(seed: int) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
    """A label map of blocks with some void, and twelve ellipses of things and of stuff, in no order."""
    generator = np.random.default_rng(seed)
    label_HW = np.kron(generator.integers(0, 9, (6, 8)), np.ones((5, 5), int)).astype(np.uint8)
    label_HW[label_HW == 8] = SCENES.void_id
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    instances = []
    for _ in range(12):
        y, x, ry, rx = generator.uniform([0, 0, 3, 3], [HEIGHT, WIDTH, 12, 12])
        mask_HW = ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 <= 1
        instances.append(
            {
                "category_id": int(generator.integers(4, 8)),
                "score": float(generator.choice([0.2, 0.5, 0.6, 0.7, 0.9])),
                "rle": encode_rle(mask_HW),
            }
        )
    return label_HW, instances


@pytest.mark.parametrize(("confidence", "overlap", "limit"), [(0.5, 0.5, 40), (0.0, 0.2, 0), (0.6, 0.9, 25)])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_published_rule(seed: int, confidence: float, overlap: float, limit: int) -> None:
    label_HW, instances = drawn(seed)
    segment_HW, segments = merge_panoptic(
        label_HW, instances, SCENES, score_threshold=confidence, overlap_threshold=overlap, stuff_area=limit
    )
    found: dict[int, list[tuple[int, bytes]]] = {}
    for segment in segments:
        mask_HW = segment_HW == segment["id"]
        found.setdefault(segment["category_id"], []).append((int(mask_HW.sum()), mask_HW.tobytes()))
    expected = combined(label_HW, instances, confidence, overlap, limit)
    assert {category: sorted(masks) for category, masks in found.items()} == expected
    assert [segment["id"] for segment in segments] == [*range(1, len(segments) + 1)]
    assert set(np.unique(segment_HW).tolist()) <= {0, *(segment["id"] for segment in segments)}
    assert any(segment["category_id"] >= 5 for segment in segments)
    assert any(segment["category_id"] < 5 for segment in segments)


def box(left: int, right: int, **fields: Any) -> dict[str, Any]:
    """An instance of 10 rows."""
    mask_HW = np.zeros((10, 20), bool)
    mask_HW[:, left:right] = True
    return {"category_id": 5, "score": 0.9, "rle": encode_rle(mask_HW), **fields}


def test_by_hand() -> None:
    """Ten rows of twenty columns, road (2) on the left, sky (0) on the right."""
    label_HW = np.repeat(np.array([[2] * 10 + [0] * 10], np.uint8), 10, axis=0)
    instances = [
        box(4, 8, score=0.6),  # half of it is free: it keeps columns 6 and 7
        box(2, 6, score=0.8, category_id=6),
        box(3, 6, score=0.7),  # none of it is free
        box(15, 20, score=0.4),  # too unsure
        box(15, 20, category_id=1),  # stuff
        box(5, 5),  # no pixel
    ]
    segment_HW, segments = merge_panoptic(label_HW, instances, SCENES, stuff_area=41)
    assert segment_HW[0].tolist() == [0] * 2 + [1] * 4 + [2] * 2 + [0] * 2 + [3] * 10
    assert segments == [
        {"id": 1, "category_id": 6, "score": 0.8},
        {"id": 2, "category_id": 5, "score": 0.6},
        {"id": 3, "category_id": 0, "score": 1.0},
    ]
    # Road has 4 columns left, 40 pixels.
    assert len(merge_panoptic(label_HW, instances, SCENES, stuff_area=40)[1]) == 4
    # Its default is that of images of COCO's size.
    assert [one["category_id"] for one in merge_panoptic(label_HW, instances, SCENES)[1]] == [6, 5]
    with pytest.raises(SchemaError, match="expected run lengths of 20x9 pixels"):
        merge_panoptic(label_HW[:9], instances, SCENES)


def loaded(**options: Any) -> LoadedModel:
    given = {**TINY["panoptic_merge"], "semantic": UNET, **options}
    taxonomy = given.pop("taxonomy", "scenes")
    config = ModelConfig(name="panoptic_merge", taxonomy=taxonomy, options=given)
    return load_model(config, seed=0, tile_pixels=1 << 20)


def rcnn_output(scores: Sequence[float], labels: Sequence[int], boxes: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """What Mask R-CNN says of one image: masks that fill their boxes."""
    return {
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels),
        "boxes": torch.tensor(boxes),
        "masks": torch.ones(len(scores), 1, 28, 28),
    }


def test_two_outputs_become_one_prediction() -> None:
    """Of an image of 40x30 that was halved and padded: the map's upper half is sky, its lower half car."""
    model = loaded(instance=RCNN, score_threshold=0.5)
    logits = torch.zeros(1, 8, 32, 32)
    logits[:, 0, :8], logits[:, 5, 8:] = 5, 5
    detections = [rcnn_output([0.9, 0.8, 0.3], [5, 6, 7], [[2, 2, 8, 12], [2, 2, 8, 12], [10, 2, 18, 12]])]
    frame = Frame(HEIGHT, WIDTH, 15, 20)
    (prediction,) = model.postprocess(Outputs(detections, logits, model.module), [frame], model.context)
    assert isinstance(prediction.instances, Instances)
    assert prediction.instances.category_ids_N.tolist() == [0, 5]
    assert prediction.instances.scores_N.tolist() == pytest.approx([1.0, 0.9])
    stuff_HW, car_HW = (decode_rle(rle, width=WIDTH, height=HEIGHT) for rle in prediction.instances.rles or ())
    # Pasted as the table's segments are: its first instance alone.
    read = model.postprocess.__globals__["POSTPROCESS"]["instance"](detections, [frame], model.context)
    segments = encode_instances(read[0].instances, width=WIDTH, height=HEIGHT)
    assert (car_HW == decode_rle(segments[0]["rle"], width=WIDTH, height=HEIGHT)).all()
    assert car_HW.sum() == pytest.approx(12 * 20, abs=2 * (12 + 20))
    assert (stuff_HW == ((np.arange(HEIGHT) < 16)[:, None] & ~car_HW)).all()
    assert prediction.label_HW is not None
    # The label map is the semantic model's, but for the car.
    assert (
        prediction.label_HW[~car_HW] == np.where(np.arange(HEIGHT) < 16, 0, 5)[:, None].repeat(WIDTH, 1)[~car_HW]
    ).all()
    assert (prediction.label_HW[car_HW] == 5).all()
    assert prediction.quality is not None


def test_label_spaces_are_joined_by_name() -> None:
    """COCO's cars and persons, Cityscapes' roads, in the space of the scenes."""
    model = loaded(
        instance={**RCNN, "taxonomy": "coco80"}, semantic={**UNET, "taxonomy": "cityscapes19"}, score_threshold=0.5
    )
    module: Any = model.module
    assert module.instance.roi_heads.box_predictor.cls_score.out_features == 91
    assert module.semantic.head.out_channels == 19
    cityscapes = load_taxonomy("cityscapes19")
    place = [category.name for category in cityscapes.categories].index
    logits = torch.zeros(1, 19, 32, 32)
    logits[:, place("road"), :, :16], logits[:, place("pole"), :, 16:] = 5, 5
    # A car, a zebra and a person of COCO.
    detections = [rcnn_output([0.9, 0.8, 0.7], [3, 24, 1], [[0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8]])]
    (prediction,) = model.postprocess(Outputs(detections, logits, module), [Frame(32, 32, 32, 32)], model.context)
    assert isinstance(prediction, Prediction)
    assert prediction.instances is not None
    assert prediction.instances.category_ids_N.tolist() == [2, 5, 6]
    assert prediction.label_HW is not None
    assert set(np.unique(prediction.label_HW).tolist()) == {2, 5, 6, SCENES.void_id}
    # What each part learns the whole's classes as.
    instance, semantic = module.parts["instance"], module.parts["semantic"]
    assert instance.outputs_K.tolist() == [IGNORED] * 5 + [3, 1, IGNORED]
    assert semantic.outputs_K[2] == place("road")
    assert semantic.outputs_K[5] == place("car")


def test_by_default_the_instances_are_the_wholes_things() -> None:
    """Of COCO's panoptic classes those are COCO's 80, so that published weights of Mask R-CNN fit."""
    with torch.device("meta"):
        spec = MODELS["panoptic_merge"]
        module: Any = spec.module(load_taxonomy("coco_panoptic"), {})
    assert module.instance.roi_heads.box_predictor.cls_score.out_features == 91
    assert module.semantic.classifier[4].out_channels == 133
    assert module.parts["instance"].taxonomy.ids == load_taxonomy("coco80").ids


def test_losses_are_the_parts() -> None:
    model = loaded(instance=RCNN)
    module: Any = model.module.train()
    scene = render_scene(3, width=64, height=48)
    masks_NHW = torch.from_numpy(np.stack([scene.segment_HW == one.id for one in scene.segments]).astype(np.uint8))
    labels_N = torch.tensor([one.category_id for one in scene.segments])
    boxes_N4 = torch.tensor([[1.0, 1.0, 20.0, 20.0]]).repeat(len(labels_N), 1)
    target = {"masks": masks_NHW, "labels": labels_N, "boxes": boxes_N4}
    image_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    nothing = {name: values[:0] for name, values in target.items()}
    frames = [Frame(48, 64, 48, 64)] * 2
    torch.manual_seed(3)
    found = merge_losses(module, image_BCHW, frames, [target, nothing])
    torch.manual_seed(3)
    things = labels_N >= 5
    assert things.any()
    part = module.parts["instance"].spec
    own = part.losses(
        module.instance, image_BCHW, frames, [{name: values[things] for name, values in target.items()}, nothing]
    )
    assert float(found["instance"]) == pytest.approx(float(sum(own.values())), rel=1e-6)
    # The first image's cross-entropy by hand; the second has no target.
    index_HW = torch.from_numpy(scene.semantic_HW.astype(np.int64))
    valid_HW = torch.from_numpy(scene.segment_HW > 0)
    log_probability = module.semantic(image_BCHW)[0, :, :48].log_softmax(0)
    by_hand = -log_probability.gather(0, index_HW.clamp(max=7)[None])[0][valid_HW].mean() / 2
    assert float(found["semantic"]) == pytest.approx(float(by_hand), rel=1e-5)


def test_a_mean_and_deviation_of_its_own() -> None:
    """A part that wants values from -1 to 1 gets them, and zeros where the image is padded."""
    model = loaded(semantic={"name": "segmenter", **TINY["segmenter"]})
    part: Any = model.module.parts["semantic"]  # type: ignore[union-attr,index]
    image_CHW = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    given = torch.zeros(1, 3, 32, 32)
    given[0, :, :20, :30] = (image_CHW - mean) / std
    got = part.normalised(given, [Frame(20, 30, 20, 30)])
    torch.testing.assert_close(got[0, :, :20, :30], image_CHW * 2 - 1, rtol=0, atol=1e-5)
    assert not got[0, :, 20:].any()
    assert not got[0, :, :, 30:].any()


def test_weights_of_two_models_become_one(tmp_path: Path) -> None:
    instance, semantic = (
        load_model(config, seed=5, tile_pixels=1 << 20).module.state_dict() for config in PART_CONFIGS
    )
    both = {name: tensor.contiguous() for name, tensor in join_weights(instance, semantic).items()}
    safetensors.torch.save_file(both, tmp_path / "both.safetensors")
    whole = load_model(
        ModelConfig(
            name="panoptic_merge",
            taxonomy="scenes",
            weights=str(tmp_path / "both.safetensors"),
            options={
                "instance": {**RCNN, "taxonomy": "coco80"},
                "semantic": UNET,
                "resize": 64,
                "score_threshold": 0.0,
            },
        ),
        seed=0,
        tile_pixels=1 << 20,
    )
    state = whole.module.state_dict()
    assert state.keys() == both.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in both.items())
    # One part alone goes to its own place.
    for part, given in (("instance", instance), ("semantic", semantic)):
        adapted = adapt_merge(given, state.keys())
        assert adapted.keys() == {name for name in state if name.startswith(f"{part}.")}
    assert adapt_merge(both, state.keys()) == both
    assert adapt_merge({"x": torch.ones(1)}, state.keys()).keys() == {"x"}
    # What the whole says of things is what the one model says, and its map is the other's where no things are.
    scene = render_scene(3, width=64, height=48)
    run = Predict(whole, device=torch.device("cpu"), batch_pixels=1 << 20, tile_pixels=1 << 20)
    (merged,) = run([prepare(scene.image_HWC, whole.preprocess)])
    assert isinstance(merged, Prediction)
    alone = load_model(PART_CONFIGS[1], seed=5, tile_pixels=1 << 20)
    single = Predict(alone, device=torch.device("cpu"), batch_pixels=1 << 20, tile_pixels=1 << 20)
    (labels,) = single([prepare(scene.image_HWC, whole.preprocess)])
    assert isinstance(labels, Prediction)
    assert merged.instances is not None
    thing_HW = np.zeros((48, 64), bool)
    for category_id, rle in zip(merged.instances.category_ids_N, merged.instances.rles or (), strict=True):
        if category_id >= 5:
            thing_HW |= decode_rle(rle, width=64, height=48)
    assert merged.label_HW is not None
    assert labels.label_HW is not None
    assert (merged.label_HW == labels.label_HW)[~thing_HW].all()
    assert not thing_HW.all()


PART_CONFIGS = (
    ModelConfig(name="maskrcnn_resnet50_fpn_v2", options=RCNN),
    ModelConfig(name="unet_small", options={"width": 4, "depth": 2, "pad_multiple": 32, "resize": 64}),
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance": UNET}, "instance.name must be a model of task instance, got unet_small of task semantic"),
        ({"semantic": {"name": "unet_small_depth"}}, "semantic.name must be a model of task semantic"),
        ({"semantic": {"name": "unet_smal"}}, "unknown model 'unet_smal'; did you mean unet_small"),
        ({"semantic": {**UNET, "depht": 2}}, "unexpected keyword argument 'depht'"),
        ({"overlap_threshold": 1.2}, "overlap_threshold must be from 0 to 1"),
        ({"semantic": {**UNET, "taxonomy": "no_such"}}, "no_such"),
    ],
)
def test_parts_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(**options)
