"""RT-DETR (v1, v2), D-FINE and RF-DETR from transformers (https://github.com/huggingface/transformers, Apache-2.0).

Built from options, never from a downloaded configuration. Axes: B batch, Q queries, K classes, N objects.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.masks import encode_rle
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame, Instances, PostContext, Prediction
from pipeline.models.zoo.detections import center_boxes, corner_boxes, stretch, stretch_masks

__all__ = [
    "DFINE_LOSSES",
    "EXTRA",
    "RFDETR_LOSSES",
    "RTDETR_LOSSES",
    "adapt_dfine",
    "adapt_rfdetr",
    "adapt_rtdetr",
    "build_dfine",
    "build_rfdetr_seg",
    "build_rtdetr",
    "build_rtdetr_v2",
    "detect_queries",
    "query_losses",
    "segment_queries",
    "segmented_objects",
]

EXTRA = "hf"
# Zhao et al. 2024, arXiv:2304.08069, and for the two of the edges Peng et al. 2024, arXiv:2410.13842: the authors'
# factors, of the last layer, the others, the encoder's choice and the denoising queries alike.
RTDETR_LOSSES = {"loss_vfl": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
DFINE_LOSSES = {**RTDETR_LOSSES, "loss_fgl": 0.15, "loss_ddf": 1.5}
# As the configurations of the published segmentation models have them (their loss_ce counts 5 times a detector's).
RFDETR_LOSSES = {"loss_ce": 5.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask_ce": 5.0, "loss_mask_dice": 5.0}
COUNTER = "num_batches_tracked"
MASK_PIXELS = 16_000_000  # of full-size floats at once, 64 MB

# How the published sizes differ from the library's defaults: fields of its model's and its backbone's configuration.
Fields = Mapping[str, Any]
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
BASIC_NECK = {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5}
RTDETR_SIZES: dict[str, tuple[Fields, Fields]] = {
    "r18": ({**BASIC_NECK, "decoder_layers": 3}, {**BASIC, "depths": [2, 2, 2, 2]}),
    "r34": ({**BASIC_NECK, "decoder_layers": 4}, BASIC),
    "r50": ({}, {}),
    "r101": (
        {"encoder_ffn_dim": 2048, "encoder_hidden_dim": 384, "decoder_in_channels": [384, 384, 384]},
        {"depths": [3, 4, 23, 3]},
    ),
}
POINTS = {"decoder_n_points": [3, 6, 3]}
SMALL_STAGES = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "hidden_sizes": [128, 256, 512, 1024],
    "use_learnable_affine_block": True,
}
DFINE_SIZES: dict[str, tuple[Fields, Fields]] = {
    "nano": (
        {
            "decoder_n_points": [6, 6],
            "num_feature_levels": 2,
            "feat_strides": [16, 32],
            "encode_proj_layers": [1],
            "encoder_in_channels": [512, 1024],
            "encoder_hidden_dim": 128,
            "encoder_ffn_dim": 512,
            "decoder_in_channels": [128, 128],
            "decoder_ffn_dim": 512,
            "d_model": 128,
            "decoder_layers": 3,
            "hidden_expansion": 0.34,
            "depth_mult": 0.5,
        },
        {**SMALL_STAGES, "out_indices": [3, 4]},
    ),
    "small": (
        {
            **POINTS,
            "encoder_in_channels": [256, 512, 1024],
            "decoder_layers": 3,
            "hidden_expansion": 0.5,
            "depth_mult": 0.34,
        },
        SMALL_STAGES,
    ),
    "medium": (
        {**POINTS, "encoder_in_channels": [384, 768, 1536], "decoder_layers": 4, "depth_mult": 0.67},
        {
            "stem_channels": [3, 24, 32],
            "stage_in_channels": [32, 96, 384, 768],
            "stage_mid_channels": [32, 64, 128, 256],
            "stage_out_channels": [96, 384, 768, 1536],
            "stage_numb_of_layers": [4, 4, 4, 4],
            "hidden_sizes": [192, 384, 768, 1536],
            "use_learnable_affine_block": True,
        },
    ),
    "large": (POINTS, {}),
    "xlarge": (
        {
            **POINTS,
            "encoder_hidden_dim": 384,
            "encoder_ffn_dim": 2048,
            "decoder_in_channels": [384, 384, 384],
        },
        {
            "stem_channels": [3, 32, 64],
            "stage_in_channels": [64, 128, 512, 1024],
            "stage_mid_channels": [64, 128, 256, 512],
            "stage_num_blocks": [1, 2, 5, 2],
        },
    ),
}
# The larger ones are not free for every use, so they are not here.
RFDETR_SIZES: dict[str, tuple[Fields, Fields]] = {
    "nano": ({"decoder_layers": 4, "num_queries": 100}, {"image_size": 312, "num_windows": 1}),
    "small": ({"decoder_layers": 4, "num_queries": 100}, {"image_size": 384}),
    "medium": ({"decoder_layers": 5, "num_queries": 200}, {"image_size": 432}),
    "large": ({"decoder_layers": 5, "num_queries": 300}, {"image_size": 504}),
}
RFDETR_BACKBONE: Fields = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 12,
    "num_windows": 2,
    "out_features": ["stage3", "stage6", "stage9", "stage12"],
}


def build_rtdetr(
    num_classes: int,
    size: str = "r50",
    image_size: int = 640,
    model: Fields | None = None,
    backbone: Fields | None = None,
) -> nn.Module:
    """RT-DETR (Zhao et al. 2024, arXiv:2304.08069), random weights; by default as `PekingU/rtdetr_r50vd` is.

    size: r18, r34, r50 or r101. image_size: every image is stretched to this many pixels square, as in training,
    whatever its shape, a multiple of 32. model, backbone: fields of RTDetrConfig and RTDetrResNetConfig that are to
    differ, such as {"num_queries": 100}; with {"freeze_backbone_batch_norms": false} a backbone without weights learns
    its statistics. Raises ValueError for options that do not fit, ConfigError without the extra.
    """
    library = import_extra("transformers", EXTRA)
    fields = _rtdetr_fields(library, num_classes, size, model, backbone)
    module = library.RTDetrForObjectDetection(_config(library.RTDetrConfig, fields, "model"))
    return _sized(_drawn(module), image_size, 32)


def build_rtdetr_v2(
    num_classes: int,
    size: str = "r50",
    image_size: int = 640,
    model: Fields | None = None,
    backbone: Fields | None = None,
) -> nn.Module:
    """RT-DETRv2 (Lv et al. 2024, arXiv:2407.17140), random weights; by default as `PekingU/rtdetr_v2_r50vd` is.

    model: fields of RTDetrV2Config. The rest as of `build_rtdetr`.
    """
    library = import_extra("transformers", EXTRA)
    fields = {**_rtdetr_fields(library, num_classes, size, model, backbone), "tie_word_embeddings": False}
    module: Any = library.RTDetrV2ForObjectDetection(_config(library.RTDetrV2Config, fields, "model"))
    # Second names of what stands in the decoder, which nothing calls.
    del module.class_embed, module.bbox_embed
    return _sized(_drawn(module), image_size, 32)


def _rtdetr_fields(
    library: Any, num_classes: int, size: str, model: Fields | None, backbone: Fields | None
) -> dict[str, Any]:
    """Of the model's configuration. Losses are given as they are: what each counts is not the model's to say."""
    given_model, given_backbone = _fields(RTDETR_SIZES, size, model, backbone)
    inner = _config(library.RTDetrResNetConfig, {"out_indices": [2, 3, 4], **given_backbone}, "backbone")
    unit = {f"weight_{name}": 1.0 for name in RTDETR_LOSSES}
    return {**unit, **given_model, "backbone_config": inner, "num_labels": num_classes}


def build_dfine(
    num_classes: int,
    size: str = "medium",
    image_size: int = 640,
    model: Fields | None = None,
    backbone: Fields | None = None,
) -> nn.Module:
    """D-FINE (Peng et al. 2024, arXiv:2410.13842), random weights; by default as `ustc-community/dfine-medium-coco` is.

    size: nano, small, medium, large or xlarge. model, backbone: fields of DFineConfig and HGNetV2Config. image_size and
    errors as of `build_rtdetr`.
    """
    given_model, given_backbone = _fields(DFINE_SIZES, size, model, backbone)
    library = import_extra("transformers", EXTRA)
    inner = _config(library.HGNetV2Config, {"out_indices": [2, 3, 4], **given_backbone}, "backbone")
    unit = {f"weight_{name}": 1.0 for name in DFINE_LOSSES}
    fields = {**unit, **given_model, "backbone_config": inner, "num_labels": num_classes, "tie_word_embeddings": False}
    module: Any = library.DFineForObjectDetection(_config(library.DFineConfig, fields, "model"))
    del module.class_embed, module.bbox_embed  # as of RT-DETRv2
    # Settings, not weights, though the library keeps them as such: training would move them away from the loss' own.
    for name in ("up", "reg_scale"):
        value = getattr(module.model.decoder, name).detach()
        delattr(module.model.decoder, name)
        module.model.decoder.register_buffer(name, value)
    return _sized(_drawn(module), image_size, 32)


def build_rfdetr_seg(
    num_classes: int,
    size: str = "small",
    image_size: int | None = None,
    model: Fields | None = None,
    backbone: Fields | None = None,
) -> nn.Module:
    """RF-DETR with masks (Robinson et al. 2025, arXiv:2511.09554), random weights; by default as
    `Roboflow/rf-detr-seg-small` is.

    num_classes: outputs, which are ids of categories, as COCO's are in the published weights. size: nano, small, medium
    or large. image_size: every image is stretched to this many pixels square, a multiple of the patches times the
    windows of a side; None: the backbone's, that of its position embeddings. model, backbone: fields of RfDetrConfig
    and RfDetrDinov2Config. Errors as of `build_rtdetr`.
    """
    given_model, given_backbone = _fields(RFDETR_SIZES, size, model, backbone)
    library = import_extra("transformers", EXTRA)
    # Without the mask token, which only pretraining uses.
    inner = _config(
        library.RfDetrDinov2Config, {**RFDETR_BACKBONE, **given_backbone, "use_mask_token": False}, "backbone"
    )
    fields = {
        "decoder_n_points": 2,
        "class_loss_coefficient": RFDETR_LOSSES["loss_ce"],
        **given_model,
        "backbone_config": inner,
        "num_labels": num_classes,
    }
    module = library.RfDetrForInstanceSegmentation(_config(library.RfDetrConfig, fields, "model"))
    return _sized(module, image_size or inner.image_size, inner.patch_size * inner.num_windows)


def _fields(
    sizes: Mapping[str, tuple[Fields, Fields]], size: str, model: Fields | None, backbone: Fields | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    base_model, base_backbone = sizes[size]
    return {**base_model, **(model or {})}, {**base_backbone, **(backbone or {})}


def _config(kind: Any, fields: Fields, option: str) -> Any:
    """The library's configuration, which itself would take any name."""
    known = {field.name for field in dataclasses.fields(kind)} | {"num_labels", "out_indices", "out_features"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{option} has {unknown[0]!r}, which is no field of {kind.__name__}")
    return kind(**fields)


def _drawn(module: nn.Module) -> nn.Module:
    """With new weights of convolutions after He et al. 2015, arXiv:1502.01852, and normalisation that begins as the
    identity. The library's own (a deviation of 0.01 for both) leave so little of an image that gradients overflow."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
        elif isinstance(child, nn.BatchNorm2d):
            child.reset_parameters()
    return module


def _sized(module: Any, image_size: int, multiple: int) -> nn.Module:
    if image_size < multiple or image_size % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple}, got {image_size}")
    module.image_size = image_size
    checked: nn.Module = module
    return checked


def detect_queries(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """The Q best of each image's queries x classes: boxes (Q, 4; prepared pixels, which may reach beyond the image),
    scores (Q, descending) and labels (Q; outputs)."""
    model: Any = module
    output = module(pixel_values=stretch(image_BCHW, frames, model.image_size))
    return [best for best, _ in _best(output.logits, output.pred_boxes, frames)]


def segment_queries(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
    """As `detect_queries`, with `mask_logits` (Q, H, W) of the whole image at a fraction of its size."""
    model: Any = module
    output = module(pixel_values=stretch(image_BCHW, frames, model.image_size))
    found = _best(output.logits, output.pred_boxes, frames)
    return [
        {**best, "mask_logits": logits_QHW[query_Q]}
        for (best, query_Q), logits_QHW in zip(found, output.pred_masks, strict=True)
    ]


def _best(logits_BQK: Tensor, boxes_BQ4: Tensor, frames: Sequence[Frame]) -> list[tuple[dict[str, Tensor], Tensor]]:
    queries, classes = logits_BQK.shape[1:]
    scores_BQ, index_BQ = logits_BQK.float().sigmoid().flatten(1).topk(queries, dim=1)
    found = []
    for scores_Q, index_Q, boxes_Q4, frame in zip(scores_BQ, index_BQ, boxes_BQ4.float(), frames, strict=True):
        query_Q = index_Q // classes
        best = {"boxes": corner_boxes(boxes_Q4[query_Q], frame), "scores": scores_Q, "labels": index_Q % classes}
        found.append((best, query_Q))
    return found


def segmented_objects(
    output: Sequence[Mapping[str, Tensor]], frames: Sequence[Frame], context: PostContext
) -> list[Prediction]:
    """What `segment_queries` gives -> the best `max_segments` of at least `score_threshold` whose label is a category's
    id, as run lengths of the decoded size: logits brought there (bilinear), inside where above 0. A mask without a
    pixel is left out. A few masks at a time are dense."""
    predictions = []
    for detection, frame in zip(output, frames, strict=True):
        labels_Q, scores_Q = detection["labels"], detection["scores"]
        known_Q = torch.isin(labels_Q, labels_Q.new_tensor(context.taxonomy.ids))
        kept_N = torch.nonzero(known_Q & (scores_Q >= context.score_threshold))[:, 0][: context.max_segments]
        rles = _rles(detection["mask_logits"][kept_N], frame)
        seen_N = torch.tensor([rle is not None for rle in rles], dtype=torch.bool)
        scale = torch.tensor([frame.width / frame.prepared_width, frame.height / frame.prepared_height] * 2)
        instances = Instances(
            boxes_N4=(detection["boxes"][kept_N].float().cpu() * scale)[seen_N].numpy(),
            scores_N=scores_Q[kept_N].float().cpu()[seen_N].numpy(),
            category_ids_N=labels_Q[kept_N].cpu()[seen_N].numpy(),
            rles=tuple(rle for rle in rles if rle is not None),
        )
        predictions.append(Prediction(instances=instances))
    return predictions


def _rles(logits_NHW: Tensor, frame: Frame) -> list[str | None]:
    size = (frame.height, frame.width)
    rles: list[str | None] = []
    for part_nHW in torch.split(logits_NHW, max(1, MASK_PIXELS // (frame.height * frame.width))):
        dense_nHW = functional.interpolate(part_nHW[:, None].float(), size=size, mode="bilinear", align_corners=False)
        inside_nHW = (dense_nHW[:, 0] > 0).cpu().numpy()
        rles += [encode_rle(mask_HW) if mask_HW.any() else None for mask_HW in inside_nHW]
    return rles


def query_losses(
    names: Mapping[str, float], *, masks: bool = False
) -> Callable[[nn.Module, Tensor, Sequence[Frame], Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
    """The library's own losses, each summed over the decoder's layers, the encoder's choice and, where the model has
    them, the denoising queries.

    The library divides by the objects of the whole batch, so a batch that is cut among workers gives nearly, not
    exactly, the gradient of the whole. Noise and the points of masks come from torch's global generator.
    """

    def losses(
        module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        model: Any = module
        labels = []
        for frame, target in zip(frames, targets, strict=True):
            label = {"class_labels": target["labels"], "boxes": center_boxes(target["boxes"], frame)}
            if masks:
                label["masks"] = stretch_masks(target["masks"], frame, model.image_size)
            labels.append(label)
        output = module(pixel_values=stretch(image_BCHW, frames, model.image_size), labels=labels)
        totals = dict.fromkeys(names, image_BCHW.new_zeros(()))
        for key, value in output.loss_dict.items():
            name = re.sub(r"(_aux|_dn)?_(\d+|enc)$", "", key)
            if name in totals:
                totals[name] = totals[name] + value.sum()  # an empty tensor where there are no objects
        if not any(len(label["boxes"]) for label in labels):
            # Parts that only objects reach have a gradient all the same: other workers may wait for it.
            first = next(iter(names))
            totals[first] = totals[first] + 0 * sum(value.sum() for value in module.parameters() if value.requires_grad)
        return totals

    return losses


def _renamed(given: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in given.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _with_counters(state: dict[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """With the counters that frozen batch normalisation does not have, where ours is not frozen."""
    counters = {
        name: torch.tensor(0)
        for name in wanted
        if name.endswith(COUNTER) and name not in state and name.removesuffix(COUNTER) + "running_mean" in state
    }
    return {**counters, **state}


HYBRID = ((r"\bout_proj\b", "o_proj"), (r"encoder\.encoder\.(\d+)\.layers", r"encoder.aifi.\1.layers"))
HEADS = (r"^(class|bbox)_embed\.", r"model.decoder.\1_embed.")


def adapt_rtdetr(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published RT-DETR or RT-DETRv2 under the names of the library's earlier versions or of this one."""
    layers = (r"layers\.(\d+)\.fc([12])\b", r"layers.\1.mlp.fc\2")
    return _with_counters(_renamed(given, (*HYBRID, layers, HEADS)), wanted)


def adapt_dfine(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published D-FINE under the names of the library's earlier versions or of this one. Its heads have two names."""
    first = (r"layers\.(\d+)\.fc1\b", r"layers.\1.mlp.layers.0")
    second = (r"layers\.(\d+)\.fc2\b", r"layers.\1.mlp.layers.1")
    return _with_counters(_renamed(given, (*HYBRID, first, second, HEADS)), wanted)


PROJECTOR = "model.model.backbone.projector"
DECODER_LAYER = r"model.model.decoder.layers.\1"
# From the names of the authors' own code to the library's, in this order.
RFDETR_NAMES = (
    (r"^backbone\.0\.encoder\.encoder\.", "model.model.backbone.backbone."),
    (r"^backbone\.0\.projector\.stages\.0\.1\.", PROJECTOR + ".layer_norm."),
    (r"^backbone\.0\.projector\.stages\.0\.0\.m\.(\d+)\.", PROJECTOR + r".projector_layer.bottlenecks.\1."),
    (r"^backbone\.0\.projector\.stages\.0\.0\.", PROJECTOR + ".projector_layer."),
    (r"(projector_layer\.(?:bottlenecks\.\d+\.)?)cv(\d)\.conv\.", r"\1conv\2.conv."),
    (r"(projector_layer\.(?:bottlenecks\.\d+\.)?)cv(\d)\.bn\.", r"\1conv\2.norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", DECODER_LAYER + ".self_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", DECODER_LAYER + ".cross_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", DECODER_LAYER + ".layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.linear([12])\.", DECODER_LAYER + r".mlp.fc\2."),
    (r"^transformer\.decoder\.norm\.", "model.model.decoder.layernorm."),
    (r"^transformer\.", "model.model."),
    (r"^refpoint_embed\.", "model.model.reference_point_embed."),
    (r"^query_feat\.", "model.model.query_feat."),
    (r"^(class|bbox)_embed\.", r"model.\1_embed."),
    (r"^segmentation_head\.query_features_block\.layers\.0\.", "query_features_block.mlp.fc1."),
    (r"^segmentation_head\.query_features_block\.layers\.2\.", "query_features_block.mlp.fc2."),
    (r"^segmentation_head\.query_features_block\.norm_in\.", "query_features_block.norm."),
    (r"^segmentation_head\.blocks\.(\d+)\.norm\.", r"blocks.\1.layernorm."),
    (r"^segmentation_head\.blocks\.(\d+)\.dwconv\.", r"blocks.\1.depthwise_conv."),
    (r"^segmentation_head\.blocks\.(\d+)\.pwconv1\.", r"blocks.\1.pointwise_conv."),
    (r"^segmentation_head\.bias$", "segmentation_bias"),
    (r"^segmentation_head\.", ""),
    (r"\battention\.attention\.(query|key|value)\.", r"attention.\1."),
    (r"\battention\.query\.", "attention.q_proj."),
    (r"\battention\.key\.", "attention.k_proj."),
    (r"\battention\.value\.", "attention.v_proj."),
    (r"\battention\.output\.dense\.", "attention.o_proj."),
    (r"\bself_attn\.out_proj\.", "self_attn.o_proj."),
)


def adapt_rfdetr(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """A published RF-DETR with masks, under the library's names or those of the authors' own code, whose attention
    keeps queries, keys and values in one tensor. The mask token of pretraining is left out."""
    state = {}
    for name, tensor in _renamed(given, RFDETR_NAMES).items():
        packed = re.fullmatch(r"(.*self_attn\.)in_proj_(weight|bias)", name)
        if packed:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{packed[1]}{part}_proj.{packed[2]}"] = piece
        elif name in wanted or not name.endswith("embeddings.mask_token"):
            state[name] = tensor
    return state
