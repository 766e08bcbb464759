"""Detectors of torchvision and transformers on our batches, against the libraries' own forward passes and losses."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import TINY
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.masks import decode_rle
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, PostContext, Prediction
from pipeline.models.zoo import hf_detection
from pipeline.models.zoo.detections import known_objects, placed_objects, stretch
from pipeline.sources.scenes import render_scene
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import load_taxonomy

ONE_STAGE = ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"]
QUERIES = ["rtdetr", "rtdetr_v2", "dfine", "rfdetr_seg"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def load(name: str, options: dict[str, Any] | None = None, **fields: Any) -> LoadedModel:
    options = {**TINY[name], "channels_last": False, "max_segments": 40, **(options or {})}
    return load_model(ModelConfig(name=name, options=options, **fields), seed=3, tile_pixels=1 << 22)


def predict(model: LoadedModel, image_HWC: Any) -> Prediction:
    run = Predict(model, device=torch.device("cpu"), batch_pixels=1 << 22, tile_pixels=1 << 22)
    (prediction,) = run([prepare(image_HWC, model.preprocess)])
    assert isinstance(prediction, Prediction)
    return prediction


def excited(model: LoadedModel) -> LoadedModel:
    """With weights whose scores differ: fresh ones are all about as sure, and rounding would choose among them."""
    torch.manual_seed(5)
    for name, parameter in model.module.named_parameters():
        if any(part in name for part in ("cls_logits.weight", "class_embed", "score_head.weight")):
            nn.init.normal_(parameter, std=0.5 if "weight" in name else 1.0)
        elif "bbox" in name and name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def objects_of(model: LoadedModel) -> list[dict[str, Tensor]]:
    """Of two images of 64x64 prepared pixels, as training gives them."""
    masks_2HW = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks_2HW[0, 8:40, 4:60] = 1
    masks_2HW[1, 20:50, 30:54] = 1
    boxes_24 = torch.tensor([[4.0, 8.0, 60.0, 40.0], [30.0, 20.0, 54.0, 50.0]])
    labels_2 = torch.tensor([3, 17])
    return [
        {"boxes": boxes_24, "labels": labels_2, "masks": masks_2HW},
        {"boxes": boxes_24[1:], "labels": labels_2[1:], "masks": masks_2HW[1:]},
    ]


FRAMES = [Frame(64, 64, 64, 64)] * 2


@pytest.mark.parametrize("name", ONE_STAGE)
def test_the_objects_are_what_torchvision_says(name: str) -> None:
    model = excited(load(name))
    # The short side is 64 already, so neither side resizes; 90 columns are padded to 96.
    image_HWC = render_scene(5, width=90, height=64).image_HWC
    instances = predict(model, image_HWC).instances
    assert instances is not None

    official: Any = model.module
    official.transform.min_size, official.transform.max_size = (64,), 1333
    with torch.inference_mode():
        (expected,) = official([torch.from_numpy(image_HWC.copy()).permute(2, 0, 1) / 255])
    known_N = torch.isin(expected["labels"], torch.tensor(model.taxonomy.ids))
    assert 40 < known_N.sum() < len(known_N)  # some are of no category
    order = torch.argsort(expected["scores"][known_N], descending=True, stable=True)[:40]
    assert instances.category_ids_N.tolist() == expected["labels"][known_N][order].tolist()
    boxes_N4 = torch.from_numpy(instances.boxes_N4)
    torch.testing.assert_close(boxes_N4, expected["boxes"][known_N][order], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(instances.scores_N), expected["scores"][known_N][order])


@pytest.mark.parametrize("name", ONE_STAGE)
def test_the_losses_are_torchvisions(name: str) -> None:
    model = load(name)
    module: Any = model.module.requires_grad_(True).train()
    module.transform.min_size, module.transform.max_size = (64,), 1333
    images = [torch.rand(3, 64, width) for width in (64, 90)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    image_BCHW = torch.zeros(2, 3, 64, 96)
    for whole_CHW, image_CHW in zip(image_BCHW, images, strict=True):
        whole_CHW[:, :, : image_CHW.shape[2]] = (image_CHW - mean) / std
    frames = [Frame(64, 64, 64, 64), Frame(64, 90, 64, 90)]
    targets = [{name: item[name] for name in ("boxes", "labels")} for item in objects_of(model)]
    assert model.spec.losses is not None
    losses = model.spec.losses(module, image_BCHW, frames, targets)
    expected = module(images, targets)
    assert set(losses) == set(model.spec.loss_factors) == set(expected)
    for key, value in losses.items():
        torch.testing.assert_close(value, expected[key], msg=key)
    assert min(losses.values()) > 0
    # An image without objects is a whole lesson too.
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    module.zero_grad()
    torch.stack([*model.spec.losses(module, image_BCHW, frames, [empty] * 2).values()]).sum().backward()
    assert [key for key, parameter in module.named_parameters() if parameter.grad is None] == []


def test_fcos_weights_of_frozen_statistics(tmp_path: Path) -> None:
    """torchvision's own have no counters in their backbone."""
    model = load("fcos_resnet50_fpn")
    state = {name: value for name, value in model.module.state_dict().items() if "num_batches_tracked" not in name}
    assert len(state) < len(model.module.state_dict())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = load("fcos_resnet50_fpn", weights=str(tmp_path / "model.safetensors"))
    assert loaded.version == model.version


