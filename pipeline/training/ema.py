"""An exponential moving average of a model's weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.sharding import load_full_state

__all__ = ["Ema", "ema_decay"]


def ema_decay(updates: int, decay: float) -> float:
    """What the average keeps of itself after `updates` updates: min(decay, (1 + n) / (10 + n)), so that it does not
    hold on to the first, random weights (tf.train.ExponentialMovingAverage's num_updates)."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """`module` is the average, a copy in evaluation mode; `update` moves it towards the model.

    Floating parameters are averaged; buffers are copied, as the running statistics of a batch normalisation are an
    average already. Where the model is sharded, so is the average (`sharding.shard_like`): each worker moves its parts.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999) -> None:
        """decay: of each step, once warmed up (TensorFlow's usual value). Raises ConfigError."""
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be 0 or more and under 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimiser step; `model` is the same architecture, without a wrapper (DistributedDataParallel)."""
        averages, values = _paired(self.module.named_parameters(), model.named_parameters())
        weight = 1 - ema_decay(self.updates, self.decay)
        torch._foreach_lerp_(averages, values, weight)
        for average, value in zip(*_paired(self.module.named_buffers(), model.named_buffers()), strict=True):
            average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """`updates`, and `module`, the average's own state dict."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, of whole tensors. Raises CheckpointError where they are another model's."""
        try:
            load_full_state(self.module, state["module"])
            self.updates = int(state["updates"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"expected the average of this model: {error}") from error


def _paired(averages: Any, values: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors of two models, each in the first one's order. Raises ValueError where their names differ."""
    mine, others = dict(averages), dict(values)
    if mine.keys() != others.keys():
        different = sorted(mine.keys() ^ others.keys())
        raise ValueError(f"expected the weights of one model, the names differ in {different[:5]}")
    return list(mine.values()), [others[name] for name in mine]
