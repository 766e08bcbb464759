"""Segment Anything and SAM 2, from transformers (https://github.com/huggingface/transformers, Apache-2.0): every mask
of an image, or those that the sample's boxes and points ask for.

Axes: B batch, C channels, H rows, W columns, M rows and columns of a low-resolution mask, N masks, P prompts, K points
or masks of a prompt, S rows and columns of the model's input.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.masks import encode_rle
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame, Instances, PostContext, Prediction
from pipeline.models.zoo.mask_generator import (
    MASK_THRESHOLD,
    Embedding,
    Enlarging,
    GridOptions,
    Segments,
    enlarged,
    generate,
    segments_of,
    takes_grid,
    views,
)

__all__ = [
    "EXTRA",
    "SAM2_GRID",
    "Sam",
    "Sam2",
    "adapt_sam",
    "adapt_sam2",
    "build_sam",
    "build_sam2",
    "prompted",
    "segment",
    "segments",
]

EXTRA = "hf"
Mode = Literal["automatic", "prompts"]
MODEL = "model."
# Of SAM 2's checkpoints: what follows objects through a video, which images do without.
VIDEO = (
    "memory_",
    "mask_downsample",
    "object_pointer_proj",
    "temporal_positional_encoding_projection_layer",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)
SHARED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

# Kirillov et al. 2023, section 3 and appendix A: ViT-B, -L and -H.
SAM_SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "layers": 12, "heads": 12, "global_layers": (2, 5, 8, 11)},
    "large": {"hidden_size": 1024, "layers": 24, "heads": 16, "global_layers": (5, 11, 17, 23)},
    "huge": {"hidden_size": 1280, "layers": 32, "heads": 16, "global_layers": (7, 15, 23, 31)},
}
# As https://github.com/facebookresearch/sam2 configures Hiera for its 2.1 weights.
SAM2_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "heads": 1, "blocks": (1, 2, 7, 2), "global_layers": (5, 7, 9)},
    "small": {"hidden_size": 96, "heads": 1, "blocks": (1, 2, 11, 2), "global_layers": (7, 10, 13)},
    "base-plus": {
        "hidden_size": 112,
        "heads": 2,
        "blocks": (2, 3, 16, 3),
        "global_layers": (12, 16, 20),
        "background_size": 14,
    },
    "large": {
        "hidden_size": 144,
        "heads": 2,
        "blocks": (2, 6, 36, 4),
        "global_layers": (23, 33, 43),
        "windows": (8, 4, 16, 8),
    },
}

# What the authors have for SAM 2.
SAM2_GRID = GridOptions(pred_iou_thresh=0.8)


class Sam(nn.Module):
    """transformers' SamModel as the mask generator wants it. grid: how masks are looked for in mode automatic."""

    def __init__(self, model: nn.Module, image_size: int, mode: Mode, grid: GridOptions) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be automatic or prompts, got {mode!r}")
        self.model: Any = model
        self.image_size, self.mode, self.grid = image_size, mode, grid

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the input: the long side fills it, the rest is zeros."""
        scale = self.image_size / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def embed(self, image_BCSS: Tensor) -> list[Embedding]:
        return [(embedding[None],) for embedding in self.model.vision_encoder(image_BCSS)[0]]

    def decode(
        self,
        embedding: Embedding,
        *,
        points_PK2: Tensor | None = None,
        labels_PK: Tensor | None = None,
        boxes_P4: Tensor | None = None,
        several: bool,
    ) -> tuple[Tensor, Tensor]:
        output = self.model(
            image_embeddings=self._embeddings(embedding),
            input_points=None if points_PK2 is None else points_PK2[None],
            input_labels=None if labels_PK is None else labels_PK[None],
            input_boxes=None if boxes_P4 is None else boxes_P4[None],
            multimask_output=several,
        )
        return output.pred_masks[0], output.iou_scores[0]

    def _embeddings(self, embedding: Embedding) -> Any:
        return embedding[0]

    def enlarge(self, logits_NMM: Tensor, height: int, width: int) -> Tensor:
        """First to the input's size, where what is padding is cut off: bilinear twice, as the authors do."""
        rows, columns = self.fit(height, width)
        values_N1SS = functional.interpolate(logits_NMM[:, None], (self.image_size,) * 2, mode="bilinear")
        return functional.interpolate(values_N1SS[..., :rows, :columns], (height, width), mode="bilinear")[:, 0]


