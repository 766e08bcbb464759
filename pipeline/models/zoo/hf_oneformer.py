"""OneFormer from transformers (https://github.com/huggingface/transformers, Apache-2.0), built from options, and what
its training is made of: a task for each image, its targets as that task has them, and the contrast with texts.

Axes: B batch, C channels, H rows, W columns, K classes, N segments, Q queries, T tokens.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.clip_text import END, clip_tokenizer, letters, read_pieces
from pipeline.models.zoo.hf_universal import (
    EXTRA,
    MASK2FORMER_LOSSES,
    adapt_universal,
    backbone_config,
    finished,
    last_queries,
    query_losses,
)
from pipeline.models.zoo.universal_post import Queries
from pipeline.models.zoo.vgg import check_options
from pipeline.taxonomy import Taxonomy

__all__ = [
    "ONEFORMER_LOSSES",
    "TASK_TOKENS",
    "adapt_oneformer",
    "as_task",
    "build_oneformer",
    "oneformer",
    "oneformer_losses",
    "texts_of",
]

CONTRAST = "loss_contrastive"
# Jain et al. 2023, "Losses".
ONEFORMER_LOSSES = {**MASK2FORMER_LOSSES, CONTRAST: 0.5}
OneFormerTask = Literal["panoptic", "instance", "semantic"]
# "the task is ..." between start and end of text, as CLIP's vocabulary numbers it (bpe_simple_vocab_16e6.txt of
# https://github.com/openai/CLIP): the numbers themselves are what OneFormer's task network reads, 0 after the end.
TASK_TOKENS: Mapping[OneFormerTask, tuple[int, ...]] = {
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
}
# What stands in the list of texts for a segment, and for none (Jain et al. 2023, "Task conditioned joint training").
SEGMENT = "a photo with a {}"
NOTHING: Mapping[OneFormerTask, str] = {
    "panoptic": "a panoptic photo",
    "instance": "an instance photo",
    "semantic": "a semantic photo",
}
MAX_TOKENS = 77
LOGIT_SCALE = "criterion.logit_scale"


class FollowsMode:
    """Mixed into the library's model, whose `is_training` (dropout of the pixel decoder, reading of texts) is a fixed
    option: here it follows `train` and `eval`."""

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's."""
        model: Any = self
        for module in model.modules():
            if hasattr(module, "is_training"):
                module.is_training = mode
        reads = mode and model.model.text_mapper is not None
        model.model.is_training = model.config.is_training = reads
        parent: Any = super()
        return parent.train(mode)


def build_oneformer(
    num_classes: int,
    taxonomy: Taxonomy,
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
    train_tasks: Sequence[OneFormerTask] = (),
    contrast: bool = False,
    vocab: str = "",
    text_layers: int = 6,
    text_contexts: int = 16,
) -> nn.Module:
    """OneFormer (Jain et al. 2023, arXiv:2211.06220); by default that of COCO's weights on Swin-L.

    task_input: what the model is told that its task is: panoptic, instance or semantic. train_tasks: in training each
    image's is drawn from these, as the paper does with all three; by default it is `task_input`. The targets follow it:
    all segments, things alone, or one segment for each class.

    contrast: in training, compare the queries with texts that list the targets ("task guided contrastive queries").
    This adds an encoder of texts that no prediction reads (transformers', which unlike the authors' has no causal
    mask), so a checkpoint may be labelled with `contrast: false`. It learns from the other images of a forward pass,
    which should be 2 or more; those of other workers are not among them. vocab: path or fsspec address of CLIP's
    tokenizer.json, which published weights ask for; without it texts are read letter by letter. text_layers: of the
    encoder, which is as wide as the queries: hidden_size must be a multiple of 64. text_contexts: of the queries' texts
    those that are learned. Other options as in `build_mask2former`.

    Raises ValueError for options that make no sense, ConfigError for a vocab that cannot be read and without the extra.
    """
    for name, tasks in (("task_input", [task_input]), ("train_tasks", [*train_tasks])):
        wrong = [task for task in tasks if task not in get_args(OneFormerTask)]
        if wrong:
            raise ValueError(f"{name} must be panoptic, instance or semantic, got {wrong[0]!r}")
    check_options(num_classes, queries=queries, layers=layers, encoder_layers=encoder_layers, points=points)
    if contrast and (hidden_size % 64 or not 0 <= text_contexts < queries):
        raise ValueError(
            f"hidden_size must be a multiple of 64 and text_contexts 0 or more, under {queries} queries, "
            f"got {hidden_size} and {text_contexts} (contrast)"
        )
    library = import_extra("transformers", EXTRA)
    reading: dict[str, Any] = {"is_training": contrast}
    if contrast:
        pieces, merges = read_pieces(vocab) if vocab else letters()
        if pieces[END] != len(pieces) - 1:
            raise ValueError(f"the last piece of vocab must be {END}, as in CLIP's, got number {pieces[END]} of it")
        reading |= {
            "text_encoder_width": hidden_size,
            "text_encoder_context_length": MAX_TOKENS,
            "text_encoder_num_layers": text_layers,
            "text_encoder_vocab_size": len(pieces),
            "text_encoder_n_ctx": text_contexts,
        }
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
        task_seq_len=MAX_TOKENS,
        **reading,
    )
    module: Any = type("OneFormer", (FollowsMode, library.OneFormerForUniversalSegmentation), {})(config)
    if contrast:
        # With an axis, as what is cut among workers must have one.
        module.criterion.logit_scale = nn.Parameter(module.criterion.logit_scale.detach().reshape(1))
        phrases = [*(SEGMENT.format(category.name) for category in taxonomy.categories), *NOTHING.values()]
        tokenizer = clip_tokenizer(pieces, merges)
        rows = [tokenizer(phrase, truncation=True, max_length=MAX_TOKENS)["input_ids"] for phrase in phrases]
        module.register_buffer("text_tokens", _filled(rows), persistent=False)
        module.texts = queries - text_contexts
    else:
        del module.criterion.logit_scale
    module.register_buffer("task_tokens", _filled([*TASK_TOKENS.values()]), persistent=False)
    module.task = [*TASK_TOKENS].index(task_input)
    module.train_tasks = tuple([*TASK_TOKENS].index(task) for task in train_tasks or (task_input,))
    module.thing_classes = tuple(at for at, category in enumerate(taxonomy.categories) if category.kind == "thing")
    return finished(module, mask_threshold, overlap_threshold)


