"""Validation: every image once, and the same figures for any number of workers."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import CPU, run_workers, validate_once

from pipeline.config import ModelConfig, ScenesSource, ScoreConfig
from pipeline.config_train import TargetConfig, ValidationConfig
from pipeline.metrics.confusion import Confusion
from pipeline.models.load import load_model
from pipeline.predictions.base import Predicted
from pipeline.sources.base import Sample
from pipeline.sources.registry import open_source
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.stages.score import Scorer
from pipeline.training.plan import plan_source
from pipeline.training.samples import Failure
from pipeline.training.validate import Scores, Validator, lower_is_better
from pipeline.training.workers import Workers

# 11 images in units of 4, in batches of 2: divisible by none of 2 and 3 workers, in images or in batches.
TREE: Mapping[str, Any] = {
    "source": {"format": "scenes", "count": 11, "width": 64, "height": 48, "unit_images": 4},
    "batch_images": 2,
}


@pytest.fixture(scope="module")
def shared() -> dict[int, list[Any]]:
    return run_workers(validate_once, [1, 2, 3], dict(TREE))


def test_any_number_of_workers_gives_the_same_figures(shared: dict[int, list[Any]]) -> None:
    torch.set_num_threads(1)
    expected, row = validate_once(Workers(), dict(TREE))
    assert row["images"] == 11
    for size, results in shared.items():
        for figures, scores in results:
            assert figures.keys() == expected.keys(), size
            for name, value in expected.items():
                assert figures[name] == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), (size, name)
            assert scores == row


def test_the_figures_are_those_of_labelling() -> None:
    """Image by image through the stages that `label` is made of."""
    torch.set_num_threads(1)
    source = ScenesSource.model_validate(TREE["source"])
    model = load_model(ModelConfig(weights="bundled:unet_small_scenes"), seed=0, tile_pixels=2**22)
    predict = Predict(model, device=CPU, batch_pixels=2**30, tile_pixels=2**30)
    scorer = Scorer.build(ScoreConfig(boundary=False), model.taxonomy, model.taxonomy, max_pixels=10**6)
    total = Confusion.empty(model.taxonomy)
    opened = open_source(source)
    for unit in opened.plan():
        for sample in opened.read(unit, ()):
            if isinstance(sample, Sample):
                image_HWC = np.asarray(Image.open(io.BytesIO(sample.image)))
                (prediction,) = predict([prepare(image_HWC, model.preprocess)])
                score = scorer.score(Predicted(label_HW=prediction.label_HW), sample.targets, key="")  # type: ignore[union-attr]
                assert score is not None
                total = total.merge(Confusion.from_row(score["confusion"]))
    figures, _ = validate_once(Workers(), {**TREE, "batch_images": 1})
    expected = total.compute()
    for name in ("mIoU", "pixel_accuracy", "fwIoU", "mean_accuracy"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-12)
    assert figures["IoU/car"] == pytest.approx(expected["per_class"][5]["IoU"], abs=1e-12)
    assert figures["mIoU"] > 0.3


def files(folder: Path, broken: int = 0, lacking: int = 0) -> dict[str, Any]:
    """The same scenes as files; of the first ones images are broken, of the last ones targets lacking."""
    source = open_source(ScenesSource.model_validate(TREE["source"]))
    index = 0
    for unit in source.plan():
        for sample in source.read(unit, ()):
            if isinstance(sample, Sample):
                for kind, data in (("image", sample.image), ("semantic", sample.targets["semantic"])):
                    if kind == "semantic" and index >= 11 - lacking:
                        continue
                    path = folder / kind / f"{index:03d}.png"
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(data[:100] if kind == "image" and index < broken else data)
                index += 1
    return {
        "format": "files",
        "uri": str(folder),
        "images": "image/{id}.png",
        "targets": {"semantic": "semantic/{id}.png"},
    }


def test_what_cannot_be_scored_is_listed(tmp_path: Path) -> None:
    figures, row = validate_once(Workers(), {"source": files(tmp_path, broken=2, lacking=1), "batch_images": 2})
    assert row["images"] == 8
    assert sorted((image_id, kind) for image_id, kind, _ in row["failures"]) == [
        ("image/000.png", "CorruptImageError"),
        ("image/001.png", "CorruptImageError"),
        ("image/010.png", "MissingTargetError"),
    ]
    assert 0 < figures["mIoU"] < 1


def test_targets_are_mapped_into_the_models_classes() -> None:
    """Of the data set's eight classes two become one of the model's, and one is left out."""
    merged: dict[str, Any] = {"merge": {"road": ["road", "pavement"], "pavement": [], "sign": []}}
    figures, row = validate_once(Workers(), dict(TREE), merged)
    confusion = Confusion.from_row(row["confusion"])
    plain = Confusion.from_row(validate_once(Workers(), dict(TREE))[1]["confusion"])
    by_id = {id_: at for at, id_ in enumerate(plain.ids)}
    road, pavement, sign = (by_id[id_] for id_ in (2, 3, 7))
    assert (confusion.matrix[road] == plain.matrix[road] + plain.matrix[pavement]).all()
    assert confusion.matrix[[pavement, sign]].sum() == 0
    assert plain.matrix[[pavement, sign]].sum() > 0
    assert figures["IoU/pavement"] == 0.0


def test_training_mode_is_given_back() -> None:
    model = load_model(ModelConfig(name="unet_small", options={"width": 4}), seed=0, tile_pixels=2**22)
    config = ValidationConfig.model_validate(TREE)
    validator = Validator(config, TargetConfig(), plan_source(open_source(config.source)), model, device=CPU, threads=1)
    module = model.module.train()
    module.encoder[0].eval()  # type: ignore[union-attr,index]
    before = {name: child.training for name, child in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    validator.score(module, Workers())
    assert {name: child.training for name, child in module.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("task", ["semantic", "depth", "instance"])
def test_scores_come_back_from_rows(task: Any) -> None:
    model = load_model(ModelConfig(name="unet_small"), seed=0, tile_pixels=2**22)
    scores = Scores(images=2, failures=(Failure("a", "b", "c"),))
    assert Scores.from_row(scores.to_row()) == scores
    assert all(np.isnan(value) for value in scores.figures(task, model.taxonomy).values())


def test_errors_are_better_when_low() -> None:
    assert lower_is_better("AbsRel")
    assert not lower_is_better("mIoU")
    assert not lower_is_better("delta1")
