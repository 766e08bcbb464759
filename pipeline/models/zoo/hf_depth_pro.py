"""Depth Pro, from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options.

Axes: B batch, N images of one size, C channels, H rows, W columns.
"""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth_anything import DINOV2_RENAMES
from pipeline.models.zoo.hf_depth_shared import EXTRA, by_size, leave_out, renamed, without
from pipeline.models.zoo.log_depth import FIRST_DEPTH

__all__ = ["adapt_depth_pro", "build_depth_pro", "depth_pro"]

# The image is seen whole at a quarter of the network's size, in 3 x 3 patches at half, and in 5 x 5 at its full size.
SCALES = (0.25, 0.5, 1)
OVERLAPS = (0.0, 0.5, 0.25)
# What new weights begin with.
FIRST_FIELD_OF_VIEW = 60.0
# The authors' bounds of 1 / depth: from 10 km down to a tenth of a millimetre.
MIN_INVERSE, MAX_INVERSE = 1e-4, 1e4
UNUSED = "fusion_stage.intermediate.0.residual_layer1"
MASK_TOKENS = (
    "depth_pro.encoder.patch_encoder.model.embeddings.mask_token",
    "depth_pro.encoder.image_encoder.model.embeddings.mask_token",
    "fov_model.fov_encoder.model.embeddings.mask_token",
)


def build_depth_pro(
    num_classes: int,
    input_size: int = 1536,
    patch_size: int = 16,
    hidden_size: int = 1024,
    layers: int = 24,
    heads: int = 16,
    out_layers: Sequence[int] = (11, 5),
    out_sizes: Sequence[int] = (256, 256),
    scale_sizes: Sequence[int] = (1024, 1024, 512),
    fusion_size: int = 256,
) -> nn.Module:
    """Depth Pro (Bochkovskii et al. 2024, arXiv:2410.02073), by default as `apple/DepthPro-hf` is: a DINOv2 over
    patches of three scales of the image, one over the whole of it, and one that says the camera's field of view.

    num_classes: not used; a depth model has one output. input_size: pixels, the sides of the square that every image is
    brought to, a multiple of 4 * patch_size. hidden_size, layers, heads: of each of the three. out_layers, out_sizes:
    two layers of the first, from 0, the later one first, and their channels in the decoder. scale_sizes: channels of
    the three scales, the smallest first. Raises ValueError for options that do not fit together, ConfigError without
    the extra.
    """
    if input_size < 1 or input_size % (4 * patch_size):
        raise ValueError(f"input_size must be a multiple of 4 * patch_size, {4 * patch_size}, got {input_size}")
    if len(out_layers) != len(out_sizes) or not all(0 <= at < layers for at in out_layers):
        raise ValueError(f"out_layers must be of the {layers} layers, as many as out_sizes, got {list(out_layers)}")
    if len(scale_sizes) != len(SCALES):
        raise ValueError(f"scale_sizes must be three, got {list(scale_sizes)}")
    library = import_extra("transformers", EXTRA)
    encoder = {
        "model_type": "dinov2",
        "image_size": input_size // 4,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "use_mask_token": False,
    }
    config = library.DepthProConfig(
        patch_size=input_size // 4,
        fusion_hidden_size=fusion_size,
        intermediate_hook_ids=list(out_layers),
        intermediate_feature_dims=list(out_sizes),
        scaled_images_ratios=list(SCALES),
        scaled_images_overlap_ratios=list(OVERLAPS),
        scaled_images_feature_dims=list(scale_sizes),
        use_fov_model=True,
        image_model_config=dict(encoder),
        patch_model_config=dict(encoder),
        fov_model_config=dict(encoder),
    )
    module: Any = library.DepthProForDepthEstimation(config)
    leave_out(module, [UNUSED])
    # Where new weights gave 0 or less there would be no gradient: depth ends in a ReLU and is bounded. So they begin
    # with one depth everywhere, whatever comes before; that learns from the second step on.
    last, field = module.head.layers[-2], module.fov_model.head.layers[-1]
    for layer, value in ((last, _canonical(FIRST_DEPTH)), (field, FIRST_FIELD_OF_VIEW)):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    built: nn.Module = module
    return built


def _canonical(depth: float) -> float:
    """1 / depth in units of the image's width over the focal length, at the first field of view."""
    return 1 / (depth * 2 * math.tan(math.radians(FIRST_FIELD_OF_VIEW) / 2))


def depth_pro(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
    """Metres, depth_BHW of the input's size. Images go one by one: each is 35 patches."""
    return by_size(partial(_depth, module), image_BCHW, frames, alone=True)


def _depth(model: Any, image_1CHW: Tensor, frame: Frame) -> Tensor:
    """What the network says is 1 / depth of a camera whose focal length is the image's width. The camera's own is
    width / (2 tan(field of view / 2)), so the width is not needed."""
    side = 4 * model.config.patch_size
    # No low-pass filter, as in the authors' code.
    square_1CHW = functional.interpolate(image_1CHW, size=(side, side), mode="bilinear", align_corners=False)
    output = model(square_1CHW)
    ratio_1 = 2 * torch.tan(torch.deg2rad(output.field_of_view.float()) / 2)
    inverse_11HW = output.predicted_depth[:, None].float() * ratio_1[:, None, None, None]
    sized_11HW = functional.interpolate(inverse_11HW, size=image_1CHW.shape[-2:], mode="bilinear", align_corners=False)
    return 1 / sized_11HW[:, 0].clamp(MIN_INVERSE, MAX_INVERSE)


def adapt_depth_pro(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published Depth Pro under the installed library's names, without what the depth does not depend on."""
    return without(renamed(given, wanted, DINOV2_RENAMES), wanted, (*MASK_TOKENS, UNUSED))
