"""Train a model: `maskmill train CONFIG.yaml [dotted.key=value ...]`, or the same as `python -m jobs.train`."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from jobs.common import config_job
from jobs.driver import leave, signals_interrupt
from pipeline.config_train import TrainConfig
from pipeline.configfile import redacted
from pipeline.dataflow import cluster
from pipeline.dataflow.metrics import RayMetrics, cost_meter
from pipeline.errors import RunError
from pipeline.models.licences import licence, licence_warning
from pipeline.models.load import find_spec, stored_spec
from pipeline.observe.log import open_log
from pipeline.observe.training import TrainObserver
from pipeline.progress import Reporter, counted, duration
from pipeline.runfile import code_version, write_run
from pipeline.sources.registry import open_source
from pipeline.trainer import Resumed, Training, WorkersFailed
from pipeline.training.events import EpochDone, Saved, SaveFailed, StepDone
from pipeline.training.plan import SourcePlan, plan_source

__all__ = ["main", "train"]

SHOWN_FAILURES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("train", TrainConfig, train, sys.argv[1:] if argv is None else argv)


def train(config: TrainConfig) -> int:
    """Train to the end, or go on from the output's last checkpoint. Raises RunError; checkpoints stay."""
    reporter = Reporter("training")
    log = open_log(config.log.path)
    started = time.monotonic()
    plan = plan_source(open_source(config.source))
    validation = None if config.validation is None else plan_source(open_source(config.validation.source))
    held_out = f" and {validation.images} to validate on" if validation else ""
    reporter.say(f"{plan.images} images to learn from{held_out}, planned in {time.monotonic() - started:.1f} s")
    _say_licence(config, reporter)
    cluster.connect(config.ray_address, config.resources.object_store_bytes)
    with signals_interrupt():
        meter = cost_meter(config.cost)
        pool = cluster.plan_pool(config.resources, fewest=config.resources.min_workers, say=reporter.say)
        if config.resources.workers == "auto" and not pool.gpus:
            pool = replace(pool, workers=1)  # its CPUs serve one model better than two
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
        log.run_id = run_id
        observer = TrainObserver(config, plan.images, log=log, metrics=RayMetrics(), meter=meter)
        _write_run(config, run_id, plan, "running")
        log.write("run_running", job="train")
        training = Training(config, pool, plan, validation, run_id)
        reporter.say(
            f"starting {counted(pool.workers, 'worker')}: {counted(config.batch_images, 'image')} a step, "
            f"{counted(config.epochs, 'epoch')}"
        )
        if training.waits_for:
            reporter.say(f"waiting for room: {training.waits_for}; resources.min_workers begins with fewer")
        try:
            try:
                _follow(config, training, reporter, observer, pool.workers)
            except KeyboardInterrupt:
                reporter.stop()
                _stop(training, reporter, observer)
                raise
        # What stopped the run, a full disk say, may stop run.json too; it must not keep the reason from being said.
        except KeyboardInterrupt:
            log.write("run_interrupted", "warning")
            with contextlib.suppress(RunError):
                _write_run(config, run_id, plan, "interrupted", observed=observer.observed())
            raise
        except RunError as error:
            reporter.stop()
            log.write("run_stopped", "error", error=str(error))
            with contextlib.suppress(RunError):
                _write_run(config, run_id, plan, "stopped", error=str(error), observed=observer.observed())
            raise
        _write_run(config, run_id, plan, "done", observed=observer.observed())
        log.write("run_done")
        reporter.say(observer.stalls().sentence)
        bill = observer.bill()
        if bill is not None:
            reporter.say(bill.sentence())
    return 0


def _say_licence(config: TrainConfig, reporter: Reporter) -> None:
    """Once, before anything is learned. What cannot be found is said by the workers, where it is needed."""
    with contextlib.suppress(RunError):
        spec = find_spec(config.model)
        text, commercial = licence(spec, config.model.weights, stored_spec(config.model))
        if not commercial:
            reporter.say(licence_warning(config.model.label or spec.name, text))


