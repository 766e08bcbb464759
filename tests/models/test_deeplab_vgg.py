"""DeepLab v1 and v2 against their papers: parameters, sizes, holes, and where scores lie."""

from typing import Any

import pytest
import torch
from test_upsample import spread
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.deeplab_vgg import (
    DeepLabVGG,
    adapt_deeplab_resnet,
    deeplab_v1_largefov,
    deeplab_v2_resnet101,
    deeplab_v2_vgg16,
)

RATES = (6, 12, 18, 24)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_as_in_the_papers() -> None:
    with torch.device("meta"):
        largefov, aspp, resnet = (build(21) for build in (deeplab_v1_largefov, deeplab_v2_vgg16, deeplab_v2_resnet101))
    branch = 512 * 9 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 21 + 21
    # v1, table 2: DeepLab-CRF-LargeFOV has 20.5M.
    assert count(largefov) == 14_714_688 + branch == 20_505_429
    assert count(aspp) == 14_714_688 + 4 * branch
    # torchvision's ResNet-101 has 44,549,160 with its 2048 x 1000 classifier.
    assert count(resnet) == 44_549_160 - 2_049_000 + 4 * (2048 * 9 * 21 + 21)


@torch.inference_mode()
def test_321_pixels_are_41_units() -> None:
    module = DeepLabVGG(3, (12,), width=1, hidden=2).eval()
    assert module.coarse_forward(torch.randn(1, 3, 321, 321)).shape == (1, 3, 41, 41)
    # The last unit is at the last pixel or past it.
    for size in (1, 2, 8, 9, 10, 16, 17, 18, 63, 64, 65, 66):
        units = module.coarse_forward(torch.randn(1, 3, size, 32)).shape[2]
        assert 8 * (units - 1) >= size - 1 > 8 * (units - 2)
        assert module(torch.randn(1, 3, size, 32)).shape == (1, 3, size, 32)


def dilated(values: Tensor, layer: nn.Conv2d, rate: int) -> Tensor:
    """A 3x3 convolution with holes, as nine shifted copies."""
    height, width = values.shape[-2:]
    framed = functional.pad(values, (rate, rate, rate, rate))
    total = torch.zeros(()) if layer.bias is None else layer.bias[:, None, None]
    for row in range(3):
        for column in range(3):
            part = framed[..., row * rate : row * rate + height, column * rate : column * rate + width]
            total = total + torch.einsum("bchw,kc->bkhw", part, layer.weight[..., row, column])
    return total


@pytest.mark.parametrize("largefov", [True, False])
@torch.inference_mode()
def test_holes_branches_and_places(largefov: bool) -> None:
    build = deeplab_v1_largefov if largefov else deeplab_v2_vgg16
    module: Any = build(3, width=2, hidden=4).eval()
    for score in module.score:
        nn.init.normal_(score.weight)
    image = torch.randn(2, 3, 97, 81)
    values = image
    for at, (name, halved) in enumerate(
        zip(("conv1", "conv2", "conv3", "conv4", "conv5"), (1, 1, 1, 0, 0), strict=True)
    ):
        for layer in module.encoder[name]:
            if isinstance(layer, nn.Conv2d):
                values = functional.relu(dilated(values, layer, 2 if at == 4 else 1))
        # A 3x3 maximum around each kept pixel.
        framed = functional.pad(values, (1, 1, 1, 1), value=-float("inf")).unfold(2, 3, 1).unfold(3, 3, 1)
        values = framed.amax((-1, -2))[..., :: 1 + halved, :: 1 + halved]
    if largefov:
        values = functional.pad(values, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2))
    scores: Any = 0
    for rate, fc6, fc7, score in zip(
        (12,) if largefov else RATES, module.encoder["fc6"], module.encoder["fc7"], module.score, strict=True
    ):
        scores = scores + score(functional.relu(fc7(functional.relu(dilated(values, fc6, rate)))))
    torch.testing.assert_close(module.coarse_forward(image), scores, rtol=1e-4, atol=1e-5)
    expected = spread(scores, 0, 8, torch.arange(97).double(), torch.arange(81).double())
    torch.testing.assert_close(module(image), expected, rtol=1e-4, atol=1e-5)


def test_a_units_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit i looks at the pixels around 8 i: with means for maxima and equal weights, evenly on both sides."""

    def mean(values: Tensor, size: int, stride: int, padding: int, ceil_mode: bool) -> Tensor:
        return functional.avg_pool2d(values, size, stride, padding, ceil_mode=ceil_mode)

    monkeypatch.setattr(functional, "max_pool2d", mean)
    module = DeepLabVGG(2, (2,), width=1, hidden=1).double().eval()
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    image = torch.ones(1, 3, 393, 401, dtype=torch.float64, requires_grad=True)
    module.coarse_forward(image)[0, 0, 24, 25].backward()
    assert image.grad is not None
    for axis, unit in ((1, 24), (0, 25)):
        places = image.grad[0, 0].sum(axis).nonzero().flatten()
        assert places[0] > 0
        assert places[-1] < 392
        assert (places[0] + places[-1]).item() / 2 == 8 * unit


@torch.inference_mode()
def test_a_resnet_at_an_eighth() -> None:
    module = deeplab_v2_resnet101(3, layers=(1, 1, 1, 2)).eval()
    sizes: list[tuple[int, ...]] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        module.backbone.get_submodule(name).register_forward_hook(
            lambda _module, _given, output: sizes.append(tuple(output.shape[1:]))
        )
    image = torch.randn(1, 3, 65, 49)
    logits = module(image)
    assert sizes == [(256, 17, 13), (512, 9, 7), (1024, 9, 7), (2048, 9, 7)]
    # The paper's "hole" of each stage: 2 in the third, 4 in the fourth, 1 before; its first block still has the last's.
    holes = {name: child.dilation[0] for name, child in module.backbone.named_modules() if name.endswith("conv2")}
    assert holes == {
        "layer1.0.conv2": 1,
        "layer2.0.conv2": 1,
        "layer3.0.conv2": 1,
        "layer4.0.conv2": 2,
        "layer4.1.conv2": 4,
    }
    features = module.backbone(image)
    scores: Any = sum(dilated(features, score, rate) for score, rate in zip(module.score, RATES, strict=True))  # type: ignore[arg-type]
    expected = spread(scores, 0, 8, torch.arange(65).double(), torch.arange(49).double())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_torchvisions_resnet_is_its_backbone() -> None:
    from torchvision.models import resnet101

    with torch.device("meta"):
        wanted, given = deeplab_v2_resnet101(21).state_dict(), resnet101().state_dict()
    adapted = adapt_deeplab_resnet(given, wanted.keys())
    assert set(adapted) == {name for name in wanted if name.startswith("backbone.")}
    assert all(tensor.shape == wanted[name].shape for name, tensor in adapted.items())


def test_scores_begin_small() -> None:
    for score in deeplab_v2_vgg16(21, width=1, hidden=256).score:
        assert score.get_parameter("weight").std().item() == pytest.approx(0.01, rel=0.1)
        assert not score.get_parameter("bias").any()


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"rates must be one or more of 1 or more, got \[\]"):
        deeplab_v2_vgg16(3, rates=())
    with pytest.raises(ValueError, match=r"got \[6, 0\]"):
        deeplab_v2_resnet101(3, rates=[6, 0])
    with pytest.raises(ValueError, match=r"layers must be four of 1 or more, got \[1, 1\]"):
        deeplab_v2_resnet101(3, layers=[1, 1])
