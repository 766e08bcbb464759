"""Depth Anything V2 from transformers: its sizes, published weights under their names, its kinds of depth, licences."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import TINY
from torch import nn

from pipeline.config import ModelConfig
from pipeline.config_train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.models.licences import licence
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth_anything import build_depth_anything, depth_anything
from pipeline.training.setup import start_model

V2, METRIC, OUTDOOR = "depth_anything_v2", "depth_anything_v2_metric", "depth_anything_v2_metric_outdoor"
HUB = "hf:depth-anything/Depth-Anything-V2-"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def official(kind: str = "relative", max_depth: int = 1) -> Any:
    """The library's own model of the tiny options."""
    library = importlib.import_module("transformers")
    torch.manual_seed(5)
    backbone = library.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = library.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        depth_estimation_type=kind,
        max_depth=max_depth,
    )
    module = library.DepthAnythingForDepthEstimation(config).eval()
    for name, parameter in module.named_parameters():
        if "norm" not in name and "layer_scale" not in name:
            nn.init.normal_(parameter, std=0.2)
    nn.init.constant_(module.head.conv3.bias, 0.0 if kind == "metric" else 5.0)
    return module


def load(name: str = V2, **fields: Any) -> LoadedModel:
    options = {**TINY[name], **fields.pop("options", {})}
    return load_model(ModelConfig(name=name, options=options, **fields), seed=0, tile_pixels=1 << 20)


@pytest.mark.parametrize(("size", "count"), [("small", 24_785_089), ("base", 97_470_785), ("large", 335_315_649)])
def test_the_published_sizes(size: Any, count: int) -> None:
    """24.8, 97.5 and 335.3 M, as the authors list them, with a mask token and the residual unit that is left out."""
    with torch.device("meta"):
        module: Any = build_depth_anything(1, size)
    hidden, fusion = module.config.backbone_config.hidden_size, module.config.fusion_hidden_size
    unused = hidden + 2 * (9 * fusion * fusion + fusion)
    assert sum(parameter.numel() for parameter in module.parameters()) + unused == count
    # The authors' intermediate_layer_idx, and one more for what comes before the layers.
    expected = [5, 12, 18, 24] if size == "large" else [3, 6, 9, 12]
    assert list(module.config.backbone_config.out_indices) == expected


@pytest.mark.parametrize(
    ("name", "kind", "max_depth"), [(V2, "relative", 1), (METRIC, "metric", 20), (OUTDOOR, "metric", 80)]
)
@torch.inference_mode()
def test_published_weights_give_the_librarys_depth(tmp_path: Path, name: str, kind: str, max_depth: int) -> None:
    """Written by the library, so under the names that its published files have, and through its image processor."""
    expected = official(kind, max_depth)
    expected.save_pretrained(tmp_path)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "backbone.encoder.layer.0.attention.attention.query.weight" in written
    assert "backbone.embeddings.mask_token" in written
    model = load(name, weights=str(tmp_path / "model.safetensors"))
    # Not square, and of another size than the position embeddings.
    image_BCHW, frames = torch.randn(2, 3, 56, 84), [Frame(75, 120, 56, 84), Frame(30, 40, 56, 84)]
    depth_BHW = model.spec.forward(model.module, image_BCHW, frames)
    assert depth_BHW.shape == (2, 56, 84)
    predictions = model.postprocess(depth_BHW, frames, model.context)
    processor = importlib.import_module("transformers").DPTImageProcessor()
    sizes = [(75, 120), (30, 40)]
    resized = processor.post_process_depth_estimation(expected(image_BCHW), sizes)
    for prediction, item in zip(predictions, resized, strict=True):
        assert prediction.depth_kind == ("metric_m" if kind == "metric" else "inverse_relative")
        assert prediction.depth_HW.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), item["predicted_depth"].clamp_min(0))


@torch.inference_mode()
def test_names_of_the_installed_library_do_as_well(tmp_path: Path) -> None:
    expected = official()
    state = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model = load(weights=str(tmp_path / "model.safetensors"))
    image_BCHW = torch.randn(1, 3, 70, 70)
    depth_BHW = depth_anything(model.module, image_BCHW, [])
    torch.testing.assert_close(depth_BHW, expected(image_BCHW).predicted_depth)


def test_dinov2_is_a_start(tmp_path: Path) -> None:
    library = importlib.import_module("transformers")
    config = library.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14
    )
    library.Dinov2Model(config).save_pretrained(tmp_path)
    tree = {
        "source": {"format": "scenes", "count": 2},
        "model": {"name": V2, "weights": str(tmp_path / "model.safetensors"), "options": TINY[V2]},
        "partial_weights": True,
        "epochs": 1,
        "output": {"uri": str(tmp_path)},
    }
    model, unfilled = start_model(TrainConfig.model_validate(tree))
    assert unfilled == [name for name in model.module.state_dict() if not name.startswith("backbone.")]
    given = safetensors.torch.load_file(tmp_path / "model.safetensors")
    query = model.module.state_dict()["backbone.encoder.layer.3.attention.q_proj.weight"]
    assert torch.equal(query, given["encoder.layer.3.attention.attention.query.weight"])


def test_new_weights_begin_where_they_learn() -> None:
    image_BCHW = torch.randn(1, 3, 70, 70)
    with torch.inference_mode():
        assert depth_anything(load().module, image_BCHW, []).min() > 0
        for options, about in (({"max_depth": 80.0}, 10), ({"max_depth": 12.5}, 6.25)):
            depth_BHW = depth_anything(load(METRIC, options=options).module, image_BCHW, [])
            assert float(depth_BHW.median()) == pytest.approx(about, rel=0.3)
            assert 0 < depth_BHW.min() <= depth_BHW.max() < options["max_depth"]


def test_every_parameter_learns() -> None:
    module = load().module.requires_grad_(True).train()
    depth_anything(module, torch.randn(2, 3, 70, 84), []).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias adds the same to all of a query's scores, which the softmax takes out again.
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_licences_are_of_the_weights() -> None:
    for name, part in ((V2, ""), (METRIC, "Metric-Indoor-"), (OUTDOOR, "Metric-Outdoor-")):
        known = {size: f"{HUB}{part}{size}-hf" for size in ("Small", "Base", "Large")}
        assert set(known.values()) <= set(MODELS[name].weights)
        assert licence(MODELS[name], known["Small"]) == ("Apache-2.0", True)
        for size in ("Base", "Large"):
            assert licence(MODELS[name], known[size]) == ("Apache-2.0, weights CC-BY-NC-4.0", False)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"size": "giant"}, "size must be small, base or large, got 'giant'"),
        ({"depth_kind": "relative"}, "depth_kind must be inverse_relative or metric_m, got 'relative'"),
        ({"max_depth": 0.0}, "max_depth must be above 0, got 0.0"),
        ({"image_size": 64}, "image_size must be a multiple of 14, got 64"),
        ({"layers": 5}, "out_layers must ascend from 0 or more to the last layer, 4, got [0, 1, 2, 3]"),
        ({"neck_sizes": [8, 8]}, "out_layers and neck_sizes must be four each"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options=options)
    assert part in str(caught.value)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 14, got 64 x 70 \(pad_multiple\)"):
        depth_anything(load().module, torch.zeros(1, 3, 64, 70), [])
