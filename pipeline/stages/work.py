"""What passes between the driver and its workers: the plan of a run, a unit to label, a window that is labelled."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from pipeline.config import ModelConfig, OutputConfig, Resources, SourceConfig
from pipeline.sources.base import Unit
from pipeline.stages.score import Scorer
from pipeline.tablefiles import FileRecord

__all__ = ["FAILED_ROW", "RETRY", "STAGES", "LabelPlan", "Note", "Window", "WorkItem"]

STAGES = ("read", "decode", "prepare", "predict", "encode", "score", "write")
FAILED_ROW, RETRY = "failed_row", "retry"


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """What every worker of a run is given.

    versions: the model_version expected of each model, by label. scorers: how each is scored, None where it is not.
    notes: whether windows tell what became of single images.
    """

    source: SourceConfig
    models: tuple[ModelConfig, ...]
    output: OutputConfig
    resources: Resources
    versions: Mapping[str, str]
    scorers: tuple[Scorer | None, ...]
    run_id: str
    seed: int
    notes: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """One unit to label.

    index: its number in the run's plan. done: per model, positions that have their row. attempts: per model, earlier
    tries by position, of rows that failed before.
    """

    index: int
    unit: Unit
    done: tuple[Container[int], ...]
    attempts: tuple[Mapping[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What happened to one image (or, without image_id, to its unit), for the log. event: FAILED_ROW or RETRY.

    attempts: tries so far. stage: in which it failed, or is tried again.
    """

    event: str
    image_id: str | None = None
    position: int | None = None
    model: str | None = None
    stage: str | None = None
    error_type: str | None = None
    message: str | None = None
    attempts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one window of a unit came to: its files (all committed together), and the unit's rows once it is finished.

    seconds: thread seconds by stage. wall_s: from its first sample to its files. images: samples in it, of bytes_read
    encoded bytes. waits: seconds in which the accelerator paused before this window's batches, by cause (waits.py).
    batches: how many it made, of batch_pixels padded pixels in all; queued: the sum of those that waited for the
    accelerator when each was added. worker: which actor, in which process, and whether it took a dead one's place.
    """

    index: int
    files: tuple[FileRecord, ...] = ()
    rows: int | None = None
    images: int = 0
    wall_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    waits: Mapping[str, float] = field(default_factory=dict)
    batches: int = 0
    batch_pixels: int = 0
    queued: int = 0
    notes: tuple[Note, ...] = ()
    worker: tuple[str, str, bool] | None = None
