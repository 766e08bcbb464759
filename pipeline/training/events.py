"""What a training run says while it goes on; whoever drives it decides what that means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import StorageError
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.history import Row
from pipeline.training.samples import Failure
from pipeline.training.step import StepResult

__all__ = ["LISTED_FAILURES", "EpochDone", "Event", "SaveFailed", "Saved", "StepDone", "Stopped"]

LISTED_FAILURES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """After every optimiser step. epoch: from 0; step: of the epoch, from 0; done: steps of the whole run."""

    epoch: int
    step: int
    done: int
    learning_rate: float
    result: StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDone:
    """row: as in the history. failures: images that were not learned from, at most LISTED_FAILURES of each worker.
    seconds: since the epoch before, by timing.ACTIVITIES, of the worker that waited longest for its images."""

    row: Row
    failures: tuple[Failure, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """On rank 0, when a checkpoint is whole. uri: of its folder; `published` is the model's at the end of the run."""

    uri: str
    checkpoint: Checkpoint
    published: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """On rank 0: storage failed, and the run goes on. what: was not written, a checkpoint (then the one before is
    whole) or the history with its pictures (which are written again after the next epoch)."""

    error: StorageError
    what: Literal["checkpoint", "history"] = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """It was asked to stop, and has written a checkpoint to go on from."""

    epoch: int
    step: int


Event = StepDone | EpochDone | Saved | SaveFailed | Stopped
