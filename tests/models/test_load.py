"""Loading: seeds, versions, options, and weights that are missing, foreign, damaged or hostile."""

import json
import os
import pickle
import shutil
import urllib.error
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, ConfigError, MaskmillError, UnknownModelError
from pipeline.models.load import LoadedModel, check_models, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Prediction
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import build_taxonomy, load_taxonomy

BUNDLED = Path(str(resources.files("pipeline"))) / "checkpoints" / "unet_small_scenes"


def load(seed: int = 0, tile_pixels: int = 4_194_304, **fields: Any) -> LoadedModel:
    fields.setdefault("name", "unet_small")
    return load_model(ModelConfig.model_validate(fields), seed=seed, tile_pixels=tile_pixels)


def refused(kind: type[MaskmillError], **fields: Any) -> str:
    with pytest.raises(MaskmillError) as caught:
        load(**fields)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(BUNDLED / "model.safetensors")


# --- random weights and versions


def test_random_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.version == again.version != other.version
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(first.module.parameters(), other.module.parameters(), strict=True))


def test_a_loaded_model_is_ready_to_predict() -> None:
    model = load()
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    described = model.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["parameters"] == sum(parameter.numel() for parameter in model.module.parameters())
    assert (described["name"], described["task"], described["version"]) == ("unet_small", "semantic", model.version)


CHANGES: list[dict[str, Any]] = [
    {"seed": 3},
    {"weights": "bundled:unet_small_scenes"},
    {"tile_pixels": 65_536},
    *({"options": option} for option in ({"resize": 64}, {"max_size": 64}, {"pad_multiple": 32}, {"antialias": False})),
    *({"options": option} for option in ({"low_confidence": 0.4}, {"score_threshold": 0.3}, {"max_segments": 5})),
    *({"options": option} for option in ({"precision": "bf16"}, {"precision": "fp16"}, {"mean": [0, 0, 0]})),
    {"options": {"std": [1, 1, 1]}},
    {"options": {"width": 8}},
    {"options": {"depth": 3}},
]


def test_every_change_of_the_labels_is_another_version() -> None:
    versions = [load().version, *(load(**change).version for change in CHANGES)]
    assert len(set(versions)) == len(versions)
    assert all(len(version) == 16 and int(version, 16) >= 0 for version in versions)


@pytest.mark.parametrize(
    "change",
    [
        {"label": "other"},
        {"options": {"compile": False}},
        {"options": {"precision": "fp32"}},
        {"options": {"low_confidence": 0.5, "pad_multiple": 16}},
        {"storage": {"anon": True}},
        {"taxonomy": "scenes"},
        {"options": {"width": 16, "depth": 4}},
    ],
)
def test_what_changes_no_label_keeps_the_version(change: dict[str, Any]) -> None:
    assert load(**change).version == load().version


def test_the_version_follows_the_taxonomy(tmp_path: Path) -> None:
    text = (resources.files("pipeline") / "taxonomies" / "scenes.yaml").read_text("utf-8")
    (tmp_path / "same.yaml").write_text(text)
    (tmp_path / "renamed.yaml").write_text(text.replace("name: car,", "name: vehicle,"))
    (tmp_path / "coloured.yaml").write_text(text.replace("[40, 60, 210]", "[1, 2, 3]"))
    (tmp_path / "shifted.yaml").write_text(text.replace("id: 7", "id: 9"))
    version = load().version
    assert load(taxonomy=str(tmp_path / "same.yaml")).version == version
    assert load(taxonomy=str(tmp_path / "coloured.yaml")).version == version
    assert load(taxonomy=str(tmp_path / "renamed.yaml")).version != version
    assert load(taxonomy=str(tmp_path / "shifted.yaml")).version != version


def test_tiles_are_no_part_of_a_detectors_version() -> None:
    # Built small: what matters is the spec.
    spec = MODELS["maskrcnn_resnet50_fpn_v2"]
    assert not spec.dense


