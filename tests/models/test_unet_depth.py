"""Metric depth: the layer of logarithmic metres, and that the small U-Net learns scenes with it."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.models.zoo.log_depth import LogDepth
from pipeline.models.zoo.unet import UNetSmall
from pipeline.models.zoo.unet_depth import DepthUNetSmall
from pipeline.sources.scenes import render_scene
from pipeline.training.losses.objective import DepthLoss, DepthLossOptions


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_logarithm_of_depth_is_even_between_the_bounds() -> None:
    layer = LogDepth(0.1, 100.0)
    # Shares 1/4, 1/2 and 3/4 of ln(1000).
    values = torch.tensor([-math.log(3), 0.0, math.log(3)])
    torch.testing.assert_close(layer(values), torch.tensor([0.1 * 1000**0.25, 0.1 * 1000**0.5, 0.1 * 1000**0.75]))
    extremes = layer(torch.tensor([-1e9, -30.0, 30.0, 1e9]))
    torch.testing.assert_close(extremes, torch.tensor([0.1, 0.1, 100.0, 100.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("depth", [0.2, 1.0, 10.0, 99.0])
def test_a_bias_for_a_depth(depth: float) -> None:
    layer = LogDepth(0.1, 100.0)
    assert float(layer(torch.tensor(layer.value_of(depth)))) == pytest.approx(depth, rel=1e-5)
    convolution = torch.nn.Conv2d(1, 1, 1)
    layer.begin_after(convolution, depth)
    assert layer(convolution(torch.zeros(1, 1, 1, 1))).item() == pytest.approx(depth, rel=1e-5)
    assert LogDepth(20.0, 80.0).value_of(10.0) == 0
    assert float(LogDepth(20.0, 80.0)(torch.tensor(0.0))) == pytest.approx(40)


def test_half_precision_loses_nothing() -> None:
    layer = LogDepth(0.1, 100.0)
    values = torch.linspace(-4, 4, 9).bfloat16()
    assert layer(values).dtype == torch.float32
    torch.testing.assert_close(layer(values), layer(values.float()))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 2.0), (1.0, math.inf), (1.0, math.nan)])
def test_bounds_that_are_none(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < min_depth < max_depth"):
        LogDepth(low, high)


@torch.inference_mode()
def test_new_weights_predict_about_ten_metres_at_the_images_size() -> None:
    torch.manual_seed(0)
    module = DepthUNetSmall(1, width=8).eval()
    depth_B1HW = module(torch.randn(2, 3, 32, 48))
    assert depth_B1HW.shape == (2, 1, 32, 48)
    assert 5 < float(depth_B1HW.median()) < 20
    near = DepthUNetSmall(1, width=8, min_depth=0.5, max_depth=2.0).eval()
    depth_B1HW = near(torch.randn(1, 3, 32, 32))
    assert float(depth_B1HW.min()) > 0.5
    assert float(depth_B1HW.max()) < 2


def test_a_checkpoint_of_the_semantic_unet_is_a_start() -> None:
    shapes = [
        {name: tensor.shape for name, tensor in module.state_dict().items() if not name.startswith("head.")}
        for module in (DepthUNetSmall(1, width=4), UNetSmall(8, width=4))
    ]
    assert shapes[0] == shapes[1]


def test_it_learns_scenes_in_metres() -> None:
    """60 steps on 8 scenes: from 10 m everywhere, which is off by half, to a quarter and less."""
    scenes = [render_scene(index, width=64, height=48) for index in range(8)]
    image_BCHW = torch.from_numpy(np.stack([scene.image_HWC for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    target_BHW = torch.from_numpy(np.stack([scene.depth_HW for scene in scenes]))
    target_BHW[target_BHW == 0] = math.nan
    torch.manual_seed(0)
    module = DepthUNetSmall(1, width=8, depth=3).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    objective = DepthLoss(DepthLossOptions(kind="l1"))
    errors = []
    for _ in range(60):
        depth_B1HW = module(image_BCHW)
        errors.append(float(((depth_B1HW.detach()[:, 0] - target_BHW).abs() / target_BHW).nanmean()))
        (term,) = objective.terms(depth_B1HW, {"depth": target_BHW}).values()
        optimizer.zero_grad()
        (term.total / term.weight).backward()
        optimizer.step()
    assert errors[0] > 0.4
    assert errors[-1] < 0.2


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    module = DepthUNetSmall(1, width=4, depth=2).train()
    functional.l1_loss(module(torch.randn(2, 3, 16, 16)), torch.full((2, 1, 16, 16), 3.0)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
