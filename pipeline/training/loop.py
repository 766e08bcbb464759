"""The training of one model as one worker runs it: epochs of steps, validation, checkpoints, and where it went on from.

A plain generator of events: whoever drives it (Ray Train, a test) decides what they mean. All workers go through it in
step; only rank 0 writes.
"""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeline.config_train import TrainConfig
from pipeline.configfile import redacted
from pipeline.errors import (
    ConfigError,
    FailureBudgetExceeded,
    SourceChangedError,
    StorageError,
    TrainingDivergedError,
)
from pipeline.sources.registry import open_source
from pipeline.stages.label import thread_count
from pipeline.storage import join
from pipeline.training.backbone import freeze, train_mode
from pipeline.training.batch import MicroBatch, blank_batch, collate
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.ema import Ema
from pipeline.training.events import LISTED_FAILURES, EpochDone, Event, Saved, SaveFailed, StepDone, Stopped
from pipeline.training.history import Row, curve_png, json_lines, parquet
from pipeline.training.norms import sync_norms
from pipeline.training.optim import build_optimizer
from pipeline.training.order import EpochOrder, part_range
from pipeline.training.plan import SourcePlan, plan_source
from pipeline.training.samples import Failure, SampleReader, StepItems
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.setup import (
    augment_options,
    model_spec,
    objective,
    optimizer_options,
    schedule_options,
    start_model,
    to_device,
)
from pipeline.training.snapshot import capture, put_back
from pipeline.training.step import Stepper, StepResult, Trainee, wrap
from pipeline.training.task_targets import TaskTargets
from pipeline.training.validate import HEADLINES, Scores, Validator, finite, lower_is_better
from pipeline.training.workers import Workers

__all__ = ["EpochDone", "Event", "SaveFailed", "Saved", "StepDone", "Stopped", "TrainingLoop"]

