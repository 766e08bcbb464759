"""Which rows a report reads, and what became of each: scored, failed, without a target, or without a prediction."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, MissingPredictionError, MissingTargetError
from pipeline.rows import PREDICTIONS, SCORES
from pipeline.runfile import SCORES_FOLDER, read_run
from pipeline.schema import MODEL, OK
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable
from pipeline.taxonomy import Taxonomy, build_taxonomy

__all__ = ["OUTCOMES", "ScoredTable", "find_scored", "open_predicted", "open_scored"]

# Each row has exactly one of them.
OUTCOMES = ("ok", "failed", "missing_target", "missing_prediction")
# Files of a table may hold few rows; folding has a cost per block.
BLOCK_ROWS = 4096
WHOSE = ("image_id", "shard_id", "position", "width", "height")
STATE = ("status", "error_type", "error_stage", "error_message", "fields", "score")
NO_TARGET = "the source has no target of the prediction's kind for this image"


@dataclass(frozen=True, kw_only=True)
class ScoredTable:
    """The scored rows of one model. run, model: what run.json says. taxonomy: the label space of the scores."""

    table: RowTable
    run: Mapping[str, Any]
    model: Mapping[str, Any]
    taxonomy: Taxonomy

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's plain columns."""
        return tuple(field.name for field in self.table.schema if not pa.types.is_nested(field.type))

    def blocks(self, columns: Sequence[str] = ()) -> Generator[pa.RecordBatch, None, None]:
        """All rows in blocks of bounded size, in no certain order.

        Columns: image_id, shard_id, position, width, height, status, fields, score, outcome, error_type, error_stage,
        error_message, and those of `columns`. error_*: null where the outcome is ok.
        """
        names = dict.fromkeys((*WHOSE, *STATE, *columns))
        for rows in _joined(self.scan(tuple(names))):
            yield _with_outcome(rows)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """This model's rows as the table has them."""
        return self.table.scan(columns, {MODEL: self.model["label"], "model_version": self.model["version"]})


def open_scored(uri: str, storage: Mapping[str, Any], label: str | None = None) -> list[ScoredTable]:
    """The scored models at `uri`, or the one of them called `label`.

    `uri` is a scores table, a prediction table with scores of its own, or one with a scores table below it. Raises
    StorageError, SchemaError, and ConfigError where there are no scores or no such model.
    """
    scored = find_scored(uri, storage, label)
    if not scored:
        raise ConfigError(
            f"{uri} has no scores: its source had no targets, or they were not scored; "
            f"`maskmill evaluate source.format=... source.uri=... predictions.uri={uri}` scores it against any source"
        )
    return scored


def find_scored(uri: str, storage: Mapping[str, Any], label: str | None = None) -> list[ScoredTable]:
    """`open_scored`, and nothing where there are no scores."""
    run = read_run(uri, storage)
    if run.get("job") == "evaluate":
        return _models(RowTable.open(uri, storage, schema=SCORES), run, label)
    scored = _models(RowTable.open(uri, storage, schema=PREDICTIONS), run, label)
    if any(_has_scores(one) for one in scored):
        return scored
    below = join(uri, SCORES_FOLDER)
    fs, path = open_fs(join(below, "_delta_log"), storage)
    with storage_errors(below):
        found = fs.exists(path)
    if not found:
        return []
    return _models(RowTable.open(below, storage, schema=SCORES), read_run(below, storage), label)


def open_predicted(uri: str, storage: Mapping[str, Any], label: str | None = None) -> list[ScoredTable]:
    """The models of a prediction table, scored or not, or the one of them called `label`. Raises as `open_scored`,
    ConfigError for a scores table."""
    run = read_run(uri, storage)
    if run.get("job") == "evaluate":
        raise ConfigError(f"{uri} holds scores and no predictions; expected output.uri of a label run")
    return _models(RowTable.open(uri, storage, schema=PREDICTIONS), run, label)


def _models(table: RowTable, run: Mapping[str, Any], label: str | None) -> list[ScoredTable]:
    models = {model["label"]: model for model in run["models"]}
    if label is not None and label not in models:
        raise ConfigError(f"no model {label!r} in {table.uri}; there are {', '.join(models)}")
    chosen = [models[label]] if label is not None else list(models.values())
    return [
        ScoredTable(
            table=table,
            run=run,
            model=model,
            taxonomy=build_taxonomy(model.get("score_taxonomy") or model.get("taxonomy"), f"{table.uri}/run.json"),
        )
        for model in chosen
    ]


def _has_scores(scored: ScoredTable) -> bool:
    return any(batch["score"].null_count < len(batch) for batch in scored.scan(["score"]))


def _joined(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Small batches put together into larger ones."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if rows + len(batch) > BLOCK_ROWS and rows:
            yield pa.concat_batches(waiting)
            waiting, rows = [], 0
        waiting.append(batch)
        rows += len(batch)
    if rows:
        yield pa.concat_batches(waiting)


def _with_outcome(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The row's error and that of its score as one."""
    score = rows["score"]
    ok = pc.fill_null(pc.equal(rows["status"], OK), False)
    untargeted = pc.and_(ok, pc.is_null(score))
    unscored = pc.and_(ok, pc.is_valid(pc.struct_field(score, "error_type")))
    none = pa.scalar(None, pa.string())
    at_score = pc.make_struct(untargeted, unscored, ok)
    no_target = MissingTargetError.__name__
    error = {
        "error_type": pc.case_when(
            at_score, no_target, pc.struct_field(score, "error_type"), none, pc.fill_null(rows["error_type"], "unknown")
        ),
        "error_stage": pc.case_when(at_score, "match", "score", none, pc.fill_null(rows["error_stage"], "")),
        "error_message": pc.case_when(
            at_score, NO_TARGET, pc.struct_field(score, "error_message"), none, rows["error_message"]
        ),
    }
    missing_target = pc.equal(error["error_type"], no_target)
    missing_prediction = pc.equal(error["error_type"], MissingPredictionError.__name__)
    ok = pc.is_null(error["error_type"])
    outcome = pc.case_when(
        pc.make_struct(ok, missing_target, missing_prediction), "ok", "missing_target", "missing_prediction", "failed"
    )
    others = [name for name in rows.schema.names if name not in error]
    return pa.RecordBatch.from_pydict({name: rows[name] for name in others} | error | {"outcome": outcome})
