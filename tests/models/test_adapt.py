"""A classification network's published weights as the start of a model that is built on it."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from pipeline.config_train import TrainConfig
from pipeline.errors import CheckpointError
from pipeline.models.adapt import as_named, backbone
from pipeline.models.registry import MODELS
from pipeline.training.setup import start_model

# Model, its options: the classification network, and where its tensors come to stand.
BACKBONES = [
    ("fcn_resnet50", {}, "resnet50", "backbone."),
    ("fcn_resnet101", {}, "resnet101", "backbone."),
    ("deeplabv3_resnet50", {}, "resnet50", "backbone."),
    ("deeplabv3_resnet101", {}, "resnet101", "backbone."),
    ("deeplabv3_mobilenet_v3_large", {}, "mobilenet_v3_large", "backbone."),
    ("lraspp_mobilenet_v3_large", {}, "mobilenet_v3_large", "backbone."),
    ("maskrcnn_resnet50_fpn_v2", {}, "resnet50", "backbone.body."),
    ("segnet", {}, "vgg16_bn", "encoder."),
    ("unet", {}, "resnet34", "encoder."),
    ("unet", {"encoder": "vgg16_bn"}, "vgg16_bn", "encoder."),
    ("unet", {"encoder": "mobilenet_v2"}, "mobilenet_v2", "encoder."),
    ("unet", {"encoder": "tu-resnet50"}, "resnet50", "encoder."),
    ("deeplabv3plus", {}, "resnet50", "encoder."),
    ("fpn", {"encoder": "densenet121"}, "densenet121", "encoder."),
    ("pspnet", {}, "resnet50", "encoder."),
    ("upernet", {"encoder": "resnet101"}, "resnet101", "encoder."),
]


def classifier(name: str) -> nn.Module:
    """torchvision's classification network, without its values: names and shapes."""
    with torch.device("meta"):
        module: nn.Module = getattr(importlib.import_module("torchvision.models"), name)()
    return module


@pytest.mark.parametrize(("name", "options", "network", "prefix"), BACKBONES)
def test_a_backbone_is_filled_and_nothing_else(name: str, options: dict[str, Any], network: str, prefix: str) -> None:
    with torch.device("meta"):
        wanted = MODELS[name].build(21, **options).state_dict()
    given = classifier(network).state_dict()
    adapted = MODELS[name].adapt(given, wanted.keys())
    assert set(adapted) == {key for key in wanted if key.startswith(prefix)}
    assert all(tensor.shape == wanted[key].shape for key, tensor in adapted.items())
    # Tensor by tensor the same ones, in their order.
    values = {id(tensor) for tensor in given.values()}
    assert all(id(tensor) in values for tensor in adapted.values())
    # What the model itself wrote comes back as it is.
    assert MODELS[name].adapt(wanted, wanted.keys()) == wanted


def test_names_that_a_head_has_as_well() -> None:
    """MobileNet's classifier is no head of ours, though its name may be."""
    one, two = torch.zeros(1), torch.ones(1)
    wanted = {"backbone.0.weight": one, "classifier.0.weight": one}.keys()
    adapted = backbone("backbone.")({"features.0.weight": two, "classifier.0.weight": two}, wanted)
    assert adapted == {"backbone.0.weight": two}
    other: Mapping[str, Tensor] = {"layers.0.weight": two}
    assert backbone("backbone.")(other, wanted) == other
    assert as_named(other, wanted) == other


def train(name: str, weights: Path, folder: Path, **options: Any) -> TrainConfig:
    tree = {
        "source": {"format": "scenes", "count": 2},
        "model": {"name": name, "weights": str(weights), "options": options},
        "partial_weights": True,
        "epochs": 1,
        "output": {"uri": str(folder)},
    }
    return TrainConfig.model_validate(tree)


def saved_resnet(folder: Path, suffix: str) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(5)
    module = resnet50()
    path = folder / f"resnet50{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path)
    return path, module.state_dict()


@pytest.mark.parametrize(
    ("name", "suffix", "prefix"),
    [("deeplabv3plus", ".pt", "encoder."), ("maskrcnn_resnet50_fpn_v2", ".safetensors", "backbone.body.")],
)
def test_training_begins_from_a_resnet(name: str, suffix: str, prefix: str, tmp_path: Path) -> None:
    path, given = saved_resnet(tmp_path, suffix)
    model, unfilled = start_model(train(name, path, tmp_path))
    state = model.module.state_dict()
    assert unfilled == [key for key in state if not key.startswith(prefix)]
    for key, tensor in state.items():
        if key.startswith(prefix):
            assert torch.equal(tensor, given[key.removeprefix(prefix)]), key
    assert not torch.equal(state[unfilled[0]], torch.zeros_like(state[unfilled[0]]))


def test_training_begins_from_a_vgg(tmp_path: Path) -> None:
    given = {
        # Its classifier, 500 MB of nothing in a view of one number.
        name: torch.zeros(1).expand(tensor.shape) if name.startswith("classifier.") else torch.randn(tensor.shape)
        for name, tensor in classifier("vgg16_bn").state_dict().items()
    }
    torch.save(given, tmp_path / "vgg16_bn.pt")
    model, unfilled = start_model(train("segnet", tmp_path / "vgg16_bn.pt", tmp_path))
    state = model.module.state_dict()
    assert unfilled == [key for key in state if not key.startswith("encoder.")]
    places = {name.split(".", 2)[2]: name for name in state if name.startswith("encoder.")}
    for rest, name in places.items():
        assert torch.equal(state[name], given[f"features.{rest}"].to(state[name].dtype)), name


def test_a_network_that_does_not_fit(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(2, 3, 5, 5)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt has none of the tensors of segnet"):
        start_model(train("segnet", tmp_path / "other.pt", tmp_path, width=4))
