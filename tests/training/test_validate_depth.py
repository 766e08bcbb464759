"""Validation of depth without a scale: each prediction is fitted to its target first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from training_helpers import CPU

from pipeline.config import ModelConfig
from pipeline.config_train import TargetConfig, ValidationConfig
from pipeline.models.load import load_model
from pipeline.sources.registry import open_source
from pipeline.training.plan import plan_source
from pipeline.training.validate import Validator
from pipeline.training.workers import Workers


class Brightness(nn.Module):
    """The first channel, whatever its mean and deviation: a disparity of the images below up to scale and shift."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return 5 + image_BCHW[:, 0]


def validate(folder: Path, alignment: str) -> dict[str, Any]:
    """Figures of images that are as bright as they are near: 1 / depth = (brightness + 20) / 200 per metre."""
    brightness_HW = np.add.outer(np.arange(16), 5 * np.arange(32)).astype(np.uint8)
    Image.fromarray(np.dstack([brightness_HW] * 3)).save(folder / "a.png")
    np.save(folder / "a.npy", 200 / (brightness_HW + 20.0))
    source = {"format": "files", "uri": str(folder), "images": "{id}.png", "targets": {"depth": "{id}.npy"}}
    config = ValidationConfig.model_validate({"source": source, "alignment": alignment})
    loaded = load_model(
        ModelConfig(name="unet_small_depth", options={"depth_kind": "inverse_relative", "width": 2, "depth": 2}),
        seed=0,
        tile_pixels=1 << 20,
    )
    model = replace(loaded, module=Brightness())
    target = TargetConfig.model_validate({"depth": {"max_depth": 20}})
    validator = Validator(config, target, plan_source(open_source(config.source)), model, device=CPU, threads=1)
    scores = validator.score(model.module, Workers())
    assert scores.images == 1
    return scores.figures("depth", model.taxonomy)


def test_a_fit_finds_scale_and_shift(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert validate(tmp_path, "least_squares_disparity")["AbsRel"] == pytest.approx(0, abs=1e-3)
    assert validate(tmp_path, "none")["AbsRel"] > 0.5
    assert 0.01 < validate(tmp_path, "median")["AbsRel"] < validate(tmp_path, "none")["AbsRel"]
