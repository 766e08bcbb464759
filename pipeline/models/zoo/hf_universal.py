"""Models of queries from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options:
MaskFormer and Mask2Former, and what OneFormer (hf_oneformer.py) and EoMT (hf_eomt.py) share with them.

Axes: B batch, C channels, H rows, W columns, Q queries.
"""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.universal_post import Queries, check_thresholds
from pipeline.models.zoo.vgg import check_options

__all__ = [
    "EXTRA",
    "MASK2FORMER_LOSSES",
    "MASKFORMER_LOSSES",
    "adapt_universal",
    "backbone_config",
    "build_mask2former",
    "build_maskformer",
    "finished",
    "last_queries",
    "mask2former",
    "maskformer",
    "query_losses",
]

EXTRA = "hf"
# Cheng et al. 2021, arXiv:2107.06278, section 4.1, and Cheng et al. 2022, arXiv:2112.01527, section 4.1, whose factors
# OneFormer and EoMT took over.
MASKFORMER_LOSSES = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
MASK2FORMER_LOSSES = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}

# Liu et al. 2021, arXiv:2103.14030, section 3.3; base and large as they were trained on ImageNet-22k, at 384 pixels.
SWIN: Mapping[str, Mapping[str, Any]] = {
    "swin_tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin_large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
# He et al. 2016, arXiv:1512.03385, table 1.
RESNET: Mapping[str, Mapping[str, Any]] = {
    "resnet50": {"depths": [3, 4, 6, 3]},
    "resnet101": {"depths": [3, 4, 23, 3]},
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DROP_PATH = 0.3
BIAS_STD = 0.02

# Names of published tensors -> what newer versions of transformers call them.
RENAMED = (
    (r"(pixel_level_module\.encoder)\.(embeddings|encoder)\.", r"\1.swin.\2."),
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (r"attention\.self\.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"out_proj", "o_proj"),
    (r"layers\.(\d+)\.fc([12])\.", r"layers.\1.mlp.fc\2."),
)
# What transformers builds and no prediction depends on: DistributedDataParallel would wait for its gradients.
UNUSED = ("pixel_level_module.encoder.swin.layernorm", "pixel_level_module.encoder.model.layernorm")
# Published tensors that only training reads, and those that follow from the options.
NOT_LEARNED = re.compile(
    r"^criterion\.|^model\.text_mapper\.|\.relative_position_index$|encoder\.(swin|model)\.layernorm\."
)


def build_mask2former(
    num_classes: int,
    backbone: str = "swin_large",
    queries: int = 200,
    hidden_size: int = 256,
    layers: int = 10,
    encoder_layers: int = 6,
    heads: int = 8,
    points: int = 12544,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    backbone_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Mask2Former (Cheng et al. 2022, arXiv:2112.01527); by default that of COCO's panoptic weights on Swin-L.

    backbone: swin_tiny, swin_small, swin_base, swin_large, resnet50 or resnet101; backbone_options: fields of
    transformers' SwinConfig or ResNetConfig that replace what the name says. layers: of the decoder, the prediction
    before the first counted; encoder_layers: of the pixel decoder. points: of a mask that the loss looks at.
    mask_threshold, overlap_threshold: see `universal_post.check_thresholds`. Raises ValueError for options that make
    no sense, ConfigError without the extra.
    """
    check_options(num_classes, queries=queries, layers=layers, encoder_layers=encoder_layers, points=points)
    library = import_extra("transformers", EXTRA)
    config = library.Mask2FormerConfig(
        backbone_config=backbone_config(library, backbone, backbone_options),
        num_labels=num_classes,
        num_queries=queries,
        feature_size=hidden_size,
        mask_feature_size=hidden_size,
        hidden_dim=hidden_size,
        encoder_feedforward_dim=4 * hidden_size,
        dim_feedforward=8 * hidden_size,
        decoder_layers=layers,
        encoder_layers=encoder_layers,
        num_attention_heads=heads,
        train_num_points=points,
    )
    return finished(library.Mask2FormerForUniversalSegmentation(config), mask_threshold, overlap_threshold)


def build_maskformer(
    num_classes: int,
    backbone: str = "swin_base",
    queries: int = 100,
    hidden_size: int = 256,
    layers: int = 6,
    heads: int = 8,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    backbone_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """MaskFormer (Cheng, Schwing, Kirillov 2021, arXiv:2107.06278); by default that of COCO's weights on Swin-B.

    Options as in `build_mask2former`; layers: of the transformer decoder, each of which learns.
    """
    check_options(num_classes, queries=queries, layers=layers)
    library = import_extra("transformers", EXTRA)
    decoder = library.DetrConfig(
        d_model=hidden_size,
        num_queries=queries,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        encoder_attention_heads=heads,
        decoder_ffn_dim=8 * hidden_size,
        encoder_ffn_dim=8 * hidden_size,
    )
    config = library.MaskFormerConfig(
        backbone_config=backbone_config(library, backbone, backbone_options),
        decoder_config=decoder,
        num_labels=num_classes,
        fpn_feature_size=hidden_size,
        mask_feature_size=hidden_size,
        use_auxiliary_loss=True,
    )
    module: Any = library.MaskFormerForInstanceSegmentation(config)
    # Queries enter as 0, and with biases of 0 they leave the first attention so: the layer norm as in `finished`.
    for name, parameter in module.model.transformer_module.decoder.layers[0].self_attn.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=BIAS_STD)
    return finished(module, mask_threshold, overlap_threshold)


def backbone_config(library: Any, name: str, given: Mapping[str, Any] | None) -> Any:
    own = dict(given or {})
    if name in SWIN:
        fields = {**SWIN[name], "drop_path_rate": DROP_PATH, "out_features": STAGES, **own}
        return library.SwinConfig(image_size=fields.pop("image_size", 32 * fields["window_size"]), **fields)
    if name in RESNET:
        return library.ResNetConfig(**{**RESNET[name], "out_features": STAGES, **own})
    raise ValueError(f"backbone must be one of {', '.join([*SWIN, *RESNET])}, got {name!r}")


def finished(module: Any, mask_threshold: float, overlap_threshold: float) -> nn.Module:
    """The library's model without what no prediction depends on, with what reading its queries needs."""
    check_thresholds(mask_threshold, overlap_threshold)
    module.thresholds = {"mask_threshold": mask_threshold, "overlap_threshold": overlap_threshold}
    # The loss's weights of classes are options, not something learned.
    module.criterion.register_buffer("empty_weight", module.criterion.empty_weight, persistent=False)
    for name, _ in [*module.named_modules()]:
        if name.endswith(UNUSED):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, nn.Identity())
        elif name.endswith("patch_embeddings.projection"):
            # With transformers' bias of 0 a patch of padding is 0 all through Swin, and each layer norm multiplies
            # its gradient by 300: a first step of random weights would be nothing else.
            module.get_submodule(name).reset_parameters()
    finished: nn.Module = module
    return finished


def last_queries(module: Any, image_BCHW: Tensor, classes_BQC: Tensor, masks_BQhw: Tensor) -> Queries:
    height, width = image_BCHW.shape[-2:]
    return Queries(classes_BQC, masks_BQhw, padded=(height, width), **module.thresholds)


def mask2former(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Queries:
    """What the last layer's queries say of a padded batch."""
    output = module(image_BCHW)
    return last_queries(module, image_BCHW, output.class_queries_logits, output.masks_queries_logits)


def maskformer(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Queries:
    """MaskFormerForInstanceSegmentation.forward without the masks of the layers before the last."""
    model: Any = module
    output = model.model(image_BCHW)
    queries_BQD = output.transformer_decoder_last_hidden_state
    masks_BQhw = torch.einsum(
        "bqc,bchw->bqhw", model.mask_embedder(queries_BQD), output.pixel_decoder_last_hidden_state
    )
    return last_queries(model, image_BCHW, model.class_predictor(queries_BQD), masks_BQhw)


def query_losses(
    module: nn.Module,
    image_BCHW: Tensor,
    frames: Sequence[Frame],
    targets: Sequence[Mapping[str, Tensor]],
    **given: Tensor,
) -> dict[str, Tensor]:
    """The library's losses of queries matched to segments (scipy's Hungarian method), each summed over the layers that
    predict: `loss_cross_entropy`, `loss_mask`, `loss_dice`, without their factors. given: what else the model's forward
    takes.

    A mask's points are drawn with torch's global generator. The masks' losses are means over the segments of the batch
    that is seen at once, so a batch that is cut among workers gives nearly, not exactly, the gradient of the whole.
    """
    model: Any = module
    height, width = image_BCHW.shape[-2:]
    masks = [
        functional.pad(
            target["masks"].float(), (0, width - target["masks"].shape[-1], 0, height - target["masks"].shape[-2])
        )
        for target in targets
    ]
    sums: dict[str, Tensor] = {}

    def record(_module: nn.Module, _inputs: Any, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            kind = re.sub(r"_\d+$", "", name)
            # The library multiplies what it is given in place.
            sums[kind] = sums[kind] + loss.sum() if kind in sums else loss.sum().clone()

    # Of its losses the library returns the sum alone; some models ask the criterion once for all layers, some for each.
    handle = model.criterion.register_forward_hook(record)
    try:
        model(
            image_BCHW,
            mask_labels=masks,
            class_labels=[target["labels"] for target in targets],
            output_hidden_states=True,
            **given,
        )
    finally:
        handle.remove()
    return sums


def adapt_universal(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Published weights under the names of this version of transformers, without what only training reads."""
    placed = {}
    for name, tensor in given.items():
        place = name
        if place not in wanted:
            for pattern, becomes in RENAMED:
                place = re.sub(pattern, becomes, place)
        if place in wanted or not NOT_LEARNED.search(place):
            placed[place] = tensor
    return placed