def test_a_weight_that_changes_by_one_bit_is_another_version(tmp_path: Path) -> None:
    tensors = state()
    name = next(iter(tensors))
    flat = tensors[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    assert load(weights=str(tmp_path / "w.safetensors")).version != load(weights="bundled:unet_small_scenes").version


# --- checkpoints


def test_one_checkpoint_under_all_its_addresses(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    torch.save(state(), tmp_path / "plain.pt")
    torch.save({"state_dict": state(), "epoch": 3}, tmp_path / "nested.pth")
    addresses = ["bundled:unet_small_scenes", str(folder), f"file://{folder}", str(folder / "model.safetensors")]
    addresses += [str(tmp_path / "plain.pt"), str(tmp_path / "nested.pth")]
    assert len({load(weights=address).version for address in addresses}) == 1


@pytest.mark.parametrize("address", ["bundled:unet_small_scenes", str(BUNDLED)])
def test_a_checkpoint_names_its_model(address: str) -> None:
    model = load(name=None, weights=address)
    assert model.spec is MODELS["unet_small"]
    assert model.taxonomy.name == "scenes"
    assert model.version == load(weights=address).version


def checkpoint(tmp_path: Path, **changes: Any) -> str:
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    spec = {**json.loads((folder / "spec.json").read_text("utf-8")), **changes}
    (folder / "spec.json").write_text(json.dumps(spec))
    return str(folder)


def test_options_of_a_checkpoint_are_used_and_may_be_overridden(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, preprocess={"resize": 48, "pad_multiple": 16}, options={"low_confidence": 0.25})
    assert load(weights=folder).preprocess.resize == 48
    assert load(weights=folder).context.low_confidence == 0.25
    assert load(weights=folder, options={"resize": 96}).preprocess.resize == 96


@pytest.mark.parametrize(
    ("changes", "part", "kind"),
    [
        ({"model": "unet_smal"}, "unknown model 'unet_smal'; did you mean unet_small", UnknownModelError),
        (
            {"model": "null_model", "options": {}},
            "does not fit the model: logits_K is missing; ",
            CheckpointError,
        ),
        ({"model": 5}, "expected an object with a field model", CheckpointError),
        ({"options": [1]}, "options must be a dict, got [1]", CheckpointError),
        ({"preprocess": "x"}, "preprocess must be a dict, got 'x'", CheckpointError),
        ({"taxonomy": 5}, "taxonomy must be a str or dict, got 5", CheckpointError),
        ({"taxonomy": None}, "taxonomy must be a str or dict, got None", CheckpointError),
        ({"taxonomy": "scene"}, "unknown taxonomy 'scene'; did you mean scenes?", ConfigError),
        ({"options": {"wdith": 8}}, "unknown option 'wdith'", ConfigError),
    ],
)
def test_checkpoint_specs_that_are_wrong(
    changes: dict[str, Any], part: str, kind: type[MaskmillError], tmp_path: Path
) -> None:
    assert part in refused(kind, name=None, weights=checkpoint(tmp_path, **changes))


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else []


# Eight classes, as the bundled weights have, under other ids and names, and a void of the data set's own.
OWN: dict[str, Any] = {
    "name": "own",
    "source": "a test",
    "void_ids": [99],
    "categories": [
        {
            "id": 3 * at + 1,
            "name": f"class {at}",
            "kind": "thing" if at % 2 else "stuff",
            "color": [at, 5 * at, 255 - at],
        }
        for at in range(8)
    ],
}


def labels(model: LoadedModel) -> Any:
    """What a picture of noise is labelled as."""
    image_HWC = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    predict = Predict(model, device=torch.device("cpu"), batch_pixels=2**20, tile_pixels=2**20)
    (found,) = predict([prepare(image_HWC.numpy(), model.preprocess)])
    assert isinstance(found, Prediction)
    return found.label_HW


def test_a_checkpoint_carries_its_label_space(tmp_path: Path) -> None:
    """With the taxonomy in spec.json it is the model that the YAML file made it, wherever that file is not."""
    torch.set_num_threads(1)
    given = build_taxonomy(OWN, "here")
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OWN))
    before = load(weights="bundled:unet_small_scenes", taxonomy=str(path))
    expected_HW = labels(before)
    path.unlink()
    model = load(name=None, weights=checkpoint(tmp_path, taxonomy=given.describe()))
    assert model.taxonomy == given == before.taxonomy
    assert model.version == before.version
    found_HW = labels(model)
    np.testing.assert_array_equal(found_HW, expected_HW)
    assert len(np.unique(found_HW)) > 1
    assert set(np.unique(found_HW).tolist()) <= set(given.ids)


