"""ZoeDepth, from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options.

Axes: B batch, N images of one size, C channels, H rows, W columns.
"""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth_shared import (
    EXTRA,
    UNUSED_FUSION,
    by_size,
    check_layers,
    draw_anew,
    leave_out,
    renamed,
    without,
)

__all__ = ["adapt_zoedepth", "build_zoedepth", "zoedepth"]

BinCenters = Literal["softplus", "normed"]
# The names of the heads in the published weights of two, in their order.
DOMAINS = ("nyu", "kitti")
MIN_DEPTH = 1e-3
STEP = 32
BEIT_RENAMES = (
    (r"\.attention\.attention\.relative_position_bias\.", ".relative_position_bias."),
    (r"^(backbone\..*)\.attention\.attention\.query\.", r"\1.attention.q_proj."),
    (r"^(backbone\..*)\.attention\.attention\.key\.", r"\1.attention.k_proj."),
    (r"^(backbone\..*)\.attention\.attention\.value\.", r"\1.attention.v_proj."),
    (r"^(backbone\..*)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    (r"^(backbone\..*)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(backbone\..*)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^backbone\.encoder\.layer\.", "backbone.beit.layers."),
    (r"^backbone\.embeddings\.", "backbone.beit.embeddings."),
)


def build_zoedepth(
    num_classes: int,
    flip: bool = False,
    max_depths: Sequence[float] = (10.0,),
    bin_centers: BinCenters = "softplus",
    input_size: Sequence[int] = (384, 512),
    hidden_size: int = 1024,
    layers: int = 24,
    heads: int = 16,
    out_layers: Sequence[int] = (5, 11, 17, 23),
    neck_sizes: Sequence[int] = (256, 512, 1024, 1024),
    fusion_size: int = 256,
    bins: int = 64,
    image_size: int = 384,
) -> nn.Module:
    """ZoeDepth (Bhat et al. 2023, arXiv:2302.12288), by default as `Intel/zoedepth-nyu` is: MiDaS' DPT on BEiT-Large,
    and a head of metres whose bins are moved from coarse to fine.

    num_classes: not used; a depth model has one output. flip: average the depth of the image and of its mirror image,
    as the authors evaluate it; twice the time. max_depths: metres, one per head; two of them, (10, 80), is
    `Intel/zoedepth-nyu-kitti`, which picks a head by the image and cannot be trained here. bin_centers: `softplus`
    (without bounds) or `normed` (up to max_depth, as `Intel/zoedepth-kitti`). input_size: height and width that an
    image is brought near to, its shape kept. out_layers: of the transformer, from 0, the last one among them. bins: of
    depth, per pixel. image_size: of the relative position biases, in pixels; other sizes are interpolated. Raises
    ValueError for options that do not fit together, ConfigError without the extra.
    """
    check_layers(out_layers, layers, neck_sizes)
    if bin_centers not in get_args(BinCenters):
        raise ValueError(f"bin_centers must be softplus or normed, got {bin_centers!r}")
    if not 1 <= len(max_depths) <= len(DOMAINS) or not all(MIN_DEPTH < depth < math.inf for depth in max_depths):
        raise ValueError(f"max_depths must be one or two, each above {MIN_DEPTH}, got {list(max_depths)}")
    if len(input_size) != 2 or min(input_size) < STEP:
        raise ValueError(f"input_size must be a height and a width of at least {STEP}, got {list(input_size)}")
    library = import_extra("transformers", EXTRA)
    backbone = library.BeitConfig(
        image_size=image_size,
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=heads,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=[f"stage{at + 1}" for at in out_layers],
    )
    several = {
        "num_patch_transformer_layers": 4,
        "patch_transformer_hidden_size": 128,
        "patch_transformer_intermediate_size": 1024,
        "patch_transformer_num_attention_heads": 4,
    }
    config = library.ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=list(neck_sizes),
        fusion_hidden_size=fusion_size,
        bottleneck_features=fusion_size,
        bin_centers_type=bin_centers,
        bin_configurations=[
            {"name": name, "n_bins": bins, "min_depth": MIN_DEPTH, "max_depth": float(depth)}
            for name, depth in zip(DOMAINS, max_depths, strict=False)
        ],
        **(several if len(max_depths) > 1 else {}),
    )
    module: Any = library.ZoeDepthForDepthEstimation(config)
    leave_out(module, [UNUSED_FUSION])
    draw_anew(module.neck, module.relative_head, module.metric_head)
    # The library's is 0: the first normalisation would multiply its gradients by a million.
    nn.init.trunc_normal_(next(one for name, one in module.named_parameters() if name.endswith("cls_token")), std=0.02)
    # The metric head also sees relative depth, which ends in a ReLU.
    nn.init.constant_(module.relative_head.conv3.bias, 1.0)
    module.flip, module.input_size = bool(flip), tuple(input_size)
    built: nn.Module = module
    return built