SMALLEST_SCALE = 1.0
TARGETS = {"semantic": ("semantic",), "depth": ("depth",), "instance": ("masks",)}


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
    model. Raises ConfigError and its kin where the run cannot start, StorageError.
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
    ) -> None:
        self.config = config
        self.workers = workers
        self.device = device
        self.run_id = run_id or workers.gather(uuid.uuid4().hex)[0]
        self.plan = plan or plan_source(open_source(config.source))
        self.model, self.unfilled = start_model(config)
        task, taxonomy = self.model.spec.task, self.model.taxonomy
        self.module = to_device(self.model.module, self.model, device)
        self.ema = None if config.ema is None else Ema(self.module, decay=config.ema)
        if config.batch_norm == "synced":
            sync_norms(self.module, workers)
        self._objective = objective(config, self.model, device)
        self.optimizer = build_optimizer(self.module, optimizer_options(config))
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
        self.steps_per_epoch = -(-self.plan.images // config.batch_images)
        self._schedule = schedule_options(config, self.steps_per_epoch)
        threads = thread_count(config.resources.decode_threads)
        self._reader = SampleReader(
            open_source(config.source),
            self.plan,
            TaskTargets(config.target, config.source, task, taxonomy),
            augment_options(config, self.model),
            seed=config.seed,
            max_pixels=config.source.max_pixels,
            threads=threads,
        )
        self._validator = None
        if config.validation is not None:
            given = validation_plan or plan_source(open_source(config.validation.source))
            self._validator = Validator(
                config.validation, config.target, given, self.model, device=device, threads=threads
            )
        self.headline = config.checkpoint.best or HEADLINES[task]
        self._figures = [*Scores().figures(task, taxonomy)]
        if self.headline not in self._figures:
            raise ConfigError(f"checkpoint.best must be one of {', '.join(self._figures)}, got {self.headline!r}")
        self.store = CheckpointStore(
            config.output.uri,
            config.output.storage,
            keep=config.checkpoint.keep,
            lower_is_better=lower_is_better(self.headline),
            attempts=config.checkpoint.attempts,
        )
        self.history: list[Row] = []
        self._progress = _Progress()

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint of the output, if there is one. All workers call it.

        Raises SourceChangedError or ConfigError where images, batches or seed are others than the checkpoint's: what
        of the epoch is left to see could not be told.
        """
        found = None
        if self.workers.rank == 0:
            self.store.clean()
            found = self.store.newest()
        name = self.workers.gather(found[0].name if found else None)[0]
        if name is None:
            return False
        if found is None:
            checkpoint = next(item for item in self.store.list() if item.name == name)
            found = (checkpoint, *self.store.read(checkpoint))
        _, model, state, meta = found
        self._check(meta["order"])
        put_back(model, state, meta["state"], self.module, self.optimizer, self.scaler, self.ema)
        self.history = meta["history"]
        self.run_id = meta["run_id"]
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

        Raises TrainingDivergedError, FailureBudgetExceeded, and StorageError where the last checkpoint cannot be
        written.
        """
        config = self.config
        while self._progress.epoch < config.epochs:
            began, images_before = time.monotonic(), self._progress.images
            for event in self._epoch(should_stop):
                yield event
                if isinstance(event, Stopped):
                    return
            last = self._progress.epoch == config.epochs - 1
            row, failures = self._close_epoch(last, images_before, time.monotonic() - began)
            yield EpochDone(row=row, failures=failures)
            if last or self._progress.epoch % config.checkpoint.every_epochs == 0:
                yield from self._save(row.get(self.headline), must=last)
        if self.workers.rank == 0:
            chosen = self.store.best() or self.store.list()[-1]
            uri = join(config.output.uri, "checkpoint")
            self.store.publish(chosen, uri, config.output.storage)
            yield Saved(uri=uri, checkpoint=chosen, published=True)

    def _epoch(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """The steps of an epoch that are left."""
        config, progress, epoch = self.config, self._progress, self._progress.epoch
        stepper = self._begin(epoch)
        order = EpochOrder(self.plan.named_rows, seed=config.seed, epoch=epoch, shuffle_images=config.shuffle_images)
        steps = self._reader.steps(
            order,
            epoch=epoch,
            batch_images=config.batch_images,
            first_step=progress.step,
            worker=self.workers.rank,
            workers=self.workers.size,
        )
        for share in steps:
            torch.manual_seed(_step_seed(config.seed, epoch, share.step, self.workers.rank))
            failures = [item.failure for item in share.items if item.failure is not None]
            result = stepper.gradients(self._batches(share), failed=len(failures), stop=should_stop())
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
        trainee = Trainee(self.module, self.model.spec)
        if self.model.compile:
            trainee.compile()
        return Stepper(
            wrap(trainee, self.workers, self.device),
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
        return batches

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
        where = ""
        if self.workers.rank == 0:
            with contextlib.suppress(StorageError):
                data = json.dumps(report, indent=1).encode()
                where = f"; all in {self.store.put(f'diverged-{epoch:04d}-{step:06d}.json', data)}"
        raise TrainingDivergedError(
            f"expected a finite loss and gradient, got {result.loss} and {result.gradient_norm} in step {step} of "
            f"epoch {epoch} at a learning rate of {learning_rate:g}, with {', '.join(ids[:8])}"
            f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}{where}"
        )

    def _close_epoch(self, last: bool, images_before: int, seconds: float) -> tuple[Row, tuple[Failure, ...]]:
        """Validate, add to the history, and go on to the next epoch."""
        config, progress = self.config, self._progress
        failures = self._all_failures()
        seen = progress.images + progress.failed
        if progress.failed > config.failure_budget * seen:
            first = "; ".join(f"{item.image_id}: {item.error_type}: {item.message}" for item in failures[:3])
            raise FailureBudgetExceeded(
                f"{progress.failed} of {seen} images of epoch {progress.epoch} could not be learned from, over the "
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
        if self._validator is not None and (last or (progress.epoch + 1) % every == 0):
            row |= self._validate(self._validator)
        self.history.append(row)
        self._progress = _Progress(epoch=progress.epoch + 1, done=progress.done)
        return row, tuple(failures)

    def _validate(self, validator: Validator) -> dict[str, float | None]:
        module: nn.Module = self.module if self.ema is None else self.ema.module
        self.workers.same_state(module)
        scores = validator.score(module, self.workers)
        if scores.images == 0:
            first = scores.failures[0]
            raise FailureBudgetExceeded(
                f"none of {len(scores.failures)} images of the validation could be scored: {first.image_id}: "
                f"{first.error_type}: {first.message}"
            )
        figures = scores.figures(self.model.spec.task, self.model.taxonomy)
        counts = {"validation_images": scores.images, "validation_failed": len(scores.failures)}
        return {**finite(figures), **counts}

    def _all_failures(self) -> list[Failure]:
        """Every worker's listed failures."""
        own = [[item.image_id, item.error_type, item.message] for item in self._progress.failures]
        return [Failure(*item) for part in self.workers.gather(own) for item in part]

    def _save(self, figure: float | int | None, *, must: bool) -> Iterator[Event]:
        """Write a checkpoint and the history. All workers call it. must: raise where storage fails."""
        progress = replace(self._progress, failures=self._all_failures())
        self.workers.same_state(self.module)
        if self.workers.rank != 0:
            return
        model, tensors, state = capture(self.module, self.optimizer, self.scaler, self.ema)
        meta = {
            "run_id": self.run_id,
            "order": self._order(),
            "progress": {
                **{name: getattr(progress, name) for name in ("epoch", "step", "done", "loss_sum", "images", "failed")},
                "failures": [[item.image_id, item.error_type, item.message] for item in progress.failures],
            },
            "history": self.history,
            "state": state,
        }
        try:
            checkpoint = self.store.save(
                step=progress.done,
                model=model,
                spec=self._spec(),
                state=tensors,
                meta=meta,
                figure=None if figure is None else float(figure),
            )
            if self.history:
                self.store.put("metrics.jsonl", json_lines(self.history))
                self.store.put("metrics.parquet", parquet(self.history))
                self.store.put("curve.png", curve_png(self.history, ("loss", self.headline)))
        except StorageError as error:
            if must:
                raise
            yield SaveFailed(error=error)
            return
        yield Saved(uri=self.store.uri(checkpoint), checkpoint=checkpoint)

    def _spec(self) -> dict[str, Any]:
        # Of these weights, or of none: a checkpoint in the middle of an epoch has not been validated.
        last: Row = self.history[-1] if self.history and self.history[-1]["step"] == self._progress.done else {}
        return {
            **model_spec(self.config, self.model),
            "metrics": {name: last[name] for name in self._figures if name in last},
            "run_id": self.run_id,
            "epoch": self._progress.epoch,
            "step": self._progress.done,
            "data": {"source": redacted(self.config)["source"], "fingerprint": self.plan.fingerprint},
        }

    def _order(self) -> dict[str, Any]:
        """What the place of every image depends on."""
        config = self.config
        return {
            "fingerprint": self.plan.fingerprint,
            "seed": config.seed,
            "batch_images": config.batch_images,
            "shuffle_images": config.shuffle_images,
        }

    def _check(self, stored: dict[str, Any]) -> None:
        now = self._order()
        if stored["fingerprint"] != now["fingerprint"]:
            raise SourceChangedError("the training images are not those of the checkpoint; train into another output")
        for name, value in now.items():
            if stored[name] != value:
                raise ConfigError(
                    f"{name} must be {stored[name]} as in the checkpoint that training goes on from, got {value}; "
                    "train into another output to change it"
                )


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Of dropout and sampled proposals. Set anew in every step, so that no generator's state has to be kept."""
    digest = hashlib.blake2b(json.dumps([seed, epoch, step, rank]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
