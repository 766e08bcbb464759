"""The stages of real models' backbones, and that what is frozen does not move."""

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.registry import MODELS
from pipeline.models.zoo.unet import UNetSmall
from pipeline.taxonomy import load_taxonomy
from pipeline.training.backbone import backbone_stages, freeze, train_mode
from pipeline.training.optim import OptimizerOptions, build_optimizer

RESNET = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
MOBILENET = [[str(n)] for n in range(17)]
VGG = [[f"conv{n}"] for n in range(1, 6)]
STAGES: dict[str, tuple[str, list[list[str]]]] = {
    "unet_small": ("encoder", [[str(n)] for n in range(5)]),
    "fcn_resnet50": ("backbone", RESNET),
    "fcn_resnet101": ("backbone", RESNET),
    "deeplabv3_resnet50": ("backbone", RESNET),
    "deeplabv3_resnet101": ("backbone", RESNET),
    "deeplabv3_mobilenet_v3_large": ("backbone", MOBILENET),
    "lraspp_mobilenet_v3_large": ("backbone", MOBILENET),
    "maskrcnn_resnet50_fpn_v2": ("backbone.body", RESNET),
    "segnet": ("encoder", [[str(n)] for n in range(5)]),
    "unet_2015": ("encoder", [[str(n)] for n in range(5)]),
    "unet": ("encoder", RESNET),
    "deeplabv3plus": ("encoder", RESNET),
    "fpn": ("encoder", RESNET),
    "pspnet": ("encoder", RESNET),
    "upernet": ("encoder", RESNET),
    "segformer": (
        "encoder",
        [[part] for n in range(1, 5) for part in (f"patch_embed{n}", f"block{n}", f"norm{n}")],
    ),
    "unet_small_depth": ("encoder", [[str(n)] for n in range(5)]),
    **dict.fromkeys(("fcn32s", "fcn16s", "fcn8s", "dilated_vgg16"), ("encoder", [*VGG, ["fc6", "fc7"]])),
    **dict.fromkeys(("deeplab_v1_largefov", "deeplab_v2_vgg16"), ("encoder", [*VGG, ["fc6"], ["fc7"]])),
    "deconvnet": ("encoder", [*VGG, ["fc6", "fc6_norm", "fc7", "fc7_norm"]]),
    "deeplab_v2_resnet101": ("backbone", RESNET),
    "segmenter": ("encoder", [["patch_embed"], ["blocks"], ["norm"]]),
    "dpt_depth": ("dpt", [["embeddings"], *([f"encoder.layer.{n}"] for n in range(24))]),
}
# Of the backbone itself, and of none of its stages.
LOOSE = {"segmenter": {"cls_token", "pos_embed"}}
# Not on the meta device: its stochastic depth is read off a tensor while it is built.
REAL = {"segformer"}
# Stages of the others, as small as tests have them.
COUNTS = {
    "dpt_segmentation": 5,
    "fasterrcnn_resnet50_fpn_v2": 5,
    "maskrcnn": 5,
    "fastrcnn": 5,
    "mnc": 5,
    "retinanet_resnet50_fpn_v2": 5,
    "fcos_resnet50_fpn": 5,
    "yolo_v1": 1,
    **dict.fromkeys(("rtdetr", "rtdetr_v2", "dfine"), 5),
    "rfdetr_seg": 6,
    **dict.fromkeys(("maskformer", "mask2former", "mask2former_instance", "oneformer", "oneformer_instance"), 2),
    "midas_hybrid": 5,
    **dict.fromkeys(("depth_anything_v2", "depth_anything_v2_metric", "depth_anything_v2_metric_outdoor"), 6),
    "zoedepth": 1,
    **dict.fromkeys(("rcnn", "overfeat", "hypercolumns", "sds"), 6),
    "sppnet": 5,
}
# Those without one place to look: small nets of their own, two models in one, or a transformer that is all there is.
WITHOUT = {
    "null_model",
    "recurrent_cnn",
    "multiscale_cnn",
    "hog_svm",
    "panoptic_merge",
    "eomt",
    "eomt_instance",
    "depth_pro",
    "sam",
    "sam2",
    "grounded_sam2",
    "sam3",
}


def tiny(name: str) -> nn.Module:
    spec = MODELS[name]
    known = inspect.signature(spec.build).parameters
    options = {key: value for key, value in {**(spec.options or {}), **TINY[name]}.items() if key in known}
    return spec.module(load_taxonomy(spec.taxonomy), options)


