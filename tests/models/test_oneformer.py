"""OneFormer's training: targets of a task, the texts that tell of them, and the contrast are transformers'."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTRAST, TINY
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame
from pipeline.models.zoo.clip_text import clip_tokenizer, letters
from pipeline.models.zoo.hf_oneformer import (
    NOTHING,
    TASK_TOKENS,
    adapt_oneformer,
    as_task,
    oneformer_losses,
    texts_of,
)
from pipeline.taxonomy import load_taxonomy

transformers = pytest.importorskip("transformers", reason="OneFormer is transformers' (extra hf)")

FRAMES = [Frame(64, 64, 64, 64)] * 3
SCENES = load_taxonomy("scenes")  # 0 to 4 are stuff, 5 to 7 things
THINGS = tuple(at for at, category in enumerate(SCENES.categories) if category.kind == "thing")
IMAGE_BCHW = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def loaded(**options: Any) -> LoadedModel:
    given = {**TINY["oneformer"], **CONTRAST, "queries": 12, **options}
    return load_model(ModelConfig(name="oneformer", options=given, taxonomy="scenes"), seed=0, tile_pixels=1 << 20)


def learning(**options: Any) -> Any:
    return loaded(**options).module.train().requires_grad_(True)


def target(*labels: int) -> dict[str, Tensor]:
    """Stripes of 64 rows by 64 columns, one for each label."""
    masks_NHW = torch.zeros(len(labels), 64, 64, dtype=torch.uint8)
    for at in range(len(labels)):
        masks_NHW[at, :, at * 64 // len(labels) : (at + 1) * 64 // len(labels)] = 1
    return {"masks": masks_NHW, "labels": torch.tensor(labels, dtype=torch.int64)}


TARGETS = [target(5, 0, 6, 5, 2), target(1, 7), target()]


def test_it_is_told_its_task() -> None:
    """The words of the task between start and end of text, and nothing after them."""
    for at, (task, tokens) in enumerate(TASK_TOKENS.items()):
        module: Any = loaded(task_input=task).module
        assert module.task_tokens.shape == (3, 77)
        assert module.task == at
        assert tuple(module.task_tokens[at, : len(tokens)].tolist()) == tokens
        assert not module.task_tokens[at, len(tokens) :].any()
        assert tokens[:4] == (49406, 518, 10549, 533)
        assert tokens[-1] == 49407
        assert "task_tokens" not in module.state_dict()
    assert (MODELS["oneformer_instance"].options or {})["task_input"] == "instance"
    with pytest.raises(ConfigError, match="task_input must be panoptic, instance or semantic, got 'depth'"):
        loaded(task_input="depth")
    with pytest.raises(ConfigError, match="train_tasks must be panoptic, instance or semantic, got 'depth'"):
        loaded(train_tasks=["panoptic", "depth"])


def metadata() -> dict[str, Any]:
    names = [category.name for category in SCENES.categories]
    return {**{str(at): name for at, name in enumerate(names)}, "class_names": names, "thing_ids": list(THINGS)}


def librarys(given: Mapping[str, Tensor], task: str, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Classes, masks and texts as transformers' processor makes them of an image's segments."""
    processor = transformers.OneFormerImageProcessor.__new__(transformers.OneFormerImageProcessor)
    processor.num_text, processor.metadata = count, metadata()
    counts = dict.fromkeys(processor.metadata["class_names"], 0)
    label = {"classes": given["labels"], "masks": given["masks"].clone()}
    found: tuple[Tensor, Tensor, list[str]] = getattr(processor, f"get_{task}_annotations")(label, counts)
    return found


