"""Grounding DINO before SAM 2: word pieces as BERT cuts them, boxes and masks as the library gives them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_mask_generator import inputs, masks_of
from tiny_models import TINY
from torch import nn

from pipeline.errors import ConfigError, PredictError
from pipeline.models.registry import MODELS
from pipeline.models.spec import Preprocess, Prompts
from pipeline.models.zoo.grounded_sam import (
    GroundedSam2,
    adapt_grounded,
    find,
    own_words,
    pieces,
    prompts_of,
    read_vocab,
    split_words,
)
from pipeline.models.zoo.vocabulary import asked
from pipeline.sources.scenes import render_scene
from pipeline.stages.prepare import prepare
from pipeline.taxonomy import Taxonomy, load_taxonomy

PREPROCESS = Preprocess(resize=64, max_size=64, pad_multiple=32)
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "-", "tr", "##aff", "##ic", "light", "cafe", "person", "##s"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(taxonomy: Taxonomy | None = None, **options: Any) -> GroundedSam2:
    given = {name: value for name, value in TINY["grounded_sam2"].items() if name not in ("resize", "max_size")}
    torch.manual_seed(0)
    module: Any = MODELS["grounded_sam2"].module(taxonomy or load_taxonomy("scenes"), {**given, **options})
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    found: GroundedSam2 = module.eval()
    return found


def test_words_are_cut_as_bert_does(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    vocabulary = read_vocab(str(tmp_path / "vocab.txt"))
    tokenizer = BertTokenizer(vocab=dict(vocabulary))
    for text in ("Traffic light. café.", "persons-light", "  unknown  PERSON", "traff", "light."):
        assert pieces(text, vocabulary) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert pieces("Traffic", vocabulary) == [6, 7, 8]
    assert split_words("wine-glass's") == ["wine", "-", "glass", "'", "s"]


def test_prompts_by_hand() -> None:
    names = {"traffic light": 3, "person": 9}
    vocabulary = {word: number for number, word in enumerate(VOCAB)}
    assert prompts_of(names, vocabulary) == [([2, 6, 7, 8, 9, 4, 11, 4, 3], [-1, 3, 3, 3, 3, -1, 9, -1, -1])]
    many = {f"word{number}": number for number in range(300)}
    prompts = prompts_of(many, own_words(many))
    assert max(len(tokens) for tokens, _ in prompts) <= 256
    assert sorted(owner for _, owners in prompts for owner in owners if owner >= 0) == [*range(300)]
    long = " ".join(["person"] * 300)
    with pytest.raises(ValueError, match=r"has 300 word pieces, expected 1 to 253"):
        prompts_of({long: 1}, vocabulary)


def test_boxes_and_masks_are_the_librarys() -> None:
    """post_process_grounded_object_detection for boxes and scores, Sam2Model for each box."""
    model = tiny(box_threshold=0.3)
    image_HWC = render_scene(4, width=64, height=64).image_HWC
    image_BCHW, frames = inputs([image_HWC], PREPROCESS)
    (tokens, owners) = model.prompts[0]
    with torch.inference_mode():
        (found,) = find(model, image_BCHW, frames)
        output = model.detector(
            pixel_values=image_BCHW, input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)).long()
        )
        answers = output.logits[0, :, : len(tokens)].sigmoid()
        answers[:, torch.tensor(owners) < 0] = 0
        scores, places = answers.max(1)
        keep = scores > 0.3
        x, y, w, h = output.pred_boxes[0, keep].unbind(1)
        boxes_P4 = (torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).clamp(0, 1)) * 64
        expected = model.sam.model(pixel_values=image_BCHW, input_boxes=boxes_P4[None], multimask_output=False)
    assert len(found["scores"]) == int(keep.sum()) >= 2
    torch.testing.assert_close(found["scores"], scores[keep])
    assert found["labels"].tolist() == [owners[place] for place in places[keep].tolist()]
    full = nn.functional.interpolate(expected.pred_masks[0], (64, 64), mode="bilinear")[:, 0] > 0
    for mask_HW, other_HW in zip(masks_of(found, 64, 64), full.numpy(), strict=True):
        assert np.array_equal(mask_HW, other_HW)


def test_a_text_restricts_the_vocabulary() -> None:
    model = tiny(box_threshold=0.0)
    image_HWC = render_scene(4, width=64, height=64).image_HWC
    image_BCHW, frames = inputs([image_HWC], PREPROCESS)
    with torch.inference_mode():
        (found,) = find(model, image_BCHW, frames)
        name = next(name for name, number in model.names.items() if number == int(found["labels"][0]))
        frame = prepare(image_HWC, PREPROCESS, Prompts(text=f" {name.upper()} .")).frame
        (some,) = find(model, image_BCHW, [frame])
    same = found["labels"] == found["labels"][0]
    assert torch.equal(some["scores"], found["scores"][same])
    assert set(some["labels"].tolist()) == {int(found["labels"][0])}


def test_what_a_text_may_say() -> None:
    names = {"traffic light": 3, "person": 9}
    assert asked("", names) is None
    assert asked("Traffic  light. person.", names) == {3, 9}
    with pytest.raises(PredictError, match=r"prompts.text: 'dragon' is no category of the model; it has traffic light"):
        asked("dragon", names)


def test_published_names() -> None:
    model = tiny()
    published = {name: tensor + 1 for name, tensor in model.sam.model.state_dict().items()}
    published["memory_attention.layer_norm.weight"] = torch.zeros(1)
    for name, tensor in model.detector.state_dict().items():
        old = name.replace("conv_encoder.model.swin.", "conv_encoder.model.") if ".conv_encoder." in name else name
        if ".conv_encoder." in name:
            for new, given in (
                ("attention.q_proj", "attention.self.query"),
                ("attention.relative_position_bias.", "attention.self."),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                old = old.replace(new, given)
        if not name.startswith("bbox_embed.1"):
            published[old] = tensor + 1
    state = adapt_grounded(published, model.state_dict().keys())
    own = model.state_dict()
    assert state.keys() == own.keys()
    heads = [
        name for name in own if "bbox_embed" in name and "decoder" not in name and ".1." not in name.split("layers")[0]
    ]
    assert all(torch.equal(state[name], own[name] + 1) for name in own if "bbox_embed" not in name or name in heads)
    assert adapt_grounded(own, own.keys()).keys() == own.keys()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder_layers must be 2 or more, got 1"):
        tiny(decoder_layers=1)
    with pytest.raises(ValueError, match="text_vocabulary must be 14 or more"):
        tiny(text_vocabulary=3)
    with pytest.raises(ConfigError, match="cannot be read"):
        tiny(vocab=str(tmp_path / "none.txt"))
    (tmp_path / "words.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"is no list of BERT's word pieces: it lacks \[CLS\], \[SEP\], \[UNK\], \."):
        tiny(vocab=str(tmp_path / "words.txt"))
