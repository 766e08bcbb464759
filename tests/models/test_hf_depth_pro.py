"""Depth Pro from transformers: whole images give the depth of its own image processor and model."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.licences import licence
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame, Prediction
from pipeline.models.zoo.hf_depth_pro import build_depth_pro, depth_pro
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def official() -> Any:
    """The library's own model of the tiny options."""
    library = importlib.import_module("transformers")
    torch.manual_seed(8)
    encoder = {
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = library.DepthProConfig(
        patch_size=32,
        fusion_hidden_size=16,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[16, 16],
        scaled_images_feature_dims=[32, 32, 16],
        use_fov_model=True,
        image_model_config=dict(encoder),
        patch_model_config=dict(encoder),
        fov_model_config=dict(encoder),
    )
    module = library.DepthProForDepthEstimation(config).eval()
    nn.init.constant_(module.head.layers[-2].bias, 0.5)
    nn.init.constant_(module.fov_model.head.layers[-1].bias, 50.0)
    return module


def load(**fields: Any) -> LoadedModel:
    options = {**TINY["depth_pro"], **fields.pop("options", {})}
    return load_model(ModelConfig(name="depth_pro", options=options, **fields), seed=0, tile_pixels=1 << 20)


def predict(model: LoadedModel, image_HWC: np.ndarray[Any, Any]) -> Prediction:
    run = Predict(model, device=torch.device("cpu"), batch_pixels=1 << 20, tile_pixels=1 << 20)
    (prediction,) = run([prepare(image_HWC, model.preprocess)])
    assert isinstance(prediction, Prediction)
    return prediction


def test_the_published_size() -> None:
    """952 M on the model's card."""
    with torch.device("meta"):
        module: Any = build_depth_pro(1)
    unused = 2 * (9 * 256 * 256 + 256)
    assert sum(parameter.numel() for parameter in module.parameters()) + unused == 951_991_330
    assert [*module.config.intermediate_hook_ids] == [11, 5]
    assert module.config.patch_model_config.image_size == 384


@pytest.mark.parametrize(("height", "width"), [(60, 90), (128, 128), (200, 70)])
def test_published_weights_give_the_librarys_depth(tmp_path: Path, height: int, width: int) -> None:
    """Written by the library, so under the names that its published files have; from the image to its depth."""
    library = importlib.import_module("transformers")
    module = official()
    module.save_pretrained(tmp_path)
    model = load(weights=str(tmp_path / "model.safetensors"))
    image_HWC = np.random.default_rng(4).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = library.DepthProImageProcessor(size={"height": 128, "width": 128})
    with torch.inference_mode():
        pixels = processor(torch.from_numpy(image_HWC).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
        output = module(pixels)
        (item,) = processor.post_process_depth_estimation(output, target_sizes=[(height, width)])
        prediction = predict(model, image_HWC)
    assert prediction.depth_kind == "metric_m"
    assert prediction.depth_HW is not None
    assert prediction.depth_HW.std() > 1e-3
    torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), item["predicted_depth"], rtol=1e-4, atol=1e-5)


def test_the_focal_length_makes_metres() -> None:
    """By hand: 90 degrees are a focal length of half the width, so 1 / depth is twice the canonical one."""
    model = load()
    module: Any = model.module
    for layer, value in ((module.head.layers[-2], 0.05), (module.fov_model.head.layers[-1], 90.0)):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    with torch.inference_mode():
        depth_BHW = depth_pro(module, torch.randn(1, 3, 40, 50), [Frame(40, 50, 40, 50)])
        assert depth_BHW.shape == (1, 40, 50)
        torch.testing.assert_close(depth_BHW, torch.full((1, 40, 50), 10.0))
        # As far as the authors let it be where there is nothing near.
        nn.init.constant_(module.head.layers[-2].bias, -1.0)
        assert depth_pro(module, torch.randn(1, 3, 40, 50), [Frame(40, 50, 40, 50)]).eq(1e4).all()


def test_it_is_disparity_that_is_interpolated() -> None:
    """Between 1 m and 3 m is 1.5 m: half of 1 / 1 + 1 / 3 is 2 / 3."""
    model = load()
    (prediction,) = model.postprocess(torch.tensor([[[1.0, 3.0]]]), [Frame(1, 4, 1, 2)], model.context)
    quarter = 1 / (0.75 + 0.25 / 3)
    expected = [[1.0, quarter, 1 / (0.25 + 0.75 / 3), 3.0]]
    np.testing.assert_allclose(prediction.depth_HW, expected, rtol=1e-6)


def test_new_weights_begin_where_they_learn() -> None:
    module = load().module.requires_grad_(True).train()
    depth_BHW = depth_pro(module, torch.randn(2, 3, 64, 48), [Frame(64, 48, 64, 48), Frame(50, 40, 50, 40)])
    torch.testing.assert_close(depth_BHW[0].detach(), torch.full((64, 48), 10.0))
    assert depth_BHW[1, 50:].eq(0).all()
    depth_BHW[:, :50, :40].log().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert math.isfinite(float(parameter.grad.sum())), name


def test_its_licence_is_for_research() -> None:
    assert licence(MODELS["depth_pro"], "hf:apple/DepthPro-hf") == ("Apple's licence for research", False)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"input_size": 100}, "input_size must be a multiple of 4 * patch_size, 32, got 100"),
        ({"out_layers": [2, 0]}, "out_layers must be of the 2 layers, as many as out_sizes, got [2, 0]"),
        ({"scale_sizes": [32, 32]}, "scale_sizes must be three, got [32, 32]"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options=options)
    assert part in str(caught.value)
