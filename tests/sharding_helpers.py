"""What workers do in tests of sharding: steps and whole runs, with the model whole (ddp) or cut (fsdp)."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training_helpers import CLASSES, CPU, PREPROCESS, examples, run_loop, unet_spec

from pipeline.config_train import TrainConfig
from pipeline.models.zoo.unet import UNetSmall
from pipeline.training.backbone import freeze, train_mode
from pipeline.training.batch import blank_batch, collate
from pipeline.training.ema import Ema
from pipeline.training.events import EpochDone, StepDone
from pipeline.training.losses.objective import SemanticLoss, SemanticLossOptions
from pipeline.training.norms import sync_norms
from pipeline.training.optim import OptimizerOptions, build_optimizer, clip_gradients
from pipeline.training.order import part_range
from pipeline.training.sharding import full_state, shard, shard_like, shard_units
from pipeline.training.step import Stepper, StepResult, Trainee, wrap
from pipeline.training.workers import Workers

# By what torch sums and cuts gradients; its name changed between versions.
EXCHANGE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Steps on batches of those sizes; a batch of 1 leaves shares, and micro-batches, without an image. thaw: the step
    from which two frozen stages learn."""

    optimizer: dict[str, Any]
    batches: tuple[int, ...] = (7, 1, 5)
    norm: str = "frozen"
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    thaw: int = 0
    precision: str = "fp32"
    loss: dict[str, Any] = field(default_factory=lambda: {"cross_entropy": 1.0, "dice": 0.5})


@dataclass(frozen=True)
class Stepped:
    """The whole state of model and average after a case, what each step said, this worker's numbers of the parameters
    and of the optimiser's averages, and how often gradients were exchanged unit by unit."""

    state: dict[str, Tensor]
    results: list[StepResult]
    parameters: int
    averages: int
    exchanges: int


def take_steps(workers: Workers, case: Case, strategy: str) -> Stepped:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module: nn.Module = UNetSmall(CLASSES, width=4, depth=2)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    ema = None if case.ema is None else Ema(module, decay=case.ema)
    if case.norm == "synced":
        sync_norms(module, workers)
    trainee = Trainee(module, unet_spec())
    if strategy == "fsdp":
        shard(trainee, shard_units(module), workers, CPU)
        if ema is not None:
            shard_like(ema.module, module, CPU)
    optimizer = build_optimizer(module, OptimizerOptions(**case.optimizer))
    results, exchanges = [], 0
    for step, size in enumerate(case.batches):
        frozen = 2 if step < case.thaw else 0
        freeze(module, frozen)
        train_mode(module, frozen_stages=frozen, frozen_norms=case.norm == "frozen")
        stepper = Stepper(
            wrap(trainee, workers, CPU),
            SemanticLoss(SemanticLossOptions(**case.loss), num_classes=CLASSES, device=CPU),
            optimizer,
            PREPROCESS,
            workers=workers,
            device=CPU,
            precision=case.precision,
            clip_norm=case.clip_norm,
            scaler=torch.amp.GradScaler("cpu", init_scale=256.0) if case.precision == "fp16" else None,
        )
        members = examples(size, seed=step)
        own = [members[at] for at in part_range(size, workers.rank, workers.size)]
        parts = [[own[at] for at in part_range(len(own), part, case.accumulate)] for part in range(case.accumulate)]
        batches = [
            collate(part, PREPROCESS, void_id=255) if part else blank_batch(("semantic",), PREPROCESS, void_id=255)
            for part in parts
        ]
        with mock.patch.object(dist, EXCHANGE, wraps=getattr(dist, EXCHANGE)) as exchange:
            results.append(stepper.gradients(batches))
        exchanges += exchange.call_count
        stepper.update(case.optimizer["learning_rate"])
        if ema is not None:
            ema.update(module)
    state = full_state(module.state_dict(), keep=True)
    averages = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    if ema is not None:
        state |= {f"ema.{name}": value for name, value in full_state(ema.module.state_dict(), keep=True).items()}
    copied = {name: value.clone() for name, value in state.items()}
    return Stepped(copied, results, held(module.parameters()), held(averages), exchanges)


def held(tensors: Any) -> int:
    """Numbers that this worker has of tensors."""
    return sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in tensors)


@dataclass(frozen=True)
class Run:
    """A run, up to the end or until the last worker is asked to stop in the step of that number. copy: of its folder
    afterwards, for another to go on from."""

    name: str
    config: TrainConfig
    stop: int | None = None
    copy: str | None = None


@dataclass(frozen=True)
class Ran:
    """The whole state of the model (the average, where there is one) at a run's end, its rows, its steps' losses."""

    state: dict[str, Tensor]
    rows: list[dict[str, Any]]
    losses: list[float]


def go(workers: Workers, given: Run) -> Ran:
    calls = itertools.count(1)
    asked = workers.rank == workers.size - 1
    loop, events = run_loop(given.config, workers, should_stop=lambda: asked and next(calls) == given.stop)
    module = loop.module if loop.ema is None else loop.ema.module
    state = full_state(module.state_dict(), keep=True)
    rows = [dict(event.row) for event in events if isinstance(event, EpochDone)]
    losses = [event.result.loss for event in events if isinstance(event, StepDone)]
    if given.copy is not None and workers.rank == 0:
        shutil.copytree(given.config.output.uri, given.copy)
    return Ran({name: value.clone() for name, value in state.items()}, rows, losses)


def overflow(workers: Workers) -> tuple[float, bool]:
    """Gradients of 1, but for one that is infinite on the last worker: their norm, and whether the step was made."""
    module = nn.Sequential(nn.Linear(4, 6, bias=False))
    shard(module, [], workers, CPU)
    weight: Any = module[0].weight
    before = weight.to_local().clone()
    weight.grad = torch.ones_like(weight)
    if workers.rank == workers.size - 1:
        weight.grad.to_local()[0, 0] = torch.inf
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    norm = float(clip_gradients(optimizer, None, scaler))
    scaler.step(optimizer)
    scaler.update()
    return norm, not torch.equal(weight.to_local(), before)


def everything(workers: Workers, cases: Sequence[tuple[Case, Sequence[str]]], runs: Sequence[Run]) -> dict[Any, Any]:
    """By the case's place and strategy, by the run's name, and "overflow". Runs are those of two workers."""
    found: dict[Any, Any] = {
        (at, strategy): take_steps(workers, case, strategy)
        for at, (case, strategies) in enumerate(cases)
        for strategy in strategies
    }
    found["overflow"] = overflow(workers)
    if workers.size == 2:
        for given in runs:
            found[given.name] = go(workers, given)
            workers.gather(None)  # no run before the copy that it goes on from
    return found
