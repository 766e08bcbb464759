"""Every model of the registry at its smallest: it learns, what it has learned comes back bit by bit, and labels.

A model without an entry in tiny_models.py fails here by its name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from pyroaring import BitMap
from tiny_models import TINY
from torch import Tensor

from pipeline.config import ModelConfig, OutputConfig, Resources, ScenesSource
from pipeline.config_train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.masks import decode_depth, decode_label_map, decode_rle
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Prediction
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import Scene, render_scene
from pipeline.stages.encode import encode
from pipeline.stages.label import Labeller
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.stages.work import LabelPlan, WorkItem
from pipeline.tablefiles import FILE_SCHEMA
from pipeline.training.augment import Example, make_example
from pipeline.training.batch import MicroBatch, collate
from pipeline.training.optim import OptimizerOptions, build_optimizer
from pipeline.training.setup import model_spec, objective, start_model
from pipeline.training.step import Stepper, Trainee
from pipeline.training.targets import output_labels
from pipeline.training.workers import Workers

CPU = torch.device("cpu")
# They are taken as they were trained: from prompts, by methods of their own.
UNTRAINED: set[str] = {"sam", "sam2", "sam3", "grounded_sam2"}
CAR = 5
# How far the weights move, so that the loss falls by nearly that times the gradient's norm. A detector's proposals
# follow its weights, and another choice of them is another loss: it needs a step that outweighs that.
STEP = {"semantic": 1e-4, "depth": 1e-4, "instance": 1e-3, "detection": 1e-3, "panoptic": 1e-3}
LOSSES: dict[str, dict[str, Any]] = {
    "dpt_depth": {"depth": {"kind": "scale_shift_invariant", "inverse": True}},
    "midas_hybrid": {"depth": {"kind": "scale_shift_invariant", "inverse": True}},
    "depth_anything_v2": {"depth": {"kind": "scale_shift_invariant", "inverse": True}},
    "depth_anything_v2_metric": {"depth": {"kind": "silog", "variance_focus": 0.85}},
    "depth_anything_v2_metric_outdoor": {"depth": {"kind": "silog", "variance_focus": 0.85}},
    "zoedepth": {"depth": {"kind": "silog", "variance_focus": 0.85}},
    "depth_pro": {"depth": {"kind": "log_l1"}},
    "recurrent_cnn": {"semantic": {"heads": {"pass1": 1, "pass2": 1, "out": 1}}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train_config(name: str, folder: Path) -> TrainConfig:
    tree = {
        "source": {"format": "scenes", "count": 2},
        "model": {"name": name, "options": TINY[name]},
        "loss": LOSSES.get(name, {}),
        "epochs": 1,
        "output": {"uri": str(folder)},
    }
    return TrainConfig.model_validate(tree)


def example(scene: Scene, model: LoadedModel) -> Example:
    """The scene with targets in the model's label space, whatever that is: its classes in a few of the model's."""
    task, taxonomy = model.spec.task, model.taxonomy
    if task == "depth":
        depth_HW = np.where(scene.depth_HW > 0, scene.depth_HW, np.nan)
        return make_example(scene.image_HWC, depth_HW=depth_HW)
    if task == "semantic":
        index_HW = scene.semantic_HW % len(taxonomy.ids)
        return make_example(scene.image_HWC, semantic_HW=np.where(scene.semantic_HW == 255, taxonomy.void_id, index_HW))
    segments = [one for one in scene.segments if task == "panoptic" or one.category_id >= CAR]
    ids = torch.tensor([taxonomy.ids[segment.category_id % len(taxonomy.ids)] for segment in segments])
    return make_example(
        scene.image_HWC,
        masks_NHW=torch.from_numpy(np.stack([scene.segment_HW == one.id for one in segments]).astype(np.uint8)),
        labels_N=output_labels(ids, taxonomy, background=model.spec.background),
    )


def batch_for(model: LoadedModel) -> MicroBatch:
    """Two scenes of 64x48 pixels, with a car or a person in each."""
    scenes = (render_scene(index, width=64, height=48) for index in range(20))
    whole = [scene for scene in scenes if any(segment.category_id >= CAR for segment in scene.segments)]
    examples = [example(scene, model) for scene in whole[:2]]
    return collate(examples, model.preprocess, void_id=model.taxonomy.void_id)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items: Sequence[Any] = [*output.values()] if isinstance(output, Mapping) else output
    return [tensor for item in items for tensor in tensors(item)]


def predict(model: LoadedModel, batch: MicroBatch) -> list[Tensor]:
    image_BCHW = batch.normalised(model.preprocess, torch.contiguous_format)
    # As a loaded model is: torch's attention rounds otherwise where a weight asks for a gradient.
    module = model.module.eval().requires_grad_(False)
    with torch.inference_mode():
        return tensors(model.spec.forward(module, image_BCHW, batch.frames))


def losses(model: LoadedModel, config: TrainConfig, batch: MicroBatch) -> tuple[float, float]:
    """The batch's loss before and after a short step against its gradient, with the same dropout."""
    module = model.module.requires_grad_(True).train()
    options = OptimizerOptions(kind="sgd", momentum=0, weight_decay=0)
    stepper = Stepper(
        Trainee(module, model.spec),
        objective(config, model, CPU),
        build_optimizer(module, options),
        model.preprocess,
        workers=Workers(),
        device=CPU,
    )
    torch.manual_seed(7)
    before = stepper.gradients([batch])
    # DistributedDataParallel waits for every gradient.
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    stepper.update(STEP[model.spec.task] / before.gradient_norm)
    torch.manual_seed(7)
    return before.loss, stepper.gradients([batch]).loss


