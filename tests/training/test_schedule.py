"""Schedules equal torch's own where it has them, need no state, and refuse options that make no sense."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from pipeline.errors import ConfigError
from pipeline.training.schedule import ScheduleOptions, learning_rate_factor

LAW = settings(deadline=None, max_examples=40)
STEPS, WARMUP = 50, 8
Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def torchs(make: Make, steps: int = STEPS) -> list[float]:
    """The factor that each step is taken with, as a training loop with torch's scheduler takes it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own call of a deprecated argument
        scheduler = make(optimizer)
        factors = []
        for _ in range(steps):
            factors.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return factors


def ours(**options: Any) -> list[float]:
    return [learning_rate_factor(step, ScheduleOptions(steps=STEPS, **options)) for step in range(STEPS)]


def after_warmup(make: Make) -> Make:
    def build(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP)
        return lr_scheduler.SequentialLR(optimizer, [warmup, make(optimizer)], milestones=[WARMUP])

    return build


REST = STEPS - WARMUP
CASES: dict[str, tuple[dict[str, Any], Make, Make]] = {
    "constant": (
        {"kind": "constant"},
        lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
        lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    ),
    "poly": (
        {"kind": "poly", "power": 0.9},
        lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=0.9),
        lambda o: lr_scheduler.PolynomialLR(o, REST, power=0.9),
    ),
    "cosine": (
        {"kind": "cosine"},
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
        lambda o: lr_scheduler.CosineAnnealingLR(o, REST),
    ),
    "cosine with a floor": (
        {"kind": "cosine", "floor": 0.05},
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.05),
        lambda o: lr_scheduler.CosineAnnealingLR(o, REST, eta_min=0.05),
    ),
    "step": (
        {"kind": "step", "milestones": (20, 40), "gamma": 0.3},
        lambda o: lr_scheduler.MultiStepLR(o, [20, 40], gamma=0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [20 - WARMUP, 40 - WARMUP], gamma=0.3),
    ),
}


@pytest.mark.parametrize(("options", "make", "make_rest"), CASES.values(), ids=CASES)
def test_schedules_are_torchs(options: dict[str, Any], make: Make, make_rest: Make) -> None:
    assert ours(**options) == pytest.approx(torchs(make), rel=1e-9, abs=1e-12)
    warmed = ours(warmup_steps=WARMUP, warmup_start=0.1, **options)
    assert warmed == pytest.approx(torchs(after_warmup(make_rest)), rel=1e-9, abs=1e-12)


OPTIONS = st.builds(
    lambda steps, warmup, **rest: ScheduleOptions(steps=steps + 1, warmup_steps=min(warmup, steps), **rest),
    steps=st.integers(0, 300),
    warmup=st.integers(0, 300),
    kind=st.sampled_from(["constant", "poly", "cosine"]),
    power=st.floats(0.1, 3),
    floor=st.floats(0, 0.5),
    warmup_start=st.floats(0, 1),
)


@LAW
@given(OPTIONS)
def test_a_factor_rises_to_1_and_falls_to_its_floor(options: ScheduleOptions) -> None:
    factors = [learning_rate_factor(step, options) for step in range(options.steps + 5)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[: options.warmup_steps + 1], factors[options.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert factors[options.warmup_steps] == 1
    if options.warmup_steps:
        assert factors[0] == options.warmup_start
    if options.kind != "constant":
        assert factors[-5:] == pytest.approx([options.floor] * 5, abs=1e-12)


@pytest.mark.parametrize("kind", ["poly", "cosine", "constant"])
def test_the_last_step_still_moves(kind: Any) -> None:
    assert learning_rate_factor(99, ScheduleOptions(steps=100, kind=kind)) > 0


def test_milestones_are_reached_at_their_step() -> None:
    factors = ours(kind="step", milestones=(10, 30), gamma=0.1)
    runs = [(value, len(list(group))) for value, group in itertools.groupby(factors)]
    assert [length for _, length in runs] == [10, 20, 20]
    assert [value for value, _ in runs] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear"}, "kind must be one of constant, poly, cosine, step, got 'linear'"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"warmup_steps": 10}, "over warmup_steps, got 10 and warmup_steps 10"),
        ({"warmup_steps": -1}, "over warmup_steps"),
        ({"kind": "step"}, "milestones are for kind step and needed there"),
        ({"milestones": (3,)}, "milestones are for kind step and needed there"),
        ({"kind": "step", "milestones": (5, 3)}, "ascending order"),
        ({"kind": "step", "milestones": (0, 3)}, "steps of 1 or more"),
        ({"power": 0.0}, "power must be over 0"),
        ({"gamma": 0.0}, "gamma over 0"),
        ({"floor": 1.5}, "floor and warmup_start must be 0 to 1"),
        ({"warmup_start": -0.5}, "floor and warmup_start must be 0 to 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleOptions(**({"steps": 10} | options))


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        learning_rate_factor(-1, ScheduleOptions(steps=10))
