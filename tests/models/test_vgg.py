"""VGG16 taken apart: torchvision's own network, layer by layer, and its classifier as convolutions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vgg16, vgg16_bn
from torchvision.models.vgg import make_layers

from pipeline.config_train import TrainConfig
from pipeline.models.registry import MODELS
from pipeline.models.zoo.vgg import adapt_vgg16, conv_stages
from pipeline.training.backbone import backbone_stages
from pipeline.training.setup import start_model

WIDTH, HIDDEN = 2, 8
CONFIG = [2, 2, "M", 4, 4, "M", 8, 8, 8, "M", 16, 16, 16, "M", 16, 16, 16, "M"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_vgg(batch_norm: bool = False) -> nn.ModuleDict:
    """torchvision's VGG16 with channels divided by 32, and its classifier."""
    linear = [nn.Linear(16 * 49, HIDDEN), nn.ReLU(), nn.Dropout(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.ModuleDict(
        {
            "features": make_layers(CONFIG, batch_norm=batch_norm),
            "classifier": nn.Sequential(*linear, nn.Dropout(), nn.Linear(HIDDEN, 10)),
        }
    ).eval()


@pytest.mark.parametrize("batch_norm", [False, True])
@torch.inference_mode()
def test_stages_are_torchvisions(batch_norm: bool) -> None:
    features: Any = tiny_vgg(batch_norm)["features"]
    stages = nn.ModuleDict(conv_stages(WIDTH, batch_norm=batch_norm)).eval()
    places = {name.partition(".")[2]: name for name in stages.state_dict()}
    stages.load_state_dict({places[name]: tensor for name, tensor in features.state_dict().items()})
    image = torch.randn(1, 3, 64, 32)
    values = image
    for stage in stages.values():
        values = functional.max_pool2d(stage(values), 2)
    assert torch.equal(values, features(image))


@torch.inference_mode()
def test_the_classifier_as_convolutions() -> None:
    """On 224 pixels what the linear layers say; on 256 what they say of each of four crops."""
    given = tiny_vgg()
    module: Any = MODELS["fcn32s"].build(3, width=WIDTH, hidden=HIDDEN).eval()
    adapted = adapt_vgg16()(given.state_dict(), module.state_dict().keys())
    assert adapted.keys() == {name for name in module.state_dict() if name.startswith("encoder.")}
    module.load_state_dict(adapted, strict=False)
    linear: Any = given["classifier"]
    features = given["features"](torch.randn(1, 3, 256, 256))
    found = module.encoder["fc7"](functional.relu(module.encoder["fc6"](features)))
    assert found.shape == (1, HIDDEN, 2, 2)
    for row in range(2):
        for column in range(2):
            crop = features[..., row : row + 7, column : column + 7]
            torch.testing.assert_close(found[..., row, column], linear[:4](crop.flatten(1)))


def test_decimation() -> None:
    """A unit's number and place go into its value, so that what is kept can be read off."""
    unit, channel, row, column = torch.meshgrid(*(torch.arange(size) for size in (8, 16, 7, 7)), indexing="ij")
    number = ((unit * 100 + channel) * 10 + row) * 10 + column
    given = {
        "features.0.weight": torch.zeros(1),
        "classifier.0.weight": number.flatten(1),
        "classifier.0.bias": torch.arange(8),
        "classifier.3.weight": torch.arange(8)[:, None] * 10 + torch.arange(8),
        "classifier.3.bias": torch.arange(8),
    }
    names = [
        f"encoder.{part}.{branch}.{kind}" for part in ("fc6", "fc7") for branch in "01" for kind in ("weight", "bias")
    ]
    adapted = adapt_vgg16(taps=3, channels=4)(given, {*names, "score.0.weight", "encoder.fc6_norm.weight"})
    assert set(adapted) == set(names)
    for branch in "01":
        fc6, fc7 = adapted[f"encoder.fc6.{branch}.weight"], adapted[f"encoder.fc7.{branch}.weight"]
        assert fc6.shape == (2, 16, 3, 3)
        assert torch.equal(fc6, number[[0, 4]][:, :, [0, 3, 6]][..., [0, 3, 6]])
        assert fc7[..., 0, 0].tolist() == [[0, 4], [40, 44]]
        assert (
            adapted[f"encoder.fc6.{branch}.bias"].tolist() == adapted[f"encoder.fc7.{branch}.bias"].tolist() == [0, 4]
        )


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("fcn8s", vgg16),
        ("deconvnet", vgg16_bn),
        ("deeplab_v1_largefov", vgg16),
        ("deeplab_v2_vgg16", vgg16),
        ("dilated_vgg16", vgg16),
    ],
)
def test_the_published_network_fits(name: str, network: Callable[[], nn.Module]) -> None:
    """By shapes alone: everything of the encoder is filled, but for normalisation that the classifier has not."""
    with torch.device("meta"):
        wanted, given = MODELS[name].build(21).state_dict(), network().state_dict()
    adapted = MODELS[name].adapt(given, wanted.keys())
    expected = {key for key in wanted if key.startswith("encoder.") and "_norm." not in key}
    assert set(adapted) == expected
    assert all(tensor.shape == wanted[key].shape for key, tensor in adapted.items())
    # What the model itself wrote comes back as it is.
    assert MODELS[name].adapt(wanted, wanted.keys()) == wanted


