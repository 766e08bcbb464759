"""ZoeDepth from transformers: whole images give the depth of its own image processor and model."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Frame, Prediction
from pipeline.models.zoo.hf_zoedepth import build_zoedepth, zoedepth
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare

Array = np.ndarray[Any, Any]
ONE = [{"name": "nyu", "n_bins": 16, "min_depth": 1e-3, "max_depth": 10.0}]
TWO = [*ONE, {"name": "kitti", "n_bins": 16, "min_depth": 1e-3, "max_depth": 80.0}]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def official(configurations: list[dict[str, Any]], bin_centers: str = "softplus") -> Any:
    """The library's own model of the tiny options."""
    library = importlib.import_module("transformers")
    torch.manual_seed(6)
    backbone = library.BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = library.ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        bin_centers_type=bin_centers,
        bin_configurations=configurations,
        num_patch_transformer_layers=4,
        patch_transformer_hidden_size=128,
        patch_transformer_intermediate_size=1024,
        patch_transformer_num_attention_heads=4,
    )
    module = library.ZoeDepthForDepthEstimation(config).eval()
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return module


def image_processor() -> Any:
    library = importlib.import_module("transformers")
    return library.ZoeDepthImageProcessor(size={"height": 64, "width": 64}, ensure_multiple_of=32)


def pixels_of(image_HWC: Array) -> torch.Tensor:
    pixels: torch.Tensor = image_processor()(torch.from_numpy(image_HWC).permute(2, 0, 1), return_tensors="pt")[
        "pixel_values"
    ]
    return pixels


def domain_logits(module: Any, image_HWC: Array) -> torch.Tensor:
    logits: torch.Tensor = module(pixels_of(image_HWC)).domain_logits[0]
    return logits


def expected_depth(module: Any, image_HWC: Array, *, flip: bool) -> torch.Tensor:
    """As the library's documentation has it."""
    processor, pixels = image_processor(), pixels_of(image_HWC)
    (item,) = processor.post_process_depth_estimation(
        module(pixels),
        source_sizes=[image_HWC.shape[:2]],
        outputs_flipped=module(pixels.flip(-1)) if flip else None,
    )
    depth_HW: torch.Tensor = item["predicted_depth"]
    return depth_HW


def load(**fields: Any) -> LoadedModel:
    options = {**TINY["zoedepth"], **fields.pop("options", {})}
    return load_model(ModelConfig(name="zoedepth", options=options, **fields), seed=0, tile_pixels=1 << 20)


def predict(model: LoadedModel, images: list[Array]) -> list[Prediction]:
    run = Predict(model, device=torch.device("cpu"), batch_pixels=1 << 20, tile_pixels=1 << 20)
    predictions = run([prepare(image_HWC, model.preprocess) for image_HWC in images])
    assert all(isinstance(prediction, Prediction) for prediction in predictions)
    return [prediction for prediction in predictions if isinstance(prediction, Prediction)]


def images(count: int, height: int = 60, width: int = 90) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def test_the_published_size() -> None:
    """345 M in the paper, which counts the classifier of BEiT's 1000 classes and its normalisation."""
    with torch.device("meta"):
        module = build_zoedepth(1)
    unused = 2 * (9 * 256 * 256 + 256)
    count = sum(parameter.numel() for parameter in module.parameters()) + unused
    assert count == 343_789_698
    assert (count + 1000 * 1025 + 2 * 1024) / 1e6 == pytest.approx(345, abs=0.5)


@pytest.mark.parametrize("flip", [False, True])
def test_published_weights_give_the_librarys_depth(tmp_path: Path, flip: bool) -> None:
    """Written by the library, so under the names that its published files have; from the image to its depth."""
    module = official(ONE)
    module.save_pretrained(tmp_path)
    model = load(weights=str(tmp_path / "model.safetensors"), options={"flip": flip})
    with torch.inference_mode():
        for image_HWC in [*images(1), *images(1, 64, 48), *images(1, 33, 150)]:
            (prediction,) = predict(model, [image_HWC])
            expected_HW = expected_depth(module, image_HWC, flip=flip)
            assert prediction.depth_kind == "metric_m"
            assert prediction.depth_HW is not None
            assert prediction.depth_HW.std() > 1e-3
            torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), expected_HW, rtol=1e-4, atol=1e-5)


