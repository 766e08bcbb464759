"""Weights in 8 bits: nearly the same answers, and what cannot be."""

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.quantize import QUANTIZED, quantize


@pytest.mark.parametrize("precision", QUANTIZED)
def test_linear_layers_keep_their_answers_nearly(precision: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval().requires_grad_(False)
    given = torch.randn(16, 64)
    before = module(given)
    quantize(module, precision, "here")
    after = module(given)
    assert not torch.equal(before, after)
    assert (after - before).abs().mean() < 0.02 * before.abs().mean()


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the model has none \(here\)"):
        quantize(nn.Conv2d(3, 3, 1), "int8_dynamic", "here")
