"""Batch normalisation over all workers' images, as if one worker had the whole batch.

torch's SyncBatchNorm is for GPUs alone, and counts every image that it is given. This one runs on any device, and a
worker whose share of a batch is empty takes part without being counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.workers import Workers, summed

__all__ = ["SyncedBatchNorm", "blank_pass", "sync_norms"]


class SyncedBatchNorm(_BatchNorm):
    """A batch normalisation that shares parameters, buffers and their names with the one it replaces. In evaluation it
    is that one; in training mean and variance are those of all workers, in two passes and float32."""

    def __init__(self, local: _BatchNorm, workers: Workers) -> None:
        super().__init__(0, local.eps, local.momentum, local.affine, local.track_running_stats)
        self.num_features = local.num_features
        self._parameters.update(local._parameters)
        self._buffers.update(local._buffers)
        self.train(local.training)
        self.workers = workers
        self.counted = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input of two axes or more, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        values = input.float()
        # A worker that is not counted makes the same calls with the same shapes, or the others would wait for ever.
        share = 1.0 if self.counted else 0.0
        own = torch.tensor([share * values.numel() / values.shape[1]], device=values.device)
        sums = summed(torch.cat([share * values.sum(axes), own]), self.workers)
        count = sums[-1].detach()
        # Where no worker has an image there is nothing to normalise, and nothing to remember.
        divisor = count.clamp_min(1)
        mean = sums[:-1] / divisor
        centred = values - mean.view(shape)
        variance = summed(share * centred.square().sum(axes), self.workers) / divisor
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1), count > 0)
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, known: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += known
        share = 1 / self.num_batches_tracked.clamp_min(1) if self.momentum is None else self.momentum
        weight = (known * share).to(self.running_mean)
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(variance.to(self.running_var), weight)


def sync_norms(module: nn.Module, workers: Workers) -> None:
    """Replace every batch normalisation below `module` by a synchronised one, in place."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SyncedBatchNorm(child, workers))
        else:
            sync_norms(child, workers)


@contextmanager
def blank_pass(module: nn.Module) -> Iterator[None]:
    """Within it a forward pass leaves no trace in any statistics: it is there only so that a worker without images
    takes part in the exchange of gradients."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.training]
    for norm in norms:
        if isinstance(norm, SyncedBatchNorm):
            norm.counted = False
        else:
            norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            if isinstance(norm, SyncedBatchNorm):
                norm.counted = True
            else:
                norm.train()
