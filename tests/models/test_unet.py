"""The small U-Net: its shape and size, and that the bundled checkpoint recognises scenes it never saw."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.zoo.unet import UNetSmall
from pipeline.sources.scenes import GENERATOR_VERSION, render_scene
from pipeline.taxonomy import load_taxonomy

CHECKPOINT = Path(str(resources.files("pipeline"))) / "checkpoints" / "unet_small_scenes"
# After the 200 scenes that the checkpoint's own metrics were measured on.
UNSEEN = range(2_000_200, 2_000_216)


def build(seed: int = 0, **options: int) -> UNetSmall:
    torch.manual_seed(seed)
    return UNetSmall(8, **options).eval()


@pytest.mark.parametrize(("depth", "height", "width"), [(4, 32, 32), (4, 48, 80), (3, 8, 40), (2, 12, 20)])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(depth: int, height: int, width: int) -> None:
    assert build(depth=depth)(torch.randn(2, 3, height, width)).shape == (2, 8, height, width)


@torch.inference_mode()
def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 40 x 64"):
        build()(torch.randn(1, 3, 40, 64))


@pytest.mark.parametrize(("num_classes", "width", "depth"), [(1, 16, 4), (8, 0, 4), (8, 16, 0)])
def test_senseless_options_are_refused(num_classes: int, width: int, depth: int) -> None:
    with pytest.raises(ValueError, match="got"):
        UNetSmall(num_classes, width, depth)


def test_parameter_count() -> None:
    assert 150_000 < sum(parameter.numel() for parameter in build().parameters()) < 450_000


@torch.inference_mode()
def test_same_seed_same_model_same_logits_alone_or_in_a_batch() -> None:
    image_BCHW = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    logits_BKHW = build()(image_BCHW)
    assert torch.equal(logits_BKHW, build()(image_BCHW))
    torch.testing.assert_close(logits_BKHW[1:2], build()(image_BCHW[1:2]), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns() -> None:
    model = build().train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.fixture(scope="module")
def checkpoint() -> tuple[dict[str, object], UNetSmall]:
    spec = json.loads((CHECKPOINT / "spec.json").read_text("utf-8"))
    model = UNetSmall(len(load_taxonomy(spec["taxonomy"]).ids), **spec["options"])
    model.load_state_dict(load_file(CHECKPOINT / "model.safetensors"), strict=True)
    return spec, model.eval()


def test_checkpoint_is_small_and_says_what_it_is(checkpoint: tuple[dict[str, object], UNetSmall]) -> None:
    spec, _ = checkpoint
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 2_000_000
    assert (spec["format"], spec["model"], spec["taxonomy"]) == (1, "unet_small", "scenes")
    assert spec["license"] == "Apache-2.0"
    assert spec["metrics"]["mIoU"] >= 0.8  # type: ignore[index]
    # Trained on other pixels than the generator now paints: train again.
    assert spec["data"]["generator_version"] == GENERATOR_VERSION  # type: ignore[index]


@torch.inference_mode()
def test_checkpoint_recognises_unseen_scenes(checkpoint: tuple[dict[str, object], UNetSmall]) -> None:
    spec, model = checkpoint
    preprocess: dict[str, list[float]] = spec["preprocess"]  # type: ignore[assignment]
    scenes = [render_scene(index) for index in UNSEEN]
    image_BHWC = np.stack([scene.image_HWC for scene in scenes]).astype(np.float32) / 255
    image_BHWC = (image_BHWC - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    pred_BHW = model(torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)).argmax(1).numpy()
    target_BHW = np.stack([scene.semantic_HW for scene in scenes])
    known = target_BHW != 255
    confusion = np.bincount(target_BHW[known] * np.int64(8) + pred_BHW[known], minlength=64).reshape(8, 8)
    hit = np.diag(confusion)
    assert hit.sum() / confusion.sum() > 0.95
    assert (hit / (confusion.sum(0) + confusion.sum(1) - hit)).mean() > 0.78