def check_row(row: Mapping[str, Any], model: LoadedModel) -> None:
    """A row is what the table promises of the model's task."""
    task, taxonomy, size = model.spec.task, model.taxonomy, {"width": row["width"], "height": row["height"]}
    assert (row["status"], row["error_message"]) == ("ok", None)
    assert (row["semantic"] is not None) == (task in ("semantic", "panoptic"))
    assert (row["segments"] is not None) == (task in ("instance", "detection", "panoptic"))
    assert (row["depth"] is not None) == (task == "depth")
    if row["semantic"]:
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], **size)
        assert set(np.unique(label_HW).tolist()) <= {*taxonomy.ids, taxonomy.void_id}
    if row["depth"]:
        assert np.isfinite(decode_depth(row["depth"], **size)).all()
        assert row["depth"]["kind"] == model.context.depth_kind
    covered_HW = np.zeros((row["height"], row["width"]), int)
    for segment in row["segments"] or ():
        assert segment["category_id"] in taxonomy.by_id
        assert 0 <= segment["score"] <= 1
        assert segment["area"] > 0
        assert (segment["rle"] is None) == (task == "detection")
        if segment["rle"]:
            mask_HW = decode_rle(segment["rle"], **size)
            covered_HW += mask_HW
            assert segment["area"] == mask_HW.sum()
    assert task != "panoptic" or covered_HW.max(initial=0) <= 1
    assert [segment["id"] for segment in row["segments"] or ()] == [*range(1, len(row["segments"] or ()) + 1)]


def labelled(config: ModelConfig, folder: Path, targets: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Three scenes as rows, as a worker of a run writes them."""
    source = ScenesSource.model_validate(
        {"format": "scenes", "count": 3, "width": 64, "height": 48, "targets": targets}
    )
    plan = LabelPlan(
        source=source,
        models=(config,),
        output=OutputConfig(uri=str(folder)),
        resources=Resources(torch_threads=1, decode_threads=1),
        versions={},
        scorers=(None,),
        run_id="run",
        seed=0,
    )
    (unit,) = open_source(source).plan()
    windows = [*Labeller(plan).label(WorkItem(index=0, unit=unit, done=(BitMap(),), attempts=({},)))]
    files = [file for window in windows for file in window.files]
    return [row for file in files for row in pq.read_table(folder / file.path, partitioning=None).to_pylist()]


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_and_comes_back(name: str, tmp_path: Path) -> None:
    assert name in TINY, f"tests/models/tiny_models.py has no entry for {name}: options that make it tiny"
    config = train_config(name, tmp_path)
    model, _ = start_model(config)
    batch = batch_for(model)
    untrained = predict(model, batch)
    if any(True for _ in model.module.parameters()) and name not in UNTRAINED:
        before, after = losses(model, config, batch)
        assert before > after > 0
    state = {key: value.contiguous() for key, value in model.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "spec.json").write_text(json.dumps(model_spec(config, model)))
    stored = ModelConfig(weights=str(tmp_path))
    loaded = load_model(stored, seed=9, tile_pixels=1 << 20)
    assert (loaded.spec, loaded.preprocess, loaded.context) == (model.spec, model.preprocess, model.context)
    expected, again = predict(model, batch), predict(loaded, batch)
    assert len(expected) == len(again) >= 1
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    learned = [
        one.shape != other.shape or not torch.equal(one, other) for one, other in zip(expected, untrained, strict=False)
    ]
    assert any(learned) == (name != "null_model" and name not in UNTRAINED)

    rows = labelled(stored, tmp_path / "table")
    assert [row["image_id"] for row in rows] == [f"scenes/seed0-64x48/{index:09d}" for index in range(3)]
    run = Predict(model, device=CPU, batch_pixels=1 << 20, tile_pixels=1 << 20)
    scenes = [render_scene(index, width=64, height=48) for index in range(3)]
    predictions = run([prepare(scene.image_HWC, model.preprocess) for scene in scenes])
    for row, prediction in zip(rows, predictions, strict=True):
        check_row(row, model)
        assert isinstance(prediction, Prediction)
        columns = encode(prediction, "png", width=64, height=48)
        expected = pa.Table.from_pylist([columns], schema=pa.schema([FILE_SCHEMA.field(key) for key in columns]))
        assert {key: row[key] for key in columns} == expected.to_pylist()[0]


def test_those_that_do_not_learn_say_so(tmp_path: Path) -> None:
    for name in UNTRAINED:
        config = train_config(name, tmp_path)
        with pytest.raises(ConfigError, match=f"model {name} is not trained here: it has no loss"):
            objective(config, start_model(config)[0], CPU)


def test_every_entry_has_a_model() -> None:
    assert sorted(TINY) == sorted(MODELS)


@pytest.mark.parametrize("name", ["fastrcnn", "rcnn", "sppnet", "hypercolumns", "sds", "sam", "sam2", "sam3"])
def test_what_the_source_points_at_reaches_the_model(name: str, tmp_path: Path) -> None:
    where = {"mode": "prompts"} if name.startswith("sam") else {"proposals": "prompts"}
    options = {**TINY[name], **where, "score_threshold": 0.0}
    # Masks of prompts alone have no classes.
    config = ModelConfig(name=name, options=options, taxonomy="objects" if name == "sam3" else None)
    rows = labelled(config, tmp_path / "with", ("prompts",))
    assert [row["error_message"] for row in rows] == [None] * 3
    assert all(row["segments"] for row in rows)
    for row in labelled(config, tmp_path / "without"):
        assert (row["status"], row["error_type"]) == ("failed", "PredictError")
        assert row["error_message"].startswith("expected prompts with the image (.prompts.json, or a column of them)")
