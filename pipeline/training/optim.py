"""Optimisers with their parameter groups, gradient clipping, and how a schedule reaches the groups."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.training.backbone import backbone_stages
from pipeline.training.sharding import whole

__all__ = ["OptimizerOptions", "build_optimizer", "clip_gradients", "parameter_groups", "set_learning_rate"]

OptimizerKind = Literal["adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """kind: adamw (Loshchilov & Hutter 2019, arXiv:1711.05101) or sgd.

    learning_rate: of new parameters, before the schedule. weight_decay: of all parameters but those of one axis or
        none, which are biases and the weights of normalisations.
    backbone_factor: what the backbone's learning rate is multiplied by (a tenth is usual where it comes with weights).
    layer_decay: further down, the rate falls by this from stage to stage (Clark et al. 2020, arXiv:2003.10555): of n
        stages, stage i from the input has backbone_factor * layer_decay^(n - i), its last (i = n - 1) layer_decay.
    backbone: name of the submodule, where the rule of backbone.py does not find it.
    betas, eps: of adamw. momentum, nesterov: of sgd.
    """

    kind: OptimizerKind = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    backbone_factor: float = 1.0
    layer_decay: float = 1.0
    backbone: str = ""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimizerKind):
            raise ConfigError(f"kind must be one of {', '.join(get_args(OptimizerKind))}, got {self.kind!r}")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                f"learning_rate must be over 0, weight_decay 0 or more, got {self.learning_rate}, {self.weight_decay}"
            )
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0 and 0 <= self.momentum < 1):
            raise ConfigError(
                "betas must be 0 or more and under 1, eps must be over 0, momentum must be 0 or more and under 1, got "
                f"{self.betas}, {self.eps}, {self.momentum}"
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs momentum over 0")
        if not (0 <= self.backbone_factor < math.inf and 0 < self.layer_decay <= 1):
            raise ConfigError(
                "backbone_factor must be 0 or more, layer_decay over 0 and at most 1, got "
                f"{self.backbone_factor}, {self.layer_decay}"
            )


def build_optimizer(module: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimiser over all parameters, frozen ones as well: they have no gradient and are passed over, and may be
    thawed later without losing the others' momentum."""
    groups = parameter_groups(module, options)
    if options.kind == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.nesterov)


def parameter_groups(module: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Every parameter once, by learning rate and decay: `params`, `names`, `lr`, `weight_decay`, and `factor`, which
    `set_learning_rate` multiplies by. In the model's order, so that a stored state finds its parameters again."""
    factor_of = dict(_factors(module, options))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        factor = factor_of.get(parameter, 1.0)
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (factor, decay),
            {
                "params": [],
                "names": [],
                "lr": options.learning_rate * factor,
                "weight_decay": decay,
                "factor": factor,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's rate: the base rate after the schedule, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """Scale all gradients down together to a norm of at most `max_norm`; return their norm before that, a scalar.

    max_norm None: only measure. scaler: of fp16; gradients are unscaled first (once a step), and a norm that is not
    finite is left for `scaler.step`, which skips such a step.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = whole(nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _factors(module: nn.Module, options: OptimizerOptions) -> Iterator[tuple[nn.Parameter, float]]:
    """The learning-rate factors of the backbone's parameters."""
    if options.backbone_factor == 1 and options.layer_decay == 1:
        return
    stages = backbone_stages(module, options.backbone)
    for at, stage in enumerate(stages):
        factor = options.backbone_factor * options.layer_decay ** (len(stages) - at)
        for child in stage:
            for parameter in child.parameters():
                yield parameter, factor