def test_every_model_is_known() -> None:
    assert sorted([*STAGES, *COUNTS, *WITHOUT]) == sorted(MODELS)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_model_without_a_backbone_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a backbone at"):
        backbone_stages(tiny(name))


@pytest.mark.parametrize("name", STAGES)
def test_published_models_have_their_stages(name: str) -> None:
    with torch.device("cpu" if name in REAL else "meta"):
        module = MODELS[name].build(21)
    path, expected = STAGES[name]
    names = {child: key for key, child in module.get_submodule(path).named_modules()}
    stages = backbone_stages(module)
    assert [[names[child] for child in stage] for stage in stages] == expected
    # Together they are all that the backbone learns.
    found = [parameter for stage in stages for child in stage for parameter in child.parameters()]
    known = dict(module.get_submodule(path).named_parameters())
    loose = {id(known[key]) for key in LOOSE.get(name, ())}
    assert {id(parameter) for parameter in found} == {id(p) for p in known.values()} - loose


@pytest.mark.parametrize("name", COUNTS)
def test_other_models_have_stages_too(name: str) -> None:
    module = tiny(name)
    stages = backbone_stages(module)
    assert len(stages) == COUNTS[name]
    found = [id(parameter) for stage in stages for child in stage for parameter in child.parameters()]
    assert found
    assert set(found) < {id(parameter) for parameter in module.parameters()}
    assert len(set(found)) == len(found)


def test_a_backbone_may_be_named() -> None:
    module = nn.ModuleDict({"features": nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Sequential(nn.Linear(1, 1)))})
    assert [len(stage) for stage in backbone_stages(module, "features")] == [1, 1]
    with pytest.raises(ConfigError, match=r"at backbone.body, backbone, .*, got a model of features"):
        backbone_stages(module)
    with pytest.raises(ConfigError, match=r"at 'features.9', got a model of features"):
        backbone_stages(module, "features.9")


def unet() -> UNetSmall:
    torch.manual_seed(0)
    return UNetSmall(3, width=4, depth=2)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Parameters and buffers that differ."""
    states = before.state_dict(), after.state_dict()
    return {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_frozen_stages_do_not_move_and_everything_else_does(stages: int, kind: Any) -> None:
    module = unet()
    # Gradients from before: an optimiser would go on applying them.
    module(torch.randn(2, 3, 8, 8)).mean().backward()
    freeze(module, stages)
    optimizer = build_optimizer(module, OptimizerOptions(kind=kind, weight_decay=0.1))
    before = copy.deepcopy(module)
    for seed in range(3):
        train_mode(module, frozen_stages=stages)
        step(module, optimizer, seed)
    frozen = {name for name in module.state_dict() if any(name.startswith(f"encoder.{n}.") for n in range(stages))}
    assert changed(before, module) == set(module.state_dict()) - frozen


def test_thawing_lets_all_learn_again() -> None:
    module = unet()
    optimizer = build_optimizer(module, OptimizerOptions())
    freeze(module, 3)
    train_mode(module, frozen_stages=3)
    step(module, optimizer, 0)
    freeze(module, 0)
    train_mode(module)
    before = copy.deepcopy(module)
    step(module, optimizer, 1)
    assert changed(before, module) == set(module.state_dict())


def test_frozen_normalisation_learns_but_keeps_its_statistics() -> None:
    module = unet()
    optimizer = build_optimizer(module, OptimizerOptions())
    before = copy.deepcopy(module)
    train_mode(module, frozen_norms=True)
    step(module, optimizer, 0)
    statistics = {name for name, _ in module.named_buffers()}
    assert changed(before, module) == set(module.state_dict()) - statistics
    # The batch does not matter to an image's output.
    image_BCHW = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(image_BCHW)[:1], module(image_BCHW[:1]))


def test_train_mode_undoes_evaluation() -> None:
    module = unet().eval()
    train_mode(module)
    assert all(child.training for child in module.modules())
    train_mode(module, frozen_stages=1)
    assert {name for name, child in module.named_modules() if not child.training} == {
        name for name, _ in module.named_modules() if name.startswith("encoder.0")
    }


def test_more_stages_than_there_are() -> None:
    with pytest.raises(ConfigError, match="frozen_stages must be 0 to 3, the backbone's stages, got 4"):
        freeze(unet(), 4)
    with pytest.raises(ConfigError, match="got -1"):
        train_mode(unet(), frozen_stages=-1)


def test_a_model_without_a_backbone_needs_none() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    freeze(module, 0)
    train_mode(module)
    assert module.training
