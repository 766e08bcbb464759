"""SAM 3, from transformers (https://github.com/huggingface/transformers, Apache-2.0): every instance of the categories
that a taxonomy names, of what a sample's boxes show, or masks from boxes and points and of the whole image as SAM 2 has
them.

Two models on one kind of backbone: a detector that reads phrases and looks at examples, and a tracker, of which a
single image needs what SAM 2 is. The published file holds both; each mode builds and loads the one that it runs.

Axes: B batch, C channels, H rows, W columns, S rows and columns of the input, M of a mask of the mask head, P phrases,
T tokens (of a phrase, then of examples), Q queries, N instances, L places of the coarsest features.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import PredictError
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.clip_text import END, START, clip_tokenizer, letters, read_pieces
from pipeline.models.zoo.mask_generator import GridOptions, Segments, segments_of, takes_grid, views
from pipeline.models.zoo.sam import MODEL, SAM2_GRID, VIDEO, Sam2, encoded, segment
from pipeline.models.zoo.vocabulary import asked, category_names
from pipeline.taxonomy import Taxonomy

__all__ = ["EXTRA", "Sam3", "adapt_sam3", "build_sam3", "find_concepts", "tokens_of"]

EXTRA = "hf"
Mode = Literal["vocabulary", "exemplars", "prompts", "automatic"]
# Tokens of a phrase with its two ends: the text model has no places for more.
MAX_TOKENS = 32
# What the model was trained to read where only boxes say what to look for.
VISUAL = "visual"
LEVELS = (4.0, 2.0, 1.0)
DETECTOR = "detector."
# Names of the published file's tensors: the detector's, its backbone's, and the tracker's that looks through it.
OF_DETECTOR, OF_NECK, OF_TRACKER = "detector_model.", "tracker_neck.", "tracker_model."
BACKBONE, NECK = "vision_encoder.backbone.", "vision_encoder.neck."


@dataclass(frozen=True, slots=True)
class Phrases:
    """The categories' names and, last, VISUAL: tokens_PT, whether each is one (mask_PT, bool; the rest fills up), and
    the id of the category that what is found belongs to (VISUAL's: the first)."""

    tokens_PT: Tensor
    mask_PT: Tensor
    categories: tuple[int, ...]


class Sam3(nn.Module):
    """detector: transformers' Sam3Model. names: categories by their names, for a sample's text. confidence_threshold:
    an instance needs more. phrases_per_batch: phrases looked for at once, which bounds the memory."""

    def __init__(
        self,
        detector: nn.Module,
        image_size: int,
        mode: Mode,
        phrases: Phrases,
        names: Mapping[str, int],
        confidence_threshold: float,
        phrases_per_batch: int,
    ) -> None:
        super().__init__()
        self.detector: Any = detector
        self.image_size, self.mode, self.phrases, self.names = image_size, mode, phrases, dict(names)
        self.confidence_threshold, self.phrases_per_batch = confidence_threshold, phrases_per_batch
        self._read: dict[torch.device, Tensor] = {}
        # Other weights read otherwise.
        self.register_load_state_dict_post_hook(lambda module, _: module._read.clear())  # type: ignore[no-untyped-call]

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The image is stretched over the whole square."""
        return self.image_size, self.image_size

    def enlarge(self, logits_NMM: Tensor, height: int, width: int) -> Tensor:
        """Probabilities of the image's size, less a half: above 0 is inside, as the library's processor has it."""
        return functional.interpolate(logits_NMM.sigmoid()[:, None], (height, width), mode="bilinear")[:, 0] - 0.5

    def texts(self, device: torch.device) -> Tensor:
        """texts_PTC: features of all phrases, which are read once."""
        if device not in self._read:
            tokens_PT, mask_PT = (tensor.to(device) for tensor in (self.phrases.tokens_PT, self.phrases.mask_PT.long()))
            parts = []
            # Once and for all batches: at full precision, whatever these are computed in.
            with torch.autocast(device.type, enabled=False):
                for rows_P in torch.split(torch.arange(len(tokens_PT), device=device), self.phrases_per_batch):
                    read = self.detector.get_text_features(input_ids=tokens_PT[rows_P], attention_mask=mask_PT[rows_P])
                    parts.append(read.pooler_output)
            self._read[device] = torch.cat(parts)
        return self._read[device]


@takes_grid(SAM2_GRID)
def build_sam3(
    num_classes: int,
    taxonomy: Taxonomy,
    mode: Mode = "vocabulary",
    vocab: str = "",
    confidence_threshold: float = 0.5,
    phrases_per_batch: int = 8,
    hidden_size: int = 1024,
    layers: int = 32,
    heads: int = 16,
    mlp_size: int = 4736,
    global_layers: Sequence[int] = (7, 15, 23, 31),
    window_size: int = 24,
    image_size: int = 1008,
    patch_size: int = 14,
    pretrain_image_size: int = 336,
    prompt_size: int = 256,
    text_size: int = 1024,
    text_layers: int = 24,
    text_heads: int = 16,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    decoder_heads: int = 8,
    feedforward: int = 2048,
    queries: int = 200,
    decoder_mlp: int = 2048,
    *,
    grid: GridOptions,
) -> Sam3 | Sam2:
    """SAM 3 (Carion et al. 2025, arXiv:2511.16719), for images.

    num_classes: not used; the taxonomy's names are the classes. mode: `vocabulary` (every instance of each category,
    or of those that a sample's text names), `exemplars` (every instance of what the sample's boxes show, whose category
    its text names), `prompts` and `automatic` (as `build_sam2`; masks without classes, for a taxonomy of one category
    such as `objects`).

    vocab: path or fsspec address (hf://facebook/sam3/tokenizer.json) of CLIP's tokenizer.json, for the first two modes.
    It says how many pieces the text model knows, so that weights that were trained with it do not load without it;
    random ones read the names letter by letter. confidence_threshold: an instance needs more, of the probability that
    there is any (presence) times its query's. phrases_per_batch: phrases looked for at once.

    hidden_size, layers, heads, mlp_size, global_layers, window_size, patch_size, pretrain_image_size: of the vision
    transformer. image_size: of the square input; give resize, max_size and pad_multiple the same where it is not 1008.
    prompt_size: width of all that follows. queries: instances of a category at most. grid: options by the names of
    GridOptions, for the mode automatic.

    Raises ValueError for options that make no sense, ConfigError for a vocab that cannot be read and without the extra.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if image_size % patch_size or image_size < patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
    if phrases_per_batch < 1:
        raise ValueError(f"phrases_per_batch must be 1 or more, got {phrases_per_batch}")
    if decoder_layers < 1:
        raise ValueError(f"decoder_layers must be 1 or more, got {decoder_layers}")
    side = image_size // patch_size
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": hidden_size,
            "intermediate_size": mlp_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "window_size": window_size,
            "global_attn_indexes": list(global_layers),
            "pretrain_image_size": pretrain_image_size,
        },
        "fpn_hidden_size": prompt_size,
        "backbone_feature_sizes": [[int(side * scale)] * 2 for scale in LEVELS],
    }
    if mode in ("prompts", "automatic"):
        if len(taxonomy.categories) != 1:
            raise ValueError(
                f"masks of mode {mode} have no classes: the taxonomy must have one category, as `objects` has, "
                f"got {len(taxonomy.categories)} ({taxonomy.name})"
            )
        return Sam2(_tracker(vision, image_size, patch_size, prompt_size, decoder_mlp), image_size, mode, grid)

    names = category_names(taxonomy)
    pieces, merges = read_pieces(vocab) if vocab else letters()
    tokens_PT, mask_PT = tokens_of([*names, VISUAL], pieces, merges)
    categories = [*names.values()]
    phrases = Phrases(tokens_PT, mask_PT, (*categories, categories[0]))
    library = import_extra("transformers", EXTRA)
    shared = {"hidden_size": prompt_size, "num_attention_heads": decoder_heads}
    config = library.Sam3Config(
        vision_config=vision,
        text_config={
            "vocab_size": len(pieces),
            "hidden_size": text_size,
            "intermediate_size": 4 * text_size,
            "projection_dim": text_size // 2,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "max_position_embeddings": MAX_TOKENS,
            "hidden_act": "gelu",
            "bos_token_id": pieces[START],
            "eos_token_id": pieces[END],
            "pad_token_id": pieces[END],
        },
        geometry_encoder_config={**shared, "intermediate_size": feedforward},
        detr_encoder_config={**shared, "intermediate_size": feedforward, "num_layers": encoder_layers},
        detr_decoder_config={
            **shared,
            "intermediate_size": feedforward,
            "num_layers": decoder_layers,
            "num_queries": queries,
        },
        mask_decoder_config=shared,
    )
    detector = library.Sam3Model(config)
    return Sam3(detector, image_size, mode, phrases, names, confidence_threshold, phrases_per_batch)


