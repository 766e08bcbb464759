"""Segmenter against its paper: masks as products of patches and classes, by hand, and timm's transformer inside."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import load_model
from pipeline.models.zoo.segmenter import MaskDecoder, Segmenter, adapt_segmenter, build_segmenter

TINY: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 2, "image_size": 64}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(num_classes: int = 5, **options: Any) -> Segmenter:
    return build_segmenter(num_classes, **{**TINY, **options}).eval()


@pytest.mark.parametrize(
    ("encoder", "size", "heads", "transformer"),
    [
        ("vit_tiny_patch16_384", 192, 3, 12),
        ("vit_small_patch16_384", 384, 6, 12),
        ("vit_large_patch16_384", 1024, 16, 24),
    ],
)
def test_parameters_as_in_the_paper(encoder: str, size: int, heads: int, transformer: int) -> None:
    """Sizes of table 1 of the paper, and a decoder of two layers of the encoder's own size."""
    with torch.device("meta"):
        module: Any = build_segmenter(150, encoder=encoder)
        linear = build_segmenter(150, encoder=encoder, decoder="linear")
    layer = 4 * size + 4 * size * size + 4 * size + 8 * size * size + 5 * size
    body = 3 * 256 * size + size + (24 * 24 + 1) * size + size + transformer * layer + 2 * size
    decoder = size * size + size + 150 * size + 2 * layer + 2 * size + 2 * size * size + 2 * 150
    assert sum(p.numel() for p in module.parameters()) == body + decoder
    assert sum(p.numel() for p in linear.parameters()) == body + 150 * size + 150
    assert [block.attn.num_heads for block in module.decoder.blocks] == [heads, heads]
    assert len(module.encoder.blocks) == transformer


@torch.inference_mode()
def test_masks_are_cosines_normalised_over_classes() -> None:
    decoder = MaskDecoder(5, 32, 16, layers=2, heads=2).eval()
    for parameter in decoder.mask_norm.parameters():
        nn.init.normal_(parameter)
    seen: list[Tensor] = []
    decoder.norm.register_forward_hook(lambda _module, _given, output: seen.append(output))
    scores = decoder(torch.randn(2, 12, 32))
    tokens = seen[0].double()
    assert tokens.shape == (2, 12 + 5, 16)
    patches = torch.einsum("bnd,ed->bne", tokens[:, :12], decoder.of_patches.weight.double())
    classes = torch.einsum("bkd,ed->bke", tokens[:, 12:], decoder.of_classes.weight.double())
    dot = torch.einsum("bne,bke->bnk", patches, classes)
    cosine = dot / (patches.square().sum(-1).sqrt()[:, :, None] * classes.square().sum(-1).sqrt()[:, None])
    centred = cosine - cosine.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normal * decoder.mask_norm.weight.double() + decoder.mask_norm.bias.double()
    assert scores.shape == (2, 12, 5)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_classes_see_the_patches_and_each_other() -> None:
    """What the layers get: the patches' tokens and one more per class, the same for every image."""
    decoder = MaskDecoder(5, 32, 16, layers=1, heads=2).eval()
    given: list[Tensor] = []
    decoder.blocks[0].register_forward_hook(lambda _module, args, _output: given.append(args[0]))
    tokens = torch.randn(2, 12, 32)
    decoder(tokens)
    assert torch.equal(given[0][:, :12], decoder.project(tokens))
    assert torch.equal(given[0][0, 12:], decoder.class_tokens[0])
    assert torch.equal(given[0][1, 12:], decoder.class_tokens[0])


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@torch.inference_mode()
def test_a_patchs_scores_lie_on_the_patch(decoder: Any) -> None:
    module: Any = build(decoder=decoder)
    image = torch.randn(2, 3, 48, 96)
    tokens = module.encoder.forward_features(image)
    assert tokens.shape == (2, 1 + 3 * 6, 32)
    scores = module.decoder(tokens[:, 1:])
    grid = torch.stack([torch.stack([scores[:, row * 6 + column] for column in range(6)], -1) for row in range(3)], -2)
    assert grid.shape == (2, 5, 3, 6)
    expected = functional.interpolate(grid, size=(48, 96), mode="bilinear")
    torch.testing.assert_close(module(image), expected)


@torch.inference_mode()
def test_other_transformers() -> None:
    """DINOv2's, with patches of 14 pixels and more tokens in front."""
    module = build(encoder="vit_small_patch14_reg4_dinov2", image_size=56)
    assert (module.patch_size, module.prefix_tokens) == (14, 5)
    assert module(torch.randn(1, 3, 28, 42)).shape == (1, 5, 28, 42)
    with pytest.raises(ValueError, match=r"multiples of 14, got 32 x 42 \(pad_multiple\)"):
        module(torch.randn(1, 3, 32, 42))


def test_timms_names_are_its_encoders() -> None:
    import timm

    wanted = build().state_dict()
    given = timm.create_model("vit_small_patch16_384", img_size=64, embed_dim=32, depth=2, num_heads=2).state_dict()
    adapted = adapt_segmenter(given, wanted.keys())
    assert set(adapted) == {name for name in wanted if name.startswith("encoder.")}
    assert all(tensor.shape == wanted[name].shape for name, tensor in adapted.items())
    assert adapt_segmenter(wanted, wanted.keys()) == dict(wanted)


@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_every_parameter_learns(decoder: Any) -> None:
    module = build(decoder=decoder).train()
    functional.cross_entropy(module(torch.randn(2, 3, 64, 64)), torch.randint(5, (2, 64, 64))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"encoder": "vit_smal_patch16"}, "encoder must be a vision transformer of timm, got 'vit_smal_patch16'"),
        (
            {"encoder": "resnet18"},
            "encoder must be of timm.models.vision_transformer, got 'resnet18' of timm.models.resnet",
        ),
        ({"decoder": "fpn"}, "decoder must be linear or mask, got 'fpn'"),
        ({"decoder_layers": 0}, "num_classes must be 2 or more, decoder_layers, image_size 1 or more"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], part: str) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        build(**options)
    assert part in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'it needs pip install "maskmill\[smp\]": cannot import timm'):
        load_model(ModelConfig(name="segmenter"), seed=0, tile_pixels=1 << 20)
