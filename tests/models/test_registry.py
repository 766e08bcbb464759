"""The registry: what each model is, that each builds with its number of outputs, and what is said of an unknown one."""

import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, UnknownModelError
from pipeline.models.registry import MODELS, find_model, import_spec
from pipeline.models.spec import Frame, ModelSpec
from pipeline.taxonomy import load_taxonomy

# Name: task, taxonomy, outputs, license, million parameters.
TABLE = {
    "unet_small": ("semantic", "scenes", 8, "Apache-2.0", 0.4),
    "null_model": ("semantic", "scenes", 8, "Apache-2.0", 0.0),
    "fcn_resnet50": ("semantic", "voc21", 21, "BSD-3-Clause", 33.0),
    "fcn_resnet101": ("semantic", "voc21", 21, "BSD-3-Clause", 51.9),
    "deeplabv3_resnet50": ("semantic", "voc21", 21, "BSD-3-Clause", 39.6),
    "deeplabv3_resnet101": ("semantic", "voc21", 21, "BSD-3-Clause", 58.6),
    "deeplabv3_mobilenet_v3_large": ("semantic", "voc21", 21, "BSD-3-Clause", 11.0),
    "lraspp_mobilenet_v3_large": ("semantic", "voc21", 21, "BSD-3-Clause", 3.2),
    "maskrcnn_resnet50_fpn_v2": ("instance", "coco80", 91, "BSD-3-Clause", 46.4),
}
FORWARD = ["unet_small", "null_model", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]


def test_the_table_is_whole() -> None:
    assert list(MODELS) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_what_each_model_is(name: str) -> None:
    spec, (task, taxonomy_name, outputs, license_name, _) = find_model(name), TABLE[name]
    taxonomy = load_taxonomy(spec.taxonomy)
    assert (spec.name, spec.task, spec.taxonomy, spec.license) == (name, task, taxonomy_name, license_name)
    assert spec.num_classes(taxonomy) == outputs
    assert spec.commercial
    assert spec.paper
    assert spec.dense == (task == "semantic")
    assert all(weights.partition(":")[0] in ("torchvision", "bundled") for weights in spec.weights)


@pytest.mark.parametrize("name", TABLE)
def test_each_builds(name: str) -> None:
    spec, (_, _, outputs, _, millions) = MODELS[name], TABLE[name]
    with torch.device("meta"):  # shapes without memory
        module = spec.build(outputs)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # The published sizes, which count the auxiliary heads that ours are built without.
    assert parameters / 1e6 == pytest.approx(millions, rel=0.12, abs=0.06)
    assert not any(key.startswith("aux_classifier") for key in module.state_dict())


@pytest.mark.parametrize("name", FORWARD)
@torch.inference_mode()
def test_dense_models_answer_at_the_size_of_their_input(name: str) -> None:
    spec = MODELS[name]
    module = spec.build(5).eval()
    output = spec.forward(module, torch.zeros(2, 3, 64, 96), [Frame(64, 96, 64, 96)] * 2)
    logits = output["out"] if isinstance(output, dict) else output
    assert logits.shape == (2, 5, 64, 96)


@pytest.mark.parametrize("name", [name for name in TABLE if MODELS[name].weights])
def test_named_weights_exist(name: str) -> None:
    from torchvision.models import get_weight

    for weights in MODELS[name].weights:
        kind, _, rest = weights.partition(":")
        if kind == "torchvision":
            assert get_weight(rest).url.startswith("https://")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("unet-small", "did you mean unet_small?"),
        ("deeplabv3_resnet", "deeplabv3_resnet50"),
        ("maskrcnn", "did you mean maskrcnn_resnet50_fpn_v2?"),
        ("Q" * 30, "known: unet_small, null_model"),
        ("", "known: unet_small"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(UnknownModelError, match="unknown model") as caught:
        find_model(name)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_spec_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_for_test.py").write_text(
        "import dataclasses\nfrom pipeline.models.registry import MODELS\n"
        "SPEC = dataclasses.replace(MODELS['null_model'], name='mine')\nOTHER = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = import_spec("own_models_for_test:SPEC")
    assert isinstance(spec, ModelSpec)
    assert spec.name == "mine"
    with pytest.raises(ConfigError, match="must be a ModelSpec, got int"):
        import_spec("own_models_for_test:OTHER")
    sys.modules.pop("own_models_for_test")


@pytest.mark.parametrize(
    "path", ["no_such_package_x:SPEC", "json:SPEC", "json", ":SPEC", "", "json.:x", "..json:x", "json:"]
)
def test_specs_that_cannot_be_imported(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot import models\.spec"):
        import_spec(path)


def test_a_spec_whose_module_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models_for_test.py").write_text("1 // 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import models.spec .*ZeroDivisionError"):
        import_spec("broken_models_for_test:SPEC")
