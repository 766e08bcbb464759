"""EoMT's masks are annealed as its authors' configs and code say, and leave no chance to a prediction."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import TINY
from torch import Tensor
from training_helpers import CPU, config

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_eomt import anneal_masks, annealing_windows
from pipeline.training.events import StepDone, Stopped
from pipeline.training.loop import TrainingLoop
from pipeline.training.workers import Workers

pytest.importorskip("transformers", reason="EoMT is transformers' (extra hf)")

# Steps of the authors' configs: COCO 12 epochs of ViT-L and ViT-g, ADE20K 31 epochs of both.
COCO_STEPS, ADE_STEPS = 88_692, 39_120
PUBLISHED = {
    "coco, large": (COCO_STEPS, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]),
    "coco, giant": (COCO_STEPS, [14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910]),
    "ade20k, large": (ADE_STEPS, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),
    "ade20k, giant": (ADE_STEPS, [6520, 11410, 16300, 21190, 26080], [13040, 17930, 22820, 27710, 32600]),
}
IMAGE_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def loaded(**options: Any) -> LoadedModel:
    given = {**TINY["eomt"], "layers": 4, "query_layers": 3, **options}
    return load_model(ModelConfig(name="eomt", options=given), seed=0, tile_pixels=1 << 20)


def with_probabilities(model: LoadedModel, *values: float) -> Any:
    module: Any = model.module.eval()
    module.attn_mask_probs.copy_(torch.tensor(values))
    return module


@torch.inference_mode()
def answer(model: LoadedModel, *probabilities: float) -> Tensor:
    module = with_probabilities(model, *probabilities)
    output: Tensor = model.spec.forward(module, IMAGE_BCHW, [Frame(64, 64, 64, 64)] * 2)["masks"]
    return output


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_are_the_authors(name: str) -> None:
    steps, starts, ends = PUBLISHED[name]
    windows = annealing_windows(len(starts), (1 / 6, 5 / 6))
    assert [begin * steps for begin, _ in windows] == pytest.approx(starts, abs=1)
    assert [end * steps for _, end in windows] == pytest.approx(ends, abs=1)


def test_fewer_layers_share_the_same_part_of_the_run() -> None:
    assert annealing_windows(1, (0.25, 0.75)) == ((0.25, 0.75),)
    assert annealing_windows(2, (0.0, 1.0)) == ((0.0, 0.5), (0.5, 1.0))
    assert annealing_windows(3, ()) == ()


def authors_probability(step: int, start: int, end: int) -> float:
    """LightningModule.mask_annealing with their power."""
    if step < start:
        return 1.0
    return 0.0 if step >= end else (1 - (step - start) / (end - start)) ** 0.9


def test_probabilities_fall_block_by_block() -> None:
    steps, starts, ends = PUBLISHED["ade20k, giant"]
    module: Any = loaded(layers=5, query_layers=5).module
    before = [1.0] * 5
    for step in range(0, steps, 326):
        anneal_masks(module, step / steps)
        now = module.attn_mask_probs.tolist()
        assert now == pytest.approx([authors_probability(step, *window) for window in zip(starts, ends, strict=True)])
        # An earlier layer is never behind a later one, and none goes back.
        assert now == sorted(now)
        assert all(new <= old for new, old in zip(now, before, strict=True))
        before = now
    assert before == [0.0] * 5


def test_without_annealing_weights_keep_their_own() -> None:
    model = loaded(mask_annealing=[])
    module = with_probabilities(model, 0.5, 0.25, 1.0)
    anneal_masks(module, 0.9)
    assert module.attn_mask_probs.tolist() == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("shares", [[0.5], [0.5, 0.5], [-0.1, 0.5], [0.2, 1.1], [0.1, 0.2, 0.3]])
def test_shares_out_of_order(shares: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"mask_annealing must be two shares from 0 to 1 in ascending order, got \["):
        loaded(mask_annealing=shares)


def test_annealed_it_predicts_without_masks() -> None:
    """No layer but the last asks for masks, and their probability is no input any more."""
    model = loaded()
    calls = []
    model.module.mask_head.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    masked = answer(model, 1, 1, 1)
    assert len(calls) == 4
    calls.clear()
    free = answer(model, 0, 0, 0)
    assert len(calls) == 1
    assert not torch.allclose(masked, free)
    half = answer(model, 0, 0, 1)
    assert not torch.allclose(half, free)
    assert not torch.allclose(half, masked)


def test_predictions_leave_nothing_to_chance() -> None:
    """As weights from the midst of a training have it, which the library draws for each query."""
    model = loaded()
    torch.manual_seed(0)
    first = answer(model, 0.2, 0.5, 0.7)
    torch.manual_seed(1)
    assert torch.equal(answer(model, 0.2, 0.5, 0.7), first)
    torch.testing.assert_close(first, answer(model, 0, 0, 1))


def test_in_training_queries_are_drawn() -> None:
    """About as many keep their masks as the probability says, each by itself."""
    module: Any = loaded().module.train()
    given = torch.zeros(2, 200 + 17, 200 + 17, dtype=torch.bool)
    torch.manual_seed(0)
    mask = module._disable_attention_mask(
        given, prob=torch.tensor(0.25), num_query_tokens=200, encoder_start_tokens=201, device=CPU
    )
    kept_BQ = (~mask[:, :200, 201:]).all(-1)
    assert torch.equal(kept_BQ, ~mask[:, :200, 201:].any(-1))
    assert 0.15 < kept_BQ.double().mean() < 0.35
    assert not mask[:, 200:].any()


def run(folder: Path, stop: int | None = None) -> tuple[list[list[float]], TrainingLoop]:
    """Twelve steps of a tiny EoMT, or what a run that is asked to stop leaves of them; the probabilities in each."""
    scenes = {"format": "scenes", "width": 64, "height": 48, "targets": ["panoptic"]}
    tree = config(
        folder,
        source={**scenes, "count": 24, "unit_images": 6},
        validation=None,
        model={"name": "eomt", "taxonomy": "scenes", "options": {**TINY["eomt"], "layers": 3, "query_layers": 2}},
        epochs=1,
        batch_images=2,
        augment={"crop": [64, 64], "flip": 0.0},
    )
    loop = TrainingLoop(tree, workers=Workers(), device=CPU)
    loop.restore()
    probabilities = []
    for event in loop.run(lambda: stop is not None and loop.done == stop - 1):
        if isinstance(event, StepDone):
            module: Any = loop.module
            probabilities.append(module.attn_mask_probs.tolist())
        assert stop is not None or not isinstance(event, Stopped)
    return probabilities, loop


def test_a_training_anneals(tmp_path: Path) -> None:
    """From always to never, the first layer first; a run that goes on is where it was; the checkpoint sees all."""
    begun, _ = run(tmp_path, stop=5)
    left, loop = run(tmp_path)
    assert [len(begun), len(left)] == [5, 7]
    first, second = zip(*begun, *left, strict=True)
    assert first[:3] == (1, 1, 1)
    assert all(one > other for one, other in itertools.pairwise(first[2:7]))
    assert first[6:] == (0,) * 6
    assert second[:7] == (1,) * 7
    assert all(one > other for one, other in itertools.pairwise(second[6:11]))
    assert second[10:] == (0, 0)
    stored = safetensors.torch.load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert stored["attn_mask_probs"].tolist() == [0, 0]
    again = load_model(ModelConfig(weights=str(tmp_path / "checkpoint")), seed=1, tile_pixels=1 << 20)
    output = again.spec.forward(again.module, IMAGE_BCHW, [Frame(64, 64, 64, 64)] * 2)
    torch.testing.assert_close(
        output["masks"], again.spec.forward(loop.module.eval(), IMAGE_BCHW, [Frame(64, 64, 64, 64)] * 2)["masks"]
    )


def test_a_part_of_a_merged_model_is_annealed_with_it() -> None:
    own = {key: value for key, value in TINY["eomt_instance"].items() if key in ("queries", "heads", "layers")}
    instance = {"name": "eomt_instance", **own, "hidden_size": 32, "image_size": 64, "query_layers": 1, "points": 64}
    options = {"instance": instance, "semantic": {"name": "unet_small", "width": 4, "depth": 2}}
    model = load_model(ModelConfig(name="panoptic_merge", options=options), seed=0, tile_pixels=1 << 20)
    module: Any = model.module
    assert model.spec.at_step is not None
    for done, expected in ((0.1, 1.0), (0.5, 0.5**0.9), (0.9, 0.0)):
        model.spec.at_step(module, done)
        assert module.instance.attn_mask_probs.tolist() == pytest.approx([expected])
