"""What a run's config becomes: losses by class, borders between objects, a checkpoint that says all of its model."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from training_helpers import CPU, config, run_loop

from pipeline.config import LabelConfig, ModelConfig, OutputConfig, Resources, ScenesSource
from pipeline.config_train import TrainConfig
from pipeline.configfile import redacted
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.load import load_model
from pipeline.models.registry import MODELS
from pipeline.redaction import without_secrets
from pipeline.sources.base import UnitEnd
from pipeline.sources.registry import open_source
from pipeline.stages.decode import Decoded
from pipeline.stages.label import Labeller
from pipeline.stages.prepare import prepare
from pipeline.stages.work import LabelPlan, WorkItem
from pipeline.taxonomy import build_taxonomy, load_taxonomy
from pipeline.training.border import BorderWeights
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.losses.objective import SemanticLoss
from pipeline.training.setup import border_weights, model_spec, objective, start_model

SCENES = load_taxonomy("scenes")
CAR, PERSON, SIGN = 5, 6, 7


def semantic(folder: Path, **loss: Any) -> TrainConfig:
    return config(folder, loss={"semantic": loss})


def options(folder: Path, **loss: Any) -> Any:
    given = semantic(folder, **loss)
    found = objective(given, start_model(given)[0], CPU)
    assert isinstance(found, SemanticLoss)
    return found.options


def border(folder: Path, **loss: Any) -> BorderWeights | None:
    given = semantic(folder, **loss)
    return border_weights(given, start_model(given)[0])


@pytest.mark.parametrize("field", ["class_weights", "focal_alpha"])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, None),
        ({"car": 3.0, "sky": 0.0}, (0.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0)),
        ({6: 0.25, "7": 2}, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 2.0)),
    ],
)
def test_weights_are_by_class(field: str, weights: Any, expected: Any, tmp_path: Path) -> None:
    found = options(tmp_path, focal=1.0, **{field: weights})
    assert getattr(found, field) == expected
    assert getattr(found, {"class_weights": "focal_alpha", "focal_alpha": "class_weights"}[field]) is None


@pytest.mark.parametrize("field", ["class_weights", "focal_alpha"])
@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"lorry": 2.0}, "scenes has no 'lorry'; it has sky, building, "),
        ({9: 2.0}, "scenes has no 9; it has sky"),
        ({"car": 1.0, 5: 2.0}, "'car' stands there twice"),
        (dict.fromkeys(SCENES.ids, 0.0), "must be 0 or more, one of them more than 0"),
    ],
)
def test_weights_of_no_class_are_refused(field: str, weights: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{field}.*{part}"):
        options(tmp_path, **{field: weights})


def test_borders_are_between_things_unless_classes_are_named(tmp_path: Path) -> None:
    assert border(tmp_path) is None
    found = border(tmp_path, border={})
    assert found == BorderWeights(
        classes=frozenset({CAR, PERSON, SIGN}), class_weights=(1.0,) * 8, void_id=255, w0=10.0, sigma=5.0
    )
    named = border(
        tmp_path, border={"w0": 3, "sigma": 1.5, "classes": ["person", 4]}, class_weights={"person": 2.0}, dice=1.0
    )
    assert named is not None
    assert named.classes == {PERSON, 4}
    assert (named.w0, named.sigma, named.class_weights) == (3.0, 1.5, (1.0,) * 6 + (2.0, 1.0))


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        ({"border": {"classes": ["lorry"]}}, "border.classes: scenes has no 'lorry'"),
        ({"border": {}, "cross_entropy": 0.0, "dice": 1.0}, "border weighs the cross-entropy, and .* is 0"),
    ],
)
def test_borders_that_make_no_sense(loss: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=part):
        border(tmp_path, **loss)


def test_a_label_space_without_things_must_say_what_has_borders(tmp_path: Path) -> None:
    stuff = {**SCENES.describe(), "name": "stuff"}
    stuff["categories"] = [{**category, "kind": "stuff"} for category in stuff["categories"]]
    (tmp_path / "stuff.yaml").write_text(yaml.safe_dump(stuff))
    model = {"name": "unet_small", "taxonomy": str(tmp_path / "stuff.yaml"), "options": {"width": 4, "depth": 2}}
    for classes, expected in (([], None), (["car"], {CAR})):
        given = config(tmp_path, model=model, loss={"semantic": {"border": {"classes": classes}}})
        loaded = start_model(given)[0]
        if expected is None:
            with pytest.raises(ConfigError, match=r"border.classes: expected some, as stuff has no things"):
                border_weights(given, loaded)
        else:
            found = border_weights(given, loaded)
            assert found is not None
            assert found.classes == expected


def test_a_model_of_another_task_has_no_borders(tmp_path: Path) -> None:
    given = config(tmp_path, model={"spec": "training_models:DEPTH"}, loss={"semantic": {"border": {}}})
    assert border_weights(given, start_model(given)[0]) is None


# --- what a checkpoint says of its model

OWN = {
    "name": "own",
    "source": "a test",
    "void_ids": [99],
    "categories": [
        {"id": 2 * at + 1, "name": f"class {at}", "kind": "thing" if at % 2 else "stuff", "color": [at, 2, 3]}
        for at in range(8)
    ],
}


def published(folder: Path, **model: Any) -> tuple[TrainConfig, str]:
    """A checkpoint as a run writes and publishes it."""
    given = config(folder, model={"name": "unet_small", "options": {"width": 4, "depth": 2}} | model)
    loaded = start_model(given)[0]
    store = CheckpointStore(str(folder / "run"), {})
    saved = store.save(
        step=1, model=dict(loaded.module.state_dict()), spec=model_spec(given, loaded), state={}, meta={}
    )
    store.publish(saved, str(folder / "checkpoint"), {})
    return given, str(folder / "checkpoint")


def test_a_checkpoint_needs_no_file_of_the_machine_it_was_trained_on(tmp_path: Path) -> None:
    """Its label space is inside: for labelling, for training on, whole or in part, and for the checkpoint after it."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OWN))
    given, folder = published(tmp_path / "first", taxonomy=str(path))
    before = start_model(given)[0]
    path.unlink()
    moved = str(shutil.copytree(folder, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "first")

    taxonomy = build_taxonomy(OWN, "here")
    loaded = load_model(ModelConfig(weights=moved), seed=9, tile_pixels=2**22)
    assert loaded.taxonomy == taxonomy
    assert loaded.version == before.version
    for partial in (False, True):
        again = config(tmp_path, model={"weights": moved}, partial_weights=partial)
        model, unfilled = start_model(again)
        assert not unfilled
        assert model.taxonomy == taxonomy
        assert model_spec(again, model) == model_spec(given, before)
        for name, value in model.module.state_dict().items():
            assert torch.equal(value, before.module.state_dict()[name])


def test_partial_weights_may_come_from_another_label_space(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    _, folder = published(tmp_path, taxonomy=str(tmp_path / "own.yaml"))
    given = config(tmp_path, model={"weights": folder, "taxonomy": "camvid11"}, partial_weights=True)
    model, unfilled = start_model(given)
    assert model.taxonomy == load_taxonomy("camvid11")
    assert unfilled == ["head.weight", "head.bias"]
    assert model_spec(given, model)["taxonomy"] == load_taxonomy("camvid11").describe()
    spec = json.loads((Path(folder) / "spec.json").read_text())
    (Path(folder) / "spec.json").write_text(json.dumps({**spec, "taxonomy": {"name": "broken"}}))
    with pytest.raises(CheckpointError, match=r"spec.json \(taxonomy\) holds no taxonomy: KeyError: 'categories'"):
        start_model(config(tmp_path, model={"weights": folder}, partial_weights=True))


@pytest.mark.parametrize("taxonomy", [None, "scenes", "ade20k150"])
def test_bundled_label_spaces_are_stored_whole_too(taxonomy: str | None, tmp_path: Path) -> None:
    """A later version's may be others; the name stays inside."""
    given, folder = published(tmp_path, **({"taxonomy": taxonomy} if taxonomy else {}))
    stored = json.loads((Path(folder) / "spec.json").read_text())["taxonomy"]
    expected = load_taxonomy(taxonomy or "scenes")
    assert stored["name"] == expected.name
    assert build_taxonomy(stored, "spec.json") == expected
    assert load_model(ModelConfig(weights=folder), seed=1, tile_pixels=2**22).version == start_model(given)[0].version


HIDDEN_WORDS = ("t0ken-0f-the-hub", "st0rage-s3cret", "passw0rd-of-it", "s1gnature-of-it", "p4rt-api-key", "acc0unt")
SECRET_OPTIONS: dict[str, Any] = {
    "hf_token": HIDDEN_WORDS[0],
    "storage": {
        "secret": HIDDEN_WORDS[1],
        "account": HIDDEN_WORDS[5],
        "anon": False,
        "client_kwargs": {"endpoint_url": f"http://u:{HIDDEN_WORDS[2]}@minio:9000"},
    },
    "vocab": f"https://u:{HIDDEN_WORDS[2]}@host/vocab.json?n=1&sig={HIDDEN_WORDS[3]}",
    "use_mask_token": False,
    "parts": {"api_key": HIDDEN_WORDS[4], "layers": 3, "pad_token_id": 7},
}


def test_no_credential_of_the_options_is_in_what_a_run_leaves(tmp_path: Path) -> None:
    """Neither in spec.json nor in a checkpoint's state, history or pictures, whoever goes on from it."""
    model = {"spec": "training_models:SECRETIVE", "options": SECRET_OPTIONS}
    given = config(tmp_path / "run", model=model, checkpoint={"every_steps": 2})
    loop, _ = run_loop(given)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.name == "spec.json"]) >= 2
    for path in files:
        data = path.read_bytes()
        assert [word for word in HIDDEN_WORDS if word.encode() in data] == [], path
    spec = json.loads((tmp_path / "run" / "checkpoint" / "spec.json").read_text())
    assert spec["options"] == {
        "storage": {"anon": False, "client_kwargs": {"endpoint_url": "http://u:***@minio:9000"}},
        "vocab": "https://u:***@host/vocab.json?n=1&sig=***",
        "use_mask_token": False,
        "parts": {"layers": 3, "pad_token_id": 7},
    }
    # Whoever gives them anew has the same model, whatever they are, and so has whoever does without.
    stored = str(tmp_path / "run" / "checkpoint")
    versions = {
        load_model(
            ModelConfig(weights=stored, spec="training_models:SECRETIVE", options=options), seed=0, tile_pixels=1 << 20
        ).version
        for options in ({}, SECRET_OPTIONS, {"hf_token": "another-token"}, {"hf_token": ""})
    }
    assert len(versions) == 1
    other = ModelConfig(weights=stored, spec="training_models:SECRETIVE", options={"use_mask_token": True})
    assert load_model(other, seed=0, tile_pixels=1 << 20).version not in versions
    # A checkpoint of a version that kept them is no way in either.
    again = given.model_copy(
        update={"model": ModelConfig(weights=stored, spec="training_models:SECRETIVE", options=SECRET_OPTIONS)}
    )
    assert model_spec(again, loop.model)["options"] == spec["options"]


