"""Training on Ray Train: one TrainingLoop per worker, their events on the driver, restarts from the last checkpoint.

Checkpoints are ours (pipeline/training/checkpoint.py), so Ray Train keeps no state that a resume needs: it starts the
workers, sets up their process group, and starts them again when one dies.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pipeline import errors
from pipeline.config_train import TrainConfig
from pipeline.dataflow.cluster import ENVIRONMENT, Pool, ray_errors
from pipeline.errors import ConfigError, FailureBudgetExceeded, RunError, SourceChangedError, TrainingDivergedError
from pipeline.storage import join, open_fs
from pipeline.training.events import Event, Saved, StepDone
from pipeline.training.loop import TrainingLoop
from pipeline.training.plan import SourcePlan
from pipeline.training.workers import Workers

__all__ = ["Resumed", "Training"]

# Deaths of workers or nodes that one command survives.
MAX_FAILURES = 20
STEP_EVENTS_S = 0.2
ASK_EVERY_S = 0.5
POLL_S = 0.1
# What trying again does not mend, and what every worker of a run meets at the same step.
LASTING = (ConfigError, TrainingDivergedError, FailureBudgetExceeded, SourceChangedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The workers have started. done: optimiser steps that are behind them, 0 unless from_checkpoint. unfilled: tensors
    that partial weights did not fill."""

    from_checkpoint: bool
    steps_per_epoch: int
    done: int
    unfilled: tuple[str, ...]


class _Board:
    """An actor between the workers and the driver: events one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._stop = False

    def push(self, event: Any) -> None:
        self._events.append(event)

    def take(self) -> list[Any]:
        taken, self._events = self._events, []
        return taken

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


class Training:
    """A run on the cluster. `events` starts it; `stop` asks for a checkpoint and an end."""

    def __init__(
        self, config: TrainConfig, pool: Pool, plan: SourcePlan, validation_plan: SourcePlan | None, run_id: str
    ) -> None:
        self.config = config
        self.pool = pool
        self._board = ray.remote(num_cpus=0)(_Board).remote()
        self._settings = {
            "config": config,
            "plan": plan,
            "validation_plan": validation_plan,
            "run_id": run_id,
            "board": self._board,
        }
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="maskmill-train", daemon=True)

    def events(self) -> Iterator[Event | Resumed]:
        """Start, and say what happens, from rank 0. Raises RunError from the workers."""
        self._thread.start()
        yield from self.remaining()

    def remaining(self) -> Iterator[Event | Resumed]:
        """What happens until the workers have ended."""
        while True:
            alive = self._thread.is_alive()
            for event in ray.get(self._board.take.remote()):
                if isinstance(event, tuple):
                    kind, message = event
                    raise getattr(errors, kind)(message)
                yield event
            if not alive:
                break
            time.sleep(POLL_S)
        if self._error is not None:
            with ray_errors():
                raise self._error

    def stop(self) -> None:
        """Write a checkpoint at the next step and end."""
        ray.get(self._board.stop.remote())

    def _fit(self) -> None:
        config, pool = self.config, self.pool
        fs, path = open_fs(join(config.output.uri, "_ray"), config.output.storage)
        trainer = TorchTrainer(
            _work,
            train_loop_config=self._settings,
            torch_config=TorchConfig(backend="nccl" if pool.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=pool.workers,
                use_gpu=bool(pool.gpus),
                resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})},
            ),
            run_config=RunConfig(
                name=self._settings["run_id"],
                storage_path=path,
                storage_filesystem=PyFileSystem(FSSpecHandler(fs)),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                worker_runtime_env=ENVIRONMENT,
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  (raised again on the driver's thread)
            self._error = error


def _work(settings: dict[str, Any]) -> None:
    """One worker. What every worker meets alike ends the run through the board; anything else is a failure that Ray
    Train restarts all workers for."""
    config, board = settings["config"], settings["board"]
    rank, size = get_context().get_world_rank(), get_context().get_world_size()
    device = get_device()
    threads = config.resources.torch_threads
    if isinstance(threads, int):
        torch.set_num_threads(threads)
    workers = Workers(rank=rank, size=size, device=device)
    try:
        loop = TrainingLoop(
            config,
            workers=workers,
            device=device,
            run_id=settings["run_id"],
            plan=settings["plan"],
            validation_plan=settings["validation_plan"],
        )
        restored = loop.restore()
        if rank == 0:
            done = loop.done
            unfilled = tuple(loop.unfilled)
            steps = loop.steps_per_epoch
            board.push.remote(Resumed(from_checkpoint=restored, steps_per_epoch=steps, done=done, unfilled=unfilled))
        _drive(loop, board, rank)
    except LASTING as error:
        if rank == 0:
            ray.get(board.push.remote((type(error).__name__, str(error))))
    except RunError as error:
        raise RuntimeError(str(error)) from error


def _drive(loop: TrainingLoop, board: Any, rank: int) -> None:
    asked = sent = 0.0
    stopping = False

    def should_stop() -> bool:
        nonlocal asked, stopping
        # The wish of one worker is the wish of all; asking costs a millisecond.
        if rank == 0 and time.monotonic() - asked > ASK_EVERY_S:
            stopping, asked = ray.get(board.stopping.remote()), time.monotonic()
        return stopping

    for event in loop.run(should_stop):
        if rank:
            continue
        if isinstance(event, StepDone) and time.monotonic() - sent < STEP_EVENTS_S:
            continue
        sent = time.monotonic()
        pushed = board.push.remote(event)
        if isinstance(event, Saved):
            ray.get(pushed)
