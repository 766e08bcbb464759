"""The U-Net of 2015 against its paper: sizes, parameters, mirroring, and tiles that fit together."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.models.zoo.unet_2015 import UNet2015


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(width: int = 3, depth: int = 2) -> UNet2015:
    torch.manual_seed(0)
    return UNet2015(4, width=width, depth=depth).eval()


def mirrored(image_BCHW: Tensor, above: int, below: int, left: int, right: int) -> Tensor:
    """numpy's reflection, which goes on as often as it takes."""
    pads = [(0, 0), (0, 0), (above, below), (left, right)]
    return torch.from_numpy(np.pad(image_BCHW.numpy(), pads, mode="reflect"))


@torch.inference_mode()
def test_the_sizes_of_figure_1() -> None:
    module = build(width=1, depth=4)
    sizes = []
    for child in [*module.encoder, *module.up, *module.decoder]:
        child.register_forward_hook(lambda _module, _input, output: sizes.append(output.shape[-1]))
    assert module.valid_forward(torch.randn(1, 3, 572, 572)).shape == (1, 4, 388, 388)
    assert sizes == [568, 280, 136, 64, 28, 56, 52, 104, 100, 200, 196, 392, 388]
    assert module.margin == (572 - 388) // 2


def test_parameters_as_in_the_paper() -> None:
    with torch.device("meta"):
        module = UNet2015(2)
    channels = [3, 64, 128, 256, 512, 1024]
    down = sum(9 * a * b + b + 9 * b * b + b for a, b in pairwise(channels))
    up = sum(4 * 2 * c * c + c + 9 * 2 * c * c + c + 9 * c * c + c for c in channels[1:-1])
    expected = down + up + 2 * 64 + 2
    assert sum(p.numel() for p in module.parameters()) == expected == 31_031_810
    # Figure 1's 23 convolutions.
    assert sum(isinstance(child, nn.Conv2d | nn.ConvTranspose2d) for child in module.modules()) == 23


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_which_sizes_fit(depth: int) -> None:
    """By going down and up, rather than by the formula."""
    module = build(depth=depth)

    def output(size: int) -> int | None:
        for _ in range(depth):
            size -= 4
            if size < 2 or size % 2:
                return None
            size //= 2
        size -= 4
        for _ in range(depth):
            size = 2 * size - 4
        return size if size > 0 else None

    fitting = {size: out for size in range(1, 150) if (out := output(size)) is not None}
    assert all(size - out == 2 * module.margin for size, out in fitting.items())
    for wanted in range(1, 40):
        assert module.output_size(wanted) == min(out for out in fitting.values() if out >= wanted)
    with torch.inference_mode():
        for size in range(2 * module.margin - 3, 2 * module.margin + 20):
            image_BCHW = torch.zeros(1, 3, size, min(fitting))
            if size in fitting:
                assert module.valid_forward(image_BCHW).shape[2:] == (fitting[size], min(fitting.values()))
            else:
                with pytest.raises(ValueError, match=f"valid convolutions can halve, such as .*, got {size}"):
                    module.valid_forward(image_BCHW)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (2, 3), (13, 40), (64, 37), (44, 44)])
@torch.inference_mode()
def test_any_size_comes_back_and_what_is_around_is_mirrored(height: int, width: int) -> None:
    module = build()
    image_BCHW = torch.randn(2, 3, height, width)
    extra = [module.output_size(size) - size for size in (height, width)]
    around = mirrored(image_BCHW, module.margin, module.margin + extra[0], module.margin, module.margin + extra[1])
    logits_BKHW = module(image_BCHW)
    assert logits_BKHW.shape == (2, 4, height, width)
    torch.testing.assert_close(logits_BKHW, module.valid_forward(around)[..., :height, :width])


@torch.inference_mode()
def test_tiles_fit_together_without_a_seam() -> None:
    """The overlap-tile strategy of figure 2: parts of 8 x 12 pixels, each from its own surroundings."""
    module = build()
    image_BCHW = torch.randn(1, 3, 24, 24)
    margin = module.margin
    around = mirrored(image_BCHW, margin, margin + 8, margin, margin + 8)
    whole = module(image_BCHW)
    for top in (0, 8, 16):
        for left in (0, 12):
            height, width = module.output_size(8), module.output_size(12)
            tile = around[..., top : top + height + 2 * margin, left : left + width + 2 * margin]
            part = module.valid_forward(tile)[..., :8, :12]
            torch.testing.assert_close(part, whole[..., top : top + 8, left : left + 12], rtol=1e-4, atol=1e-4)


def test_new_weights() -> None:
    """N(0, 2 / N), N the inputs of one unit (section 3); that of a transposed convolution has one tap of each."""
    module = UNet2015(4, width=16, depth=2)
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            taps = 9 if child.kernel_size == (3, 3) else 1
            assert child.weight.std().item() == pytest.approx((2 / (taps * child.in_channels)) ** 0.5, rel=0.2)


def test_dropout_is_at_the_end_of_the_contracting_path() -> None:
    module = build(depth=3).train()
    inputs = []
    module.dropout.register_forward_hook(lambda _module, given, _output: inputs.append(given[0].shape[1]))
    module(torch.randn(1, 3, 16, 16))
    assert inputs == [4 * 3, 8 * 3]
    assert not torch.equal(module(torch.ones(1, 3, 16, 16)), module(torch.ones(1, 3, 16, 16)))
    module.eval()
    assert torch.equal(module(torch.ones(1, 3, 16, 16)), module(torch.ones(1, 3, 16, 16)))


def test_every_parameter_learns() -> None:
    module = build().train()
    nn.functional.cross_entropy(module(torch.randn(2, 3, 30, 20)), torch.randint(4, (2, 30, 20))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("num_classes", "width", "depth"), [(1, 64, 4), (4, 0, 4), (4, 64, 0)])
def test_senseless_options_are_refused(num_classes: int, width: int, depth: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_classes}, {width}, {depth}"):
        UNet2015(num_classes, width, depth)
