"""The average is its closed form; buffers are copied; a stored state loses nothing."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.zoo.unet import UNetSmall
from pipeline.training.ema import Ema, ema_decay


def unet(seed: int = 0) -> UNetSmall:
    torch.manual_seed(seed)
    return UNetSmall(3, width=4, depth=2)


def wander(module: nn.Module, seed: int) -> None:
    """What a training step does, as far as an average sees it: weights and statistics change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    module.train()(torch.randn(2, 3, 8, 8, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_it_is_its_closed_form(decay: float) -> None:
    """The sum over steps of (1 - d_i) times all later d_j times the weights of step i, and the rest of the first."""
    module = unet()
    ema = Ema(module, decay=decay)
    history = [{name: value.double().numpy().copy() for name, value in module.state_dict().items()}]
    for seed in range(30):
        wander(module, seed)
        ema.update(module)
        history.append({name: value.double().numpy().copy() for name, value in module.state_dict().items()})
    kept = [min(decay, (1 + n) / (10 + n)) for n in range(30)]
    shares = [math.prod(kept)] + [(1 - kept[n]) * math.prod(kept[n + 1 :]) for n in range(30)]
    assert sum(shares) == pytest.approx(1)
    for name, parameter in ema.module.named_parameters():
        expected = sum(share * weights[name] for share, weights in zip(shares, history, strict=True))
        np.testing.assert_allclose(parameter.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_decay_warms_up_to_its_value() -> None:
    assert [ema_decay(n, 0.9) for n in (0, 1, 10, 79, 80, 81, 10**9)] == pytest.approx(
        [0.1, 2 / 11, 11 / 20, 80 / 89, 0.9, 0.9, 0.9]
    )


def test_buffers_are_copied() -> None:
    module = unet()
    ema = Ema(module)
    for seed in range(3):
        wander(module, seed)
        ema.update(module)
    for (name, found), (_, expected) in zip(ema.module.named_buffers(), module.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
        assert found.data_ptr() != expected.data_ptr()


def test_the_average_is_a_model_of_its_own() -> None:
    module = unet()
    ema = Ema(module)
    before = copy.deepcopy(ema.module.state_dict())
    wander(module, 0)
    assert all(torch.equal(value, before[name]) for name, value in ema.module.state_dict().items())
    assert not any(child.training for child in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.training


def test_weights_that_stand_still_stay_exactly() -> None:
    module = unet()
    ema = Ema(module)
    for _ in range(50):
        ema.update(module)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), module.parameters(), strict=True))


def test_a_stored_state_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    module = unet()
    ema = Ema(module, decay=0.99)
    for seed in range(5):
        wander(module, seed)
        ema.update(module)
    state = ema.state_dict()
    save_file(state["module"], tmp_path / "ema.safetensors")
    resumed = Ema(unet(seed=5), decay=0.99)
    resumed.load_state_dict({"updates": state["updates"], "module": load_file(tmp_path / "ema.safetensors")})
    for seed in range(5, 10):
        wander(module, seed)
        ema.update(module)
        resumed.update(module)
    assert resumed.updates == ema.updates == 10
    for found, expected in zip(resumed.module.state_dict().values(), ema.module.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("state", [{}, {"updates": 1}, {"updates": 1, "module": {}}, {"updates": "x", "module": {}}])
def test_a_state_of_another_model_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="expected the average of this model"):
        Ema(unet()).load_state_dict(state)


def test_a_wrapped_model_is_refused() -> None:
    ema = Ema(unet())
    with pytest.raises(ValueError, match=r"the names differ in \['decoder"):
        ema.update(nn.ModuleDict({"module": unet()}))


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_makes_no_sense(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay must be 0 or more and under 1"):
        Ema(unet(), decay=decay)