def test_a_network_without_a_classifier() -> None:
    given: dict[str, Tensor] = {"features.0.bias": torch.zeros(2)}
    wanted = {"encoder.conv1.0.bias", "encoder.fc6.bias", "encoder.fc7.weight"}
    assert adapt_vgg16()(given, wanted) == {"encoder.conv1.0.bias": given["features.0.bias"]}


def test_training_begins_from_imagenet_and_goes_on_from_a_coarser_fcn(tmp_path: Path) -> None:
    """FCN-16s from VGG16, and FCN-8s from that FCN-16s, as the paper trains them."""
    given = tiny_vgg().state_dict()
    torch.save(given, tmp_path / "vgg16.pt")

    def start(name: str, weights: str) -> tuple[nn.Module, list[str]]:
        tree = {
            "source": {"format": "scenes", "count": 2},
            "model": {"name": name, "weights": str(tmp_path / weights), "options": {"width": WIDTH, "hidden": HIDDEN}},
            "partial_weights": True,
            "epochs": 1,
            "output": {"uri": str(tmp_path)},
        }
        model, unfilled = start_model(TrainConfig.model_validate(tree))
        return model.module, unfilled

    coarse, unfilled = start("fcn16s", "vgg16.pt")
    assert {name.partition(".")[0] for name in unfilled} == {"score", "up"}
    state = coarse.state_dict()
    assert torch.equal(state["encoder.conv5.28.weight"], given["features.28.weight"])
    assert torch.equal(state["encoder.fc7.weight"][..., 0, 0], given["classifier.3.weight"])
    torch.save(state, tmp_path / "fcn16s.pt")
    fine, unfilled = start("fcn8s", "fcn16s.pt")
    assert unfilled == ["score.pool3.weight", "score.pool3.bias", "up.pool3.weight"]
    assert all(torch.equal(fine.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "stages"), [("fcn8s", 6), ("deconvnet", 6), ("deeplab_v2_vgg16", 7), ("dilated_vgg16", 6)]
)
def test_the_backbone_is_all_that_comes_with_weights(name: str, stages: int) -> None:
    """The five stages and the classifier: what `backbone_factor` and `frozen_stages` are about."""
    with torch.device("meta"):
        module = MODELS[name].build(21)
    found = backbone_stages(module)
    assert len(found) == stages
    encoder = sum(p.numel() for p in module.get_submodule("encoder").parameters())
    assert sum(p.numel() for stage in found for child in stage for p in child.parameters()) == encoder