def test_bounded_bins_are_the_librarys(tmp_path: Path) -> None:
    """On the same pixels: its attractors make a thousand times more of a rounding error."""
    module = official(ONE, "normed")
    module.save_pretrained(tmp_path)
    model = load(weights=str(tmp_path / "model.safetensors"), options={"bin_centers": "normed"})
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(model.module(pixels).predicted_depth, module(pixels).predicted_depth)


def test_of_two_heads_each_image_picks_its_own(tmp_path: Path) -> None:
    module = official(TWO)
    first, second = images(2)
    batch = [first, second // 8, first]
    # The second image falls to one head, the others to the other; the library lets a batch vote.
    with torch.inference_mode():
        leaning = [domain_logits(module, image_HWC) @ torch.tensor([1.0, -1.0]) for image_HWC in batch]
        module.metric_head.mlp_classifier.linear2.bias[1] += (leaning[0] + leaning[1]) / 2
        heads = [int(domain_logits(module, image_HWC).argmax()) for image_HWC in batch]
        assert heads[0] == heads[2] != heads[1]
    module.save_pretrained(tmp_path)
    model = load(weights=str(tmp_path / "model.safetensors"), options={"max_depths": [10.0, 80.0]})
    with torch.inference_mode():
        for prediction, image_HWC in zip(predict(model, batch), batch, strict=True):
            assert prediction.depth_HW is not None
            expected_HW = expected_depth(module, image_HWC, flip=False)
            torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), expected_HW, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="trained with one head"):
        zoedepth(model.module.train(), torch.zeros(1, 3, 64, 64), [Frame(64, 64, 64, 64)])


def test_images_do_not_see_their_padding() -> None:
    """A batch of several sizes, as training has them, is each of them alone."""
    model = load()
    frames = [Frame(64, 48, 64, 48), Frame(40, 80, 40, 80), Frame(64, 48, 64, 48)]
    image_BCHW = torch.randn(3, 3, 64, 80)
    with torch.inference_mode():
        depth_BHW = zoedepth(model.module, image_BCHW, frames)
        assert depth_BHW.shape == (3, 64, 80)
        for depth_HW, image_CHW, frame in zip(depth_BHW, image_BCHW, frames, strict=True):
            rows, columns = frame.height, frame.width
            alone_1HW = zoedepth(model.module, image_CHW[None, :, :rows, :columns], [frame])
            torch.testing.assert_close(depth_HW[:rows, :columns], alone_1HW[0])
            assert depth_HW[rows:].eq(0).all()
            assert depth_HW[:, columns:].eq(0).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 300), (500, 3), (4, 5)])
def test_narrow_images_have_a_depth(height: int, width: int) -> None:
    (prediction,) = predict(load(), images(1, height, width))
    assert prediction.depth_HW is not None
    assert prediction.depth_HW.shape == (height, width)
    assert np.isfinite(prediction.depth_HW).all()


def test_it_learns_after_it_has_predicted() -> None:
    """The library keeps the indices of a window's positions: those of inference mode must not be learned through."""
    model = load()
    frames = [Frame(50, 70, 50, 70)]
    with torch.inference_mode():
        zoedepth(model.module, torch.randn(1, 3, 50, 70), frames)
    module = model.module.requires_grad_(True).train()
    zoedepth(module, torch.randn(1, 3, 50, 70), frames).mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"bin_centers": "log"}, "bin_centers must be softplus or normed, got 'log'"),
        ({"max_depths": []}, "max_depths must be one or two, each above 0.001, got []"),
        ({"max_depths": [10.0, 80.0, 3.0]}, "max_depths must be one or two"),
        ({"input_size": [16, 64]}, "input_size must be a height and a width of at least 32, got [16, 64]"),
        ({"layers": 5}, "out_layers must ascend from 0 or more to the last layer, 4, got [0, 1, 2, 3]"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options=options)
    assert part in str(caught.value)
