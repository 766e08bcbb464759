"""DPT from transformers, on a vision transformer and hybrid: its size, published weights under its names, and images
that are not square."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import TINY
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.config_train import TrainConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.registry import MODELS, entries
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_depth import adapt_dpt, build_dpt, build_dpt_hybrid, dpt_depth
from pipeline.training.setup import start_model

OPTIONS = TINY["dpt_depth"]
FRAMES = [Frame(64, 64, 64, 64)] * 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def official() -> Any:
    """The library's own model of the same options."""
    library = importlib.import_module("transformers")
    torch.manual_seed(3)
    config = library.DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    )
    module = library.DPTForDepthEstimation(config).eval()
    # Its own new weights give an output of 1e-8.
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def official_hybrid() -> Any:
    library = importlib.import_module("transformers")
    torch.manual_seed(4)
    config = library.DPTConfig(
        is_hybrid=True,
        backbone_config={
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "embedding_size": 8,
            "depths": [1, 1, 1],
            "hidden_sizes": [16, 32, 64],
            "num_groups": 2,
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
        },
        backbone_featmap_shape=[1, 64, 4, 4],
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[16, 32, 16, 16],
        fusion_hidden_size=16,
    )
    module = library.DPTForDepthEstimation(config).eval()
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    nn.init.constant_(module.head.head[-2].bias, 2.0)
    return module


def load(name: str = "dpt_depth", **fields: Any) -> LoadedModel:
    options = {**TINY[name], **fields.pop("options", {})}
    return load_model(ModelConfig(name=name, options=options, **fields), seed=0, tile_pixels=1 << 20)


def published(module: nn.Module) -> dict[str, Tensor]:
    """Tensors as `Intel/dpt-large` has them: with a pooler, which depth estimation does without."""
    pooler = {"dpt.pooler.dense.weight": torch.zeros(32, 32), "dpt.pooler.dense.bias": torch.zeros(32)}
    return {**{name: tensor.clone() for name, tensor in module.state_dict().items()}, **pooler}


def test_dpt_large() -> None:
    with torch.device("meta"):
        module = build_dpt(1)
    # 343 M (table 1), less what transformers builds and depth does not use: a normalisation and a residual unit.
    unused = 2 * 1024 + 2 * (9 * 256 * 256 + 256)
    assert sum(parameter.numel() for parameter in module.parameters()) + unused == 343_030_465


def test_dpt_hybrid() -> None:
    with torch.device("meta"):
        module = build_dpt_hybrid(1)
    # 123 M (table 1), less what transformers builds and depth does not use, as above.
    unused = 2 * 768 + 2 * (9 * 256 * 256 + 256)
    assert sum(parameter.numel() for parameter in module.parameters()) + unused == 122_377_985


def test_the_hybrids_resnet_is_timms() -> None:
    """What has a home of its own elsewhere: the three stages of a BiT ResNet-50 that ViT-Base was trained on."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build_dpt_hybrid(1).get_submodule("dpt.embeddings.backbone")
        theirs = timm.create_model("vit_base_r50_s16_384").patch_embed.backbone
    sizes = [sorted(tuple(tensor.shape) for tensor in module.state_dict().values()) for module in (ours, theirs)]
    assert sizes[0] == sizes[1]


@torch.inference_mode()
def test_a_published_hybrid_gives_the_librarys_depth(tmp_path: Path) -> None:
    """Through its image processor, which resizes depth to the image; and at a size that it does not take."""
    expected = official_hybrid()
    safetensors.torch.save_file(published(expected), tmp_path / "model.safetensors")
    model = load("midas_hybrid", weights=str(tmp_path / "model.safetensors"))
    image_BCHW, frames = torch.randn(2, 3, 64, 64), [Frame(90, 100, 64, 64)] * 2
    predictions = model.postprocess(model.spec.forward(model.module, image_BCHW, frames), frames, model.context)
    processor = importlib.import_module("transformers").DPTImageProcessor()
    resized = processor.post_process_depth_estimation(expected(image_BCHW), [(90, 100)] * 2)
    for prediction, item in zip(predictions, resized, strict=True):
        assert prediction.depth_kind == "inverse_relative"
        assert prediction.depth_HW.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), item["predicted_depth"].clamp_min(0))
    wide_BCHW = torch.randn(1, 3, 32, 96)
    depth_BHW = dpt_depth(model.module, wide_BCHW, FRAMES[:1])
    embedded = expected.dpt.embeddings(wide_BCHW, interpolate_pos_encoding=True)
    tokens = [embedded.last_hidden_states]
    for layer in expected.dpt.encoder.layer:
        tokens.append(layer(tokens[-1]))
    features = expected.neck([*embedded.intermediate_activations, tokens[3], tokens[4]], 2, 6)
    torch.testing.assert_close(depth_BHW, expected.head(features))


@torch.inference_mode()
def test_depth_at_the_images_size_is_the_image_processors(tmp_path: Path) -> None:
    expected = official()
    safetensors.torch.save_file(published(expected), tmp_path / "model.safetensors")
    model = load(weights=str(tmp_path / "model.safetensors"))
    image_BCHW, frames = torch.randn(1, 3, 64, 64), [Frame(50, 100, 64, 64)]
    (prediction,) = model.postprocess(model.spec.forward(model.module, image_BCHW, frames), frames, model.context)
    processor = importlib.import_module("transformers").DPTImageProcessor()
    (item,) = processor.post_process_depth_estimation(expected(image_BCHW), [(50, 100)])
    # Bicubic weights can lead below 0, where there is no disparity.
    torch.testing.assert_close(torch.from_numpy(prediction.depth_HW), item["predicted_depth"].clamp_min(0))
    # Padding is left out before anything is resized.
    padded = [Frame(64, 40, 64, 40)]
    (prediction,) = model.postprocess(expected(image_BCHW).predicted_depth, padded, model.context)
    assert torch.equal(torch.from_numpy(prediction.depth_HW), expected(image_BCHW).predicted_depth[0, :, :40])


@torch.inference_mode()
def test_a_published_checkpoint_gives_the_librarys_depth(tmp_path: Path) -> None:
    expected = official()
    safetensors.torch.save_file(published(expected), tmp_path / "model.safetensors")
    model = load(weights=str(tmp_path / "model.safetensors"))
    image_BCHW = torch.randn(2, 3, 64, 64)
    depth_BHW = model.spec.forward(model.module, image_BCHW, FRAMES)
    assert depth_BHW.shape == (2, 64, 64)
    assert depth_BHW.std() > 0.01
    torch.testing.assert_close(depth_BHW, expected(image_BCHW).predicted_depth)


@torch.inference_mode()
def test_images_need_not_be_square() -> None:
    """The library's forward takes any grid of tokens for a square one; told the grid by hand it agrees."""
    expected, module = official(), load().module
    module.load_state_dict(adapt_dpt(published(expected), module.state_dict().keys()))
    image_BCHW = torch.randn(1, 3, 32, 96)
    depth_BHW = dpt_depth(module, image_BCHW, FRAMES[:1])
    assert depth_BHW.shape == (1, 32, 96)
    tokens = expected.dpt(image_BCHW, output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(depth_BHW, expected.head(expected.neck([*tokens], 2, 6)))
    # Turned by a quarter it is another image, and another depth: rows and columns are not mixed up.
    turned_BHW = dpt_depth(module, image_BCHW.transpose(2, 3), FRAMES[:1])
    assert turned_BHW.shape == (1, 96, 32)
    with pytest.raises(ValueError, match=r"multiples of 32, got 48 x 64 \(pad_multiple\)"):
        dpt_depth(module, torch.zeros(1, 3, 48, 64), FRAMES[:1])


def test_a_vision_transformer_is_a_start(tmp_path: Path) -> None:
    """`vit.*` as google/vit-* name it fills the transformer and nothing else."""
    library = importlib.import_module("transformers")
    config = library.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, image_size=64, num_labels=3
    )
    library.ViTForImageClassification(config).save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    tree = {
        "source": {"format": "scenes", "count": 2},
        "model": {"name": "dpt_depth", "weights": weights, "options": OPTIONS},
        "partial_weights": True,
        "epochs": 1,
        "output": {"uri": str(tmp_path)},
    }
    model, unfilled = start_model(TrainConfig.model_validate(tree))
    assert unfilled == [name for name in model.module.state_dict() if not name.startswith("dpt.")]
    given = safetensors.torch.load_file(weights)
    for name, tensor in model.module.get_submodule("dpt").state_dict().items():
        assert torch.equal(tensor, given[f"vit.{name}"]), name
    with pytest.raises(CheckpointError, match="does not fit the model: neck"):
        load(weights=weights)


