"""The registry: what each model is, that each builds with its number of outputs, and what is said of an unknown one."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.errors import ConfigError, UnknownModelError
from pipeline.models.registry import FAMILIES, MODELS, entries, find_model, import_spec
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
    "fasterrcnn_resnet50_fpn_v2": ("detection", "coco80", 91, "BSD-3-Clause", 43.7),
    "maskrcnn": ("instance", "coco80", 91, "BSD-3-Clause", 44.4),
    # VGG16 (134.3 without its thousand classes) and 91 classes with their boxes; MNC by hand, in its test.
    "fastrcnn": ("detection", "coco80", 91, "BSD-3-Clause", 136.1),
    "mnc": ("instance", "coco80", 91, "BSD-3-Clause", 283.6),
    "retinanet_resnet50_fpn_v2": ("detection", "coco80", 91, "BSD-3-Clause", 38.2),
    "fcos_resnet50_fpn": ("detection", "coco80", 91, "BSD-3-Clause", 32.3),
    # By hand, in its test: 272M for the paper's 20 classes, whose last layer is 4096 x 7 x 7 x 30.
    "yolo_v1": ("detection", "coco80", 80, "Apache-2.0", 283.8),
    # As published: 42M both, 19M, 33.7M.
    "rtdetr": ("detection", "coco80", 80, "Apache-2.0", 42.0),
    "rtdetr_v2": ("detection", "coco80", 80, "Apache-2.0", 42.0),
    "dfine": ("detection", "coco80", 80, "Apache-2.0", 19.0),
    "rfdetr_seg": ("instance", "coco80", 91, "Apache-2.0", 33.7),
    "segnet": ("semantic", "camvid11", 11, "Apache-2.0", 29.5),
    "unet_2015": ("semantic", "scenes", 8, "Apache-2.0", 31.0),
    # As the papers have them: FCN 134M, DeconvNet 252M, DeepLab-LargeFOV 20.5M. The others by hand, in their tests.
    "fcn32s": ("semantic", "voc21", 21, "Apache-2.0", 134.3),
    "fcn16s": ("semantic", "voc21", 21, "Apache-2.0", 134.4),
    "fcn8s": ("semantic", "voc21", 21, "Apache-2.0", 134.4),
    "deconvnet": ("semantic", "voc21", 21, "Apache-2.0", 252.0),
    "deeplab_v1_largefov": ("semantic", "voc21", 21, "Apache-2.0", 20.5),
    "deeplab_v2_vgg16": ("semantic", "voc21", 21, "Apache-2.0", 37.9),
    "deeplab_v2_resnet101": ("semantic", "voc21", 21, "Apache-2.0", 44.0),
    "dilated_vgg16": ("semantic", "voc21", 21, "Apache-2.0", 134.4),
    "segmenter": ("semantic", "ade20k150", 150, "Apache-2.0", 26.0),
    "recurrent_cnn": ("semantic", "scenes", 8, "Apache-2.0", 0.08),
    "multiscale_cnn": ("semantic", "scenes", 8, "Apache-2.0", 1.64),
    # These as the library's documentation and the papers have them, where they have the same decoder.
    "unet": ("semantic", "scenes", 8, "MIT", 24.4),
    "deeplabv3plus": ("semantic", "voc21", 21, "MIT", 26.7),
    "fpn": ("semantic", "cityscapes19", 19, "MIT", 26.1),
    "pspnet": ("semantic", "ade20k150", 150, "MIT", 29.9),
    "upernet": ("semantic", "ade20k150", 150, "MIT", 37.3),
    "segformer": ("semantic", "ade20k150", 150, "NVIDIA Source Code License (non-commercial)", 3.8),
    # As the authors have them in detectron2: 101.8, 216, 219; EoMT's ViT-L 316. The merge: its parts' sum.
    "maskformer": ("panoptic", "coco_panoptic", 133, "CC-BY-NC-4.0", 101.8),
    "mask2former": ("panoptic", "coco_panoptic", 133, "MIT", 216.0),
    "mask2former_instance": ("instance", "coco80", 80, "MIT", 216.0),
    "oneformer": ("panoptic", "coco_panoptic", 133, "MIT", 219.0),
    "oneformer_instance": ("instance", "coco_panoptic", 133, "MIT", 219.0),
    "eomt": ("panoptic", "coco_panoptic", 133, "MIT", 316.0),
    "eomt_instance": ("instance", "coco80", 80, "MIT", 316.0),
    "panoptic_merge": ("panoptic", "coco_panoptic", 133, "BSD-3-Clause", 86.0),
    "unet_small_depth": ("depth", "scenes", 1, "Apache-2.0", 0.4),
    # The papers' sizes; SAM 2's 38.9 without the 7.5 that follow objects through videos.
    "sam": ("instance", "objects", 1, "Apache-2.0", 93.7),
    "sam2": ("instance", "objects", 1, "Apache-2.0", 31.4),
    # Grounding DINO's 172 and SAM 2's 31.4.
    "grounded_sam2": ("instance", "coco80", 80, "Apache-2.0", 203.6),
    # The library's 840 less CLIP's pieces, which come with `vocab`: 514 letters stand for 49,408.
    "sam3": ("instance", "coco80", 80, "SAM License", 790.0),
    "dpt_depth": ("depth", "scenes", 1, "Apache-2.0", 343.0),
    # VGG16's 14.7 M convolutions and 119.5 M (sppnet: 121.6 M, of 50 bins) in fc6 and fc7, with heads for 80 classes.
    "rcnn": ("detection", "coco80", 80, "Apache-2.0", 135.9),
    "sppnet": ("detection", "coco80", 80, "Apache-2.0", 138.0),
    "overfeat": ("detection", "coco80", 80, "Apache-2.0", 160.6),
    "hypercolumns": ("instance", "coco80", 80, "Apache-2.0", 145.4),
    "sds": ("instance", "coco80", 80, "Apache-2.0", 335.5),
    "hog_svm": ("detection", "scenes", 8, "Apache-2.0", 0.03),
    # As the papers and the models' cards have them; to the last one in test_hf_depth.py.
    "midas_hybrid": ("depth", "scenes", 1, "Apache-2.0", 123.0),
    "depth_anything_v2": ("depth", "scenes", 1, "Apache-2.0", 24.8),
    "depth_anything_v2_metric": ("depth", "scenes", 1, "Apache-2.0", 24.8),
    "depth_anything_v2_metric_outdoor": ("depth", "scenes", 1, "Apache-2.0", 24.8),
    "zoedepth": ("depth", "scenes", 1, "MIT", 345.0),
    "depth_pro": ("depth", "scenes", 1, "Apple's licence for research", 952.0),
    "dpt_segmentation": ("semantic", "ade20k150", 150, "Apache-2.0", 343.0),
}
FORWARD = [
    "unet_small",
    "null_model",
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "segnet",
    "unet_2015",
    "segformer",
]
NON_COMMERCIAL = {"maskformer", "segformer", "depth_pro"}
# They see an image whole, or have a scale of their own for every image.
NOT_DENSE = {
    "dpt_depth",
    "midas_hybrid",
    "depth_anything_v2",
    "depth_anything_v2_metric",
    "depth_anything_v2_metric_outdoor",
    "zoedepth",
    "depth_pro",
}
# Its stochastic depth is read off a tensor while it is built.
NOT_ON_META = {"segformer"}


def test_the_table_is_whole() -> None:
    assert sorted(MODELS) == sorted(TABLE)
    assert sum(map(len, FAMILIES.values())) == len(MODELS)  # no name stands there twice
    assert {family: tuple(entries(family)) for family in FAMILIES} == FAMILIES
    assert all(spec.name == name for name, spec in MODELS.items())


def test_a_small_model_needs_no_large_library() -> None:
    """Nor do the worker's stages: what they import is most of what a worker's start takes."""
    code = (
        "import sys, pipeline.stages.label, pipeline.dataflow.label\n"
        "from pipeline.models.registry import find_model\n"
        "find_model('unet_small').build(8)\n"
        "print([name for name in ('torchvision', 'transformers', 'timm', 'scipy', 'skimage') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_prompts_reach_every_model_that_can_look_at_them() -> None:
    """A source's prompts are read for models whose spec says so."""
    for spec in MODELS.values():
        options = inspect.signature(spec.build).parameters
        looks = "prompts" in get_args(options["proposals"].annotation) if "proposals" in options else False
        modes = "prompts" in get_args(options["mode"].annotation) if "mode" in options else False
        assert spec.prompts == (looks or modes or spec.name in ("grounded_sam2", "panoptic_merge")), spec.name


