"""The training of one model as one worker runs it: epochs of steps, validation, checkpoints, and where it went on from.

A plain generator of events: whoever drives it (Ray Train, a test) decides what they mean. All workers go through it in
step; only rank 0 writes.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeline.config_train import TrainConfig
from pipeline.errors import (
    CheckpointError,
    CheckpointNotWrittenError,
    FailureBudgetExceeded,
    RunError,
    StorageError,
    TrainingDivergedError,
)
from pipeline.sources.registry import open_source
from pipeline.stages.label import thread_count
from pipeline.stages.stream import read_ahead
from pipeline.training.backbone import freeze, train_mode
from pipeline.training.batch import MicroBatch, blank_batch, collate
from pipeline.training.ema import Ema
from pipeline.training.events import LISTED_FAILURES, EpochDone, Event, Saved, SaveFailed, StepDone, Stopped
from pipeline.training.history import Row
from pipeline.training.norms import sync_norms
from pipeline.training.optim import build_optimizer
from pipeline.training.order import EpochOrder, part_range
from pipeline.training.plan import SourcePlan, plan_source
from pipeline.training.reader import GroupReader, Share, StepReader, ThreadReader
from pipeline.training.record import Record
from pipeline.training.samples import Failure, Preparation, StepItems
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.setup import (
    augment_options,
    border_weights,
    objective,
    optimizer_options,
    schedule_options,
    start_model,
    to_device,
)
from pipeline.training.sharding import blueprint, full_copy, shard, shard_like, shard_units
from pipeline.training.sheet import Shown
from pipeline.training.snapshot import capture, put_back
from pipeline.training.step import Stepper, StepResult, Trainee, wrap
from pipeline.training.task_targets import TaskTargets
from pipeline.training.timing import Stopwatch, slowest
from pipeline.training.validate import Validator, finite
from pipeline.training.workers import Workers

__all__ = ["EpochDone", "Event", "SaveFailed", "Saved", "StepDone", "Stopped", "TrainingLoop"]

SMALLEST_SCALE = 1.0
GO_ON = "the same command goes on from the last whole checkpoint"
# What of a batch's targets a model of each task learns from.
TARGETS = {
    "semantic": ("semantic",),
    "depth": ("depth",),
    "instance": ("masks",),
    "detection": ("masks",),
    "panoptic": ("masks",),
}


@dataclass
class _Progress:
    """Where the run is. epoch and step: the next to be done. The rest is of the epoch so far."""

    epoch: int = 0
    step: int = 0
    done: int = 0
    loss_sum: float = 0.0
    images: int = 0
    failed: int = 0
    failures: list[Failure] = field(default_factory=list)


class TrainingLoop:
    """One worker of a run.

    plan, validation_plan: where the driver has them already, so that not every worker lists and counts. device: of the
    model. step_reader: where images are read and prepared. Raises ConfigError and its kin where the run cannot start,
    StorageError.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        workers: Workers,
        device: torch.device,
        run_id: str = "",
        plan: SourcePlan | None = None,
        validation_plan: SourcePlan | None = None,
        step_reader: Callable[[GroupReader, Preparation], StepReader] = ThreadReader,
    ) -> None:
        self.config = config
        self.workers = workers
        self.device = device
        self.plan = plan or plan_source(open_source(config.source))
        self.model, self.unfilled = start_model(config)
        task, taxonomy = self.model.spec.task, self.model.taxonomy
        sharded = config.strategy == "fsdp" and workers.size > 1
        # What is sharded comes to the device in parts: it need not hold the whole.
        self.module = to_device(self.model.module, self.model, torch.device("cpu") if sharded else device)
        self._blueprint = blueprint(self.module) if sharded else None
        self.ema = None if config.ema is None else Ema(self.module, decay=config.ema)
        if config.batch_norm == "synced":
            sync_norms(self.module, workers)
        self._trainee = Trainee(self.module, self.model.spec)
        if sharded:
            shard(self._trainee, shard_units(self.module, config.optimizer.backbone), workers, device)
            if self.ema is not None:
                shard_like(self.ema.module, self.module, device)
        self._objective = objective(config, self.model, device)
        self.optimizer = build_optimizer(self.module, optimizer_options(config))
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
        self.record = Record(
            config,
            self.model,
            fingerprint=self.plan.fingerprint,
            run_id=run_id or workers.gather(uuid.uuid4().hex)[0],
        )
        self.steps_per_epoch = -(-self.plan.images // config.batch_images)
        self._schedule = schedule_options(config, self.steps_per_epoch)
        threads = thread_count(config.resources.decode_threads)
        self._reader = step_reader(
            GroupReader(open_source(config.source), self.plan, threads=threads),
            Preparation(
                targets=TaskTargets(
                    config.target, config.source, task, taxonomy, background=self.model.spec.background
                ),
                options=augment_options(config, self.model),
                seed=config.seed,
                max_pixels=config.source.max_pixels,
                border=border_weights(config, self.model),
            ),
        )
        self._validator = None
        if config.validation is not None:
            given = validation_plan or plan_source(open_source(config.validation.source))
            self._validator = Validator(
                config.validation, config.target, given, self.model, device=device, threads=threads
            )
        self._progress = _Progress()
        self._watch = Stopwatch()

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint of the output, if there is one. All workers call it.

        Raises what `Record.resume` raises, CheckpointError and StorageError.
        """
        found, problem = None, None
        if self.workers.rank == 0:
            try:
                self.record.store.clean()
                found = self.record.store.newest()
            except RunError as error:
                problem = error
        # Told to the others, who would wait for ever for a worker that has gone.
        name, failed = self.workers.gather([found and found[0].name, problem and str(problem)])[0]
        if failed is not None:
            raise problem or CheckpointError(failed)
        if name is None:
            return False
        if found is None:
            checkpoint = next(item for item in self.record.store.list() if item.name == name)
            found = (checkpoint, *self.record.store.read(checkpoint))
        _, model, state, meta = found
        self.record.resume(meta)
        put_back(model, state, meta["state"], self.module, self.optimizer, self.scaler, self.ema)
        progress = {**meta["progress"], "failures": []}
        if self.workers.rank == 0:
            progress["failures"] = [Failure(*failure) for failure in meta["progress"]["failures"]]
        self._progress = _Progress(**progress)
        return True

    @property
    def done(self) -> int:
        """Optimiser steps of the whole run that are behind it."""
        return self._progress.done

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train to the end, or until any worker's `should_stop` says so (asked once a step).

        Raises TrainingDivergedError, FailureBudgetExceeded, and CheckpointNotWrittenError where the last checkpoint or
        the model cannot be written.
        """
        config = self.config
        while self._progress.epoch < config.epochs:
            began, images_before = time.monotonic(), self._progress.images
            for event in self._epoch(should_stop):
                yield event
                if isinstance(event, Stopped):
                    return
            last = self._progress.epoch == config.epochs - 1
            row, failures, shown = self._close_epoch(last, images_before, time.monotonic() - began)
            spent = slowest(self.workers.gather(self._watch.take()))
            yield EpochDone(row=row, failures=failures, seconds=spent)
            yield from self._show(shown)
            if last or self._progress.epoch % config.checkpoint.every_epochs == 0:
                yield from self._save(row.get(self.record.headline), must=last)
        if self.workers.rank == 0:
            try:
                uri, chosen = self.record.publish()
            except StorageError as error:
                raise CheckpointNotWrittenError(f"the model was not written: {error}; {GO_ON}") from error
            yield Saved(uri=uri, checkpoint=chosen, published=True)

    def _epoch(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """The steps of an epoch that are left."""
        config, progress, epoch = self.config, self._progress, self._progress.epoch
        stepper = self._begin(epoch)
        order = EpochOrder(self.plan.named_rows, seed=config.seed, epoch=epoch, shuffle_images=config.shuffle_images)
        own = Share(
            order=order,
            epoch=epoch,
            batch_images=config.batch_images,
            first_step=progress.step,
            worker=self.workers.rank,
            workers=self.workers.size,
        )
        # One step's batches are put together while the one before is learned from.
        ready = ((share, self._batches(share)) for share in self._reader.steps(own))
        for share, batches in self._watch.each("read", read_ahead(ready, count=1, weight=lambda _: 0, limit=1)):
            torch.manual_seed(_step_seed(config.seed, epoch, share.step, self.workers.rank))
            if self.model.spec.at_step is not None:
                self.model.spec.at_step(self.module, progress.done / self._schedule.steps)
            failures = [item.failure for item in share.items if item.failure is not None]
            with self._watch.during("learn"):
                result = stepper.gradients(batches, failed=len(failures), stop=should_stop())
                learning_rate = config.optimizer.learning_rate * learning_rate_factor(progress.done, self._schedule)
                self._require_finite(share, result, learning_rate)
                stepper.update(learning_rate)
                if self.ema is not None:
                    self.ema.update(self.module)
            progress.step, progress.done = share.step + 1, progress.done + 1
            progress.loss_sum += result.loss
            progress.images += result.images
            progress.failed += result.failed
            progress.failures += failures[: LISTED_FAILURES - len(progress.failures)]
            yield StepDone(epoch=epoch, step=share.step, done=progress.done, learning_rate=learning_rate, result=result)
            if result.stop:
                yield from self._save(None, must=True)
                yield Stopped(epoch=epoch, step=progress.step)
                return
            every = config.checkpoint.every_steps
            if every is not None and progress.done % every == 0 and progress.step < self.steps_per_epoch:
                yield from self._save(None, must=False)

    def _begin(self, epoch: int) -> Stepper:
        """What learns in this epoch, in training mode."""
        config, optimizer = self.config, self.config.optimizer
        thawed = config.freeze.epochs is not None and epoch >= config.freeze.epochs
        stages = 0 if thawed else config.freeze.stages
        freeze(self.module, stages, optimizer.backbone)
        train_mode(
            self.module,
            frozen_stages=stages,
            frozen_norms=config.batch_norm == "frozen",
            name=optimizer.backbone,
        )
        if self.model.compile:
            self._trainee.compile()
        return Stepper(
            wrap(self._trainee, self.workers, self.device),
            self._objective,
            self.optimizer,
            self.model.preprocess,
            workers=self.workers,
            device=self.device,
            precision=config.precision,
            channels_last=self.model.channels_last,
            clip_norm=config.clip_norm,
            scaler=self.scaler,
        )

    def _batches(self, share: StepItems) -> list[MicroBatch]:
        """The worker's share cut into micro-batches, as many for each worker."""
        preprocess, void_id = self.model.preprocess, self.model.taxonomy.void_id
        examples = [item.example for item in share.items if item.example is not None]
        batches = []
        for part in range(self.config.accumulate):
            members = [examples[at] for at in part_range(len(examples), part, self.config.accumulate)]
            if members:
                batches.append(collate(members, preprocess, void_id=void_id))
            else:
                batches.append(blank_batch(TARGETS[self.model.spec.task], preprocess, void_id=void_id))
        return [batch.pinned() for batch in batches] if self.device.type == "cuda" else batches

    def _require_finite(self, share: StepItems, result: StepResult, learning_rate: float) -> None:
        scale = None if self.scaler is None else float(self.scaler.get_scale())
        if result.finite(scaled=scale is not None) and (scale is None or scale >= SMALLEST_SCALE):
            return
        ids = [name for part in self.workers.gather([item.image_id for item in share.items]) for name in part]
        epoch, step = self._progress.epoch, share.step
        report = {
            "epoch": epoch,
            "step": step,
            "loss": repr(result.loss),
            "gradient_norm": repr(result.gradient_norm),
            "learning_rate": learning_rate,
            "gradient_scale": scale,
            "image_ids": ids,
        }
        # Whichever worker is heard first names the file.
        path = self.workers.gather(self.record.diverged(report) if self.workers.rank == 0 else "")[0]
        where = f"; all in {path}" if path else ""
        raise TrainingDivergedError(
            f"expected a finite loss and gradient, got {result.loss} and {result.gradient_norm} in step {step} of "
            f"epoch {epoch} at a learning rate of {learning_rate:g}, with {', '.join(ids[:8])}"
            f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}{where}"
        )

    def _close_epoch(
        self, last: bool, images_before: int, seconds: float
    ) -> tuple[Row, tuple[Failure, ...], tuple[Shown, ...]]:
        """Validate, add to the history, and go on to the next epoch."""
        config, progress = self.config, self._progress
        failures = self._all_failures()
        seen = progress.images + progress.failed
        if progress.failed > config.failure_budget * seen:
            first = "; ".join(f"{item.image_id}: {item.error_type}: {item.message}" for item in failures[:3])
            raise FailureBudgetExceeded(
                f"{progress.failed} of {seen} images of epoch {progress.epoch + 1} could not be learned from, over the "
                f"failure_budget of {config.failure_budget:g}: {first}"
            )
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.done,
            "loss": progress.loss_sum / self.steps_per_epoch,
            "learning_rate": config.optimizer.learning_rate * learning_rate_factor(progress.done - 1, self._schedule),
            "images": progress.images,
            "failed": progress.failed,
            "seconds": seconds,
            "images_per_s": (progress.images - images_before) / seconds,
        }
        every = config.validation.every_epochs if config.validation is not None else 1
        shown: tuple[Shown, ...] = ()
        if self._validator is not None and (last or (progress.epoch + 1) % every == 0):
            with self._watch.during("validate"):
                figures, shown = self._validate(self._validator)
            row |= figures
        row["ended_at"] = time.time()
        self.record.history.append(row)
        self._progress = _Progress(epoch=progress.epoch + 1, done=progress.done)
        return row, tuple(failures), shown

    def _validate(self, validator: Validator) -> tuple[dict[str, float | None], tuple[Shown, ...]]:
        module: nn.Module = self.module if self.ema is None else self.ema.module
        self.workers.same_state(module)
        if self._blueprint is not None:
            # Workers score as many batches as fall to them, which a sharded module could not.
            module = full_copy(self._blueprint, module, self.device)
        scores = validator.score(module, self.workers)
        if scores.images == 0:
            first = scores.failures[0]
            raise FailureBudgetExceeded(
                f"none of {len(scores.failures)} images of the validation could be scored: {first.image_id}: "
                f"{first.error_type}: {first.message}"
            )
        figures = scores.figures(self.model.spec.task, self.model.taxonomy)
        counts = {"validation_images": scores.images, "validation_failed": len(scores.failures)}
        return {**finite(figures), **counts}, scores.shown

    def _all_failures(self) -> list[Failure]:
        """Every worker's listed failures."""
        own = [[item.image_id, item.error_type, item.message] for item in self._progress.failures]
        return [Failure(*item) for part in self.workers.gather(own) for item in part]

    def _save(self, figure: float | int | None, *, must: bool) -> Iterator[Event]:
        """Write a checkpoint. All workers call it. must: raise where storage fails."""
        progress = replace(self._progress, failures=self._all_failures())
        self.workers.same_state(self.module)
        keep = self.workers.rank == 0
        model, tensors, state = capture(self.module, self.optimizer, self.scaler, self.ema, keep=keep)
        if not keep:
            return
        place = {
            **{name: getattr(progress, name) for name in ("epoch", "step", "done", "loss_sum", "images", "failed")},
            "failures": [[item.image_id, item.error_type, item.message] for item in progress.failures],
        }
        try:
            with self._watch.during("save"):
                checkpoint = self.record.save(model, tensors, state, place, figure)
        except StorageError as error:
            if must:
                text = f"the checkpoint of step {progress.done} was not written: {error}; {GO_ON}"
                raise CheckpointNotWrittenError(text) from error
            yield SaveFailed(error=error)
            return
        yield Saved(uri=self.record.store.uri(checkpoint), checkpoint=checkpoint)

    def _show(self, shown: Sequence[Shown]) -> Iterator[Event]:
        """What a person watches; what cannot be written stops nothing."""
        if self.workers.rank == 0:
            try:
                self.record.show(shown)
            except StorageError as error:
                yield SaveFailed(error=error, what="history")


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Of dropout and sampled proposals. Set anew in every step, so that no generator's state has to be kept."""
    digest = hashlib.blake2b(json.dumps([seed, epoch, step, rank]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
