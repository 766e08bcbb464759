"""The recipes of configs/train: each says what it is for, builds what it names with its papers' values, and runs."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY
from training_helpers import CPU, run_loop

from pipeline.config import FilesSource, ScenesSource
from pipeline.config_train import TrainConfig
from pipeline.configfile import load_config
from pipeline.models.load import LoadedModel, load_model
from pipeline.sources.base import UnitEnd
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import load_taxonomy
from pipeline.training.events import EpochDone, Saved
from pipeline.training.optim import build_optimizer
from pipeline.training.plan import plan_source
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.setup import augment_options, objective, optimizer_options, schedule_options, start_model
from pipeline.training.task_targets import TaskTargets

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "train"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Too large to be built whole here.
LARGE = {"nyu_dpt"}
# Images of an epoch, where they are no generated ones.
IMAGES = {"camvid": 367, "coco": 118_287, "nyu": 24_231}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(recipe: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, str(FOLDER / f"{recipe}.yaml"), overrides)


def steps_of(recipe: str, config: TrainConfig) -> int:
    """Optimiser steps of an epoch of the whole data set."""
    source = config.source
    images = source.count if isinstance(source, ScenesSource) else IMAGES[recipe.partition("_")[0]]
    return math.ceil(images / config.batch_images)


def without_weights(config: TrainConfig, **options: Any) -> TrainConfig:
    """From random weights, smaller by `options`."""
    model = {"weights": "none", "options": {**config.model.options, **options}}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def built(recipe: str) -> tuple[TrainConfig, LoadedModel]:
    config = load(recipe)
    config = without_weights(config, **(TINY[str(config.model.name)] if recipe in LARGE else {}))
    return config, start_model(config)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_says_where_it_runs_and_how_to_start_it(recipe: str) -> None:
    lines = (FOLDER / f"{recipe}.yaml").read_text("utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    assert f"maskmill train configs/train/{recipe}.yaml" in comment
    assert re.search(r"\d+ cores|GPUs? of \d+ GB", comment)
    config = load(recipe)
    assert config.output.uri == f"out/train/{recipe}"
    assert config.validation is not None
    # Overrides of the command are of fields that the recipe has.
    for field in re.findall(r"(\S+)=[A-Z]", comment):
        value: Any = config
        for part in field.split("."):
            value = getattr(value, part)
        assert value


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_in_it_can_be_built(recipe: str) -> None:
    config, model = built(recipe)
    assert objective(config, model, CPU).factors
    assert augment_options(config, model)
    steps = steps_of(recipe, config)
    schedule = schedule_options(config, steps)
    assert schedule.steps == config.epochs * steps
    optimizer = build_optimizer(model.module, optimizer_options(config))
    found = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert found == sum(parameter.numel() for parameter in model.module.parameters())
    if config.model.weights != "none":
        assert config.partial_weights or recipe in LARGE


def rates(recipe: str, epochs: Sequence[float]) -> list[float]:
    """Learning rates at those epochs."""
    config = load(recipe)
    steps = steps_of(recipe, config)
    schedule = schedule_options(config, steps)
    base = config.optimizer.learning_rate
    return [base * learning_rate_factor(round(epoch * steps), schedule) for epoch in epochs]


def test_segnets_rate_is_fixed() -> None:
    assert rates("camvid_segnet", [0, 1, 150, 299.9]) == [0.1] * 4
    assert load("camvid_segnet").optimizer.momentum == 0.9


def test_deeplabs_rate_falls_with_the_power_of_nine_tenths() -> None:
    config = load("camvid_deeplabv3plus")
    expected = [0.007 * (1 - done) ** 0.9 for done in (0, 0.25, 0.5)]
    assert rates("camvid_deeplabv3plus", [config.epochs * done for done in (0, 0.25, 0.5)]) == pytest.approx(expected)


def test_mask_rcnns_rate_is_that_of_one_x() -> None:
    config = load("coco_maskrcnn")
    assert (config.epochs, config.batch_images) == (12, 16)
    steps = steps_of("coco_maskrcnn", config)
    assert schedule_options(config, steps).warmup_steps == pytest.approx(500, abs=5)
    found = rates("coco_maskrcnn", [0, 250 / steps, 0.1, 7.99, 8, 10.99, 11, 11.99])
    assert found == pytest.approx([2e-5, 0.01, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002], rel=0.02)


def test_dpts_transformer_learns_at_a_tenth_of_its_decoders_rate() -> None:
    config, model = built("nyu_dpt")
    groups = build_optimizer(model.module, optimizer_options(config)).param_groups
    found = {name: group["lr"] for group in groups for name in group["names"]}
    assert found == {
        name: pytest.approx(1e-5 if name.startswith("dpt.") else 1e-4) for name, _ in model.module.named_parameters()
    }
    assert {group["weight_decay"] for group in groups} == {0}


# --- with real data


@pytest.mark.shared
def test_segnets_class_weights_are_those_of_the_training_images(shared_data: Path) -> None:
    taxonomy = load_taxonomy("camvid11")
    pixels_K, shown_K = np.zeros(11), np.zeros(11)
    for path in sorted((shared_data / "camvid" / "trainannot").glob("*.png")):
        target_HW = np.asarray(Image.open(path))
        count_K = np.bincount(target_HW.ravel(), minlength=12)[:11]
        pixels_K += count_K
        shown_K += np.where(count_K > 0, target_HW.size, 0)
    frequency_K = pixels_K / shown_K
    expected = {taxonomy.by_id[id_].name: np.median(frequency_K) / frequency_K[id_] for id_ in range(11)}
    assert load("camvid_segnet").loss.semantic.class_weights == pytest.approx(expected, abs=5e-5)


@pytest.mark.shared
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("camvid")])
def test_camvid_is_found(recipe: str, shared_data: Path) -> None:
    uri = shared_data / "camvid"
    config = load(recipe, f"source.uri={uri}", f"validation.source.uri={uri}")
    assert config.validation is not None
    for source, images in ((config.source, 367), (config.validation.source, 101)):
        opened = open_source(source)
        assert plan_source(opened).images == images
        targets = TaskTargets(config.target, source, "semantic", load_taxonomy("camvid11"))
        assert isinstance(source, FilesSource)
        first = next(iter(opened.read(next(iter(opened.plan())), ())))
        assert not isinstance(first, UnitEnd)
        assert first.error is None
        assert targets.label_map(first.targets).shape == (360, 480)


# --- from start to end, on scenes in each data set's layout


def save(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def camvid(folder: Path) -> list[str]:
    """Scenes with the first of CamVid's classes."""
    for split, start in (("train", 0), ("val", 50)):
        for index in range(start, start + 4):
            scene = render_scene(index, width=64, height=48)
            save(folder / split / f"{index}.png", scene.image_HWC)
            save(folder / f"{split}annot" / f"{index}.png", np.minimum(scene.semantic_HW, 11))
    return [f"source.uri={folder}", f"validation.source.uri={folder}"]


