"""Train a model: `maskmill train CONFIG.yaml [dotted.key=value ...]`, or the same as `python -m jobs.train`."""

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
from pipeline.errors import RunError
from pipeline.progress import Reporter, duration
from pipeline.runfile import code_version, write_run
from pipeline.sources.registry import open_source
from pipeline.trainer import Resumed, Training
from pipeline.training.events import EpochDone, Saved, SaveFailed, StepDone
from pipeline.training.plan import SourcePlan, plan_source

__all__ = ["main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("train", TrainConfig, train, sys.argv[1:] if argv is None else argv)


def train(config: TrainConfig) -> int:
    """Train to the end, or go on from the output's last checkpoint. Raises RunError; checkpoints stay."""
    reporter = Reporter("training")
    started = time.monotonic()
    plan = plan_source(open_source(config.source))
    validation = None if config.validation is None else plan_source(open_source(config.validation.source))
    held_out = f" and {validation.images} to validate on" if validation else ""
    reporter.say(f"{plan.images} images to learn from{held_out}, planned in {time.monotonic() - started:.1f} s")
    cluster.connect(config.ray_address, config.resources.object_store_bytes)
    with signals_interrupt():
        pool = cluster.plan_pool(config.resources)
        if config.resources.workers == "auto" and not pool.gpus:
            pool = replace(pool, workers=1)  # its CPUs serve one model better than two
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
        _write_run(config, run_id, plan, "running")
        training = Training(config, pool, plan, validation, run_id)
        workers = f"{pool.workers} worker{'s' if pool.workers > 1 else ''}"
        reporter.say(f"starting {workers}: {config.batch_images} images a step, {config.epochs} epochs")
        try:
            _follow(config, training, reporter, plan.images)
        except KeyboardInterrupt:
            reporter.stop()
            reporter.say("stopping: a checkpoint is written first")
            training.stop()
            for _ in training.remaining():
                pass
            _write_run(config, run_id, plan, "interrupted")
            raise
        except RunError as error:
            reporter.stop()
            _write_run(config, run_id, plan, "stopped", error=str(error))
            raise
        _write_run(config, run_id, plan, "done")
    return 0


def _follow(config: TrainConfig, training: Training, reporter: Reporter, images: int) -> None:
    started = time.monotonic()
    total = config.epochs * images
    loss = ""
    for event in training.events():
        if isinstance(event, Resumed):
            done = event.done * config.batch_images
            what = f"going on after step {event.done}" if event.from_checkpoint else "from the beginning"
            reporter.say(f"{what}; {event.steps_per_epoch} steps an epoch")
            reporter.start(total, min(done, total))
        elif isinstance(event, StepDone):
            loss = f"loss {event.result.loss:.4f}"
            reporter.update(
                done=min(event.done * config.batch_images, total), total=total, failed=event.result.failed, limit=loss
            )
        elif isinstance(event, EpochDone):
            reporter.say(_epoch_line(event.row, config.epochs))
            for failure in event.failures[:3]:
                reporter.say(f"  not learned from: {failure.image_id}: {failure.error_type}: {failure.message}")
        elif isinstance(event, SaveFailed):
            reporter.say(f"checkpoint not written: {event.error}; training goes on, the last one is whole")
        elif isinstance(event, Saved) and event.published:
            reporter.stop()
            reporter.say(f"trained in {duration(time.monotonic() - started)}; the model: {event.uri}")
            reporter.say(f"  maskmill label source.format=... models.0.weights={event.uri} output.uri=...")


def _epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    figures = [
        f"{name} {value:.4f}"
        for name, value in row.items()
        if isinstance(value, float) and name not in ("loss", "learning_rate", "seconds", "images_per_s")
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