def test_labels_become_ids() -> None:
    context = PostContext(taxonomy=load_taxonomy("coco80"), score_threshold=0.0)
    frame = Frame(20, 40, 10, 10)
    output = [
        {
            "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(4, 1),
            "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
            "labels": torch.tensor([0, 12, 13, 79]),
        }
    ]
    # As ids, 0, 12 are nobody's (COCO has no street sign) and 79 an oven; as places they are the first to the last.
    (known,) = known_objects(output, [frame], context)
    (placed,) = placed_objects(output, [frame], context)
    assert known.instances is not None
    assert placed.instances is not None
    assert known.instances.category_ids_N.tolist() == [13, 79]
    assert placed.instances.category_ids_N.tolist() == [1, 14, 15, 90]
    assert known.instances.boxes_N4[0].tolist() == [4, 4, 12, 8]
    assert known_objects([], [], context) == placed_objects([], [], context) == []


def official_of(model: LoadedModel) -> Any:
    """The library's own model of the same configuration, with its own losses' factors and other weights."""
    library = importlib.import_module("transformers")
    kind = type(model.module)
    config = copy.deepcopy(model.module.config)  # type: ignore[union-attr]
    for field in vars(config):
        if field.startswith("weight_loss_"):
            setattr(config, field, getattr(type(config)(), field))
    if model.spec.name in ("dfine", "rtdetr_v2"):
        config.tie_word_embeddings = True
    if model.spec.name == "rfdetr_seg":
        config.backbone_config.use_mask_token = True
    torch.manual_seed(11)
    module = getattr(library, kind.__name__)(config).eval()
    generator = torch.Generator().manual_seed(12)
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] not in ("up", "reg_scale"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.2 if parameter.ndim > 1 else 0.05)
    return module


@pytest.mark.parametrize("name", QUERIES)
def test_a_published_checkpoint_gives_the_librarys_output(name: str, tmp_path: Path) -> None:
    """The library writes its checkpoints under the names that published ones have."""
    official = official_of(load(name))
    official.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(stored) != set(official.state_dict())
    module: Any = load(name, weights=str(tmp_path / "model.safetensors")).module
    size = module.image_size
    image_BCHW = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        given, expected = module(pixel_values=image_BCHW), official(pixel_values=image_BCHW)
    assert expected.logits.std() > 0.01
    torch.testing.assert_close(given.logits, expected.logits)
    torch.testing.assert_close(given.pred_boxes, expected.pred_boxes)
    if name == "rfdetr_seg":
        torch.testing.assert_close(given.pred_masks, expected.pred_masks)
    # And under its present names.
    plain = {key: value.clone() for key, value in official.state_dict().items()}
    if name in ("dfine", "rtdetr_v2"):
        plain = {key: value for key, value in plain.items() if not key.startswith("model.decoder.class_embed")}
    safetensors.torch.save_file(plain, tmp_path / "plain.safetensors")
    again = load(name, weights=str(tmp_path / "plain.safetensors")).module
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", QUERIES)
def test_the_losses_are_the_librarys(name: str) -> None:
    # Every loss at its whole weight, which the smallest options leave out.
    whole = {key: value for key, value in TINY[name]["model"].items() if not key.startswith("weight_")}
    model = load(name, {"model": whole})
    module: Any = model.module.requires_grad_(True).train()
    size = module.image_size
    official = official_of(model).train()
    state = {key: value for key, value in official.state_dict().items() if key in module.state_dict()}
    module.load_state_dict(state)
    objects = objects_of(model)
    image_BCHW = torch.rand(2, 3, 64, 64)
    torch.manual_seed(4)
    assert model.spec.losses is not None
    losses = model.spec.losses(module, image_BCHW, FRAMES, objects)
    labels = []
    for item in objects:
        x1, y1, x2, y2 = item["boxes"].unbind(1)
        label = {
            "class_labels": item["labels"],
            "boxes": torch.stack([(x1 + x2) / 128, (y1 + y2) / 128, (x2 - x1) / 64, (y2 - y1) / 64], dim=1),
        }
        if name == "rfdetr_seg":
            label["masks"] = nn.functional.interpolate(item["masks"][None].float(), (size, size), mode="nearest-exact")[
                0
            ]
        labels.append(label)
    torch.manual_seed(4)
    expected = official(pixel_values=stretch(image_BCHW, FRAMES, size), labels=labels).loss
    assert set(losses) == set(model.spec.loss_factors)
    total = sum(model.spec.loss_factors[key] * value for key, value in losses.items())
    torch.testing.assert_close(total, expected)
    assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize("name", QUERIES)