def _filled(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([[*row, *[0] * (MAX_TOKENS - len(row))] for row in rows])


def oneformer(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> Queries:
    """What the last layer's queries say of a padded batch, given the task."""
    model: Any = module
    task_BT = model.task_tokens[[model.task] * len(image_BCHW)]
    output = module(image_BCHW, task_inputs=task_BT)
    return last_queries(module, image_BCHW, output.class_queries_logits, output.masks_queries_logits)


def oneformer_losses(
    module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`query_losses`, given each image's task and its targets as the task has them, and `loss_contrastive`: the
    cross-entropy of which text belongs to an image of the batch, and of which image to a text; 0 without `contrast`.

    Tasks are drawn with torch's global generator.
    """
    model: Any = module
    drawn = torch.randint(len(model.train_tasks), (len(targets),), device="cpu") if len(model.train_tasks) > 1 else None
    tasks = [model.train_tasks[0 if drawn is None else int(drawn[at])] for at in range(len(targets))]
    names = [*TASK_TOKENS]
    own = [as_task(target, names[task], model.thing_classes) for target, task in zip(targets, tasks, strict=True)]
    given = {"task_inputs": model.task_tokens[tasks]}
    if model.model.is_training:
        first = len(model.text_tokens) - len(NOTHING)
        rows = [
            texts_of(target["labels"], first + [*NOTHING].index(names[task]), model.texts)
            for target, task in zip(own, tasks, strict=True)
        ]
        given["text_inputs"] = model.text_tokens[torch.stack(rows)]
    found = query_losses(module, image_BCHW, frames, own, **given)
    return {CONTRAST: image_BCHW.new_zeros(()), **found}


def as_task(target: Mapping[str, Tensor], task: OneFormerTask, things: Sequence[int]) -> dict[str, Tensor]:
    """An image's `masks` (N, H, W) and `labels` (N) as a task has them, without empty masks: panoptic, all segments;
    instance, those of `things`; semantic, one for each class, in the classes' order."""
    masks_NHW, labels_N = target["masks"], target["labels"]
    kept_N = (masks_NHW != 0).flatten(1).any(1)
    if task == "instance":
        kept_N &= torch.isin(labels_N, labels_N.new_tensor(things))
    masks_NHW, labels_N = masks_NHW[kept_N], labels_N[kept_N]
    if task == "semantic" and len(labels_N):
        classes_K = torch.unique(labels_N)
        masks_NHW, labels_N = torch.stack([masks_NHW[labels_N == label].amax(0) for label in classes_K]), classes_K
    return {"masks": masks_NHW, "labels": labels_N}


def texts_of(labels_N: Tensor, nothing: int, count: int) -> Tensor:
    """Which `count` texts tell of an image's segments: theirs by class, then `nothing`; of too many, the first ones."""
    texts = labels_N.new_full((count,), nothing)
    listed = labels_N.sort().values[:count]
    texts[: len(listed)] = listed
    return texts


def adapt_oneformer(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """`adapt_universal`, with the scale of the contrast as it is here, where it is wanted."""
    placed = adapt_universal(given, wanted)
    if LOGIT_SCALE in placed:
        placed[LOGIT_SCALE] = placed[LOGIT_SCALE].reshape(1)
    return placed
