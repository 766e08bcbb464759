"""The scoring of one unit: its targets as a stream, the predictions that belong to them, score rows in windows."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pyarrow as pa

from pipeline import errors
from pipeline.config import SourceConfig
from pipeline.errors import MissingPredictionError, MissingTargetError, RowError
from pipeline.predictions.base import Found, PredictionSource, split_payload
from pipeline.rows import SCORES
from pipeline.schema import FAILED, OK
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.registry import open_source
from pipeline.stages.score import Scorer, score_key
from pipeline.stages.stream import Members
from pipeline.stages.work import Window, WorkItem
from pipeline.tablefiles import FileRecord, file_schema, write_file

__all__ = ["STRANGERS", "EvaluatePlan", "Evaluator"]

FILE_SCHEMA = file_schema(SCORES)
# The unit of predictions that no unit of the source asked for.
STRANGERS = "!strangers"


@dataclass(frozen=True, kw_only=True)
class EvaluatePlan:
    """What every worker of an evaluation is given. labels, versions, scorers: of each model, in one order.

    versions: of the rows: the prediction's and the scoring options'.
    """

    source: SourceConfig
    predictions: PredictionSource
    labels: tuple[str, ...]
    versions: tuple[str, ...]
    scorers: tuple[Scorer, ...]
    output_uri: str
    storage: Mapping[str, Any]
    rows_per_file: int
    run_id: str


class _Seconds(dict[str, float]):
    def spend(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        self[stage] = self.get(stage, 0.0) + now - started
        return now


class Evaluator:
    """Scores units, one at a time."""

    def __init__(self, plan: EvaluatePlan) -> None:
        self.plan = plan
        self._source = open_source(plan.source)

    def evaluate(self, item: WorkItem) -> Iterator[Window]:
        """Score one unit, window by window (see Labeller.label). Predictions of which the unit has no target come after
        its samples, as rows without a score; every model gets a row of each, so that all have the same positions."""
        source_payload, payload = split_payload(item.unit.payload)
        unit = replace(item.unit, payload=source_payload)
        predictions = [self.plan.predictions.open_unit(unit, payload, label) for label in self.plan.labels]
        # All samples, the scored ones too: what was asked for tells which predictions have no target.
        stream = read_unit(self._source, unit, (), images=False) if unit.location else iter(())
        members = Members(stream)
        for _, window in groupby(members, lambda sample: sample.position // self.plan.rows_per_file):
            seconds = _Seconds()
            rows: list[list[dict[str, Any]]] = [[] for _ in predictions]
            images = 0
            started = time.perf_counter()
            began = started
            for sample in window:
                started = seconds.spend("read", started)
                for index, own in enumerate(predictions):
                    found = own.find(sample)
                    started = seconds.spend("decode", started)
                    if sample.position in item.done[index]:
                        continue
                    attempt = item.attempts[index].get(sample.position, 0) + 1
                    rows[index].append(self._row(sample, found, index, attempt))
                    started = seconds.spend("score", started)
                images += 1
            files = self._write(rows, unit.shard_id)
            seconds.spend("write", started)
            wall_s = time.perf_counter() - began
            yield Window(index=item.index, files=files, images=images, wall_s=wall_s, seconds=dict(seconds))
        rows_in_all = members.rows or 0
        strangers = [{found.name for found in own.unused()} for own in predictions]
        yield from self.strangers(item, strangers, rows_in_all)

    def strangers(self, item: WorkItem, strangers: list[set[str]], first: int = 0) -> Iterator[Window]:
        """Rows of predictions without a target, from position `first` on, and the end of the unit.

        strangers: their names, by model.
        """
        names = sorted(set().union(*strangers))
        for start in range(0, len(names), self.plan.rows_per_file):
            part = names[start : start + self.plan.rows_per_file]
            files = self._strangers(item, part, strangers, first + start)
            yield Window(index=item.index, files=files, images=len(part), seconds={"read": 0.0})
        yield Window(index=item.index, rows=first + len(names))

    def _row(self, sample: Sample, found: Found | None, index: int, attempt: int) -> dict[str, Any]:
        row = self._identity(sample.image_id, sample.shard_id, sample.position, index) | {
            "fields": list(sample.fields.items()) or None,
        }
        if found is not None:
            row |= {"prediction": found.name, "width": found.width or None, "height": found.height or None}
        if sample.error is not None:
            return row | _failure(sample.error, "read", attempt)
        if found is None:
            return row | _failure(MissingPredictionError("there is no prediction of this image"), "match", attempt)
        if found.error is not None or found.predicted is None:
            error = found.error or MissingPredictionError("the prediction is empty")
            return row | _failure(error, found.error_stage or "match", attempt)
        score = self.plan.scorers[index].score(
            found.predicted,
            sample.targets,
            key=score_key(sample.image_id, sample.fields),
            width=found.width,
            height=found.height,
        )
        if score is None:
            kinds = ", ".join(sorted(sample.targets)) or "none"
            message = f"the source has no target of the prediction's kind for this image; it has {kinds}"
            return row | _failure(MissingTargetError(message), "match", attempt)
        if score.get("error_type"):
            error = getattr(errors, score["error_type"])(score["error_message"])
            return row | _failure(error, "score", attempt)
        return row | {"status": OK, "score": score}

    def _strangers(self, item: WorkItem, names: list[str], own: list[set[str]], first: int) -> tuple[FileRecord, ...]:
        rows: list[list[dict[str, Any]]] = [[] for _ in own]
        for place, name in enumerate(names):
            for index, known in enumerate(own):
                if first + place not in item.done[index]:
                    row = self._identity(name, item.unit.shard_id, first + place, index)
                    rows[index].append(row | _stranger(name, name in known))
        return self._write(rows, item.unit.shard_id)

    def _identity(self, image_id: str, shard_id: str, position: int, index: int) -> dict[str, Any]:
        return {
            "image_id": image_id,
            "shard_id": shard_id,
            "position": position,
            "model_version": self.plan.versions[index],
            "run_id": self.plan.run_id,
        }

    def _write(self, rows: list[list[dict[str, Any]]], shard_id: str) -> tuple[FileRecord, ...]:
        scored_at = datetime.now(UTC)
        files = []
        for index, own in enumerate(rows):
            if own:
                table = pa.Table.from_pylist([row | {"scored_at": scored_at} for row in own], schema=FILE_SCHEMA)
                files.append(
                    write_file(
                        self.plan.output_uri,
                        self.plan.storage,
                        table,
                        model=self.plan.labels[index],
                        model_version=self.plan.versions[index],
                        shard_id=shard_id,
                    )
                )
        return tuple(files)


def _failure(error: RowError, stage: str, attempt: int) -> dict[str, Any]:
    return {
        "status": FAILED,
        "error_type": type(error).__name__,
        "error_stage": stage,
        "error_message": str(error)[:2000],
        "attempts": attempt,
    }


def _stranger(name: str, predicted: bool) -> dict[str, Any]:
    """The row of an image that the source does not have. Not predicted: another model of the same run has it."""
    if predicted:
        error: RowError = MissingTargetError("the source does not have this image")
        return {"prediction": name} | _failure(error, "match", 1)
    return _failure(MissingPredictionError("neither a target nor a prediction of this image"), "match", 1)
