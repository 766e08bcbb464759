"""The workers of a run as one of them sees them: sums, JSON and weights over a process group, or over itself alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Workers", "summed"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """rank of size. device: where tensors must be for the group (nccl: the worker's GPU). group: None is the default
    process group, which is used only where `size` is over 1. Every worker makes the same calls in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: Any = None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers, a new tensor; without gradient."""
        total = values.detach().clone().to(self.device)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank. Values are what JSON holds, and travel as that: nothing is unpickled."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [
            json.loads(bytes(part[: int(size)].cpu().numpy().tobytes()))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.size > 1:
            source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            for tensor in tensors:
                dist.broadcast(tensor, source, group=self.group)

    @torch.no_grad()
    def same_state(self, module: nn.Module) -> None:
        """Make a module's weights and buffers those of rank 0: local batch statistics differ between workers. Weights
        of which each worker has a part stay as they are."""
        tensors = module.state_dict().values()
        self.copy_from_first(tensor.detach() for tensor in tensors if not isinstance(tensor, DTensor))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.sum(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.sum(grads[0].contiguous()), None


def summed(values: Tensor, workers: Workers) -> Tensor:
    """The sum over workers with a gradient: each worker's values get what all workers' losses say about the sum."""
    result: Tensor = _Summed.apply(values, workers)
    return result
