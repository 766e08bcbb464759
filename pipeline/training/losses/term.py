"""A loss as a sum and what it is divided by, so that a batch may be cut among workers and still be one batch.

The mean of means is not the mean: where void pixels are spread unevenly, averaging each worker's mean loss (as
DistributedDataParallel does with gradients) weights pixels by the worker that they fell to. A sum and its divisor are
additive instead, and every divisor here is known from the targets alone, before any forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["LossTerm", "Objective", "combine", "no_loss", "widened"]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """total: scalar with gradient, float32 (float64 where the output is). weight: scalar without, of the same type and
    0 where there is no evidence; `total` is then 0 as well, with a gradient of 0."""

    total: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """total / weight; 0 where there is no evidence."""
        return divide(self.total, self.weight)


class Objective(Protocol):
    """What a model is trained to: one term per loss, and what each counts for.

    factors: by name of the term. The names of `terms`, `weights` and `factors` are the same.
    """

    @property
    def factors(self) -> Mapping[str, float]: ...

    def terms(self, output: Any, batch: Mapping[str, Any]) -> dict[str, LossTerm]:
        """The losses of a model's output against a batch's targets."""
        ...

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights of `terms`, from the targets alone."""
        ...


def combine(
    terms: Mapping[str, LossTerm], factors: Mapping[str, float], weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The scalar to differentiate: the sum of factor * total / weight over the terms.

    weights: divisors to use instead of the terms' own, where this is a part of a larger batch. For the gradient of the
    whole: the sum over the micro-batches that are accumulated; and, where gradients are averaged over workers, the
    mean over workers of that sum.
    """
    weights = {name: term.weight for name, term in terms.items()} if weights is None else weights
    parts = [factors[name] * divide(term.total, weights[name]) for name, term in terms.items()]
    return torch.stack(parts).sum()


def divide(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, and total itself (which is 0) where the weight is 0."""
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


def no_loss(values: Tensor) -> Tensor:
    """A scalar 0 that depends on `values` with a gradient of 0, whatever they are: all parameters take part in every
    backward pass, which DistributedDataParallel waits for."""
    return torch.where(torch.zeros_like(values, dtype=torch.bool), values, torch.zeros_like(values)).sum()


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is: sums over a million pixels do not fit into 8 or 11 bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