def test_the_table_needs_no_extra() -> None:
    extras = "{'segmentation_models_pytorch', 'timm', 'transformers'}"
    code = f"import sys, pipeline.models.registry; print(*{extras} & {{*sys.modules}}, 'done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["done"]


@pytest.mark.parametrize("name", TABLE)
def test_what_each_model_is(name: str) -> None:
    spec, (task, taxonomy_name, outputs, license_name, _) = find_model(name), TABLE[name]
    taxonomy = load_taxonomy(spec.taxonomy)
    assert (spec.name, spec.task, spec.taxonomy, spec.license) == (name, task, taxonomy_name, license_name)
    assert spec.num_classes(taxonomy) == outputs
    assert spec.commercial == (name not in NON_COMMERCIAL)
    assert spec.paper
    assert spec.dense == (task in ("semantic", "depth") and name not in NOT_DENSE)
    assert all(weights.partition(":")[0] in ("torchvision", "bundled", "hf", "timm") for weights in spec.weights)


@pytest.mark.parametrize("name", TABLE)
def test_each_builds(name: str) -> None:
    spec, (_, _, outputs, _, millions) = MODELS[name], TABLE[name]
    with torch.device("cpu" if name in NOT_ON_META else "meta"):  # shapes without memory
        module = spec.module(load_taxonomy(spec.taxonomy), {})
    assert spec.num_classes(load_taxonomy(spec.taxonomy)) == outputs
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
        ("unet-small", "did you mean unet_small or unet_small_depth"),
        ("deeplabv3_resnet", "deeplabv3_resnet50"),
        ("maskrcnn_resnet50", "did you mean maskrcnn_resnet50_fpn_v2"),
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