def test_a_batch_without_objects_has_every_gradient(name: str) -> None:
    model = load(name)
    module = model.module.requires_grad_(True).train()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    assert model.spec.losses is not None
    losses = model.spec.losses(module, torch.rand(2, 3, 64, 64), FRAMES, [empty] * 2)
    total = torch.stack([*losses.values()]).sum()
    assert total.isfinite()
    total.backward()
    assert [key for key, parameter in module.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", [*QUERIES, "yolo_v1"])
def test_it_learns_two_images(name: str) -> None:
    if name == "yolo_v1":
        model = load(name, {"width": 0.1, "dropout": 0.0})
    else:
        whole = {key: value for key, value in TINY[name]["model"].items() if not key.startswith("weight_")}
        model = load(name, {"model": whole})
    module = model.module.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0)
    image_BCHW, objects = torch.rand(2, 3, 64, 64), objects_of(model)
    for image_CHW, item in zip(image_BCHW, objects, strict=True):
        for mask_HW, label in zip(item["masks"], item["labels"], strict=True):
            image_CHW[:, mask_HW > 0] = 0.1 * label
    assert model.spec.losses is not None
    totals = []
    for _ in range(60):
        losses = model.spec.losses(module, image_BCHW, FRAMES, objects)
        total = torch.stack([model.spec.loss_factors[key] * value for key, value in losses.items()]).sum()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])


@pytest.mark.parametrize("name", ["rtdetr", "rtdetr_v2", "dfine"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 48)])
def test_the_objects_are_what_the_librarys_processor_says(name: str, width: int, height: int) -> None:
    library = importlib.import_module("transformers")
    model = excited(load(name))
    image_HWC = render_scene(2, width=width, height=height).image_HWC
    instances = predict(model, image_HWC).instances
    assert instances is not None
    processor = library.RTDetrImageProcessor(size={"height": 64, "width": 64})
    if (width, height) == (64, 64):
        pixels = processor(images=image_HWC, return_tensors="pt")["pixel_values"]
    else:  # the library rounds to 8 bits when it resizes
        prepared = prepare(image_HWC, model.preprocess)
        frame = prepared.frame
        pixels = stretch(prepared.image_CHW[None] / 255, [frame], 64)
        assert (frame.prepared_height, frame.prepared_width) == (64, 128)
    with torch.inference_mode():
        output: Any = model.module(pixel_values=pixels)
    (expected,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(height, width)])
    assert len(expected["scores"]) == len(instances.scores_N) == 6
    assert len({*expected["labels"].tolist()}) > 1
    ids = [model.taxonomy.ids[place] for place in expected["labels"].tolist()]
    assert instances.category_ids_N.tolist() == ids
    torch.testing.assert_close(torch.from_numpy(instances.scores_N), expected["scores"])
    torch.testing.assert_close(torch.from_numpy(instances.boxes_N4), expected["boxes"], rtol=1e-5, atol=1e-4)


