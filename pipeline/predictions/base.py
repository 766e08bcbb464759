"""What every kind of stored predictions promises: found by image, decoded one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import RowError
from pipeline.metrics.depth_align import DepthKind
from pipeline.metrics.detection_match import Objects
from pipeline.sources.base import Sample, Unit
from pipeline.taxonomy import Taxonomy

__all__ = ["Found", "Predicted", "PredictionSource", "ScoredModel", "UnitPredictions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A prediction of one image, decoded: one of label_HW, objects and depth_HW, or segment_HW with or without a
    label_HW.

    label_HW: ids of the prediction's taxonomy. objects: instances with their scores. segment_HW, segments: a panoptic
    map of segment ids (0 = void) and its segments (id, category_id). depth_HW: NaN where there is none.
    """

    label_HW: npt.NDArray[np.integer[Any]] | None = None
    objects: Objects | None = None
    segment_HW: npt.NDArray[np.integer[Any]] | None = None
    segments: tuple[Mapping[str, Any], ...] = ()
    depth_HW: npt.NDArray[np.floating[Any]] | None = None
    depth_kind: DepthKind = "metric_m"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """Whose predictions are scored.

    version: changes with the weights; empty where nobody said. taxonomy: None where it is the targets' own.
    description: what run.json says of it.
    """

    label: str
    version: str = ""
    taxonomy: Taxonomy | None = None
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The prediction of one image.

    name: what was found, as the scores table's column `prediction` has it. width, height: of the prediction's image, 0
    where it does not say. error: what made it useless, and at which stage.
    """

    name: str
    width: int = 0
    height: int = 0
    predicted: Predicted | None = None
    error: RowError | None = None
    error_stage: str = ""


class UnitPredictions(Protocol):
    """The predictions that one unit of the source may ask for, of one model."""

    def find(self, sample: Sample) -> Found | None:
        """The prediction of a sample; None where there is none. What cannot be decoded is a Found with an error."""
        ...

    def unused(self) -> Iterator[Found]:
        """Predictions of this unit alone that no sample asked for; nothing is decoded. Empty where `names` tells."""
        ...


class PredictionSource(Protocol):
    """Predictions of one kind. Instances are picklable and hold no open files.

    The driver calls `models`, then `prepare`, and sends the instance to its workers; they call `open_unit`.
    """

    def models(self) -> list[ScoredModel]:
        """Whose predictions there are, at least one. Raises ConfigError, StorageError."""
        ...

    def prepare(self, plan: pa.Table) -> pa.Table:
        """The plan of the source (units.PLAN) as the plan of the evaluation: each unit's fingerprint changes with its
        predictions too, and its payload (`join_payload`) carries what a worker needs to find them.

        Units that only predictions have, no target, may be appended; their location is empty.
        """
        ...

    def open_unit(self, unit: Unit, payload: bytes, model: str) -> UnitPredictions:
        """payload: what `prepare` joined to the source's own."""
        ...

    def names(self, model: str) -> pa.Array | None:
        """Names of a model's predictions, once `prepare` was called, among them all that no target asks for, so that
        the driver can tell these; None where units tell it themselves."""
        ...


def join_payload(source: bytes, predictions: bytes) -> bytes:
    """The payload of a unit of the source and that of its predictions as one."""
    return len(source).to_bytes(8, "big") + source + predictions


def split_payload(payload: bytes) -> tuple[bytes, bytes]:
    """The inverse of `join_payload`."""
    size = int.from_bytes(payload[:8], "big")
    return payload[8 : 8 + size], payload[8 + size :]
