"""SegNet against its paper, torchvision's VGG16, and pooling and unpooling written out."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from pipeline.models.zoo.segnet import SegNet, adapt_vgg


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(num_classes: int = 5, width: int = 4) -> SegNet:
    torch.manual_seed(0)
    return SegNet(num_classes, width=width).eval()


def test_parameters_as_in_the_paper() -> None:
    with torch.device("meta"):
        module = SegNet(11)
    convolutions = [child for child in module.encoder.modules() if isinstance(child, nn.Conv2d)]
    assert len(convolutions) == 13
    # "from 134M to 14.7M" for the encoder (section 2), 29.45 M in all (table 6).
    assert sum(p.numel() for child in convolutions for p in child.parameters()) == 14_714_688
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(29.45, abs=0.005)
    assert sum(isinstance(child, nn.Conv2d) for child in module.decoder.modules()) == 13
    # The mirror image: stage by stage the encoder's channels backwards, but for the classes at the end.
    channels = [(child.in_channels, child.out_channels) for child in convolutions]
    mirrored = [
        (child.out_channels, child.in_channels) for child in module.decoder.modules() if isinstance(child, nn.Conv2d)
    ][::-1]
    assert mirrored == [(11, 64), *channels[1:]]


def test_torchvisions_vgg_is_its_encoder() -> None:
    torch.manual_seed(1)
    features = make_layers(cfgs["D"], batch_norm=True).eval()
    given = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    classifier = {"classifier.0.weight": torch.zeros(4096, 25088), "classifier.6.bias": torch.zeros(1000)}
    module = SegNet(11).eval()
    wanted = module.state_dict().keys()
    adapted = adapt_vgg({**given, **classifier}, wanted)
    assert adapted.keys() == {name for name in wanted if name.startswith("encoder.")}
    module.load_state_dict(adapted, strict=False)
    image_BCHW = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        values = image_BCHW
        for stage in module.encoder:
            values = nn.functional.max_pool2d(stage(values), 2)
        assert torch.equal(values, features(image_BCHW))


def test_other_checkpoints_stay_as_they_are() -> None:
    module = build()
    state = module.state_dict()
    assert adapt_vgg(state, state.keys()) == dict(state)


def pooled(values: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 maxima, and 1 where each was (the first of equal ones), by hand."""
    batch, channels, height, width = values.shape
    cells = values.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 2, 4, 3, 5).flatten(4)
    largest = nn.functional.one_hot(cells.argmax(-1), 4)
    places = largest.unflatten(4, (2, 2)).permute(0, 1, 2, 4, 3, 5).reshape(values.shape)
    return cells.amax(-1), places


@torch.inference_mode()
def test_values_go_back_where_the_maxima_were() -> None:
    module = build()
    image_BCHW = torch.randn(2, 3, 32, 64)
    values, places = image_BCHW, []
    for stage in module.encoder:
        values, where = pooled(stage(values))
        places.append(where)
    for stage in module.decoder:
        where = places.pop()
        values = stage(values.repeat_interleave(2, 2).repeat_interleave(2, 3) * where)
    torch.testing.assert_close(module(image_BCHW), values)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(memory_format: torch.memory_format) -> None:
    image_BCHW = torch.randn(2, 3, 32, 96)
    expected = build()(image_BCHW)
    found = build().to(memory_format=memory_format)(image_BCHW.contiguous(memory_format=memory_format))
    assert found.shape == (2, 5, 32, 96)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 48 x 64"):
        build()(torch.randn(1, 3, 48, 64))
    for num_classes, width in ((1, 64), (5, 0)):
        with pytest.raises(ValueError, match=f"got {num_classes}, {width}"):
            SegNet(num_classes, width)


def test_new_weights_keep_the_size_of_what_passes_through() -> None:
    """He et al. 2015: the deviation is sqrt(2 / inputs) in every convolution."""
    for child in SegNet(11, width=16).modules():
        if isinstance(child, nn.Conv2d):
            assert child.weight.std().item() == pytest.approx((2 / (9 * child.in_channels)) ** 0.5, rel=0.1)
            assert child.bias is not None
            assert not child.bias.any()


def test_every_parameter_learns() -> None:
    module = build().train()
    torch.manual_seed(2)
    nn.functional.cross_entropy(module(torch.randn(2, 3, 64, 64)), torch.randint(5, (2, 64, 64))).backward()
    for name, parameter in module.named_parameters():
        # A normalisation takes out what the bias before it adds, but for rounding.
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
