"""DPT for label maps, from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options.

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth import adapt_dpt, begin_dpt, fused_features
from pipeline.models.zoo.hf_depth_shared import EXTRA, check_layers, without

__all__ = ["EXTRA", "adapt_dpt_segmentation", "build_dpt_segmentation", "dpt_segmentation"]

AUXILIARY = "auxiliary_head"


def build_dpt_segmentation(
    num_classes: int,
    auxiliary: bool = True,
    hidden_size: int = 1024,
    layers: int = 24,
    heads: int = 16,
    out_layers: Sequence[int] = (5, 11, 17, 23),
    neck_sizes: Sequence[int] = (256, 512, 1024, 1024),
    fusion_size: int = 256,
    image_size: int = 384,
    patch_size: int = 16,
) -> nn.Module:
    """DPT for label maps (Ranftl, Bochkovskiy, Koltun 2021, arXiv:2103.13413), by default as `Intel/dpt-large-ade`
    is: DPT-Large with batch normalisation in its decoder.

    auxiliary: a second head on the decoder's last features, which takes part in training alone. The others as for
    `hf_depth.build_dpt`, with the same errors.
    """
    check_layers(out_layers, layers, neck_sizes)
    library = import_extra("transformers", EXTRA)
    config = library.DPTConfig(
        num_labels=num_classes,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        backbone_out_indices=list(out_layers),
        neck_hidden_sizes=list(neck_sizes),
        fusion_hidden_size=fusion_size,
        image_size=image_size,
        patch_size=patch_size,
        use_batch_norm_in_fusion_residual=True,
        use_auxiliary_head=auxiliary,
    )
    module: nn.Module = library.DPTForSemanticSegmentation(config)
    begin_dpt(module)
    return module


def dpt_segmentation(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Tensor | dict[str, Tensor]:
    """logits_BKHW of the input's size, H and W multiples of twice the patch size; in training, where there is an
    auxiliary head, as `out`, and its logits at half that size as `aux`. Raises ValueError for other sizes."""
    model: Any = module
    features = fused_features(model, image_BCHW)
    logits_BKHW: Tensor = model.head(features)
    if model.training and model.auxiliary_head is not None:
        return {"out": logits_BKHW, "aux": model.auxiliary_head(features[-1])}
    return logits_BKHW


def adapt_dpt_segmentation(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """As `hf_depth.adapt_dpt`, and without the auxiliary head where the module has none."""
    return without(adapt_dpt(given, wanted), wanted, (AUXILIARY,))