@pytest.mark.parametrize("name", ["scenes", "camvid11"])
def test_a_bundled_label_space_is_the_same_by_name_and_by_content(name: str, tmp_path: Path) -> None:
    """The name stays inside; with eight classes the weights fit as well."""
    taxonomy = load_taxonomy(name)
    content = {**taxonomy.describe(), "categories": taxonomy.describe()["categories"][:8]}
    model = load(weights=checkpoint(tmp_path, taxonomy=content))
    assert model.taxonomy.name == name
    assert model.taxonomy.categories == taxonomy.categories[:8]
    assert model.taxonomy.void_ids == taxonomy.void_ids
    if name == "scenes":
        assert model.taxonomy == taxonomy
        assert model.version == load(weights="bundled:unet_small_scenes").version


def test_the_configs_label_space_wins_over_the_checkpoints(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, taxonomy=OWN)
    model = load(weights=folder, taxonomy="scenes")
    assert model.taxonomy == load_taxonomy("scenes")
    assert model.version == load(weights="bundled:unet_small_scenes").version != load(weights=folder).version
    # What is not asked for cannot be in the way.
    spec = json.loads((Path(folder) / "spec.json").read_text())
    (Path(folder) / "spec.json").write_text(json.dumps({**spec, "taxonomy": {"name": "broken"}}))
    assert load(weights=folder, taxonomy="scenes").version == model.version


def test_a_checkpoint_may_still_name_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OWN))
    assert load(weights=checkpoint(tmp_path, taxonomy=str(path))).taxonomy == build_taxonomy(OWN, "here")


FIRST = OWN["categories"][0]


def changed(**fields: Any) -> dict[str, Any]:
    """The taxonomy with its first category changed."""
    return {**OWN, "categories": [{**FIRST, **fields}, *OWN["categories"][1:]]}


def without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("taxonomy", "part"),
    [
        ({}, "holds no taxonomy: KeyError: 'categories'"),
        (without(OWN, "name"), "holds no taxonomy: KeyError: 'name'"),
        ({**OWN, "name": None}, "expected a name, got a NoneType"),
        ({**OWN, "categories": "abc"}, "holds no taxonomy: TypeError"),
        ({**OWN, "categories": {"a": 1}}, "holds no taxonomy: TypeError"),
        ({**OWN, "categories": []}, "ids must be unique, 0 to 65534, at least one; got []"),
        ({**OWN, "categories": [FIRST, FIRST]}, "ids must be unique, 0 to 65534, at least one; got [1, 1]"),
        ({**OWN, "categories": [without(FIRST, "color")]}, "holds no taxonomy: KeyError: 'color'"),
        (changed(id=1.5), "expected a whole number, got 1.5"),
        (changed(id="1"), "expected a whole number, got '1'"),
        (changed(id=-1), "ids must be unique, 0 to 65534, at least one; got [-1"),
        (changed(id=65535), "ids must be unique, 0 to 65534"),
        (changed(id=float("inf")), "holds no taxonomy: OverflowError"),
        (changed(id=10**4000), "ids must be unique"),
        (changed(name=["a"]), "expected a name, got a list"),
        (changed(name=deep(500)), "expected a name, got a list"),
        (changed(kind="things"), "category 1: kind must be thing or stuff"),
        (changed(color=[0, 0, 256]), "category 1: kind must be thing or stuff, color three bytes"),
        (changed(color="#ff0000"), "holds no taxonomy: ValueError"),
        ({**OWN, "void_ids": [4]}, "void_ids must be 0 to 65535 and no category's, got [4]"),
        ({**OWN, "void_ids": 5}, "holds no taxonomy: TypeError"),
    ],
)
def test_a_label_space_that_is_none_is_refused(taxonomy: dict[str, Any], part: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, taxonomy=taxonomy)
    said = refused(CheckpointError, name=None, weights=folder)
    assert said.startswith(f"{folder}/spec.json (taxonomy)")
    assert part in said
    assert len(said) <= 500


def test_a_label_space_of_another_size_does_not_fit(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, taxonomy={**OWN, "categories": OWN["categories"][:5]})
    assert "head.weight is (8, 16, 1, 1), the model has (5, 16, 1, 1)" in refused(CheckpointError, weights=folder)


def test_a_spec_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    many = [{**FIRST, "name": "x" * 10_000_000}]
    folder = checkpoint(tmp_path, taxonomy={**OWN, "categories": many})
    assert "bytes, expected at most 10000000" in refused(CheckpointError, weights=folder)


