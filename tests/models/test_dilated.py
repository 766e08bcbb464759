"""The dilated front end and the context module against their paper."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.zoo.dilated import MARGIN, Context, DilatedVGG


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(**options: Any) -> DilatedVGG:
    torch.manual_seed(0)
    return DilatedVGG(3, **{"width": 2, "hidden": 4, **options}).eval()


def test_parameters_as_in_the_paper() -> None:
    """Section 3: 64 C^2 parameters of the basic module; beside them the biases."""
    for classes in (3, 21):
        counts = [
            sum(p.numel() for p in Context(classes, kind).parameters() if p.ndim > 1) for kind in ("basic", "large")
        ]
        assert counts[0] == 64 * classes**2
        widths = (1, 2, 2, 4, 8, 16, 32, 32)
        assert counts[1] == (9 * sum(a * b for a, b in pairwise(widths)) + 32) * classes**2
    with torch.device("meta"):
        front = DilatedVGG(21, "none")
    assert sum(p.numel() for p in front.parameters()) == 134_346_581  # FCN-32s' layers


def test_what_each_layer_looks_at() -> None:
    """Table 1: receptive fields of 3, 5, 9, 17, 33, 65, 67 and 67, by what the middle depends on."""
    module = Context(1).double()
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    found = []
    for layers in range(1, 9):
        values = maps = torch.ones(1, 1, 101, 101, dtype=torch.float64, requires_grad=True)
        for layer in module.layers[:layers]:
            values = functional.relu(layer(values))
        height = values.shape[-1]
        values[0, 0, height // 2, height // 2].backward()
        assert maps.grad is not None
        rows, columns = maps.grad[0, 0].nonzero().unbind(1)
        assert (rows.min() + rows.max()).item() == (columns.min() + columns.max()).item() == 100
        # Without a gap.
        assert len(rows) == (rows.max() - rows.min() + 1) ** 2
        found.append(int(rows.max() - rows.min() + 1))
    assert found == [3, 5, 9, 17, 33, 65, 67, 67]


def test_the_whole_module_looks_at_67() -> None:
    module = Context(2, "large")
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.01)
    maps = torch.ones(1, 2, 80, 90, requires_grad=True)
    output = module(maps)
    assert output.shape == (1, 2, 80, 90)
    output[0, 0, 40, 45].backward()
    assert maps.grad is not None
    rows, columns = maps.grad[0, 1].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40 - 33, 40 + 33, 45 - 33, 45 + 33)


@torch.inference_mode()
def test_it_begins_as_the_identity() -> None:
    maps = torch.randn(2, 3, 6, 9)
    assert torch.equal(Context(3)(maps), maps.relu())
    # Equation 5 without its noise; with it, nearly.
    large = Context(3, "large")
    torch.testing.assert_close(large(maps), maps.relu(), rtol=0, atol=0.2)
    for layer in large.layers:
        weight = layer.get_parameter("weight")
        outputs, inputs = weight.shape[:2]
        middle = weight.shape[-1] // 2
        for b in range(outputs):
            for a in range(inputs):
                if a * 3 // inputs == b * 3 // outputs:
                    assert weight[b, a, middle, middle] == np.float32(3 / outputs)
                    weight[b, a, middle, middle] = 0
        assert weight.abs().max() < 6 * 0.01 * 3 / outputs
        weight.zero_()
        for b in range(outputs):
            for a in range(inputs):
                if a * 3 // inputs == b * 3 // outputs:
                    weight[b, a, middle, middle] = 3 / outputs
    torch.testing.assert_close(large(maps), maps.relu())


@torch.inference_mode()
def test_900_pixels_are_66_scores() -> None:
    """The sizes of the authors' released networks: 186 pixels on each side, an eighth of the rest."""
    assert MARGIN == 186
    module = build(width=1)
    assert module.front_forward(torch.randn(1, 3, 900, 900)).shape == (1, 3, 66, 66)
    assert module.front_forward(torch.randn(1, 3, 372 + 8, 372 + 24)).shape == (1, 3, 1, 3)


@torch.inference_mode()
def test_holes_are_the_same_network_more_densely() -> None:
    """Without holes, but with every second unit left out where the poolings were: every fourth of the scores."""
    module: Any = build()
    image = torch.randn(1, 3, 372 + 72, 372 + 40)
    values = image
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        for layer in module.encoder[name]:
            if isinstance(layer, nn.Conv2d):
                values = functional.relu(functional.conv2d(values, layer.weight, layer.bias))
        values = values[..., ::2, ::2] if name in ("conv4", "conv5") else functional.max_pool2d(values, 2)
    fc6 = module.encoder["fc6"]
    values = functional.relu(functional.conv2d(values, fc6.weight, fc6.bias))
    expected = module.score(functional.relu(module.encoder["fc7"](values)))
    found = module.front_forward(image)
    assert found.shape == (1, 3, 9, 5)
    torch.testing.assert_close(found[..., ::4, ::4], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 48), (256, 16)])
@torch.inference_mode()
def test_what_is_around_is_mirrored(height: int, width: int) -> None:
    module = build(context="none")
    image = torch.randn(1, 3, height, width)
    pads = [(0, 0), (0, 0), (186, 186), (186, 186)]
    scores = module.front_forward(torch.from_numpy(np.pad(image.numpy(), pads, mode="reflect")))
    assert scores.shape == (1, 3, height // 8, width // 8)
    expected = functional.interpolate(scores, scale_factor=8, mode="bilinear")
    torch.testing.assert_close(module(image), expected)


def test_a_scores_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score i is of the pixels 8 i to 8 i + 7: with means for maxima and equal weights, evenly on both sides."""
    monkeypatch.setattr(functional, "max_pool2d", functional.avg_pool2d)
    module = build(width=1).double()
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    image = torch.ones(1, 3, 372 + 24, 372 + 16, dtype=torch.float64, requires_grad=True)
    module.front_forward(image)[0, 0, 2, 1].backward()
    assert image.grad is not None
    for axis, number in ((1, 2), (0, 1)):
        places = image.grad[0, 0].sum(axis).nonzero().flatten() - MARGIN
        assert (places[0] + places[-1]).item() / 2 == 8 * number + 3.5


def test_the_module_is_behind_the_front_end() -> None:
    front, whole = build(context="none"), build(context="large")
    missing, unexpected = whole.load_state_dict(front.state_dict(), strict=False)
    assert unexpected == []
    assert {name.partition(".")[0] for name in missing} == {"context"}
    image = torch.randn(1, 3, 32, 32)
    seen: list[Tensor] = []
    whole.context.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    with torch.inference_mode():
        logits, whole_logits = front(image), whole(image)
    torch.testing.assert_close(functional.interpolate(seen[0], scale_factor=8, mode="bilinear"), logits)
    assert whole_logits.shape == logits.shape


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="context must be one of none, basic, large, got 'huge'"):
        build(context="huge")
    with pytest.raises(ValueError, match="context must be one of basic, large, got 'none'"):
        Context(3, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 8, got 60 x 64"):
        build()(torch.randn(1, 3, 60, 64))
    with pytest.raises(ValueError, match="got 1, 2, 4"):
        DilatedVGG(1, width=2, hidden=4)
