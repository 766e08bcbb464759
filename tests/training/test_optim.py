"""Parameter groups by what parameters are, steps that are torch's own, clipping, and a state to resume from."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.registry import MODELS
from pipeline.models.zoo.unet import UNetSmall
from pipeline.training.optim import (
    OptimizerOptions,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_learning_rate,
)

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def unet(seed: int = 0) -> UNetSmall:
    torch.manual_seed(seed)
    return UNetSmall(3, width=4, depth=2)


def settings_of(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """By parameter name: learning rate, factor, weight decay."""
    return {
        name: (group["lr"], group["factor"], group["weight_decay"])
        for group in groups
        for name, _ in zip(group["names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("name", ["unet_small", "deeplabv3_resnet50", "maskrcnn_resnet50_fpn_v2"])
def test_every_parameter_is_in_one_group_and_norms_and_biases_do_not_decay(name: str) -> None:
    with torch.device("meta"):
        module = MODELS[name].build(21)
    groups = parameter_groups(module, OptimizerOptions(weight_decay=0.05, backbone_factor=0.1, layer_decay=0.8))
    named = dict(module.named_parameters())
    listed = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, named.values()))
    assert all(named[name] is parameter for group in groups for name, parameter in zip(group["names"], group["params"]))  # noqa: B905
    without_decay = {
        f"{path}.{name}"
        for path, child in module.named_modules()
        for name, _ in child.named_parameters(recurse=False)
        if isinstance(child, NORMS) or name == "bias"
    }
    found = settings_of(groups)
    assert {name for name, (_, _, decay) in found.items() if decay == 0} == without_decay
    assert {decay for name, (_, _, decay) in found.items() if name not in without_decay} == {0.05}


def test_rates_fall_along_the_backbone() -> None:
    with torch.device("meta"):
        module = MODELS["deeplabv3_resnet50"].build(21)
    options = OptimizerOptions(learning_rate=0.2, backbone_factor=0.1, layer_decay=0.5)
    found = settings_of(parameter_groups(module, options))
    expected = {
        "backbone.conv1.": 0.5**5,
        "backbone.bn1.": 0.5**5,
        "backbone.layer1.": 0.5**4,
        "backbone.layer2.": 0.5**3,
        "backbone.layer3.": 0.5**2,
        "backbone.layer4.": 0.5,
    }
    for name, (rate, factor, _) in found.items():
        part = next((value for prefix, value in expected.items() if name.startswith(prefix)), None)
        assert factor == pytest.approx(1.0 if part is None else 0.1 * part), name
        assert rate == pytest.approx(0.2 * factor)
    assert any(name.startswith("classifier") for name in found)


def test_the_pyramid_of_a_detector_is_new() -> None:
    with torch.device("meta"):
        module = MODELS["maskrcnn_resnet50_fpn_v2"].build(91)
    found = settings_of(parameter_groups(module, OptimizerOptions(backbone_factor=0.1)))
    factors = {name.split(".")[1]: factor for name, (_, factor, _) in found.items() if name.startswith("backbone.")}
    assert factors == {"body": 0.1, "fpn": 1.0}


def test_a_model_without_a_backbone_needs_no_factor() -> None:
    module = nn.Linear(3, 2)
    assert len(parameter_groups(module, OptimizerOptions())) == 2
    with pytest.raises(ConfigError, match="expected a backbone"):
        parameter_groups(module, OptimizerOptions(backbone_factor=0.1))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        module(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_are_torchs_own(kind: Any) -> None:
    options = OptimizerOptions(
        kind=kind, learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, momentum=0.7, nesterov=True
    )
    module, other = unet(), unet()
    decayed = [parameter for parameter in other.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in other.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = (
        torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
        if kind == "adamw"
        else torch.optim.SGD(groups, lr=0.01, momentum=0.7, nesterov=True)
    )
    train(module, build_optimizer(module, options), range(4))
    train(other, reference, range(4))
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_schedule_reaches_every_group_by_its_factor() -> None:
    module = unet()
    optimizer = build_optimizer(module, OptimizerOptions(learning_rate=1.0, backbone_factor=0.1, layer_decay=0.5))
    factors = [group["lr"] for group in optimizer.param_groups]
    assert len(set(factors)) == 4
    for rate in (0.3, 0.0, 2.0):
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * factor for factor in factors])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_stored_state_goes_on_as_if_never_stopped(kind: Any) -> None:
    options = OptimizerOptions(kind=kind, layer_decay=0.9)
    module = unet()
    optimizer = build_optimizer(module, options)
    train(module, optimizer, range(3))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, range(3, 6))
    other = unet(seed=9)
    resumed = build_optimizer(other, options)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    for found, expected in zip(other.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    set_learning_rate(resumed, 1.0)
    assert min(group["lr"] for group in resumed.param_groups) < 1


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def with_gradients(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = unet()
    module(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    next(module.parameters()).grad = None  # frozen
    return module, build_optimizer(module, OptimizerOptions(layer_decay=0.5))


@pytest.mark.parametrize("share", [0.1, 0.9, 1.5, None])
def test_clipping_is_torchs_and_returns_the_norm_before(share: float | None) -> None:
    module, optimizer = with_gradients()
    before = gradients(module)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in before))
    limit = None if share is None else share * norm
    assert float(clip_gradients(optimizer, limit)) == pytest.approx(norm, rel=1e-5)
    other, _ = with_gradients()
    nn.utils.clip_grad_norm_(other.parameters(), math.inf if limit is None else limit)
    for found, expected in zip(gradients(module), gradients(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    left = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients(module)))
    assert left == pytest.approx(norm * min(1.0, share or 1.0), rel=1e-5)


def test_measuring_leaves_infinite_gradients_as_they_are() -> None:
    module, optimizer = with_gradients()
    list(module.parameters())[-1].grad = torch.full_like(list(module.parameters())[-1], math.inf)
    before = gradients(module)
    assert clip_gradients(optimizer, None).isinf()
    assert all(torch.equal(a, b) for a, b in zip(gradients(module), before, strict=True))


def test_no_gradients_have_a_norm_of_0() -> None:
    assert float(clip_gradients(build_optimizer(unet(), OptimizerOptions()), 1.0)) == 0


def scaled_step(loss_factor: float) -> tuple[nn.Module, nn.Module, float, float]:
    module = unet()
    before = copy.deepcopy(module)
    optimizer = build_optimizer(module, OptimizerOptions(kind="sgd", learning_rate=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    image_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = module(image_BCHW).square().mean() * loss_factor
    plain = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    norm = float(clip_gradients(optimizer, 0.01, scaler))
    scaler.step(optimizer)
    scaler.update()
    return before, module, norm, math.sqrt(sum(float(slope.double().square().sum()) for slope in plain))


def test_scaled_gradients_are_clipped_at_their_own_size() -> None:
    before, after, norm, expected = scaled_step(1.0)
    assert norm == pytest.approx(expected, rel=1e-4)
    moved = math.sqrt(
        sum(
            float((a - b).detach().double().square().sum())
            for a, b in zip(before.parameters(), after.parameters(), strict=True)
            if a.ndim == 1  # no decay
        )
    )
    assert 0 < moved <= 0.1 * 0.01 * 1.001


def test_a_step_with_infinite_gradients_is_skipped() -> None:
    before, after, norm, _ = scaled_step(1e38)
    assert not math.isfinite(norm)
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adam"}, "kind must be one of adamw, sgd, got 'adam'"),
        ({"learning_rate": 0.0}, "learning_rate must be over 0"),
        ({"learning_rate": math.nan}, "learning_rate must be over 0"),
        ({"weight_decay": -1.0}, "weight_decay 0 or more"),
        ({"backbone_factor": -0.1}, "backbone_factor must be 0 or more"),
        ({"layer_decay": 0.0}, "layer_decay over 0 and at most 1"),
        ({"layer_decay": 1.1}, "layer_decay over 0 and at most 1"),
        ({"kind": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
        ({"betas": (0.9, 1.0)}, "betas must be 0 or more and under 1"),
        ({"eps": 0.0}, "eps must be over 0"),
        ({"momentum": -0.1}, "momentum must be 0 or more and under 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerOptions(**options)