def test_a_checkpoint_of_another_model() -> None:
    said = refused(CheckpointError, name="null_model", weights="bundled:unet_small_scenes")
    assert said == "bundled:unet_small_scenes holds a unet_small, the config asks for null_model"


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "[" * 100_000, "null"])
def test_a_spec_that_is_none(text: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (Path(folder) / "spec.json").write_text(text)
    assert "is no checkpoint spec" in refused(CheckpointError, weights=folder)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "spec.json").write_text('{"model": "unet_small"}')
    assert "expected a folder with spec.json" in refused(CheckpointError, weights=str(tmp_path / "none"))
    for weights in (tmp_path / "half", tmp_path / "none.safetensors", tmp_path / "none.pt"):
        assert "no weights at" in refused(CheckpointError, weights=str(weights))
    assert "bundled: unet_small_scenes" in refused(CheckpointError, weights="bundled:unet")
    assert "'hub' is not a kind of weights; expected none, bundled:NAME" in refused(CheckpointError, weights="hub:a/b")
    assert "do not name their model" in refused(ConfigError, name=None, weights=str(tmp_path / "none.pt"))


def test_weights_that_do_not_fit_list_every_difference(tmp_path: Path) -> None:
    tensors = state()
    tensors["extra.weight"] = torch.zeros(1)
    missing = tensors.pop("head.bias")
    tensors["head.weight"] = torch.zeros(9, 16, 1, 1)
    path = str(tmp_path / "w.safetensors")
    safetensors.torch.save_file(tensors, path)
    said = refused(CheckpointError, weights=path)
    assert "head.bias is missing" in said
    assert "extra.weight is not in the model" in said
    assert "head.weight is (9, 16, 1, 1), the model has (8, 16, 1, 1)" in said
    assert said.count(";") == 2
    assert len(missing) == 8
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    assert "; and " in refused(CheckpointError, weights=path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_pickles_are_never_executed(writer: str, suffix: str, tmp_path: Path) -> None:
    path, mark = tmp_path / f"bomb{suffix}", tmp_path / "executed"
    value = {"head.bias": Bomb(mark)}
    if writer == "torch":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value, protocol=2))
    said = refused(CheckpointError, weights=str(path))
    assert "weights_only=True" in said or "no safetensors file" in said
    assert not mark.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False) if writer == "torch" and suffix == ".pt" else None
    assert mark.exists() == (writer == "torch" and suffix == ".pt")  # it would have gone off


@pytest.mark.parametrize("value", [[1], torch.zeros(1), {"a": 1}, {"state_dict": {"a": "b"}}, nn.Identity()])
def test_torch_files_that_hold_something_else(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "w.pt")
    refused(CheckpointError, weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 2000, -1, -1000])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files(size: int, suffix: str, tmp_path: Path) -> None:
    if suffix == ".pt":
        torch.save(state(), tmp_path / "whole.pt")
        data = (tmp_path / "whole.pt").read_bytes()
    else:
        data = (BUNDLED / "model.safetensors").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[:size])
    assert f"cut{suffix}" in refused(CheckpointError, weights=str(tmp_path / f"cut{suffix}"))


