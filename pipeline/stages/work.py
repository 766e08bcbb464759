"""What passes between the driver and its workers: the plan of a run, a unit to label, a window that is labelled."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from pipeline.config import ModelConfig, OutputConfig, Resources, SourceConfig
from pipeline.sources.base import Unit
from pipeline.stages.score import Scorer
from pipeline.table import FileRecord

__all__ = ["STAGES", "LabelPlan", "Window", "WorkItem"]

STAGES = ("read", "decode", "prepare", "predict", "encode", "score", "write")


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """What every worker of a run is given.

    versions: the model_version expected of each model, by label. scorers: how each is scored, None where it is not.
    """

    source: SourceConfig
    models: tuple[ModelConfig, ...]
    output: OutputConfig
    resources: Resources
    versions: Mapping[str, str]
    scorers: tuple[Scorer | None, ...]
    run_id: str
    seed: int


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


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one window of a unit came to: its files (all committed together), and the unit's rows once it is finished.

    seconds: thread seconds by stage. wall_s: from its first sample to its files. images: samples in it.
    """

    index: int
    files: tuple[FileRecord, ...] = ()
    rows: int | None = None
    images: int = 0
    wall_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
