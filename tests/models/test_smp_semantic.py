"""segmentation-models-pytorch behind the registry: sizes, encoders, licences, and what is said without the extra."""

import importlib
import socket
import sys
from typing import Any

import pytest
import torch
from tiny_models import ENCODER
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import load_model
from pipeline.models.registry import MODELS

NAMES = ["unet", "deeplabv3plus", "fpn", "pspnet", "upernet", "segformer"]
DEFAULTS = {"unet": "resnet34", "segformer": "mit_b0"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].build(5, **options)


def refused(name: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(ModelConfig(name=name, options=options), seed=0, tile_pixels=1 << 20)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96)])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(name: str, height: int, width: int) -> None:
    module = build(name, **ENCODER).eval()
    assert module(torch.randn(2, 3, height, width)).shape == (2, 5, height, width)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("building a model must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    module = build(name)
    encoder = DEFAULTS.get(name, "resnet50")
    assert module.name.partition("-")[2] == encoder  # type: ignore[union-attr,operator]
    if encoder.startswith("resnet"):
        # As many parameters as torchvision's without its classifier, all under `encoder`, where the backbone's rule
        # looks for them.
        with torch.device("meta"):
            expected = getattr(importlib.import_module("torchvision.models"), encoder)(num_classes=1)
        count = sum(parameter.numel() for name, parameter in expected.named_parameters() if "fc." not in name)
        assert sum(parameter.numel() for parameter in module.get_submodule("encoder").parameters()) == count


def test_the_same_seed_builds_the_same() -> None:
    for name in ("pspnet", "fpn"):
        versions = {
            load_model(ModelConfig(name=name, options=options), seed=seed, tile_pixels=1 << 20).version
            for seed, options in ((1, ENCODER), (1, ENCODER), (2, ENCODER))
        }
        assert len(versions) == 2


@torch.inference_mode()
def test_pspnets_features_are_an_eighth() -> None:
    """Zhao et al. 2017, section 3.2: "the final feature map size is 1/8 of the input image", from all stages."""
    module: Any = build("pspnet").eval()
    features = module.encoder(torch.randn(1, 3, 64, 96))
    assert [tuple(values.shape[1:]) for values in features[-3:]] == [(512, 8, 12), (1024, 8, 12), (2048, 8, 12)]


@torch.inference_mode()
def test_deeplabs_features_are_a_sixteenth() -> None:
    """Chen et al. 2018, section 3.1: output stride 16, beside features of a quarter for the decoder."""
    module: Any = build("deeplabv3plus").eval()
    features = module.encoder(torch.randn(1, 3, 64, 96))
    assert features[-1].shape == (1, 2048, 4, 6)
    assert features[2].shape == (1, 256, 16, 24)


@pytest.mark.parametrize(
    ("name", "encoder", "part"),
    [
        ("unet", "resnet35", "unknown encoder 'resnet35'; did you mean resnet50 or resnet34"),
        ("unet", "Q" * 30, "; known: resnet18, resnet34"),
        ("pspnet", "resnet35", "unknown encoder 'resnet35'"),
        ("fpn", "tu-test_resnett", "unknown encoder 'tu-test_resnett'; did you mean tu-test_resnet"),
        ("fpn", 5, "encoder must be a name, got 5"),
        ("unet", "mit_b2", "encoder 'mit_b2' is under NVIDIA's licence, which forbids commercial use"),
        ("pspnet", "mit_b0", "it goes with model segformer"),
        ("pspnet", "vgg16_bn", "encoder 'vgg16_bn' cannot be dilated, which pspnet needs"),
    ],
)
def test_encoders_that_do_not_go(name: str, encoder: Any, part: str) -> None:
    said = refused(name, encoder=encoder)
    assert part in said
    assert said.startswith(f"model {name!r} cannot be built: ")
    assert said.endswith(f"(options of model {name!r})")


def test_segformer_says_what_its_encoder_forbids() -> None:
    assert not MODELS["segformer"].commercial
    assert all(MODELS[name].commercial and MODELS[name].license == "MIT" for name in NAMES if name != "segformer")
    # Any other encoder goes with it too; the spec then says more than it must.
    assert build("segformer", **ENCODER)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    said = refused(name)
    assert 'cannot be built: it needs pip install "maskmill[smp]": cannot import segmentation_models_pytorch: ' in said
