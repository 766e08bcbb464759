"""DPT for depth, from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options: on a
vision transformer (DPT-Large), or on the first stages of a ResNet and a vision transformer (DPT-Hybrid).

Axes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth_shared import (
    EXTRA,
    UNUSED_FUSION,
    check_depth_kind,
    check_layers,
    check_multiple,
    draw_anew,
    leave_out,
    without,
)
from pipeline.models.zoo.log_depth import LogDepth

__all__ = ["EXTRA", "adapt_dpt", "begin_dpt", "build_dpt", "build_dpt_hybrid", "dpt_depth", "fused_features"]

# What transformers builds and no depth depends on: DistributedDataParallel would wait for its gradients.
UNUSED = ("dpt.layernorm", UNUSED_FUSION)
POOLER = "dpt.pooler"
TOKEN_STD = 0.02


def build_dpt(
    num_classes: int,
    depth_kind: str = "inverse_relative",
    hidden_size: int = 1024,
    layers: int = 24,
    heads: int = 16,
    out_layers: Sequence[int] = (5, 11, 17, 23),
    neck_sizes: Sequence[int] = (256, 512, 1024, 1024),
    fusion_size: int = 256,
    image_size: int = 384,
    patch_size: int = 16,
    min_depth: float = 0.1,
    max_depth: float = 100.0,
) -> nn.Module:
    """DPT (Ranftl, Bochkovskiy, Koltun 2021, arXiv:2103.13413); by default DPT-Large, as `Intel/dpt-large` is.

    num_classes: not used; a depth model has one output. depth_kind: `inverse_relative` (disparity up to scale and
    shift, what MiDaS' losses train) or `metric_m` (metres between min_depth and max_depth). out_layers: of the
    transformer, from 0, whose tokens are used, the last one among them. image_size: of the position embeddings, in
    pixels; other sizes are interpolated. Raises ValueError for options that do not fit together, ConfigError without
    the extra.
    """
    check_depth_kind(depth_kind)
    check_layers(out_layers, layers, neck_sizes)
    library = import_extra("transformers", EXTRA)
    config = library.DPTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        backbone_out_indices=list(out_layers),
        neck_hidden_sizes=list(neck_sizes),
        fusion_hidden_size=fusion_size,
        image_size=image_size,
        patch_size=patch_size,
    )
    return _built(library.DPTForDepthEstimation(config), depth_kind, min_depth, max_depth)


def build_dpt_hybrid(
    num_classes: int,
    depth_kind: str = "inverse_relative",
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    out_layers: Sequence[int] = (8, 11),
    neck_sizes: Sequence[int] = (768, 768),
    fusion_size: int = 256,
    image_size: int = 384,
    stem_size: int = 64,
    stage_layers: Sequence[int] = (3, 4, 9),
    stage_sizes: Sequence[int] = (256, 512, 1024),
    norm_groups: int = 32,
    min_depth: float = 0.1,
    max_depth: float = 100.0,
) -> nn.Module:
    """DPT-Hybrid (Ranftl et al. 2021, arXiv:2103.13413, section 3), by default as `Intel/dpt-hybrid-midas` is.

    Three stages of a BiT ResNet-50 come before the transformer, whose tokens are the last one's pixels (16 pixels of
    the image each); the decoder fuses the first two stages with two of the transformer's layers.

    stage_layers, stage_sizes: blocks and channels of the ResNet's stages, multiples of 8; norm_groups: of its group
    normalisations. out_layers, neck_sizes: of the transformer, two. The others as for `build_dpt`, with the same
    errors.
    """
    check_depth_kind(depth_kind)
    check_layers(out_layers, layers, neck_sizes, count=2)
    if len(stage_layers) != 3 or len(stage_sizes) != 3:
        raise ValueError(f"stage_layers and stage_sizes must be three each, got {stage_layers} and {stage_sizes}")
    library = import_extra("transformers", EXTRA)
    patch_size = 16
    config = library.DPTConfig(
        is_hybrid=True,
        backbone_config={
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "embedding_size": stem_size,
            "depths": list(stage_layers),
            "hidden_sizes": list(stage_sizes),
            "num_groups": norm_groups,
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
        },
        backbone_featmap_shape=[1, stage_sizes[-1], image_size // patch_size, image_size // patch_size],
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        # The first two stand for the ResNet's stages.
        backbone_out_indices=[0, 1, *out_layers],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[*stage_sizes[:2], *neck_sizes],
        fusion_hidden_size=fusion_size,
        image_size=image_size,
        patch_size=patch_size,
    )
    return _built(library.DPTForDepthEstimation(config), depth_kind, min_depth, max_depth)


def begin_dpt(module: nn.Module) -> None:
    """New weights of a DPT: without what is unused, the decoder as torch draws it, and tokens that are not 0."""
    leave_out(module, UNUSED)
    draw_anew(*(part for name, part in module.named_children() if name != "dpt"))
    # The library's are 0, and so is a patch of padding: the first normalisation would multiply gradients by a million.
    embeddings: Any = module.get_submodule("dpt.embeddings")
    for tokens in (embeddings.cls_token, embeddings.position_embeddings):
        nn.init.trunc_normal_(tokens, std=TOKEN_STD)


def _built(module: nn.Module, depth_kind: str, min_depth: float, max_depth: float) -> nn.Module:
    begin_dpt(module)
    head: Any = module.get_submodule("head.head")
    if depth_kind == "metric_m":
        head[-1] = LogDepth(min_depth, max_depth)
        head[-1].begin_after(head[-2])
    else:
        # The head ends in a ReLU: where it begins with negative values it would learn nothing.
        nn.init.constant_(head[-2].bias, 1.0)
    return module


def fused_features(model: Any, image_BCHW: Tensor) -> list[Tensor]:
    """What the head of a DPT sees, of every fusion, (B, C, H / 2, W / 2) the last. H and W must be multiples of twice
    the patch size. Raises ValueError for other sizes.

    The library's own forward takes every grid of tokens for a square one, and a hybrid's takes one size only; here
    they are told the shape.
    """
    patch = model.config.patch_size
    height, width = check_multiple(image_BCHW, 2 * patch)
    hybrid = model.config.is_hybrid
    embedded = model.dpt.embeddings(image_BCHW, **({"interpolate_pos_encoding": True} if hybrid else {}))
    picked: list[Tensor] = [*embedded.intermediate_activations] if hybrid else []
    taken = model.config.backbone_out_indices[len(picked) :]
    tokens_BND = embedded.last_hidden_states
    for at, layer in enumerate(model.dpt.encoder.layer):
        tokens_BND = layer(tokens_BND)
        if at in taken:
            picked.append(tokens_BND)
    features: list[Tensor] = model.neck(picked, height // patch, width // patch)
    return features


def dpt_depth(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
    """depth_BHW of the input's size, H and W multiples of twice the patch size. Raises ValueError for other sizes."""
    model: Any = module
    depth_BHW: Tensor = model.head(fused_features(model, image_BCHW))
    return depth_BHW


def adapt_dpt(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published DPT without the tensors that no depth depends on, or the transformer of a published ViT
    (`vit.*`, as transformers names it), whose classifier is left out."""
    vit = {f"dpt.{name.removeprefix('vit.')}": tensor for name, tensor in given.items() if name.startswith("vit.")}
    return without(vit or given, wanted, (*UNUSED, POOLER))
