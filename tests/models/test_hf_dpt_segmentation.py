"""DPT for label maps from transformers: its size, published weights, and its auxiliary head."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import TINY
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.load import LoadedModel, load_model
from pipeline.models.spec import Frame
from pipeline.models.zoo.hf_dpt_segmentation import build_dpt_segmentation, dpt_segmentation

CLASSES = 150


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def official() -> Any:
    """The library's own model of the tiny options."""
    library = importlib.import_module("transformers")
    torch.manual_seed(9)
    config = library.DPTConfig(
        num_labels=CLASSES,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        use_batch_norm_in_fusion_residual=True,
    )
    module = library.DPTForSemanticSegmentation(config).eval()
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point() and "norm" not in name:
            nn.init.normal_(tensor, std=0.2)
    return module


def load(**fields: Any) -> LoadedModel:
    options = {**TINY["dpt_segmentation"], **fields.pop("options", {})}
    return load_model(ModelConfig(name="dpt_segmentation", options=options, **fields), seed=0, tile_pixels=1 << 20)


def published(module: nn.Module, folder: Path) -> str:
    """A file as `Intel/dpt-large-ade` has it, with both heads; the pooler is of the transformer's own training."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pooler = {"dpt.pooler.dense.weight": torch.zeros(32, 32), "dpt.pooler.dense.bias": torch.zeros(32)}
    safetensors.torch.save_file({**state, **pooler}, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_the_published_size() -> None:
    """DPT-Large's transformer and neck, as depth has them, with batch normalisation for biases and two heads."""
    with torch.device("meta"):
        module = build_dpt_segmentation(CLASSES)
        library = importlib.import_module("transformers")
        config = library.DPTConfig(
            num_labels=CLASSES,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            backbone_out_indices=[5, 11, 17, 23],
            neck_hidden_sizes=[256, 512, 1024, 1024],
            use_batch_norm_in_fusion_residual=True,
        )
        whole = library.DPTForSemanticSegmentation(config)
    unused = 2 * 1024 + 2 * (9 * 256 * 256 + 2 * 256)
    count = sum(parameter.numel() for parameter in module.parameters()) + unused
    assert count == sum(parameter.numel() for parameter in whole.parameters())
    # 343_030_465 of DPT-Large for depth: without its head and its biases, with normalisations and two heads.
    depth_head = 9 * 256 * 128 + 128 + 9 * 128 * 32 + 32 + 32 + 1
    head = 9 * 256 * 256 + 2 * 256 + 256 * CLASSES + CLASSES
    assert count == 343_030_465 - depth_head + 16 * 256 + 2 * head


@torch.inference_mode()
def test_published_weights_give_the_librarys_labels(tmp_path: Path) -> None:
    expected = official()
    model = load(weights=published(expected, tmp_path))
    image_BCHW, frames = torch.randn(2, 3, 64, 64), [Frame(100, 80, 64, 64), Frame(64, 64, 64, 64)]
    logits_BKHW = model.spec.forward(model.module, image_BCHW, frames)
    output = expected(image_BCHW)
    torch.testing.assert_close(logits_BKHW, output.logits)
    predictions = model.postprocess(logits_BKHW, frames, model.context)
    processor = importlib.import_module("transformers").DPTImageProcessor()
    sizes = [(100, 80), (64, 64)]
    labels = processor.post_process_semantic_segmentation(output, sizes)
    for prediction, label_HW in zip(predictions, labels, strict=True):
        assert prediction.label_HW is not None
        ids = np.asarray(model.taxonomy.ids)[label_HW.numpy()]
        assert len(np.unique(ids)) > 1
        assert np.array_equal(prediction.label_HW, ids)
    # Not square: the library's own forward would refuse it.
    wide_BKHW = dpt_segmentation(model.module, torch.randn(1, 3, 32, 96), [])
    assert wide_BKHW.shape == (1, CLASSES, 32, 96)  # type: ignore[union-attr]


def test_the_auxiliary_head_is_for_training(tmp_path: Path) -> None:
    expected = official()
    weights = published(expected, tmp_path)
    model = load(weights=weights)
    module: Any = model.module
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert isinstance(dpt_segmentation(module, image_BCHW, []), torch.Tensor)
        module.train()
        for child in module.modules():
            if isinstance(child, nn.Dropout | nn.BatchNorm2d):
                child.eval()
        heads = dpt_segmentation(module, image_BCHW, [])
        assert isinstance(heads, dict)
        assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {
            "out": (2, CLASSES, 64, 64),
            "aux": (2, CLASSES, 32, 32),
        }
        tokens = expected.dpt(image_BCHW, output_hidden_states=True).hidden_states[1:]
        torch.testing.assert_close(heads["aux"], expected.auxiliary_head(expected.neck([*tokens], 4, 4)[-1]))

        alone = load(weights=weights, options={"auxiliary": False})
        assert not any(name.startswith("auxiliary_head") for name in alone.module.state_dict())
        bare = dpt_segmentation(alone.module.train(), image_BCHW, [])
        assert isinstance(bare, torch.Tensor)
    # A model with the head cannot be filled from weights without it.
    state = {name: tensor for name, tensor in expected.state_dict().items() if not name.startswith("auxiliary_head")}
    safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"auxiliary_head\.head\.0\.weight is missing"):
        load(weights=str(tmp_path / "bare.safetensors"))


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="out_layers and neck_sizes must be four each"):
        load(options={"neck_sizes": [8, 8]})
    with pytest.raises(ValueError, match=r"multiples of 32, got 48 x 64 \(pad_multiple\)"):
        dpt_segmentation(load().module, torch.zeros(1, 3, 48, 64), [])