class Sam2(Sam):
    """transformers' Sam2Model as the mask generator wants it."""

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The image is stretched over the whole square."""
        return self.image_size, self.image_size

    def embed(self, image_BCSS: Tensor) -> list[Embedding]:
        levels = self.model.get_image_embeddings(image_BCSS)
        return [tuple(level[place : place + 1] for level in levels) for place in range(len(image_BCSS))]

    def _embeddings(self, embedding: Embedding) -> Any:
        return list(embedding)

    def enlarge(self, logits_NMM: Tensor, height: int, width: int) -> Tensor:
        return functional.interpolate(logits_NMM[:, None], (height, width), mode="bilinear")[:, 0]


@takes_grid(GridOptions())
def build_sam(
    num_classes: int,
    size: str = "base",
    mode: Mode = "automatic",
    hidden_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    global_layers: Sequence[int] | None = None,
    window_size: int = 14,
    image_size: int = 1024,
    patch_size: int = 16,
    prompt_size: int = 256,
    decoder_mlp: int = 2048,
    *,
    grid: GridOptions,
) -> Sam:
    """Segment Anything (Kirillov et al. 2023, arXiv:2304.02643).

    num_classes: not used; masks have no classes. size: base, large or huge, of which hidden_size, layers, heads and
    global_layers are others where given. mode: `automatic` (every mask; grid: options by the names of GridOptions) or
    `prompts` (one mask for each of the sample's boxes, and one for its points). image_size: of the square input; give
    resize, max_size and pad_multiple the same where it is not 1024. prompt_size: length of the decoder's tokens.
    crop_layers: crops are cut from the prepared image, so they see more only where max_size and resize are larger than
    image_size. Raises ValueError for options that make no sense, ConfigError without the extra.
    """
    body = _size(SAM_SIZES, size, hidden_size=hidden_size, layers=layers, heads=heads, global_layers=global_layers)
    if image_size % patch_size or image_size < patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
    library = import_extra("transformers", EXTRA)
    config = library.SamConfig(
        vision_config={
            "hidden_size": body["hidden_size"],
            "num_hidden_layers": body["layers"],
            "num_attention_heads": body["heads"],
            "global_attn_indexes": list(body["global_layers"]),
            "window_size": window_size,
            "image_size": image_size,
            "patch_size": patch_size,
            "output_channels": prompt_size,
            "num_pos_feats": prompt_size // 2,
        },
        prompt_encoder_config={"hidden_size": prompt_size, "image_size": image_size, "patch_size": patch_size},
        mask_decoder_config={"hidden_size": prompt_size, "mlp_dim": decoder_mlp, "iou_head_hidden_dim": prompt_size},
    )
    model = library.SamModel(config)
    # The library has one tensor under two names, which no safetensors file may hold.
    shared = model.prompt_encoder.shared_embedding
    shared.positional_embedding = nn.Parameter(shared.positional_embedding.detach().clone())
    return Sam(model, image_size, mode, grid)


@takes_grid(SAM2_GRID)
def build_sam2(
    num_classes: int,
    size: str = "tiny",
    mode: Mode = "automatic",
    hidden_size: int | None = None,
    heads: int | None = None,
    blocks: Sequence[int] | None = None,
    global_layers: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    background_size: int | None = None,
    image_size: int = 1024,
    prompt_size: int = 256,
    decoder_mlp: int = 2048,
    *,
    grid: GridOptions,
) -> Sam2:
    """SAM 2 for images (Ravi et al. 2024, arXiv:2408.00714), by default the smallest of its 2.1.

    size: tiny, small, base-plus or large, of which hidden_size (of the first stage; it doubles from stage to stage, and
    so do heads), blocks (of the four stages), global_layers (blocks that see the whole image, never the first of a
    stage), windows (of the four stages) and background_size (of the position embeddings' coarse part) are others where
    given. The rest as in `build_sam`.
    """
    body = _size(
        {name: {"windows": (8, 4, 14, 7), "background_size": 7, **given} for name, given in SAM2_SIZES.items()},
        size,
        hidden_size=hidden_size,
        heads=heads,
        blocks=blocks,
        global_layers=global_layers,
        windows=windows,
        background_size=background_size,
    )
    if len(body["blocks"]) != 4 or len(body["windows"]) != 4:
        raise ValueError(f"blocks and windows must be four each, got {body['blocks']} and {body['windows']}")
    firsts = {sum(body["blocks"][:stage]) for stage in range(4)}
    if firsts & {*body["global_layers"]}:
        raise ValueError(
            f"global_layers must not be the first of a stage ({sorted(firsts)}), got {body['global_layers']}"
        )
    if image_size % 32 or image_size < 32:
        raise ValueError(f"image_size must be a multiple of 32, got {image_size}")
    model = sam2_model(body, image_size=image_size, prompt_size=prompt_size, decoder_mlp=decoder_mlp)
    return Sam2(model, image_size, mode, grid)


def sam2_model(body: Mapping[str, Any], *, image_size: int, prompt_size: int, decoder_mlp: int) -> Any:
    """transformers' Sam2Model with random weights. body: as an entry of SAM2_SIZES, all of it given."""
    library = import_extra("transformers", EXTRA)
    widths = [body["hidden_size"] * 2**stage for stage in range(4)]
    config = library.Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": widths[0],
                "num_attention_heads": body["heads"],
                "image_size": [image_size, image_size],
                "window_positional_embedding_background_size": [body["background_size"]] * 2,
                "blocks_per_stage": list(body["blocks"]),
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [body["heads"] * 2**stage for stage in range(4)],
                "window_size_per_stage": list(body["windows"]),
                "global_attention_blocks": list(body["global_layers"]),
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[image_size // step] * 2 for step in (4, 8, 16)],
            "fpn_hidden_size": prompt_size,
        },
        prompt_encoder_config={"hidden_size": prompt_size, "image_size": image_size},
        mask_decoder_config={"hidden_size": prompt_size, "mlp_dim": decoder_mlp, "iou_head_hidden_dim": prompt_size},
    )
    return library.Sam2Model(config)


def _size(sizes: Mapping[str, Mapping[str, Any]], size: str, **given: Any) -> dict[str, Any]:
    """What a size says, with what is given instead. Raises ValueError for a size that there is not."""
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    return {**sizes[size], **{name: value for name, value in given.items() if value is not None}}


def segment(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[Segments]:
    """The forward pass: run lengths and scores of each image's masks (`segments_of`)."""
    sam: Any = module
    if sam.mode == "automatic":
        return generate(sam, image_BCHW, frames, sam.grid)
    return prompted(sam, image_BCHW, frames)


def prompted(sam: Sam, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[Segments]:
    """A mask for each box of a frame's prompts, in their order, then one for its points; none where they are empty.
    Raises PredictError for a frame without prompts.

    A single point may mean the whole or a part: of the model's answers to it the one counts that it is surest of. Boxes
    and several points get the answer that it gives to prompts that leave no doubt.
    """
    asked = [
        place for place, frame in enumerate(frames) if frame.required_prompts().boxes or frame.required_prompts().points
    ]
    found = [segments_of(torch.zeros(0), []) for _ in frames]
    if not asked:
        return found
    crops = [(place, (0, 0, frames[place].width, frames[place].height)) for place in asked]
    for place, embedding in zip(asked, sam.embed(views(sam, image_BCHW, frames, crops)), strict=True):
        answers = [*_of_boxes(sam, embedding, frames[place]), *_of_points(sam, embedding, frames[place])]
        found[place] = segments_of(
            torch.cat([scores for scores, _ in answers]), [rle for _, rles in answers for rle in rles]
        )
    return found


def _of_boxes(sam: Sam, embedding: Embedding, frame: Frame) -> Iterator[tuple[Tensor, list[str]]]:
    boxes_P4 = torch.tensor(frame.required_prompts().boxes, dtype=torch.float32).reshape(-1, 4) * _scale(
        sam, frame
    ).repeat(2)
    for part_P4 in torch.split(boxes_P4.to(embedding[0].device), sam.grid.points_per_batch):
        if len(part_P4):
            logits, scores = sam.decode(embedding, boxes_P4=part_P4, several=False)
            yield scores[:, 0].float().cpu(), [*encoded(sam, logits[:, 0], frame)]


def _of_points(sam: Sam, embedding: Embedding, frame: Frame) -> Iterator[tuple[Tensor, list[str]]]:
    if not frame.required_prompts().points:
        return
    points_K3 = torch.tensor(frame.required_prompts().points, dtype=torch.float32)
    points_1K2 = (points_K3[:, :2] * _scale(sam, frame)).to(embedding[0].device)[None]
    labels_1K = points_K3[:, 2].long().to(embedding[0].device)[None]
    single = len(points_K3) == 1
    logits, scores = sam.decode(embedding, points_PK2=points_1K2, labels_PK=labels_1K, several=single)
    best = scores[0].argmax().view(1)
    yield scores[0, best].float().cpu(), [*encoded(sam, logits[0, best], frame)]


def _scale(sam: Sam, frame: Frame) -> Tensor:
    """What x and y of the decoded image are multiplied by to be the input's."""
    rows, columns = sam.fit(frame.height, frame.width)
    return torch.tensor([columns / frame.width, rows / frame.height])


def encoded(sam: Enlarging, logits_NMM: Tensor, frame: Frame) -> Iterator[str]:
    """The run lengths of masks of the whole image."""
    for logits_NHW in enlarged(sam, logits_NMM.float(), frame.height, frame.width):
        for mask_HW in (logits_NHW > MASK_THRESHOLD).cpu().numpy():
            yield encode_rle(mask_HW)


def segments(output: Any, frames: Sequence[Frame], context: PostContext) -> list[Prediction]:
    """`segment`'s output -> the best `max_segments` of at least `score_threshold`, of the categories that it has as
    `labels` (ids), else all of the taxonomy's first, with the model's own `boxes` (x1, y1, x2, y2; pixels) where it has
    them.

    The model's idea of an IoU may be a little above 1: a score is at most 1.
    """
    predictions = []
    for found in output:
        text, ends = found["runs"].numpy().tobytes().decode("ascii"), found["lengths"].cumsum(0).tolist()
        rles = [text[end - length : end] for end, length in zip(ends, found["lengths"].tolist(), strict=True)]
        scores_N = found["scores"].clamp(0, 1).numpy()
        labels_N = np.full(len(scores_N), context.taxonomy.ids[0], np.int64)
        if "labels" in found:
            labels_N = found["labels"].numpy()
        boxes_N4 = found["boxes"].numpy() if "boxes" in found else np.zeros((len(scores_N), 4), np.float32)
        order = np.argsort(-scores_N, kind="stable")
        order = order[scores_N[order] >= context.score_threshold][: context.max_segments]
        instances = Instances(
            boxes_N4=boxes_N4[order],
            scores_N=scores_N[order].astype(np.float32),
            category_ids_N=labels_N[order],
            rles=tuple(rles[place] for place in order.tolist()),
        )
        predictions.append(Prediction(instances=instances))
    return predictions


def adapt_sam(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """transformers' SamModel, which may hold the tensor that two of its parts share under one name alone."""
    if any(name in wanted for name in given):
        return dict(given)
    found = {MODEL + name: tensor for name, tensor in given.items()}
    for name, other in (SHARED, SHARED[::-1]):
        if MODEL + name not in found and other in given:
            found[MODEL + name] = given[other]
    return found


def adapt_sam2(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """transformers' Sam2Model, without what its checkpoints hold for videos."""
    if any(name in wanted for name in given):
        return dict(given)
    return {MODEL + name: tensor for name, tensor in given.items() if not name.startswith(VIDEO)}
