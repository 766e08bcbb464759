"""Segmenter: a vision transformer of timm (https://github.com/huggingface/pytorch-image-models, Apache-2.0), and a
decoder in which classes are tokens.

Axes: B batch, C channels, H rows, W columns, K classes, N patches, D token length.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.models.adapt import backbone
from pipeline.models.extras import import_extra
from pipeline.models.zoo.vgg import check_options

__all__ = ["EXTRA", "MaskDecoder", "Segmenter", "adapt_segmenter", "build_segmenter"]

EXTRA = "smp"
BLOCKS = "timm.models.vision_transformer"
Decoder = Literal["linear", "mask"]
INIT_STD = 0.02


class MaskDecoder(nn.Module):
    """The mask transformer (Strudel et al. 2021, section 3.2): scores_BNK from tokens_BND.

    One learned token per class joins the patches' tokens in a few layers like the encoder's. Then a patch's score of a
    class is the cosine between the two tokens' projections, normalised over the classes as in the authors' code.

    encoder_size: of the encoder's tokens. hidden_size: D of the decoder's. heads: divides it.
    """

    def __init__(self, num_classes: int, encoder_size: int, hidden_size: int, layers: int, heads: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.project = nn.Linear(encoder_size, hidden_size)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, hidden_size))
        block = import_extra(BLOCKS, EXTRA).Block
        self.blocks = nn.ModuleList(block(hidden_size, heads, qkv_bias=True) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.of_patches = nn.Linear(hidden_size, hidden_size, bias=False)
        self.of_classes = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        for child in self.modules():
            if isinstance(child, nn.Linear):
                nn.init.trunc_normal_(child.weight, std=INIT_STD)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
        for projection in (self.of_patches, self.of_classes):
            nn.init.normal_(projection.weight, std=hidden_size**-0.5)
        nn.init.trunc_normal_(self.class_tokens, std=INIT_STD)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """scores_BNK."""
        patches = self.project(tokens_BND)
        tokens = torch.cat([patches, self.class_tokens.expand(len(patches), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        patches_BND = functional.normalize(self.of_patches(tokens[:, : -self.num_classes]), dim=-1)
        classes_BKD = functional.normalize(self.of_classes(tokens[:, -self.num_classes :]), dim=-1)
        scores_BNK: Tensor = self.mask_norm(patches_BND @ classes_BKD.transpose(1, 2))
        return scores_BNK


class Segmenter(nn.Module):
    """Segmenter (Strudel, Garcia, Laptev, Schmid 2021, https://arxiv.org/abs/2105.05633).

    encoder: a timm vision transformer without its classifier. decoder: scores_BNK from its patches' tokens.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, patch_size: int, prefix_tokens: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.patch_size, self.prefix_tokens = patch_size, prefix_tokens

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """logits_BKHW of the input's size, bilinear from one per patch.

        image_BCHW: normalised, float, H and W multiples of the patch size. Raises ValueError for other sizes.
        """
        height, width = image_BCHW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"height and width must be multiples of {self.patch_size}, got {height} x {width} (pad_multiple)"
            )
        encoder: Any = self.encoder
        tokens_BND = encoder.forward_features(image_BCHW)[:, self.prefix_tokens :]
        rows, columns = height // self.patch_size, width // self.patch_size
        scores_BKHW = self.decoder(tokens_BND).transpose(1, 2).unflatten(2, (rows, columns))
        return functional.interpolate(scores_BKHW, size=(height, width), mode="bilinear")


def build_segmenter(
    num_classes: int,
    encoder: str = "vit_small_patch16_384",
    decoder: Decoder = "mask",
    decoder_layers: int = 2,
    image_size: int = 384,
    hidden_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
) -> Segmenter:
    """Segmenter on a timm vision transformer; Seg-S-Mask/16 by default.

    encoder: its name in timm, of the class VisionTransformer (augreg's and DINOv2's are). decoder: `mask`, the mask
    transformer, with as many heads of 64 as the encoder's tokens have room for, or `linear`. decoder_layers: of the
    mask transformer. image_size: of the position embeddings, in pixels; other sizes are interpolated. hidden_size,
    layers, heads: of the encoder, instead of what its name says. Raises ConfigError without the extra or for another
    kind of encoder, ValueError for options that make no sense.
    """
    check_options(num_classes, decoder_layers=decoder_layers, image_size=image_size)
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder must be linear or mask, got {decoder!r}")
    timm = import_extra("timm", EXTRA)
    kinds = import_extra(BLOCKS, EXTRA)
    given = {"embed_dim": hidden_size, "depth": layers, "num_heads": heads}
    if not timm.is_model(encoder):
        raise ConfigError(f"encoder must be a vision transformer of timm, got {encoder!r}")
    kind = getattr(timm.model_entrypoint(encoder), "__module__", "")
    if kind != kinds.__name__:
        raise ConfigError(f"encoder must be of {kinds.__name__}, got {encoder!r} of {kind}")
    body: Any = timm.create_model(
        encoder,
        pretrained=False,
        num_classes=0,
        img_size=image_size,
        dynamic_img_size=True,
        **{name: value for name, value in given.items() if value is not None},
    )
    size, patch = body.embed_dim, body.patch_embed.patch_size[0]
    if decoder == "mask":
        head: nn.Module = MaskDecoder(num_classes, size, size, decoder_layers, max(1, size // 64))
    else:
        head = nn.Linear(size, num_classes)
        nn.init.trunc_normal_(head.weight, std=INIT_STD)
        nn.init.zeros_(head.bias)
    return Segmenter(body, head, patch, body.num_prefix_tokens)


adapt_segmenter = backbone("encoder.")
