"""OneFormer from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options.

Axes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_universal import EXTRA, backbone_config, finished, last_queries, query_losses
from pipeline.models.zoo.universal_post import Queries
from pipeline.models.zoo.vgg import check_options

__all__ = ["TASK_TOKENS", "build_oneformer", "oneformer", "oneformer_losses"]

OneFormerTask = Literal["panoptic", "instance", "semantic"]
# "the task is ..." between start and end of text, as CLIP's vocabulary numbers it (bpe_simple_vocab_16e6.txt of
# https://github.com/openai/CLIP): the numbers themselves are what OneFormer's task network reads, 0 after the end.
TASK_TOKENS: Mapping[str, tuple[int, ...]] = {
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
}
TASK_LENGTH = 77


def build_oneformer(
    num_classes: int,
    task_input: OneFormerTask = "panoptic",
    backbone: str = "swin_large",
    queries: int = 150,
    hidden_size: int = 256,
    layers: int = 10,
    encoder_layers: int = 6,
    heads: int = 8,
    points: int = 12544,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    backbone_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """OneFormer (Jain et al. 2023, arXiv:2211.06220); by default that of COCO's weights on Swin-L.

    It is trained without the contrast of queries and texts, for one task at a time: the encoder of texts is left out.
    task_input: what the model is told that its task is: panoptic, instance or semantic. Options as in
    `build_mask2former`.
    """
    if task_input not in get_args(OneFormerTask):
        raise ValueError(f"task_input must be panoptic, instance or semantic, got {task_input!r}")
    check_options(num_classes, queries=queries, layers=layers, encoder_layers=encoder_layers, points=points)
    library = import_extra("transformers", EXTRA)
    config = library.OneFormerConfig(
        backbone_config=backbone_config(library, backbone, backbone_options),
        num_labels=num_classes,
        num_queries=queries,
        conv_dim=hidden_size,
        mask_dim=hidden_size,
        hidden_dim=hidden_size,
        encoder_feedforward_dim=4 * hidden_size,
        dim_feedforward=8 * hidden_size,
        decoder_layers=layers,
        encoder_layers=encoder_layers,
        num_attention_heads=heads,
        train_num_points=points,
        task_seq_len=TASK_LENGTH,
    )
    module: Any = library.OneFormerForUniversalSegmentation(config)
    del module.criterion.logit_scale  # of the contrast
    tokens = torch.zeros(1, TASK_LENGTH)
    given = torch.tensor(TASK_TOKENS[task_input], dtype=tokens.dtype)
    tokens[0, : len(given)] = given
    module.register_buffer("task_tokens", tokens, persistent=False)
    return finished(module, mask_threshold, overlap_threshold)


def oneformer(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Queries:
    """What the last layer's queries say of a padded batch, given the task."""
    output = module(image_BCHW, task_inputs=_task(module, image_BCHW))
    return last_queries(module, image_BCHW, output.class_queries_logits, output.masks_queries_logits)


def oneformer_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`query_losses`, given the task."""
    return query_losses(module, image_BCHW, frames, targets, task_inputs=_task(module, image_BCHW))


def _task(module: nn.Module, image_BCHW: Tensor) -> Tensor:
    model: Any = module
    tokens: Tensor = model.task_tokens
    return tokens.expand(len(image_BCHW), -1)
