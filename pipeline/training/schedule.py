"""Learning-rate schedules as functions of the step: nothing to save, and a resumed run goes on where it was."""

import bisect
import math
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import ConfigError

__all__ = ["ScheduleKind", "ScheduleOptions", "learning_rate_factor"]

ScheduleKind = Literal["constant", "poly", "cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """steps: optimiser steps of the whole run.

    kind: constant; poly, (1 - t)^power with t the share of the steps after warm-up that is done (Chen et al. 2017,
        arXiv:1706.05587, section 4.1; power 0.9 there); cosine, (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017,
        arXiv:1608.03983, eq. 5, without restarts); step, gamma^n after n of the `milestones`, which count from the
        run's first step.
    floor: poly and cosine end at this factor instead of 0.
    warmup_steps: linear from `warmup_start` up to 1, before the schedule begins (Goyal et al. 2017, arXiv:1706.02677,
        section 2.2).
    """

    steps: int
    kind: ScheduleKind = "poly"
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    floor: float = 0.0
    warmup_steps: int = 0
    warmup_start: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ConfigError(f"kind must be one of {', '.join(get_args(ScheduleKind))}, got {self.kind!r}")
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"steps must be 1 or more and over warmup_steps, got {self.steps} and warmup_steps {self.warmup_steps}"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ConfigError(f"milestones must be steps of 1 or more in ascending order, got {self.milestones}")
        if (self.kind == "step") != bool(self.milestones):
            raise ConfigError(f"milestones are for kind step and needed there, got {self.milestones} for {self.kind}")
        if self.power <= 0 or not 0 < self.gamma <= 1:
            raise ConfigError(f"power must be over 0, gamma over 0 and at most 1, got {self.power}, {self.gamma}")
        if not 0 <= self.floor <= 1 or not 0 <= self.warmup_start <= 1:
            raise ConfigError(f"floor and warmup_start must be 0 to 1, got {self.floor}, {self.warmup_start}")


def learning_rate_factor(step: int, options: ScheduleOptions) -> float:
    """What the base learning rate is multiplied by in the optimiser step `step`, counted from 0.

    Beyond the last step it stays at its end. Raises ValueError for a step under 0.
    """
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    if step < options.warmup_steps:
        return options.warmup_start + (1 - options.warmup_start) * step / options.warmup_steps
    if options.kind == "constant":
        return 1.0
    if options.kind == "step":
        return options.gamma ** bisect.bisect_right(options.milestones, step)
    done = min(1.0, (step - options.warmup_steps) / (options.steps - options.warmup_steps))
    curve = (1 - done) ** options.power if options.kind == "poly" else (1 + math.cos(math.pi * done)) / 2
    return options.floor + (1 - options.floor) * curve
