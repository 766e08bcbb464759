"""Training on Ray Train: one TrainingLoop per worker, their events on the driver, restarts from the last checkpoint.

Checkpoints are ours (pipeline/training/checkpoint.py), so Ray Train keeps no state that a resume needs: it starts the
workers, sets up their process group, and starts them again when one dies.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
    get_context,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pipeline.config_train import TrainConfig
from pipeline.dataflow.board import Board
from pipeline.dataflow.cluster import ENVIRONMENT, Pool, ray_errors
from pipeline.dataflow.failures import FailureNotes, WorkerError, WorkersFailed, reasons
from pipeline.dataflow.ingest import PREPARE_CPUS, READ_CPUS, ClusterReader
from pipeline.errors import (
    CheckpointError,
    CheckpointNotWrittenError,
    ConfigError,
    FailureBudgetExceeded,
    RunError,
    SourceChangedError,
    TrainingDivergedError,
)
from pipeline.training.events import Event, Saved, StepDone
from pipeline.training.loop import TrainingLoop
from pipeline.training.plan import SourcePlan
from pipeline.training.reader import StepReader, ThreadReader
from pipeline.training.workers import Workers

__all__ = ["Resumed", "Training", "WorkersFailed"]

# Deaths of workers or nodes that one command survives.
MAX_FAILURES = 20
# Times that a worker may raise the same error at the same step: what no death explains, another start does not mend.
SAME_FAILURES = 3
STEP_EVENTS_S = 0.2
ASK_EVERY_S = 0.5
POLL_S = 0.1
# What trying again does not mend, or has been tried again.
LASTING = (
    CheckpointError,
    CheckpointNotWrittenError,
    ConfigError,
    FailureBudgetExceeded,
    SourceChangedError,
    TrainingDivergedError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The workers have started, `workers` of them. done: optimiser steps that are behind them, 0 unless
    from_checkpoint. unfilled: tensors that partial weights did not fill."""

    workers: int
    from_checkpoint: bool
    steps_per_epoch: int
    done: int
    unfilled: tuple[str, ...]