def _tracker(vision: Mapping[str, Any], image_size: int, patch_size: int, prompt_size: int, decoder_mlp: int) -> Any:
    """transformers' Sam3TrackerModel with random weights, without the level of features that it drops.

    With that fourth level the library adds what stands for an image without a past to it, and so to nothing; the
    authors add it to the last level that is used, as the library's own model for videos does.
    """
    library = import_extra("transformers", EXTRA)
    config = library.Sam3TrackerConfig(
        vision_config={**vision, "scale_factors": list(LEVELS)},
        prompt_encoder_config={"hidden_size": prompt_size, "image_size": image_size, "patch_size": patch_size},
        mask_decoder_config={"hidden_size": prompt_size, "mlp_dim": decoder_mlp, "iou_head_hidden_dim": prompt_size},
    )
    return library.Sam3TrackerModel(config)


def tokens_of(
    phrases: Sequence[str], pieces: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """tokens_PT of phrases as CLIP cuts them (lower case, byte pairs), filled up to MAX_TOKENS, and which are theirs
    (bool). Raises ValueError for a phrase that is longer."""
    tokenizer = clip_tokenizer(pieces, merges)
    rows = [tokenizer(phrase)["input_ids"] for phrase in phrases]
    for phrase, row in zip(phrases, rows, strict=True):
        if not 3 <= len(row) <= MAX_TOKENS:
            raise ValueError(f"category {phrase!r} has {len(row) - 2} word pieces, expected 1 to {MAX_TOKENS - 2}")
    # Values, also where the model is built without memory.
    with torch.device("cpu"):
        tokens_PT = torch.tensor([row + [pieces[END]] * (MAX_TOKENS - len(row)) for row in rows])
        return tokens_PT, torch.arange(MAX_TOKENS) < torch.tensor([len(row) for row in rows])[:, None]


def find_concepts(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[Segments]:
    """The forward pass: scores, labels (category ids), boxes (x1, y1, x2, y2; pixels of the decoded image) and run
    lengths (`segments_of`) of what was found in each image; in the modes prompts and automatic what `segment` says.

    A frame's text ("car. person") names the categories that are looked for. Mode exemplars looks for the one that it
    names, or, where the taxonomy has no other, for what the boxes alone show; for nothing where they are empty. Raises
    PredictError for a name that is none, and in mode exemplars for a frame without prompts.
    """
    if isinstance(module, Sam2):
        return segment(module, image_BCHW, frames)
    model: Any = module
    wanted = {place: rows for place, frame in enumerate(frames) if (rows := _rows(model, frame))}
    found = [_joined([]) for _ in frames]
    if not wanted:
        return found
    crops = [(place, (0, 0, frames[place].width, frames[place].height)) for place in wanted]
    features = model.detector.vision_encoder(views(model, image_BCHW, frames, crops))
    # The coarsest level, half the last but one, is looked at by nothing.
    levels, positions = features.fpn_hidden_states[:-1], features.fpn_position_encoding[:-1]
    for index, (place, rows) in enumerate(wanted.items()):
        own = slice(index, index + 1)
        image = _Features([level[own] for level in levels], [position[own] for position in positions], frames[place])
        parts = torch.split(torch.tensor(rows), model.phrases_per_batch)
        found[place] = _joined([_look(model, image, rows_P) for rows_P in parts])
    return found


@dataclass(frozen=True, slots=True)
class _Features:
    """One image: levels and their positions (1, C, h, w), the coarsest last."""

    levels: list[Tensor]
    positions: list[Tensor]
    frame: Frame


@dataclass(frozen=True, slots=True)
class _Found:
    """Instances of one image, on the CPU."""

    scores_N: Tensor
    labels_N: Tensor
    boxes_N4: Tensor
    rles: list[str]


def _joined(parts: Sequence[_Found]) -> Segments:
    empty = torch.zeros(0)
    return {
        **segments_of(
            torch.cat([empty, *(part.scores_N for part in parts)]), [rle for part in parts for rle in part.rles]
        ),
        "labels": torch.cat([empty.long(), *(part.labels_N for part in parts)]),
        "boxes": torch.cat([empty.view(0, 4), *(part.boxes_N4 for part in parts)]),
    }


def _rows(model: Sam3, frame: Frame) -> list[int]:
    """Which of the model's phrases are looked for in an image."""
    *categories, _ = model.phrases.categories
    text = frame.prompts.text if frame.prompts else ""
    named = asked(text, model.names)
    if model.mode == "vocabulary":
        return [row for row, category in enumerate(categories) if named is None or category in named]
    if not frame.required_prompts().boxes:
        return []
    if named is None and len(categories) == 1:
        return [len(categories)]
    if named is None or len(named) > 1:
        raise PredictError(f"prompts.text: expected the one category that prompts.boxes show, got {text!r:.80}")
    return [categories.index(*named)]


def _look(model: Sam3, image: _Features, rows_P: Tensor) -> _Found:
    """Instances of some phrases in one image."""
    detector, frame, coarse = model.detector, image.frame, image.levels[-1]
    prompt_PTC = model.texts(coarse.device)[rows_P.to(coarse.device)]
    mask_PT = model.phrases.mask_PT[rows_P].to(coarse.device)
    if model.mode == "exemplars":
        prompt_PTC, mask_PT = _with_examples(detector, image, prompt_PTC, mask_PT)
    memory = detector.detr_encoder(
        vision_features=[coarse.expand(len(rows_P), -1, -1, -1)],
        text_features=prompt_PTC,
        vision_pos_embeds=[image.positions[-1].expand(len(rows_P), -1, -1, -1)],
        text_mask=mask_PT,
    )
    decoded = detector.detr_decoder(
        vision_features=memory.last_hidden_state,
        text_features=prompt_PTC,
        vision_pos_encoding=memory.pos_embeds_flattened,
        text_mask=mask_PT,
        spatial_shapes=memory.spatial_shapes,
    )
    queries_PQC = decoded.intermediate_hidden_states[-1]
    logits_PQ = detector.dot_product_scoring(
        decoder_hidden_states=queries_PQC[None], text_features=prompt_PTC, text_mask=mask_PT
    )[0, ..., 0]
    scores_PQ = logits_PQ.float().sigmoid() * decoded.presence_logits[-1].float().sigmoid()
    good_PQ = scores_PQ > model.confidence_threshold
    offsets_PQ4 = detector.detr_decoder.box_head(queries_PQC).float()
    shares_PQ4 = decoded.reference_boxes[-1].float()
    # With the library's bounds of what is next to 0 and 1.
    logits_PQ4 = shares_PQ4.clamp(min=1e-3).log() - (1 - shares_PQ4).clamp(min=1e-3).log()
    x, y, w, h = (logits_PQ4 + offsets_PQ4).sigmoid().unbind(-1)
    size_4 = torch.tensor([frame.width, frame.height] * 2, device=coarse.device)
    boxes_PQ4 = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1) * size_4
    rles: list[str] = []
    # Most categories are in few images: masks are made of those that are, one phrase at a time.
    for place in good_PQ.any(1).nonzero()[:, 0].tolist():
        own = slice(place, place + 1)
        logits_NMM = detector.mask_decoder(
            decoder_queries=queries_PQC[own, good_PQ[place]],
            backbone_features=image.levels,
            encoder_hidden_states=memory.last_hidden_state[own],
            prompt_features=prompt_PTC[own],
            prompt_mask=mask_PT[own],
        ).pred_masks[0]
        rles += encoded(model, logits_NMM, frame)
    labels_P = torch.tensor(model.phrases.categories)[rows_P]
    labels_PQ = labels_P.to(coarse.device)[:, None].expand_as(good_PQ)
    return _Found(scores_PQ[good_PQ].cpu(), labels_PQ[good_PQ].cpu(), boxes_PQ4[good_PQ].cpu(), rles)


def _with_examples(detector: Any, image: _Features, prompt_1TC: Tensor, mask_1T: Tensor) -> tuple[Tensor, Tensor]:
    """The phrase's features and after them those of the frame's boxes, all of them good examples."""
    size_4 = torch.tensor([image.frame.width, image.frame.height] * 2, dtype=torch.float32)
    x1, y1, x2, y2 = (torch.tensor(image.frame.required_prompts().boxes) / size_4).unbind(-1)
    boxes_1N4 = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)[None].to(prompt_1TC.device)
    # What pools the features in the boxes knows no mixed precision.
    with torch.autocast(boxes_1N4.device.type, enabled=False):
        shown = detector.geometry_encoder(
            box_embeddings=boxes_1N4,
            box_mask=torch.ones_like(boxes_1N4[..., 0], dtype=torch.bool),
            box_labels=torch.ones_like(boxes_1N4[..., 0], dtype=torch.int64),
            img_feats=[image.levels[-1].float()],
            img_pos_embeds=[image.positions[-1].float()],
        )
    return torch.cat([prompt_1TC, shown.last_hidden_state], 1), torch.cat([mask_1T, shown.attention_mask], 1)


def adapt_sam3(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Of the published file, which is transformers' Sam3VideoModel, the detector or what the tracker needs for images;
    or one of the library's two models for images as it is. The detector's backbone is both's."""
    if any(name in wanted for name in given):
        return dict(given)
    detector = any(name.startswith(DETECTOR) for name in wanted)
    found = {}
    for name, tensor in given.items():
        if detector:
            if not name.startswith((OF_NECK, OF_TRACKER)):
                found[DETECTOR + name.removeprefix(OF_DETECTOR)] = tensor
        elif not name.startswith(OF_DETECTOR) or name.startswith(OF_DETECTOR + BACKBONE):
            name = name.removeprefix(OF_DETECTOR).removeprefix(OF_TRACKER)
            if name.startswith(OF_NECK):
                name = NECK + name.removeprefix(OF_NECK)
            # The fourth level too is left out, see `_tracker`.
            if not name.startswith((*VIDEO, f"{NECK}fpn_layers.{len(LEVELS)}.")):
                found[MODEL + name] = tensor
    return found
