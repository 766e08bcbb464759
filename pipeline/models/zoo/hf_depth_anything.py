"""Depth Anything V2, from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options.

Axes: B batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, get_args

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
    renamed,
    without,
)
from pipeline.models.zoo.log_depth import FIRST_DEPTH

__all__ = ["DINOV2_RENAMES", "adapt_depth_anything", "build_depth_anything", "depth_anything"]

PATCH = 14
Size = Literal["small", "base", "large"]
SIZES: dict[Size, dict[str, Any]] = {
    "small": {
        "hidden_size": 384,
        "layers": 12,
        "heads": 6,
        "out_layers": (2, 5, 8, 11),
        "neck_sizes": (48, 96, 192, 384),
        "fusion_size": 64,
    },
    "base": {
        "hidden_size": 768,
        "layers": 12,
        "heads": 12,
        "out_layers": (2, 5, 8, 11),
        "neck_sizes": (96, 192, 384, 768),
        "fusion_size": 128,
    },
    "large": {
        "hidden_size": 1024,
        "layers": 24,
        "heads": 16,
        "out_layers": (4, 11, 17, 23),
        "neck_sizes": (256, 512, 1024, 1024),
        "fusion_size": 256,
    },
}
DINOV2_RENAMES = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
# Of DINOv2's own training, and of its classifier.
OTHER = ("backbone.embeddings.mask_token", "backbone.classifier.")


def build_depth_anything(
    num_classes: int,
    size: Size = "small",
    depth_kind: str = "inverse_relative",
    max_depth: float = 20.0,
    hidden_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    out_layers: Sequence[int] | None = None,
    neck_sizes: Sequence[int] | None = None,
    fusion_size: int | None = None,
    image_size: int = 518,
) -> nn.Module:
    """Depth Anything V2 (Yang et al. 2024, arXiv:2406.09414): DINOv2 with patches of 14 pixels, and DPT's decoder.

    num_classes: not used; a depth model has one output. size: of the published weights. depth_kind: `inverse_relative`
    (disparity up to scale and shift) or `metric_m` (metres from 0 to max_depth: published with 20 for rooms, 80 for
    streets). hidden_size, layers, heads, out_layers (from 0, the last one among them), neck_sizes, fusion_size: instead
    of what the size says. image_size: of the position embeddings, in pixels; other sizes are interpolated. Raises
    ValueError for options that do not fit together, ConfigError without the extra.
    """
    check_depth_kind(depth_kind)
    if size not in get_args(Size):
        raise ValueError(f"size must be small, base or large, got {size!r}")
    if not 0 < max_depth < math.inf:
        raise ValueError(f"max_depth must be above 0, got {max_depth}")
    if image_size < PATCH or image_size % PATCH:
        raise ValueError(f"image_size must be a multiple of {PATCH}, got {image_size}")
    given = {
        "hidden_size": hidden_size,
        "layers": layers,
        "heads": heads,
        "out_layers": out_layers,
        "neck_sizes": neck_sizes,
        "fusion_size": fusion_size,
    }
    chosen = {**SIZES[size], **{name: value for name, value in given.items() if value is not None}}
    check_layers(chosen["out_layers"], chosen["layers"], chosen["neck_sizes"])
    library = import_extra("transformers", EXTRA)
    backbone = library.Dinov2Config(
        hidden_size=chosen["hidden_size"],
        num_hidden_layers=chosen["layers"],
        num_attention_heads=chosen["heads"],
        image_size=image_size,
        patch_size=PATCH,
        # The first is what comes before the layers.
        out_indices=[at + 1 for at in chosen["out_layers"]],
        apply_layernorm=True,
        reshape_hidden_states=False,
        use_mask_token=False,
    )
    config = library.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=chosen["hidden_size"],
        neck_hidden_sizes=list(chosen["neck_sizes"]),
        fusion_hidden_size=chosen["fusion_size"],
        depth_estimation_type="metric" if depth_kind == "metric_m" else "relative",
        max_depth=1,
    )
    module: nn.Module = library.DepthAnythingForDepthEstimation(config)
    leave_out(module, [UNUSED_FUSION])
    head: Any = module.get_submodule("head")
    draw_anew(module.get_submodule("neck"), head)
    if depth_kind == "metric_m":
        head.max_depth = max_depth  # the config takes whole numbers only
        share = min(FIRST_DEPTH / max_depth, 0.5)
        nn.init.constant_(head.conv3.bias, math.log(share / (1 - share)))
    else:
        # The head ends in a ReLU: where it begins with negative values it would learn nothing.
        nn.init.constant_(head.conv3.bias, 1.0)
    return module


def depth_anything(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
    """depth_BHW of the input's size, H and W multiples of the patch size. Raises ValueError for other sizes."""
    check_multiple(image_BCHW, PATCH)
    depth_BHW: Tensor = module(image_BCHW).predicted_depth
    return depth_BHW


def adapt_depth_anything(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published Depth Anything, or a published DINOv2, whose names begin with no `backbone.`, for its backbone."""
    if not any(name.startswith(("backbone.", "head.")) for name in given):
        given = {f"backbone.{name.removeprefix('dinov2.')}": tensor for name, tensor in given.items()}
    named = renamed(given, wanted, DINOV2_RENAMES)
    return without(named, wanted, (*OTHER, UNUSED_FUSION))
