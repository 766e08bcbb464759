"""Validation of panoptic models: the figures of labelling and scoring, and the same for any number of workers."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from training_helpers import CPU, run_workers

from pipeline.config import ModelConfig, ScenesSource, ScoreConfig
from pipeline.config_train import TargetConfig, ValidationConfig
from pipeline.masks import encode_rle
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.panoptic import PanopticState
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Frame, Instances, PostContext, Prediction
from pipeline.predictions.stored import stored
from pipeline.sources.base import Sample
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import Scene, render_scene
from pipeline.stages.encode import encode
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.stages.score import Scorer
from pipeline.training.plan import plan_source
from pipeline.training.sheet import draw_sheet
from pipeline.training.validate import HEADLINES, Scores, Validator
from pipeline.training.workers import Workers

# 11 images in units of 4, in batches of 2: divisible by none of 2 and 3 workers, in images or in batches.
TREE: Mapping[str, Any] = {
    "source": {
        "format": "scenes",
        "count": 11,
        "width": 64,
        "height": 48,
        "unit_images": 4,
        "targets": ["semantic", "panoptic"],
    },
    "batch_images": 2,
    "sheet_images": 3,
}
MERGED: Mapping[str, Any] = {"merge": {"road": ["road", "pavement"], "pavement": [], "sign": []}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def some_model(taxonomy: str = "scenes") -> LoadedModel:
    """Of queries, with random weights: every one of its segments is somewhere, few are right."""
    options = {
        "backbone": "swin_tiny",
        "backbone_options": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        "hidden_size": 32,
        "heads": 2,
        "layers": 2,
        "encoder_layers": 1,
        "queries": 8,
        "score_threshold": 0.0,
        "overlap_threshold": 0.0,
        "resize": 64,
    }
    return load_model(ModelConfig(name="mask2former", taxonomy=taxonomy, options=options), seed=0, tile_pixels=2**22)


def validate(
    workers: Workers, model: LoadedModel, tree: Mapping[str, Any], target: Mapping[str, Any] | None = None
) -> Scores:
    given = ValidationConfig.model_validate(tree)
    plan = plan_source(open_source(given.source))
    validator = Validator(given, TargetConfig.model_validate(target or {}), plan, model, device=CPU, threads=2)
    return validator.score(model.module, workers)


def quick_model() -> LoadedModel:
    """The bundled U-Net, each of whose classes is a segment: without the library of the other, which each process of a
    test would import."""
    model = load_model(ModelConfig(weights="bundled:unet_small_scenes"), seed=0, tile_pixels=2**22)
    semantic = model.postprocess

    def postprocess(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
        predictions = []
        for one in semantic(output, frames, context):
            assert one.label_HW is not None
            categories = np.unique(one.label_HW)
            rles = tuple(encode_rle(one.label_HW == category) for category in categories)
            predictions.append(replace(one, instances=segments_of(categories.tolist(), rles)))
        return predictions

    return replace(model, spec=replace(model.spec, task="panoptic"), postprocess=postprocess)


def segments_of(categories: Sequence[int], rles: Sequence[str]) -> Instances:
    return Instances(
        boxes_N4=np.zeros((len(categories), 4), np.float32),
        scores_N=np.ones(len(categories), np.float32),
        category_ids_N=np.array(categories, np.int64),
        rles=tuple(rles),
    )


def validate_rows(workers: Workers) -> tuple[dict[str, float], dict[str, Any], bytes]:
    model = quick_model()
    scores = validate(workers, model, TREE)
    sheet = draw_sheet(scores.shown, "panoptic", model.taxonomy, "title")
    return scores.figures("panoptic", model.taxonomy), scores.to_row(), sheet


def test_any_number_of_workers_gives_the_same_figures() -> None:
    expected, row, sheet = validate_rows(Workers())
    assert row["images"] == 11
    assert row["failures"] == []
    assert len(row["shown"]) == 3
    assert Image.open(io.BytesIO(sheet)).width > 0
    for size, results in run_workers(validate_rows, [1, 2, 3]).items():
        for figures, scores, drawn in results:
            assert figures.keys() == expected.keys(), size
            for name, value in expected.items():
                assert figures[name] == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), (size, name)
            assert {**scores, "shown": None} == {**row, "shown": None}
            assert sorted(scores["shown"], key=lambda shown: shown["place"]) == row["shown"]
            assert drawn == sheet


def labelled(model: LoadedModel) -> tuple[Confusion, PanopticState]:
    """Image by image through the stages that `label` is made of: rows that are scored as they are stored."""
    predict = Predict(model, device=CPU, batch_pixels=2**30, tile_pixels=2**30)
    scorer = Scorer.build(ScoreConfig(boundary=False), model.taxonomy, model.taxonomy, max_pixels=10**6)
    opened = open_source(ScenesSource.model_validate(TREE["source"]))
    confusion, panoptic = Confusion.empty(model.taxonomy), PanopticState.empty()
    for unit in opened.plan():
        for sample in opened.read(unit, ()):
            if isinstance(sample, Sample):
                image_HWC = np.asarray(Image.open(io.BytesIO(sample.image)))
                (prediction,) = predict([prepare(image_HWC, model.preprocess)])
                assert isinstance(prediction, Prediction)
                row = {**encode(prediction, "png", width=64, height=48), "width": 64, "height": 48}
                score = scorer.score(stored(row, "panoptic"), sample.targets, key="")
                assert score is not None
                confusion = confusion.merge(Confusion.from_row(score["confusion"]))
                panoptic = panoptic.merge(PanopticState.from_row(score["panoptic"]))
    return confusion, panoptic


@pytest.mark.parametrize("kind", ["quick", "queries"])
def test_the_figures_are_those_of_labelling(kind: str) -> None:
    model = quick_model() if kind == "quick" else some_model()
    scores = validate(Workers(), model, {**TREE, "batch_images": 1})
    confusion, panoptic = labelled(model)
    assert scores.confusion is not None
    assert scores.confusion.to_row() == confusion.to_row()
    assert scores.panoptic.to_row() == panoptic.to_row()
    figures = scores.figures("panoptic", model.taxonomy)
    expected, classes = panoptic.compute(model.taxonomy), confusion.compute()
    for end, kind in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("PQ", "SQ", "RQ"):
            assert figures[f"{name}{end}"] == pytest.approx(expected[kind][name], abs=1e-12, nan_ok=True)
    assert figures["mIoU"] == pytest.approx(classes["mIoU"], abs=1e-12)
    assert figures["PQ/road"] == pytest.approx(expected["per_class"][2]["PQ"], nan_ok=True)
    assert figures["IoU/road"] == pytest.approx(classes["per_class"][2]["IoU"])
    assert 0 < figures["mIoU"] < 1
    assert (0.1 if kind == "quick" else 0) <= figures["PQ"] < 1
    assert HEADLINES["panoptic"] in figures


class Seen(nn.Module):
    """The input, from which the scene is known again."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW


