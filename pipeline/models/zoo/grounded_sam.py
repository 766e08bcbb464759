"""Text to masks: Grounding DINO finds boxes of a vocabulary's words, SAM 2 turns each into a mask (transformers).

The vocabulary is the model's taxonomy. Its names are cut into word pieces when the model is built, from BERT's list of
them, which is a text file beside the published weights (`vocab.txt`).

Axes: B batch, C channels, H rows, W columns, Q queries, T tokens, P boxes.
"""

import copy
import re
import unicodedata
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.extras import import_extra
from pipeline.models.spec import Frame
from pipeline.models.zoo.mask_generator import GridOptions, Segments, segments_of, views
from pipeline.models.zoo.sam import SAM2_SIZES, VIDEO, Sam2, encoded, sam2_model
from pipeline.models.zoo.vocabulary import asked, category_names, read_text
from pipeline.taxonomy import Taxonomy

__all__ = ["EXTRA", "GroundedSam2", "adapt_grounded", "build_grounded_sam2", "find", "pieces", "read_vocab"]

EXTRA = "hf"
MAX_TOKENS = 256
CLS, SEP, UNKNOWN, STOP = "[CLS]", "[SEP]", "[UNK]", "."
BERT_VOCABULARY = 30522
DETECTOR, SAM = "detector.", "sam.model."
SAM_PARTS = ("vision_encoder.", "prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "no_memory_embedding")
# From the published names to those of transformers 5, within the Swin backbone.
SWIN = (
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (r"attention\.self\.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    (r"attention\.self\.relative_position_index", "attention.relative_position_bias.relative_position_index"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"(conv_encoder\.model\.)(?=encoder\.|embeddings\.)", r"\1swin."),
)
# One head for all layers, which the library has under many names.
SHARED_HEAD = re.compile(r"^(?:model\.decoder\.)?bbox_embed\.\d+\.")


class GroundedSam2(nn.Module):
    """detector: GroundingDinoForObjectDetection. prompts: token ids of one or more prompts, each with the id of the
    category that every token belongs to, -1 for what lies between. names: categories by their names, for a sample's
    text."""

    def __init__(
        self,
        detector: nn.Module,
        sam: Sam2,
        prompts: Sequence[tuple[list[int], list[int]]],
        names: Mapping[str, int],
        box_threshold: float,
    ) -> None:
        super().__init__()
        self.detector: Any = detector
        self.sam = sam
        self.prompts, self.names, self.box_threshold = [*prompts], dict(names), box_threshold


def build_grounded_sam2(
    num_classes: int,
    taxonomy: Taxonomy,
    vocab: str = "",
    box_threshold: float = 0.25,
    swin_size: int = 96,
    swin_depths: Sequence[int] = (2, 2, 6, 2),
    swin_heads: Sequence[int] = (3, 6, 12, 24),
    swin_window: int = 7,
    text_size: int = 768,
    text_layers: int = 12,
    text_heads: int = 12,
    text_vocabulary: int = BERT_VOCABULARY,
    hidden_size: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    heads: int = 8,
    feedforward: int = 2048,
    queries: int = 900,
    sam_size: str = "tiny",
    sam_hidden_size: int | None = None,
    sam_blocks: Sequence[int] | None = None,
    sam_global_layers: Sequence[int] | None = None,
    sam_windows: Sequence[int] | None = None,
    sam_image_size: int = 1024,
    sam_prompt_size: int = 256,
    sam_decoder_mlp: int = 2048,
    points_per_batch: int = 64,
) -> GroundedSam2:
    """Grounding DINO (Liu et al. 2023, arXiv:2303.05499; by default its `tiny`) before SAM 2 (Ravi et al. 2024,
    arXiv:2408.00714), as Ren et al. 2024 (arXiv:2401.14159) join them.

    num_classes: not used; the taxonomy's names are the classes. vocab: path or address of BERT's vocab.txt, one piece
    on each line, needed with trained weights; without it the pieces are the taxonomy's own words. box_threshold: a box
    needs more. text_vocabulary: pieces that the text model knows, at least vocab's. sam_*: as build_sam2 has them.
    Raises ValueError for options that make no sense, ConfigError for a vocab that cannot be read and without the extra.
    """
    if decoder_layers < 2:
        raise ValueError(f"decoder_layers must be 2 or more, got {decoder_layers}")
    if sam_size not in SAM2_SIZES:
        raise ValueError(f"sam_size must be one of {', '.join(SAM2_SIZES)}, got {sam_size!r}")
    names = category_names(taxonomy)
    vocabulary = read_vocab(vocab) if vocab else own_words(names)
    if len(vocabulary) > text_vocabulary:
        raise ValueError(
            f"text_vocabulary must be {len(vocabulary)} or more, as vocab has lines, got {text_vocabulary}"
        )
    library = import_extra("transformers", EXTRA)
    config = library.GroundingDinoConfig(
        backbone_config=library.SwinConfig(
            embed_dim=swin_size,
            depths=list(swin_depths),
            num_heads=list(swin_heads),
            window_size=swin_window,
            out_indices=[2, 3, 4],
        ),
        text_config=library.BertConfig(
            vocab_size=text_vocabulary,
            hidden_size=text_size,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            intermediate_size=4 * text_size,
        ),
        d_model=hidden_size,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feedforward,
        decoder_ffn_dim=feedforward,
        num_queries=queries,
        max_text_len=MAX_TOKENS,
    )
    detector = library.GroundingDinoForObjectDetection(config)
    # What no published backbone has: its features are normalised one by one, not the last ones again.
    detector.get_submodule("model.backbone.conv_encoder.model.swin").layernorm = nn.Identity()
    # No safetensors file may hold a tensor under two names.
    detector.bbox_embed = nn.ModuleList(copy.deepcopy(head) for head in detector.bbox_embed)
    detector.model.decoder.bbox_embed = nn.ModuleList(copy.deepcopy(head) for head in detector.bbox_embed)
    # What separates phrases; the library knows the places of BERT's own list only.
    marks = [vocabulary[mark] for mark in (CLS, SEP, STOP, "?") if mark in vocabulary]
    detector.model.special_tokens = torch.tensor(marks, device=detector.model.special_tokens.device)
    body = {
        "windows": (8, 4, 14, 7),
        "background_size": 7,
        **SAM2_SIZES[sam_size],
        **{
            name: value
            for name, value in {
                "hidden_size": sam_hidden_size,
                "blocks": sam_blocks,
                "global_layers": sam_global_layers,
                "windows": sam_windows,
            }.items()
            if value is not None
        },
    }
    model = sam2_model(body, image_size=sam_image_size, prompt_size=sam_prompt_size, decoder_mlp=sam_decoder_mlp)
    sam = Sam2(model, sam_image_size, "prompts", GridOptions(points_per_batch=points_per_batch))
    return GroundedSam2(detector, sam, prompts_of(names, vocabulary), names, box_threshold)


def read_vocab(uri: str) -> dict[str, int]:
    """Word pieces and their numbers, which are their lines'. Raises ConfigError for what is no such list."""
    vocabulary = {word: number for number, word in enumerate(read_text(uri).splitlines())}
    lacking = [word for word in (CLS, SEP, UNKNOWN, STOP) if word not in vocabulary]
    if lacking:
        raise ConfigError(f"vocab {uri!r} is no list of BERT's word pieces: it lacks {', '.join(lacking)}")
    return vocabulary


def own_words(names: Mapping[str, int]) -> dict[str, int]:
    """A vocabulary of the words of these names alone."""
    words = sorted({word for name in names for word in split_words(name)} - {STOP, "?"})
    return {word: number for number, word in enumerate(["[PAD]", CLS, SEP, UNKNOWN, STOP, "?", *words])}


def split_words(text: str) -> list[str]:
    """BERT's basic tokens (Devlin et al. 2018, uncased): lower case, no accents, each mark of punctuation its own."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return re.findall(r"[^\W_]+|[^\w\s]|_", plain)


def pieces(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Numbers of a text's word pieces: the longest first, as WordPiece has it; an unknown word is one unknown."""
    found: list[int] = []
    for word in split_words(text):
        start, parts = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            end = next((end for end in ends if _piece(word, start, end) in vocabulary), None)
            if end is None:
                parts = [vocabulary[UNKNOWN]]
                break
            parts.append(vocabulary[_piece(word, start, end)])
            start = end
        found += parts
    return found


def _piece(word: str, start: int, end: int) -> str:
    return ("##" if start else "") + word[start:end]


def prompts_of(names: Mapping[str, int], vocabulary: Mapping[str, int]) -> list[tuple[list[int], list[int]]]:
    """`name. name.` as numbers, and whose category each is (-1: nobody's); in several prompts where one is too long."""
    prompts: list[tuple[list[int], list[int]]] = []
    for name, category in names.items():
        numbers = pieces(name, vocabulary)
        if not numbers or len(numbers) > MAX_TOKENS - 3:
            raise ValueError(f"category {name!r} has {len(numbers)} word pieces, expected 1 to {MAX_TOKENS - 3}")
        if not prompts or len(prompts[-1][0]) + len(numbers) + 2 > MAX_TOKENS:
            prompts.append(([vocabulary[CLS]], [-1]))
        tokens, owners = prompts[-1]
        tokens += [*numbers, vocabulary[STOP]]
        owners += [category] * len(numbers) + [-1]
    return [([*tokens, vocabulary[SEP]], [*owners, -1]) for tokens, owners in prompts]


def find(module: nn.Module, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[Segments]:
    """The forward pass: scores, labels (category ids) and run lengths (`segments_of`) of what was found in each image.

    A frame's text ("car. person") names the categories that are kept. Raises PredictError for a name that is none.
    """
    model: Any = module
    wanted = [asked(frame.prompts.text if frame.prompts else "", model.names) for frame in frames]
    boxes = _boxes(model, image_BCHW, frames)
    crops = [(place, (0, 0, frame.width, frame.height)) for place, frame in enumerate(frames)]
    embeddings = model.sam.embed(views(model.sam, image_BCHW, frames, crops))
    found = []
    for (boxes_P4, scores_P, labels_P), frame, categories, embedding in zip(
        boxes, frames, wanted, embeddings, strict=True
    ):
        good = scores_P > model.box_threshold
        if categories is not None:
            good &= torch.isin(labels_P, torch.tensor(sorted(categories), device=labels_P.device))
        rles: list[str] = []
        for part_P4 in torch.split(boxes_P4[good], model.sam.grid.points_per_batch):
            if len(part_P4):
                # Boxes are shares of the image, and SAM 2's input is the image stretched to a square.
                logits, _ = model.sam.decode(embedding, boxes_P4=part_P4 * model.sam.image_size, several=False)
                rles += encoded(model.sam, logits[:, 0], frame)
        found.append({**segments_of(scores_P[good], rles), "labels": labels_P[good].cpu()})
    return found


def _boxes(model: Any, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each image boxes_Q4 (x1, y1, x2, y2; shares of the image), scores_Q and category ids_Q, over all prompts.

    A box belongs to the category of the piece that it answers to most, with that answer as its score.
    """
    device = image_BCHW.device
    mask_BHW = torch.zeros(image_BCHW.shape[0], *image_BCHW.shape[2:], dtype=torch.int64, device=device)
    for mask_HW, frame in zip(mask_BHW, frames, strict=True):
        mask_HW[: frame.prepared_height, : frame.prepared_width] = 1
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in frames]
    for tokens, owners in model.prompts:
        tokens_BT = torch.tensor([tokens], device=device).repeat(len(frames), 1)
        owners_T = torch.tensor(owners, device=device)
        output = model.detector(
            pixel_values=image_BCHW,
            pixel_mask=mask_BHW,
            input_ids=tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            token_type_ids=torch.zeros_like(tokens_BT),
        )
        answers_BQT = output.logits[..., : len(tokens)].float().sigmoid().masked_fill(owners_T < 0, 0.0)
        scores_BQ, places_BQ = answers_BQT.max(-1)
        x, y, w, h = output.pred_boxes.float().unbind(-1)
        # The detector's shares are of the prepared image without its padding.
        corners_BQ4 = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).clamp(0, 1)
        for place in range(len(frames)):
            parts[place].append((corners_BQ4[place], scores_BQ[place], owners_T[places_BQ[place]]))
    return [(*(torch.cat(values) for values in zip(*part, strict=True)),) for part in parts]  # type: ignore[misc]


def adapt_grounded(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Of one file with the tensors of both published models (no name is in both): each to its part."""
    if any(name in wanted for name in given):
        return dict(given)
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name.startswith(SAM_PARTS):
            found[SAM + name] = tensor
        elif not name.startswith(VIDEO):
            if ".conv_encoder." in name:
                for pattern, replacement in SWIN:
                    name = re.sub(pattern, replacement, name)
            found[DETECTOR + name] = tensor
    # What neither has a name for any more, such as BERT's numbers of places, is nothing that was learned.
    found = {name: tensor for name, tensor in found.items() if name in wanted or tensor.is_floating_point()}
    head = {SHARED_HEAD.sub("", name.removeprefix(DETECTOR)): tensor for name, tensor in found.items()
            if SHARED_HEAD.match(name.removeprefix(DETECTOR))}  # fmt: skip
    for name in wanted:
        part = name.removeprefix(DETECTOR)
        if name not in found and SHARED_HEAD.match(part) and SHARED_HEAD.sub("", part) in head:
            found[name] = head[SHARED_HEAD.sub("", part)]
    return found
