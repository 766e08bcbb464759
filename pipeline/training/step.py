"""One optimiser step over all workers: exactly the step that one worker with the whole batch would make.

A batch is shared among workers, and each cuts its share into micro-batches. Losses are sums, divided by what the whole
batch has of evidence (valid pixels, images), so that the cut leaves no trace: neither void pixels nor shares of
different sizes weigh a pixel up or down. What does leave one: local batch statistics, and losses of the batch as one.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.spec import Frame, ModelSpec, Preprocess
from pipeline.training.batch import MicroBatch
from pipeline.training.losses.term import LossTerm, Objective, combine, no_loss
from pipeline.training.norms import blank_pass
from pipeline.training.optim import clip_gradients, set_learning_rate
from pipeline.training.workers import Workers

__all__ = ["PRECISIONS", "StepResult", "Stepper", "Trainee", "wrap"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainee(nn.Module):
    """A model with everything that its forward pass in training takes, as DistributedDataParallel and fully_shard want
    it."""

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame], objects: Sequence[Any]) -> Any:
        """The model's output, or where its losses come with it those by name."""
        if self.spec.losses is not None:
            return self.spec.losses(self.module, image_BCHW, frames, objects)
        return self.spec.forward(self.module, image_BCHW, frames)


def wrap(trainee: Trainee, workers: Workers, device: torch.device) -> nn.Module:
    """The trainee as it is called; with several workers, gradients are averaged over them.

    It notes what learns, so it is built anew whenever something is frozen or thawed. A trainee that is sharded
    (sharding.py) averages by itself.
    """
    if workers.size == 1 or isinstance(trainee, FSDPModule):
        return trainee
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(trainee, device_ids=ids, process_group=workers.group)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The whole batch's loss (a mean, by the factors of the objective) and gradient norm before clipping.

    images, failed: over all workers. stop: whether any worker was asked to stop.
    """

    loss: float
    gradient_norm: float
    images: int
    failed: int
    stop: bool

    def finite(self, *, scaled: bool) -> bool:
        """Whether weights may follow this gradient. scaled: fp16, where an overflow only skips the step."""
        return math.isfinite(self.loss) and (scaled or math.isfinite(self.gradient_norm))


class Stepper:
    """Gradients of a batch, then the step.

    called: what `wrap` gave. scaler: for fp16. clip_norm: largest norm of the whole gradient, None: as it is.
    """

    def __init__(
        self,
        called: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        preprocess: Preprocess,
        *,
        workers: Workers,
        device: torch.device,
        precision: str = "fp32",
        channels_last: bool = False,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.called = called
        self.optimizer = optimizer
        self.scaler = scaler
        self._objective = objective
        self._preprocess = preprocess
        self._workers = workers
        self._device = device
        self._dtype = PRECISIONS[precision]
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._clip_norm = clip_norm

    def gradients(self, batches: Sequence[MicroBatch], *, failed: int = 0, stop: bool = False) -> StepResult:
        """Leave the whole batch's gradient in the parameters; every worker calls it with as many micro-batches.

        failed: images of this worker's share that could not be read. stop: whether this worker was asked to stop.
        """
        self.optimizer.zero_grad(set_to_none=True)
        batches = [batch.to(self._device) for batch in batches]
        names = list(self._objective.factors)
        own = [self._weights(batch) for batch in batches]
        images = sum(len(batch.frames) for batch in batches if not batch.blank)
        sums = [torch.stack([weights[name].double() for weights in own]).sum() for name in names]
        counts = torch.tensor([images, failed, stop], dtype=torch.float64, device=self._device)
        whole = self._workers.sum(torch.cat([torch.stack(sums), counts]))
        # Gradients are averaged over workers, so each divides by the mean of their weights.
        divisors = {name: (whole[at] / self._workers.size).float() for at, name in enumerate(names)}
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for at, batch in enumerate(batches):
            last = at == len(batches) - 1
            loss += self._backward(batch, divisors, exchange=last).double()
        norm = clip_gradients(self.optimizer, self._clip_norm, self.scaler)
        mean = self._workers.sum(loss) / self._workers.size
        total, failures, stops = whole[len(names) :].tolist()
        return StepResult(float(mean), float(norm), int(total), int(failures), bool(stops))

    def update(self, learning_rate: float) -> None:
        """Follow the gradient. learning_rate: after the schedule."""
        set_learning_rate(self.optimizer, learning_rate)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _weights(self, batch: MicroBatch) -> dict[str, Tensor]:
        weights = self._objective.weights(_read(batch))
        return {name: torch.zeros_like(weight) for name, weight in weights.items()} if batch.blank else weights

    def _backward(self, batch: MicroBatch, divisors: dict[str, Tensor], *, exchange: bool) -> Tensor:
        called = self.called
        with contextlib.ExitStack() as stack:
            if batch.blank:
                stack.enter_context(blank_pass(called))
            if isinstance(called, FSDPModule):
                called.set_requires_gradient_sync(exchange)
            elif not exchange and isinstance(called, DistributedDataParallel):
                stack.enter_context(called.no_sync())
            image_BCHW = batch.normalised(self._preprocess, self._memory_format)
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
                output = called(image_BCHW, batch.frames, batch.objects)
            terms = self._objective.terms(output, _read(batch))
            if batch.blank:
                terms = {name: LossTerm(no_loss(term.total), term.weight) for name, term in terms.items()}
            loss = combine(terms, self._objective.factors, divisors)
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _read(batch: MicroBatch) -> dict[str, Any]:
    """A batch as an Objective reads it."""
    return {"image": batch.image_BCHW, **batch.targets}