def _stop(training: Training, reporter: Reporter, observer: TrainObserver) -> None:
    if not training.stop():
        reporter.say("stopping: no worker is at work, so there is no checkpoint to write")
        return
    reporter.say("stopping: a checkpoint is written first")
    for event in training.remaining():
        if not isinstance(event, Resumed | WorkersFailed):
            observer.event(event)
        if isinstance(event, Saved) and not event.published:
            reporter.say(f"stopped after step {event.checkpoint.step}: {event.uri}")


def _follow(config: TrainConfig, training: Training, reporter: Reporter, observer: TrainObserver, workers: int) -> None:
    started = time.monotonic()
    total = observer.total
    for event in training.events():
        if not isinstance(event, Resumed | WorkersFailed):
            observer.event(event)
        if isinstance(event, Resumed):
            observer.started(event.workers, event.done, event.steps_per_epoch)
            done = event.done * config.batch_images
            what = f"going on after step {event.done}" if event.from_checkpoint else "from the beginning"
            fewer = f" with {event.workers} of {workers} workers" if event.workers < workers else ""
            reporter.say(f"{what}{fewer}; {event.steps_per_epoch} steps an epoch")
            if event.unfilled:
                names = ", ".join(event.unfilled[:4])
                more = f" and {len(event.unfilled) - 4} more" if len(event.unfilled) > 4 else ""
                reporter.say(f"not in the weights, so random: {names}{more}")
            reporter.start(total, min(done, total))
        elif isinstance(event, WorkersFailed):
            observer.failed(event.reason, died=not event.raised)
            reporter.stop()
            reporter.say(event.reason)
        elif isinstance(event, StepDone):
            bill = observer.bill()
            reporter.update(
                done=min(event.done * config.batch_images, total),
                total=total,
                failed=event.result.failed,
                limit=f"loss {event.result.loss:.4f}",
                cost="" if bill is None else bill.short(),
            )
            observer.speed(reporter.images_per_s)
        elif isinstance(event, EpochDone):
            reporter.say(_epoch_line(event.row, config.epochs))
            for failure in event.failures[:SHOWN_FAILURES]:
                reporter.say(f"  not learned from: {failure.image_id}: {failure.error_type}: {failure.message}")
            unsaid = int(event.row["failed"] or 0) - SHOWN_FAILURES
            if unsaid > 0:
                reporter.say(f"  nor from {unsaid} more")
        elif isinstance(event, SaveFailed):
            whole = ", the last one is whole" if event.what == "checkpoint" else ""
            reporter.say(f"{event.what} not written: {event.error}; training goes on{whole}")
        elif isinstance(event, Saved) and event.published:
            reporter.stop()
            reporter.say(f"trained in {duration(time.monotonic() - started)}; the model: {event.uri}")
            reporter.say(f"  maskmill label source.format=... models.0.weights={event.uri} output.uri=...")


def _epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    figures = [
        f"{name} {value:.4f}"
        for name, value in row.items()
        if isinstance(value, float) and name not in ("loss", "learning_rate", "seconds", "images_per_s", "ended_at")
    ]
    return (
        f"epoch {row['epoch']} of {epochs}: loss {row['loss']:.4f}  {'  '.join(figures[:4])}  "
        f"{row['images_per_s']:.1f} img/s, {duration(row['seconds'])}"
    )


def _write_run(config: TrainConfig, run_id: str, plan: SourcePlan, state: str, **more: Any) -> None:
    """run.json: what this run was made of and how it ended."""
    run = {
        "run_id": run_id,
        "job": "train",
        "state": state,
        "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": redacted(config),
        "source": {"images": plan.images, "units": len(plan.units), "fingerprint": plan.fingerprint},
        "code": code_version(),
        **more,
    }
    write_run(config.output.uri, config.output.storage, run)


if __name__ == "__main__":
    leave(main())