def knowing(mistake: int = -1) -> LoadedModel:
    """A model that knows the targets of all scenes, and calls each car of one of them a person."""
    scenes = [render_scene(index, width=64, height=48) for index in range(11)]
    by_image = {scene.image_HWC.tobytes(): index for index, scene in enumerate(scenes)}

    def forward(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
        return module(image_BCHW)

    def postprocess(output: Tensor, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
        predictions = []
        for image_CHW in output:
            pixels_CHW = ((image_CHW * std + mean) * 255).round().to(torch.uint8)
            at = by_image[pixels_CHW.permute(1, 2, 0)[:48, :64].contiguous().numpy().tobytes()]
            predictions.append(prediction_of(scenes[at], wrong=at == mistake))
        return predictions

    model = some_model()
    preprocess = replace(model.preprocess, resize=None)
    spec = replace(model.spec, forward=forward)
    return replace(model, module=Seen(), spec=spec, postprocess=postprocess, preprocess=preprocess)


def prediction_of(scene: Scene, wrong: bool) -> Prediction:
    label_HW = scene.semantic_HW.astype(np.uint8)
    categories = [one.category_id for one in scene.segments]
    if wrong:
        label_HW = np.where(label_HW == 5, 6, label_HW).astype(np.uint8)
        categories = [6 if category == 5 else category for category in categories]
    rles = [encode_rle(scene.segment_HW == one.id) for one in scene.segments]
    return Prediction(label_HW=label_HW, instances=segments_of(categories, rles))


def test_who_knows_the_targets_is_perfect() -> None:
    model = knowing()
    scores = validate(Workers(), model, TREE)
    assert scores.failures == ()
    figures = scores.figures("panoptic", model.taxonomy)
    for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU", "pixel_accuracy"):
        assert figures[name] == 1.0
    present = {one.category_id for index in range(11) for one in render_scene(index, width=64, height=48).segments}
    for category in model.taxonomy.categories:
        value = figures[f"PQ/{category.name}"]
        assert value == 1.0 if category.id in present else np.isnan(value)
    # The sheet's captions say so of each image.
    assert len(scores.shown) == 3
    assert all("PQ 1.000" in shown.caption for shown in scores.shown)


def test_a_mistake_counts_as_it_should() -> None:
    """Cars of one scene are called persons: each is a car that was missed, and a person that is not there."""
    scenes = [render_scene(index, width=64, height=48) for index in range(11)]
    cars = [sum(one.category_id == 5 and not one.iscrowd for one in scene.segments) for scene in scenes]
    people = sum(one.category_id == 6 and not one.iscrowd for scene in scenes for one in scene.segments)
    mistake = next(index for index, count in enumerate(cars) if count)
    missed, right = cars[mistake], sum(cars) - cars[mistake]
    model = knowing(mistake)
    figures = validate(Workers(), model, TREE).figures("panoptic", model.taxonomy)
    assert figures["PQ/car"] == pytest.approx(right / (right + missed / 2))
    assert figures["PQ/person"] == pytest.approx(people / (people + missed / 2))
    assert figures["PQ/road"] == figures["PQ_stuff"] == figures["SQ_things"] == 1.0
    pixels = [int((scene.semantic_HW == 5).sum()) for scene in scenes]
    assert figures["IoU/car"] == pytest.approx(1 - pixels[mistake] / sum(pixels))


def test_targets_are_mapped_into_the_models_classes() -> None:
    """Of the data set's classes two kinds of stuff become one segment of the model's, and signs are void."""
    model = knowing()
    figures = validate(Workers(), model, TREE, MERGED).figures("panoptic", model.taxonomy)
    assert figures["PQ/car"] == figures["PQ/sky"] == 1.0
    # The target has one segment where the prediction has a road and a pavement: a match where the road is most of it.
    true = matched = 0.0
    for index in range(11):
        scene = render_scene(index, width=64, height=48)
        road, both = ((np.isin(scene.semantic_HW, ids) & (scene.segment_HW > 0)).sum() for ids in ([2], [2, 3]))
        assert both
        matched, true = (matched + road / both, true + 1) if 2 * road > both else (matched, true)
    roads = sum(any(one.category_id == 2 for one in render_scene(at, width=64, height=48).segments) for at in range(11))
    assert 0 < true < 11
    assert figures["PQ/road"] == pytest.approx(matched / (true + (roads - true) / 2 + (11 - true) / 2))
    assert figures["PQ/pavement"] == 0.0
    # A segment that is void in the target counts neither way.
    assert np.isnan(figures["PQ/sign"])


def test_what_lacks_a_target_is_listed() -> None:
    tree = {**TREE, "source": {**TREE["source"], "targets": ["semantic"]}}
    model = some_model()
    scores = validate(Workers(), model, tree)
    assert scores.images == 0
    assert {failure.error_type for failure in scores.failures} == {"MissingTargetError"}
    assert len(scores.failures) == 11
    assert Scores.from_row(scores.to_row()) == scores