def test_kinds_of_depth() -> None:
    image_BCHW = torch.randn(1, 3, 64, 64)
    inverse, metric = load(), load(options={"depth_kind": "metric_m", "max_depth": 12.0})
    assert (inverse.context.depth_kind, metric.context.depth_kind) == ("inverse_relative", "metric_m")
    with torch.inference_mode():
        disparity_BHW, depth_BHW = (dpt_depth(model.module, image_BCHW, FRAMES[:1]) for model in (inverse, metric))
    # New weights begin where the last layer has a gradient everywhere.
    assert disparity_BHW.min() > 0
    assert 0.1 < depth_BHW.min() <= depth_BHW.max() < 12
    assert float(depth_BHW.median()) == pytest.approx(10, abs=1)
    assert inverse.version != metric.version


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"depth_kind": "relative"}, "depth_kind must be inverse_relative or metric_m, got 'relative'"),
        ({"out_layers": [0, 1, 2, 2]}, "out_layers must ascend from 0 or more to the last layer, 3, got [0, 1, 2, 2]"),
        ({"layers": 5}, "to the last layer, 4, got [0, 1, 2, 3]"),
        ({"out_layers": [1, 2, 3]}, "out_layers and neck_sizes must be four each"),
        ({"heads": 3}, "model 'dpt_depth' cannot be built"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options=options)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"depth_kind": "relative"}, "depth_kind must be inverse_relative or metric_m, got 'relative'"),
        ({"out_layers": [1, 2, 3]}, "out_layers and neck_sizes must be two each"),
        ({"stage_sizes": [16, 32]}, "stage_layers and stage_sizes must be three each, got [1, 1, 1] and [16, 32]"),
    ],
)
def test_options_of_a_hybrid_that_do_not_fit(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("midas_hybrid", options=options)
    assert part in str(caught.value)


def test_a_default_written_out_is_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are tuples where they are defaults."""
    defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in OPTIONS.items()}
    spec = replace(MODELS["dpt_depth"], build=partial(build_dpt, **defaults))
    monkeypatch.setitem(entries("depth"), "dpt_depth", spec)
    bare = load_model(ModelConfig(name="dpt_depth"), seed=0, tile_pixels=1 << 20)
    assert bare.version == load().version


@pytest.mark.parametrize("name", ["dpt_depth", "midas_hybrid"])
def test_every_parameter_learns(name: str) -> None:
    module = load(name).module.requires_grad_(True).train()
    dpt_depth(module, torch.randn(2, 3, 64, 96), FRAMES).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias adds the same to all of a query's scores, which the softmax takes out again.
        assert parameter.grad.abs().sum() > 0 or name.endswith("key.bias"), name


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'it needs pip install "maskmill\[hf\]": cannot import transformers: '):
        load()