class Training:
    """A run on the cluster. `events` starts it; `stop` asks for a checkpoint and an end.

    Raises ConfigError where the cluster has no room for a split layout's readers.
    """

    def __init__(
        self, config: TrainConfig, pool: Pool, plan: SourcePlan, validation_plan: SourcePlan | None, run_id: str
    ) -> None:
        self.config = config
        self.pool = pool
        self._board = Board()
        self._settings = {
            "config": config,
            "plan": plan,
            "validation_plan": validation_plan,
            "run_id": run_id,
            "board": self._board,
            "worker_cpus": pool.cpus,
        }
        if config.resources.layout == "split":
            _reading_cpus(pool.workers, pool.cpus)  # refuse now what would wait for ever
        self._working = self._stopping = False
        self._raised: frozenset[str] = frozenset()
        self._same = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="maskmill-train", daemon=True)

    @property
    def waits_for(self) -> str:
        """What the cluster lacks to begin, empty where it lacks nothing: Ray would wait for it in silence."""
        have, fewest = ray.cluster_resources(), self.config.resources.min_workers
        workers = min(fewest or self.pool.workers, self.pool.workers)
        lacking = [
            f"{workers * each:g} {kind}s of which the cluster has {have.get(kind, 0):g}"
            for kind, each in (("CPU", self.pool.cpus), ("GPU", self.pool.gpus))
            if workers * each > have.get(kind, 0.0)
        ]
        return f"{workers} workers need {' and '.join(lacking)}" if lacking else ""

    def events(self) -> Iterator[Event | Resumed | WorkersFailed]:
        """Start, and say what happens, from rank 0. Raises RunError from the workers."""
        self._thread.start()
        yield from self.remaining()

    def remaining(self) -> Iterator[Event | Resumed | WorkersFailed]:
        """What happens until the workers have ended, or until `stop` finds none at work."""
        while True:
            alive = self._thread.is_alive()
            for event in self._board.take():
                if isinstance(event, RunError):
                    raise event
                self._note(event)
                yield event
            if not alive:
                break
            if self._stopping and not self._working:
                return  # there is nothing to keep, and room for the workers may never come
            time.sleep(POLL_S)
        error = self._error
        if isinstance(error, WorkerGroupError):
            failures, last = error.worker_failures.values(), reasons(error.worker_failures)
            kind = next((type(failure) for failure in failures if isinstance(failure, RunError)), RunError)
            raise kind(f"the workers failed more than {MAX_FAILURES} times, the last time: {last}") from error
        if isinstance(error, ControllerError):
            raise RunError(f"Ray Train could not start the workers: {error.controller_failure}") from error
        if error is not None:
            with ray_errors():
                raise error

    def stop(self) -> bool:
        """Write a checkpoint at the next step and end. Returns whether there is anything to write one of."""
        self._stopping = True
        self._board.stop(wait=self._working)  # where no worker has started, the board may not have either
        return self._working

    def _note(self, event: Any) -> None:
        if isinstance(event, Resumed):
            self._working = True
        elif isinstance(event, WorkersFailed):
            self._working = False
            # Which of the workers Ray Train hears of first differs, and so does what the others make of that.
            again = self._raised & event.raised
            self._same = self._same + 1 if again else 1
            self._raised = again or event.raised
            if again and self._same == SAME_FAILURES:
                raise RunError(f"{event.reason}, {SAME_FAILURES} times in a row")

    def _fit(self) -> None:
        pool, fewest = self.pool, self.config.resources.min_workers
        # Read here, not in the workers: paths of a config are those of the driver's folder, not of one of Ray Train's.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        trainer = TorchTrainer(
            _work,
            train_loop_config=self._settings,
            torch_config=TorchConfig(backend="nccl" if pool.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=pool.workers if fewest is None else (min(fewest, pool.workers), pool.workers),
                use_gpu=bool(pool.gpus),
                resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})},
            ),
            run_config=RunConfig(
                name=self._settings["run_id"],
                # All that Ray Train would keep is a mark that storage can be written to, anew at every start.
                storage_path="/",
                storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                worker_runtime_env=ENVIRONMENT,
                callbacks=[FailureNotes(self._board)],
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  (raised again on the driver's thread)
            self._error = error


def _work(settings: dict[str, Any]) -> None:
    """One worker. What lasts ends the run through the board; anything else is a failure that Ray Train starts all
    workers again for."""
    config, board = settings["config"], settings["board"]
    rank, size = get_context().get_world_rank(), get_context().get_world_size()
    device = get_device()
    threads = config.resources.torch_threads
    # Said even where it is the default: Ray tells OpenMP to use as many threads as the worker has logical CPUs.
    own = len(os.sched_getaffinity(0)) // get_context().get_local_world_size()
    torch.set_num_threads(threads if isinstance(threads, int) else max(1, own))
    workers = Workers(rank=rank, size=size, device=device)
    loop: TrainingLoop | None = None
    try:
        loop = TrainingLoop(
            config,
            workers=workers,
            device=device,
            run_id=settings["run_id"],
            plan=settings["plan"],
            validation_plan=settings["validation_plan"],
            step_reader=_step_reader(config, size, settings["worker_cpus"]),
        )
        restored = loop.restore()
        if rank == 0:
            started = Resumed(
                workers=size,
                from_checkpoint=restored,
                steps_per_epoch=loop.steps_per_epoch,
                done=loop.done,
                unfilled=tuple(loop.unfilled),
            )
            board.push(started)
        _drive(loop, board, rank)
    except LASTING as error:
        # Every worker says it: the others may be waiting for one that meets something alone.
        board.push(error, wait=True)
    except RunError:
        raise
    except Exception as error:
        raise WorkerError.of(error, "while starting" if loop is None else f"after step {loop.done}") from error


def _step_reader(config: TrainConfig, workers: int, worker_cpus: float) -> Callable[..., StepReader]:
    if config.resources.layout == "fused":
        return ThreadReader
    readers = config.resources.readers
    cpus = _reading_cpus(workers, worker_cpus)
    return partial(ClusterReader, readers=readers if isinstance(readers, int) else None, cpus=cpus)


def _reading_cpus(workers: int, worker_cpus: float) -> float:
    """What of the cluster's CPUs each worker's reading may take. Raises ConfigError where it is not enough."""
    total = float(ray.cluster_resources().get("CPU", 0.0))
    share = (total - workers * worker_cpus) / workers
    if share < READ_CPUS + PREPARE_CPUS:
        raise ConfigError(
            f"resources.layout split: expected {READ_CPUS + PREPARE_CPUS:g} CPUs for each of {workers} workers beside "
            f"their own {worker_cpus:g}, got a cluster of {total:g}"
        )
    return share


def _drive(loop: TrainingLoop, board: Board, rank: int) -> None:
    asked = sent = 0.0
    stopping = False

    def should_stop() -> bool:
        nonlocal asked, stopping
        # The wish of one worker is the wish of all; asking costs a millisecond.
        if rank == 0 and time.monotonic() - asked > ASK_EVERY_S:
            stopping, asked = board.stopping(), time.monotonic()
        return stopping

    for event in loop.run(should_stop):
        if rank:
            continue
        if isinstance(event, StepDone) and time.monotonic() - sent < STEP_EVENTS_S:
            continue
        sent = time.monotonic()
        board.push(event, wait=isinstance(event, Saved))
