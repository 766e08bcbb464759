"""FCN against its paper: parameters, where scores lie on the image, and how a skip begins."""

from typing import Any

import pytest
import torch
from test_upsample import spread
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.fcn_vgg import FCN, fcn8s, fcn16s, fcn32s

PAD = 100


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(stride: int, num_classes: int = 3, **options: Any) -> FCN:
    """With scores that say something."""
    torch.manual_seed(0)
    module = FCN(num_classes, stride, width=1, hidden=4, **options).eval()
    for head in module.score.parameters():
        nn.init.normal_(head)
    return module


def test_parameters_as_in_the_paper() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build(21).parameters()) for build in (fcn32s, fcn16s, fcn8s)]
    fc6, fc7 = 512 * 49 * 4096 + 4096, 4096 * 4096 + 4096
    # 14,714,688 in the 13 convolutions; table 1: 134M.
    assert counts[0] == 14_714_688 + fc6 + fc7 + 4096 * 21 + 21 == 134_346_581
    assert counts[1] - counts[0] == 512 * 21 + 21 + 21 * 21 * 4 * 4
    assert counts[2] - counts[1] == 256 * 21 + 21 + 21 * 21 * 4 * 4


def middle(cell: Tensor, stride: int) -> Tensor:
    """The pixel that a pooled cell's middle is at: 99 of the padding's zeros come before the first pixel, and the
    hundredth is the first convolution's own."""
    return stride * cell.double() + (stride - 1) / 2 - (PAD - 1)


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 70)])
@torch.inference_mode()
def test_scores_lie_where_their_cells_are(stride: int, height: int, width: int) -> None:
    """The paper's network as convolutions of its state with a padding of 100, and its scores put together by the pixels
    that they are at."""
    module: Any = build(stride)
    image = torch.randn(2, 3, height, width)
    values, pools = image, {}
    for number, name in enumerate(("conv1", "conv2", "conv3", "conv4", "conv5"), 1):
        for layer in module.encoder[name]:
            if isinstance(layer, nn.Conv2d):
                padding = PAD if values is image else 1
                values = functional.relu(functional.conv2d(values, layer.weight, layer.bias, padding=padding))
        values = functional.max_pool2d(values, 2, 2, ceil_mode=True)
        pools[number] = values
    for name in ("fc6", "fc7"):
        values = functional.relu(module.encoder[name](values))
    scores = module.score["fc7"](values)
    # fc6's unit has its middle three cells further on.
    first = middle(torch.tensor(3), 32).item()
    step = 32
    for number, name in ((4, "pool4"), (3, "pool3"))[: {32: 0, 16: 1, 8: 2}[stride]]:
        skip = module.score[name](pools[number])
        # The scores that a transposed convolution of kernel 4 gives lie on cells of the pooling: the first one is half
        # a cell and a whole one before the first of the coarser scores.
        step //= 2
        places = [middle(torch.arange(size), step) for size in skip.shape[-2:]]
        begin = first - 1.5 * step
        sizes = [2 * size + 2 for size in scores.shape[-2:]]
        cells = [
            [int((place == begin + step * at).nonzero().item()) for at in range(size)]
            for place, size in zip(places, sizes, strict=True)
        ]
        at = [place[index] for place, index in zip(places, cells, strict=True)]
        scores = spread(scores, first, 2 * step, *at) + skip[:, :, cells[0]][..., cells[1]]
        first = begin
    expected = spread(scores, first, step, torch.arange(height).double(), torch.arange(width).double())
    found = module(image)
    assert found.shape == (2, 3, height, width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_units_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6's unit j looks at pixels around 32 j + 12.5: with means for maxima and equal weights, what it depends on is
    symmetric about that."""
    monkeypatch.setattr(
        functional,
        "max_pool2d",
        lambda values, size, ceil_mode: functional.avg_pool2d(values, size, ceil_mode=ceil_mode),
    )
    module: Any = build(32, dropout=0.0)
    for parameter in module.encoder.parameters():
        nn.init.ones_(parameter)
    seen: list[Tensor] = []
    module.encoder["fc6"].register_forward_hook(lambda _module, _given, output: seen.append(output))
    image = torch.ones(1, 3, 512, 448, dtype=torch.float64, requires_grad=True)
    module.double()(image)
    row, column = 7, 6
    seen[0][0, 0, row, column].backward()
    assert image.grad is not None
    weight_HW = image.grad[0, 0]
    for axis, number in ((1, row), (0, column)):
        profile = weight_HW.sum(axis)
        places = profile.nonzero().flatten()
        # 404 pixels: the receptive field of VGG16's fc6.
        assert len(places) == places[-1] - places[0] + 1 == 404
        assert (places[0] + places[-1]).item() / 2 == 32 * number + 12.5


@pytest.mark.parametrize("stride", [32, 16, 8])
@torch.inference_mode()
def test_any_size_comes_back(stride: int) -> None:
    module = build(stride)
    for height, width in ((1, 1), (2, 31), (32, 33), (63, 65), (95, 29), (96, 127)):
        assert module(torch.randn(1, 3, height, width)).shape == (1, 3, height, width)


@torch.inference_mode()
def test_a_skip_begins_as_nothing() -> None:
    image = torch.randn(1, 3, 160, 160)
    assert not fcn8s(3, width=1, hidden=4).eval()(image).any()
    coarse, fine = build(32), FCN(3, 16, width=1, hidden=4).eval()
    nn.init.zeros_(coarse.score["fc7"].weight)  # type: ignore[arg-type]
    missing, unexpected = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert missing == ["score.pool4.weight", "score.pool4.bias", "up.pool4.weight"]
    assert unexpected == []
    # Scores that are the same everywhere are so however often they are interpolated.
    torch.testing.assert_close(fine(image)[..., 64:96, 64:96], coarse(image)[..., 64:96, 64:96])


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
@torch.inference_mode()
def test_other_upsampling(upsample: Any) -> None:
    image = torch.randn(1, 3, 160, 160)
    expected, found = build(8)(image), build(8, upsample=upsample)(image)
    assert found.shape == expected.shape
    assert not any(name.startswith("up.") for name in build(8, upsample=upsample).state_dict())
    if upsample == "bilinear":
        # Away from the edges, where a transposed convolution fades out.
        torch.testing.assert_close(found[..., 64:96, 64:96], expected[..., 64:96, 64:96], rtol=1e-4, atol=1e-5)


def test_every_parameter_learns() -> None:
    module = build(8, dropout=0.0)
    for bias in (child.bias for child in module.encoder.modules() if isinstance(child, nn.Conv2d)):
        nn.init.constant_(bias, 0.1)  # type: ignore[arg-type]
    functional.cross_entropy(module(torch.randn(1, 3, 64, 64)), torch.randint(3, (1, 64, 64))).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad.abs().sum() > 0 for p in [*module.score.parameters(), *module.up.parameters()])


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="stride must be 32, 16 or 8, got 4"):
        FCN(3, 4)
    with pytest.raises(ValueError, match="num_classes must be 2 or more, width, hidden 1 or more, got 1, 64, 4096"):
        FCN(1, 32)
    with pytest.raises(ValueError, match="got 'max_unpool'"):
        FCN(3, 32, 1, 4, upsample="max_unpool")