def test_the_masks_are_what_the_librarys_processor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_detection, "MASK_PIXELS", 3 * 128 * 128)  # three at a time
    library = importlib.import_module("transformers")
    model = excited(load("rfdetr_seg", {"resize": 96}))
    nn.init.normal_(model.module.get_submodule("query_features_proj").weight, std=0.5)  # type: ignore[arg-type]
    image_HWC = render_scene(2, width=128, height=128).image_HWC
    instances = predict(model, image_HWC).instances
    assert instances is not None
    assert instances.rles is not None
    prepared = prepare(image_HWC, model.preprocess)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    with torch.inference_mode():
        output: Any = model.module(pixel_values=((prepared.image_CHW / 255 - mean) / std)[None])
    (expected,) = library.RfDetrImageProcessor().post_process_instance_segmentation(
        output, threshold=0.0, target_sizes=[(128, 128)], return_binary_maps=True
    )
    ids = model.taxonomy.ids
    known = [
        (info, mask_HW.numpy())
        for info, mask_HW in zip(expected["segments_info"], expected["segmentation"], strict=True)
        if info["label_id"] in ids
    ][: len(instances.rles)]
    assert 20 < len(known) == len(instances.rles)
    assert len(expected["segments_info"]) > len(known)
    assert instances.category_ids_N.tolist() == [info["label_id"] for info, _ in known]
    assert instances.scores_N.tolist() == pytest.approx([info["score"] for info, _ in known], abs=1e-5)
    differing = sum(
        int((decode_rle(rle, width=128, height=128) != mask_HW).sum())
        for rle, (_, mask_HW) in zip(instances.rles, known, strict=True)
    )
    assert differing <= 2  # a logit of 0 may round either way


@pytest.mark.parametrize("name", [*QUERIES, "yolo_v1"])
def test_padding_is_not_seen(name: str) -> None:
    """An image gives the same alone and in a batch that pads it, whatever lies in the padding."""
    model = load(name)
    image_CHW = torch.rand(3, 48, 40)
    frame = Frame(48, 40, 48, 40)
    padded_BCHW = torch.rand(1, 3, 64, 96)
    padded_BCHW[0, :, :48, :40] = image_CHW
    with torch.inference_mode():
        (alone,) = model.spec.forward(model.module, image_CHW[None], [frame])
        (padded,) = model.spec.forward(model.module, padded_BCHW, [frame])
    assert set(alone) == set(padded)
    assert all(torch.equal(alone[key], padded[key]) for key in alone)


SIZES = [
    # Zhao et al. 2024, table 2.
    ("rtdetr", "r18", 20),
    ("rtdetr", "r34", 31),
    ("rtdetr", "r50", 42),
    ("rtdetr", "r101", 76),
    ("rtdetr_v2", "r50", 42),
    # Peng et al. 2024, tables 1 and 7.
    ("dfine", "nano", 4),
    ("dfine", "small", 10),
    ("dfine", "medium", 19),
    ("dfine", "large", 31),
    ("dfine", "xlarge", 62),
    # https://github.com/roboflow/rf-detr, segmentation models.
    ("rfdetr_seg", "nano", 33.6),
    ("rfdetr_seg", "small", 33.7),
    ("rfdetr_seg", "medium", 35.7),
    ("rfdetr_seg", "large", 36.2),
]


@pytest.mark.parametrize(("name", "size", "millions"), SIZES)
def test_published_sizes(name: str, size: str, millions: float) -> None:
    spec = MODELS[name]
    with torch.device("meta"):
        module: Any = spec.module(load_taxonomy("coco80"), {"size": size})
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=1.0, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("rtdetr", {"size": "r19"}, "size must be one of r18, r34, r50, r101, got 'r19'"),
        ("dfine", {"image_size": 100}, "image_size must be a multiple of 32, got 100"),
        ("rfdetr_seg", {"image_size": 100}, "image_size must be a multiple of 24, got 100"),
        ("dfine", {"model": {"num_querys": 3}}, "model has 'num_querys', which is no field of DFineConfig"),
        ("rtdetr", {"backbone": {"width": 3}}, "backbone has 'width', which is no field of RTDetrResNetConfig"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name, options)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", QUERIES)
def test_without_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'it needs pip install "maskmill\[hf\]": cannot import transformers: '):
        load(name)