def test_no_credential_of_the_options_is_in_the_table(tmp_path: Path) -> None:
    source = ScenesSource.model_validate({"format": "scenes", "count": 1, "width": 64, "height": 48, "targets": ()})
    model = ModelConfig(spec="training_models:SECRETIVE", options=SECRET_OPTIONS)
    plan = LabelPlan(
        source=source,
        models=(model,),
        output=OutputConfig(uri=str(tmp_path)),
        resources=Resources(torch_threads=1, decode_threads=1),
        versions={},
        scorers=(None,),
        run_id="run",
        seed=0,
    )
    labeller = Labeller(plan)
    black = prepare(np.zeros((48, 64, 3), np.uint8), labeller.models[0].preprocess)
    decoded = Decoded(image_id="a", shard_id="s", position=0, width=64, height=48, prepared=(black,))
    (unit,) = open_source(source).plan()
    item = WorkItem(index=0, unit=unit, done=((),), attempts=({},))
    windows = [*labeller.label_decoded(item, iter([decoded, UnitEnd(rows=1)]))]
    (file,) = (file for window in windows for file in window.files)
    (row,) = pq.read_table(tmp_path / file.path).to_pylist()
    assert row["error_message"].startswith("RuntimeError: cannot reach it with ***, ")
    run = LabelConfig.model_validate({"source": source, "models": [model], "output": {"uri": str(tmp_path)}})
    text = json.dumps([row, redacted(run), labeller.models[0].describe()], default=str)
    # An account's name is hidden by its place alone, which an error's text does not tell.
    assert [word for word in HIDDEN_WORDS[:-1] if word in text] == []


@pytest.mark.parametrize("name", MODELS)
def test_no_option_of_a_model_is_taken_for_a_credential(name: str) -> None:
    spec = MODELS[name]
    given = {item.name: item.default for item in inspect.signature(spec.build).parameters.values()}
    given = {key: value for key, value in {**given, **(spec.options or {})}.items() if value is not inspect._empty}
    assert without_secrets(given) == given