def nyu(folder: Path) -> list[str]:
    """Scenes at a seventh, so that they are rooms."""
    for split, start in (("sync", 0), ("official_splits/test", 50)):
        for index in range(start, start + 4):
            scene = render_scene(index, width=80, height=64)
            room = folder / split / f"room_{index % 2}"
            save(room / f"rgb_{index:05d}.jpg", scene.image_HWC)
            save(room / f"sync_depth_{index:05d}.png", (scene.depth_HW * 1000 / 7).astype(np.uint16))
    return [f"source.uri={folder}", f"validation.source.uri={folder}", "model.options.resize=64"]


def coco(folder: Path) -> list[str]:
    """Scenes with cars and people, in COCO's JSON."""
    ids = {5: 3, 6: 1}
    arguments = []
    for field, split, start in (("source", "train2017", 0), ("validation.source", "val2017", 50)):
        images, annotations = [], []
        for index in range(start, start + 4):
            scene = render_scene(index, width=64, height=64)
            save(folder / split / f"{index:012d}.jpg", scene.image_HWC)
            images.append({"id": index, "file_name": f"{index:012d}.jpg", "width": 64, "height": 64})
            for segment in scene.segments:
                if segment.category_id in ids:
                    mask_HW = scene.segment_HW == segment.id
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": ids[segment.category_id],
                            "iscrowd": 0,
                            "area": segment.area,
                            "bbox": [*segment.bbox],
                            "segmentation": {"size": [64, 64], "counts": runs(mask_HW)},
                        }
                    )
        categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        path = folder / f"{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        arguments += [f"{field}.uri={folder / split}", f"{field}.instances={path}"]
    return [*arguments, "model.options.resize=64", "checkpoint.every_steps=null"]


def runs(mask_HW: np.ndarray[Any, Any]) -> list[int]:
    """Uncompressed run lengths of a mask, column by column, beginning with zeros."""
    flat = mask_HW.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


LAYOUTS: dict[str, Callable[[Path], list[str]]] = {"camvid": camvid, "nyu": nyu, "coco": coco}
SMALLER = [
    "epochs=1",
    "batch_images=4",
    "resources.decode_threads=1",
    "validation.sheet_images=0",
    "schedule.kind=constant",
    "schedule.milestones=[]",
    "schedule.warmup_epochs=0",
]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.partition("_")[0] in LAYOUTS])
def test_it_runs_from_start_to_end(recipe: str, tmp_path: Path) -> None:
    given = load(recipe)
    arguments = LAYOUTS[recipe.partition("_")[0]](tmp_path / "data")
    crop = [] if given.augment.crop is None else ["augment.crop=[64, 64]"]
    config = load(recipe, *arguments, *crop, *SMALLER, f"output.uri={tmp_path / 'out'}")
    config = without_weights(config, **TINY[str(config.model.name)])
    loop, events = run_loop(config)
    (done,) = (event for event in events if isinstance(event, EpochDone))
    assert done.row["images"] == 4
    assert done.row["failed"] == done.row["validation_failed"] == 0
    assert done.row["validation_images"] == 4
    assert math.isfinite(done.row["loss"])
    assert loop.record.headline in done.row
    published = [event for event in events if isinstance(event, Saved)][-1]
    again = load_model(config.model.model_copy(update={"weights": published.uri}), seed=1, tile_pixels=1 << 20)
    state = (loop.module if loop.ema is None else loop.ema.module).state_dict()
    for name, tensor in again.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