def zoedepth(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor:
    """Metres, depth_BHW of the input's size. Raises ValueError while two heads are trained.

    As the library's image processor does, an image is mirrored at its borders, where depth would be off, and resized.
    With two heads, all of a batch would be given the same one: images go one by one.
    """
    several = len(module.config.bin_configurations) > 1  # type: ignore[union-attr,arg-type]
    if several and module.training:
        raise ValueError("ZoeDepth is trained with one head, got max_depths of two: which is right has no gradient")
    return by_size(partial(_depth, module), image_BCHW, frames, alone=several)


def _depth(model: Any, image_NCHW: Tensor, frame: Frame) -> Tensor:
    height, width = image_NCHW.shape[-2:]
    rows, columns = _border(frame.height, height), _border(frame.width, width)
    # A side that is shorter than its border has too little to mirror.
    mode = "reflect" if rows < height and columns < width else "replicate"
    padded_NCHW = functional.pad(image_NCHW, (columns, columns, rows, rows), mode=mode)
    padded = (padded_NCHW.shape[-2], padded_NCHW.shape[-1])
    size = _network_size(padded, model.input_size)
    _index_positions(model, size)
    resized_NCHW = functional.interpolate(padded_NCHW, size=size, mode="bilinear", align_corners=True)
    depth_NHW = model(resized_NCHW).predicted_depth
    if model.flip and not model.training:
        depth_NHW = (depth_NHW + model(resized_NCHW.flip(-1)).predicted_depth.flip(-1)) / 2
    depth_N1HW = functional.interpolate(depth_NHW[:, None].float(), size=padded, mode="bicubic", align_corners=False)
    return depth_N1HW[:, 0, rows : rows + height, columns : columns + width]


def _index_positions(model: Any, size: tuple[int, int]) -> None:
    """The library keeps the indices of relative positions from one call to the next; those that were made in inference
    mode could not be learned through afterwards."""
    patch = model.config.backbone_config.patch_size
    with torch.inference_mode(False):
        for child in model.backbone.modules():
            if hasattr(child, "generate_relative_position_index"):
                child.generate_relative_position_index((size[0] // patch, size[1] // patch))


def _border(size: int, prepared_size: int) -> int:
    """Pixels that are mirrored on either side: 3 sqrt(size / 2) of the image as decoded."""
    return round(int(3 * math.sqrt(size / 2)) * prepared_size / size)


def _network_size(size: tuple[int, int], near: tuple[int, int]) -> tuple[int, int]:
    """Multiples of 32: the image's size scaled as little as brings one of its sides to that of `near`."""
    scale = min((near[0] / size[0], near[1] / size[1]), key=lambda scale: abs(1 - scale))
    height, width = (max(1, round(scale * side / STEP)) * STEP for side in size)
    return height, width


def adapt_zoedepth(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published ZoeDepth under the installed library's names, without what the depth does not depend on."""
    return without(renamed(given, wanted, BEIT_RENAMES), wanted, (UNUSED_FUSION,))