@pytest.mark.parametrize("task", TASK_TOKENS)
@pytest.mark.parametrize("count", [10, 3])
@pytest.mark.parametrize("labels", [(5, 0, 6, 5, 2), (5, 5, 5, 0), (7,)])
def test_targets_and_texts_are_the_librarys(task: Any, count: int, labels: tuple[int, ...]) -> None:
    given = target(*labels)
    # And a segment that a crop has left nothing of.
    given = {"masks": torch.cat([given["masks"], torch.zeros(1, 64, 64, dtype=torch.uint8)])} | {
        "labels": torch.cat([given["labels"], torch.tensor([6])])
    }
    classes_N, masks_NHW, texts = librarys(given, task, count)
    ours = as_task(given, task, THINGS)
    order = classes_N.argsort() if task == "semantic" else torch.arange(len(classes_N))
    assert torch.equal(ours["labels"], classes_N[order])
    assert torch.equal(ours["masks"], masks_NHW[order])
    phrases = [f"a photo with a {category.name}" for category in SCENES.categories] + [*NOTHING.values()]
    nothing = phrases.index(NOTHING[task])
    # transformers writes "an panoptic photo", the authors' code, whose weights these are, "a panoptic photo".
    expected = [text.replace("an panoptic", "a panoptic") for text in texts]
    assert [phrases[at] for at in texts_of(ours["labels"], nothing, count)] == expected


def test_an_image_without_things_is_an_instance_photo() -> None:
    ours = as_task(target(0, 2), "instance", THINGS)
    assert ours["masks"].shape == (0, 64, 64)
    assert texts_of(ours["labels"], 9, 4).tolist() == [9, 9, 9, 9]
    assert as_task(target(), "semantic", THINGS)["labels"].shape == (0,)


def test_texts_are_tokens_with_nothing_after_their_end() -> None:
    module = learning()
    tokenizer = clip_tokenizer(*letters())
    assert module.text_tokens.shape == (8 + 3, 77)
    row = tokenizer("a photo with a car")["input_ids"]
    at = [category.name for category in SCENES.categories].index("car")
    assert module.text_tokens[at, : len(row)].tolist() == row
    assert not module.text_tokens[at, len(row) :].any()
    # What a text ends in has the highest number: there the encoder reads what the text says.
    assert module.text_tokens.max(1).values.tolist() == [max(row)] * 11


@pytest.mark.parametrize("task", TASK_TOKENS)
def test_losses_are_the_librarys(task: Any) -> None:
    """The same inputs, weights and random numbers through transformers' own class in training."""
    module = learning(task_input=task)
    torch.manual_seed(5)
    found = oneformer_losses(module, IMAGE_BCHW, FRAMES, TARGETS)
    assert found["loss_contrastive"] > 0
    own = transformers.OneFormerForUniversalSegmentation(module.config)
    state = {**module.state_dict(), "criterion.logit_scale": module.criterion.logit_scale[0]}
    own.load_state_dict(state, strict=False)
    own.train()
    # `finished` leaves out what no prediction reads.
    own.model.pixel_level_module.encoder.swin.layernorm = nn.Identity()
    targets = [as_task(one, task, THINGS) for one in TARGETS]
    nothing = 8 + [*NOTHING].index(task)
    torch.manual_seed(5)
    expected = own(
        IMAGE_BCHW,
        task_inputs=module.task_tokens[[module.task] * 3],
        text_inputs=torch.stack([module.text_tokens[texts_of(one["labels"], nothing, 10)] for one in targets]),
        mask_labels=[one["masks"].float() for one in targets],
        class_labels=[one["labels"] for one in targets],
    ).loss
    factors = MODELS["oneformer"].loss_factors
    assert factors.keys() == found.keys()
    assert factors["loss_contrastive"] == own.weight_dict["loss_contrastive"] == 0.5
    total = sum(factor * found[name] for name, factor in factors.items())
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_contrast_is_learned() -> None:
    """On one batch: images and texts find each other, for which the contrast alone is enough; all of it learns."""
    module = learning()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    values = []
    for step in range(12):
        torch.manual_seed(3)
        found = oneformer_losses(module, IMAGE_BCHW, FRAMES, TARGETS)
        optimizer.zero_grad()
        found["loss_contrastive"].backward()
        if step == 0:
            silent = [
                name
                for name, value in module.named_parameters()
                if ("text_mapper" in name or "logit_scale" in name) and (value.grad is None or not value.grad.any())
            ]
            assert silent == []
        optimizer.step()
        values.append(float(found["loss_contrastive"]))
    # Nobody knows at first which of three is meant, one way and the other.
    assert values[0] == pytest.approx(2 * math.log(3), rel=0.2)
    assert values[-1] < values[0] / 2


