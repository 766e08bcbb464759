"""How CLIP cuts text into tokens (Radford et al. 2021, arXiv:2103.00020, section 2.4): byte pairs of lower case words,
by the list of them that a tokenizer.json holds, or letter by letter without one."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.extras import import_extra
from pipeline.models.zoo.vocabulary import read_text

__all__ = ["END", "START", "clip_tokenizer", "letters", "read_pieces"]

EXTRA = "hf"
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def read_pieces(uri: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of a tokenizer.json the pieces with their numbers, and the pairs that are merged, the first ones first. Raises
    ConfigError for what cannot be read or is no byte pair encoding as CLIP has it."""
    try:
        model = json.loads(read_text(uri))["model"]
        pieces = {str(piece): int(number) for piece, number in model["vocab"].items()}
        # "a b" before version 0.20 of the library that writes it, then ["a", "b"].
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        kind = (model.get("type"), model.get("end_of_word_suffix"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"vocab {uri!r} is no tokenizer.json: {type(error).__name__}: {error!s:.200}") from error
    if kind != ("BPE", WORD_END):
        raise ConfigError(f"vocab {uri!r} must be a BPE whose words end in {WORD_END}, got {kind[0]}, {kind[1]}")
    lacking = [piece for piece in (START, END) if piece not in pieces]
    lacking += ["".join(map(str, pair)) for pair in merges if len(pair) != 2 or "".join(map(str, pair)) not in pieces]
    if lacking:
        raise ConfigError(f"vocab {uri!r} is no list of CLIP's pieces: it lacks {', '.join(lacking[:5])!s:.200}")
    if sorted(pieces.values()) != [*range(len(pieces))]:
        raise ConfigError(f"vocab {uri!r} must number its {len(pieces)} pieces from 0 without a gap")
    return pieces, [(first, second) for first, second in merges]


def letters() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces of an encoding that merges nothing: each byte, within a word and at its end."""
    alphabet = sorted(import_extra("tokenizers", EXTRA).pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + WORD_END for letter in alphabet), START, END]
    return {piece: number for number, piece in enumerate(pieces)}, []


def clip_tokenizer(pieces: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """transformers' tokenizer of these pieces and merged pairs. Raises ConfigError without the extra."""
    return import_extra("transformers", EXTRA).CLIPTokenizer(vocab=dict(pieces), merges=[*merges])