@pytest.mark.parametrize(
    "header", [b"{}", b"[1]", b"x" * 20, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}']
)
def test_damaged_safetensors(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(CheckpointError, weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    refused(CheckpointError, weights=str(tmp_path / "w.safetensors"))


# --- torchvision


@pytest.mark.parametrize("enum", ["", "Nope_Weights.X", "FCN_ResNet50_Weights.NOPE", "FCN_ResNet50_Weights", "os.path"])
def test_unknown_torchvision_weights(enum: str) -> None:
    assert "torchvision has no weights" in refused(CheckpointError, weights=f"torchvision:{enum}")


LRASPP = "LRASPP_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1"


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), EOFError("cut")]
)
def test_no_network_is_said_clearly(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    said = refused(CheckpointError, name="lraspp_mobilenet_v3_large", weights=f"torchvision:{LRASPP}")
    assert said.startswith(f"cannot download {LRASPP}: {type(error).__name__}: ")
    assert "fetch lraspp_mobilenet_v3_large-d234d4ea.pth elsewhere and give its path as weights" in said


def test_a_file_in_torchs_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = MODELS["lraspp_mobilenet_v3_large"].build(21).state_dict()
    torch.save({**tensors, "aux_classifier.0.weight": torch.zeros(1)}, cache / "lraspp_mobilenet_v3_large-d234d4ea.pth")
    model = load(name="lraspp_mobilenet_v3_large", weights=f"torchvision:{LRASPP}")
    assert all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert "does not fit the model" in refused(CheckpointError, weights=f"torchvision:{LRASPP}")
    (cache / "lraspp_mobilenet_v3_large-d234d4ea.pth").write_bytes(b"half a file")
    assert "cannot download" in refused(
        CheckpointError, name="lraspp_mobilenet_v3_large", weights=f"torchvision:{LRASPP}"
    )


# --- options


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"resise": 5}, "unknown option 'resise' in options of model 'unet_small'; known: antialias, channels_last"),
        ({"num_classes": 5}, "unknown option 'num_classes'"),
        ({"taxonomy": "voc21"}, "unknown option 'taxonomy'"),
        ({"resize": "64"}, "resize must be a whole number above 0, got '64' (options of model 'unet_small')"),
        ({"resize": 64.5}, "resize must be a whole number"),
        ({"resize": 0}, "resize must be a whole number above 0, got 0"),
        ({"resize": True}, "resize must be a whole number"),
        ({"pad_multiple": None}, "pad_multiple must be a whole number above 0, got None"),
        ({"pad_multiple": -16}, "pad_multiple must be"),
        ({"max_segments": 1.5}, "max_segments must be"),
        ({"antialias": 1}, "antialias must be true or false, got 1"),
        ({"score_threshold": "high"}, "score_threshold must be a number from 0 to 1, got 'high'"),
        ({"score_threshold": 1.5}, "score_threshold must be a number from 0 to 1"),
        ({"low_confidence": float("nan")}, "low_confidence must be a number from 0 to 1, got nan"),
        ({"mean": 0.5}, "mean must be three numbers, got 0.5"),
        ({"mean": [1, 2]}, "mean must be three numbers"),
        ({"mean": [1, 2, "x"]}, "mean[2] must be a number, got 'x'"),
        ({"std": [1, 1, 0]}, "std[2] must be a number above 0, got 0"),
        ({"depth_kind": "metres"}, "depth_kind must be one of metric_m, relative, inverse_relative, got 'metres'"),
        (
            {"precision": "fp8"},
            "precision must be one of fp32, tf32, bf16, fp16, int8_dynamic, int8_weight_only, got 'fp8'",
        ),
        ({"precision": ["fp32"]}, "precision must be one of"),
        ({"compile": "false"}, "compile must be true or false, got 'false'"),
        ({"channels_last": 1}, "channels_last must be true or false, got 1"),
        ({"width": 0}, "model 'unet_small' cannot be built: ValueError: num_classes must be 2 or more"),
        ({"width": "wide"}, "model 'unet_small' cannot be built: TypeError"),
    ],
)
def test_options_that_are_wrong(option: dict[str, Any], part: str) -> None:
    assert part in refused(ConfigError, options=option)


def test_options_that_are_right() -> None:
    options = {"resize": None, "max_size": 99, "mean": [0, 0.5, 1], "antialias": False, "score_threshold": 0}
    model = load(options={**options, "precision": "bf16", "width": 4})
    assert (model.preprocess.resize, model.preprocess.max_size, model.preprocess.antialias) == (None, 99, False)
    assert model.preprocess.mean == (0.0, 0.5, 1.0)
    assert model.context.score_threshold == 0
    assert model.autocast is torch.bfloat16
    assert model.module.head.in_channels == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("models", "labels"),
    [
        ([{"name": "unet_small"}, {"name": "null_model"}], ["unet_small", "null_model"]),
        ([{"name": "unet_small"}, {"name": "unet_small", "label": "b-2.x"}], ["unet_small", "b-2.x"]),
        ([{"weights": "bundled:unet_small_scenes"}], ["unet_small"]),
    ],
)
def test_labels(models: list[dict[str, str]], labels: list[str]) -> None:
    assert check_models(tuple(map(ModelConfig.model_validate, models))) == labels


@pytest.mark.parametrize("label", ["a b", "a/b", "ü", "..", "-"])
def test_labels_that_are_wrong(label: str) -> None:
    with pytest.raises(ConfigError, match="a model's label may hold"):
        check_models((ModelConfig(name="unet_small", label=label),))


def test_labels_must_differ() -> None:
    with pytest.raises(ConfigError, match=r"two models are called 'unet_small' in the table; set models.N.label"):
        check_models((ModelConfig(name="unet_small"), ModelConfig(name="unet_small", weights="none")))