def test_one_image_has_nothing_to_be_told_from() -> None:
    module = learning()
    found = oneformer_losses(module, IMAGE_BCHW[:1], FRAMES[:1], TARGETS[:1])
    assert float(found["loss_contrastive"]) == 0
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert [name for name, value in module.named_parameters() if value.grad is None] == []


def test_without_it_the_contrast_is_nothing() -> None:
    model = loaded(contrast=False)
    module = model.module.train().requires_grad_(True)
    found = oneformer_losses(module, IMAGE_BCHW, FRAMES, TARGETS)
    assert float(found["loss_contrastive"]) == 0
    assert not any("text" in name or "logit_scale" in name for name in module.state_dict())


def test_tasks_are_drawn_image_by_image() -> None:
    """Each of three about as often, told to the model and to its texts; again the same with the same seed."""
    module = learning(train_tasks=["semantic", "instance", "panoptic"])
    seen: list[tuple[int, ...]] = []
    module.model.task_encoder.register_forward_pre_hook(
        lambda _, given: seen.append(tuple((given[0][:, None] == module.task_tokens).all(-1).int().argmax(1).tolist()))
    )
    texts: list[Tensor] = []
    module.model.text_mapper.register_forward_pre_hook(lambda _, given: texts.append(given[0]))
    for _ in range(2):
        torch.manual_seed(0)
        for _ in range(6):
            oneformer_losses(module, IMAGE_BCHW, FRAMES, [target(5, 5, 1)] * 3)
    assert seen[:6] == seen[6:]
    drawn = [task for tasks in seen[:6] for task in tasks]
    assert {drawn.count(at) > 2 for at in range(3)} == {True}
    names = [*TASK_TOKENS]
    listed = {"panoptic": [1, 5, 5], "instance": [5, 5], "semantic": [1, 5]}
    for tasks, batch in zip(seen, texts, strict=True):
        for task, text in zip(tasks, batch, strict=True):
            nothing = 8 + [*NOTHING].index(names[task])
            expected = [*listed[names[task]], *[nothing] * 10][:10]
            assert torch.equal(text, module.text_tokens[expected])


@torch.inference_mode()
def test_predictions_do_not_read() -> None:
    """With the encoder of texts and without it, after a training step as before it."""
    model = loaded()
    module: Any = model.module
    first = model.spec.forward(module, IMAGE_BCHW, FRAMES)
    module.train()
    oneformer_losses(module, IMAGE_BCHW, FRAMES, TARGETS)
    again = model.spec.forward(module.eval(), IMAGE_BCHW, FRAMES)
    assert torch.equal(first["masks"], again["masks"])
    without = loaded(contrast=False)
    given = adapt_oneformer(module.state_dict(), without.module.state_dict().keys())
    without.module.load_state_dict(given)
    assert torch.equal(first["masks"], without.spec.forward(without.module, IMAGE_BCHW, FRAMES)["masks"])


def test_published_weights_bring_the_scale_without_an_axis() -> None:
    state = dict(loaded().module.state_dict())
    old = {**state, "criterion.logit_scale": torch.tensor(2.5), "criterion.empty_weight": torch.ones(9)}
    adapted = adapt_oneformer(old, state.keys())
    assert adapted.keys() == state.keys()
    assert adapted["criterion.logit_scale"].tolist() == [2.5]


def test_a_vocabulary_from_a_file(tmp_path: Path) -> None:
    pieces, _ = letters()
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": pieces, "merges": []}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model}))
    assert torch.equal(learning(vocab=str(path)).text_tokens, learning().text_tokens)
    turned = {piece: len(pieces) - 1 - number for piece, number in pieces.items()}
    path.write_text(json.dumps({"model": {**model, "vocab": turned}}))
    with pytest.raises(ConfigError, match=r"the last piece of vocab must be <\|endoftext\|>"):
        learning(vocab=str(path))


@pytest.mark.parametrize("options", [{"hidden_size": 32}, {"text_contexts": 12}, {"text_contexts": -1}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hidden_size must be a multiple of 64 and text_contexts 0 or more, under 12"):
        loaded(**options)
