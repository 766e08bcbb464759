"""DeconvNet against its paper, and unpooling against places worked out by hand."""

from typing import Any

import pytest
import torch
from test_segnet import pooled
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.deconvnet import DeconvNet


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(**options: Any) -> DeconvNet:
    torch.manual_seed(0)
    return DeconvNet(3, width=2, hidden=6, **options).eval()


def test_parameters_as_in_the_paper() -> None:
    """13 convolutions and two fully connected layers, mirrored; "approximately 252M parameters" says the paper."""
    with torch.device("meta"):
        module = DeconvNet(21)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(252, abs=0.5)
    down = [child for child in module.encoder.modules() if isinstance(child, nn.Conv2d)]
    up = [child for child in module.modules() if isinstance(child, nn.ConvTranspose2d)]
    assert [(child.in_channels, child.out_channels) for child in down[13:]] == [(512, 4096), (4096, 4096)]
    assert (up[0].in_channels, up[0].out_channels, up[0].kernel_size) == (4096, 512, (7, 7))
    mirrored = [(child.out_channels, child.in_channels) for child in up[1:]][::-1]
    assert mirrored == [(64, 64), *((child.in_channels, child.out_channels) for child in down[1:13])]


@torch.inference_mode()
def test_sizes_from_224_to_a_vector_and_back() -> None:
    module = build()
    sizes: list[int] = []
    parts = [module.encoder["fc6"], module.encoder["fc7"], module.widen, *module.up, *module.decoder]
    for part in parts:
        part.register_forward_hook(lambda _module, _given, output: sizes.append(output.shape[-1]))
    assert module(torch.randn(1, 3, 224, 224)).shape == (1, 3, 224, 224)
    assert sizes == [1, 1, 7, 14, 14, 28, 28, 56, 56, 112, 112, 224, 224]


@torch.inference_mode()
def test_values_go_back_where_the_maxima_were() -> None:
    module = build()
    image = torch.randn(2, 3, 224, 256)
    values, places = image, []
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        values, where = pooled(module.encoder[name](values))
        places.append(where)
    for name in ("fc6", "fc7"):
        values = functional.relu(module.encoder[f"{name}_norm"](module.encoder[name](values)))
    values = module.widen(values)
    for stage in module.decoder:
        values = stage(values.repeat_interleave(2, 2).repeat_interleave(2, 3) * places.pop())
    torch.testing.assert_close(module(image), module.score(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bed_of_nails", "transposed"])
@torch.inference_mode()
def test_other_upsampling(upsample: Any) -> None:
    module, image = build(upsample=upsample), torch.randn(1, 3, 224, 224)
    inputs: list[Tensor] = []
    module.decoder[0].register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    wide: list[Tensor] = []
    module.widen.register_forward_hook(lambda _module, _given, output: wide.append(output))
    assert module(image).shape == (1, 3, 224, 224)
    copies = wide[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    if upsample == "nearest":
        assert torch.equal(inputs[0], copies)
    elif upsample == "bed_of_nails":
        assert torch.equal(inputs[0][..., ::2, ::2], wide[0])
        assert inputs[0].count_nonzero() == wide[0].count_nonzero()
    else:
        expected = functional.interpolate(wide[0], scale_factor=2, mode="bilinear")
        torch.testing.assert_close(inputs[0][..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


@torch.inference_mode()
def test_small_images_are_filled_up() -> None:
    module = build()
    image = torch.randn(1, 3, 64, 256)
    whole = functional.pad(image, (0, 0, 0, 160))
    assert torch.equal(module(image), module(whole)[..., :64, :])
    with pytest.raises(ValueError, match="multiples of 32, got 48 x 64"):
        module(torch.randn(1, 3, 48, 64))


def test_every_parameter_learns() -> None:
    module = build(upsample="transposed").train()
    functional.cross_entropy(module(torch.randn(2, 3, 224, 224)), torch.randint(3, (2, 224, 224))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="num_classes must be 2 or more, width, hidden 1 or more, got 3, 0, 4096"):
        DeconvNet(3, width=0)
    with pytest.raises(ValueError, match="upsample must be one of"):
        DeconvNet(3, 2, 6, upsample="pixel_shuffle")  # type: ignore[arg-type]
