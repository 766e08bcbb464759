"""The unit log: which units were planned with which fingerprint, which are finished, and so what is left to do.

A small Delta table in the folder `_units` of the output. Lines are only ever appended; of each (shard_id,
model_version) the last one counts. Planning a million units is a few Arrow operations on a table of a million lines.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake

from pipeline.deltacalls import delta_errors, is_table, patiently
from pipeline.errors import StorageError
from pipeline.schema import UNITS
from pipeline.sources.base import Unit
from pipeline.storage import delta_options, join
from pipeline.table import QUIET

__all__ = ["PLAN", "Coverage", "UnitLog", "extra_unit", "plan_table", "row_to_unit"]

PLAN = pa.schema(
    [
        ("shard_id", pa.string()),
        ("location", pa.string()),
        ("size_bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("rows", pa.int64()),
        ("cut", pa.int64()),
        ("stop", pa.int64()),
        ("payload", pa.large_binary()),
    ]
)
CHUNK = 10_000
# Each note is a file: so many of them are put together, into files of this size, which are then left alone.
NOTES_PER_MERGE = 64
MERGED_BYTES = 8 << 20
# How long a reader that began before a merge may still need the files from before it.
KEPT_HOURS = 1

log = logging.getLogger(__name__)


def plan_table(units: Iterable[Unit]) -> pa.Table:
    """A source's plan as one Arrow table, about 100 bytes a unit."""
    batches: list[pa.RecordBatch] = []
    columns: dict[str, list[Any]] = {name: [] for name in PLAN.names}

    def close() -> None:
        batches.append(pa.RecordBatch.from_pydict(columns, schema=PLAN))
        for values in columns.values():
            values.clear()

    for unit in units:
        for name, values in columns.items():
            values.append(getattr(unit, name))
        if len(columns["shard_id"]) == CHUNK:
            close()
    close()
    return pa.Table.from_batches(batches, schema=PLAN)


def extra_unit(shard_id: str, plan: pa.Table) -> pa.Table:
    """A unit that no source has, as a table like `plan`; its fingerprint is of the whole plan."""
    parts = "\n".join(plan.column("fingerprint").to_pylist())
    fingerprint = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    return plan_table([Unit(shard_id=shard_id, location="", size_bytes=0, fingerprint=fingerprint)])


def row_to_unit(row: Mapping[str, Any]) -> Unit:
    """The inverse of one row of `plan_table`."""
    return Unit(**{name: row[name] for name in PLAN.names})


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the plan there is: units in all, units of unknown row count, and rows (estimated for those)."""

    units: int
    expected: int
    estimated: bool


class UnitLog:
    """The log of one output as its driver sees it."""

    def __init__(self, output_uri: str, storage: Mapping[str, Any]) -> None:
        self.uri = join(output_uri, "_units").removeprefix("file://")
        self._options = delta_options(storage)
        self._order = 0
        self._notes = 0

    def create(self, epoch: int) -> None:
        """Create the log where it is missing. Lines of a later epoch (see RowTable.take_over) count as later."""
        options: dict[str, Any] = {"mode": "ignore", "name": "maskmill units", "storage_options": self._options}
        patiently(self.uri, lambda: DeltaTable.create(self.uri, schema=UNITS, **options))
        files = len(patiently(self.uri, lambda: DeltaTable(self.uri, storage_options=self._options).file_uris()))
        self._order = epoch << 40
        if files >= NOTES_PER_MERGE:
            self.merge()

    def merge(self) -> None:
        """Put small files together, the lines as they are. Readers do without it: where it fails, that is only said."""
        try:
            with delta_errors(self.uri):
                table = DeltaTable(self.uri, storage_options=self._options)
                table.optimize.compact(
                    target_size=MERGED_BYTES, max_concurrent_tasks=1, post_commithook_properties=QUIET
                )
                table.create_checkpoint()
                table.vacuum(KEPT_HOURS, dry_run=False, enforce_retention_duration=False)
        except StorageError as error:
            log.warning("the unit log was not merged: %s", error)

    def read(self) -> pa.Table:
        """All lines, oldest first."""

        if not is_table(self.uri, self._options):
            return UNITS.empty_table()
        lines = patiently(self.uri, lambda: DeltaTable(self.uri, storage_options=self._options).to_pyarrow_table())
        return lines.sort_by("order")

    def append(self, lines: pa.Table) -> None:
        """Add lines (every column of UNITS but `order`)."""
        if not len(lines):
            return
        order = pa.array(np.arange(self._order, self._order + len(lines)))
        self._order += len(lines)
        lines = lines.append_column("order", order).select(UNITS.names).cast(UNITS)
        options: dict[str, Any] = {"storage_options": self._options, "post_commithook_properties": QUIET}
        # Lines that are there twice, because an answer was lost, say the same twice.
        patiently(self.uri, lambda: write_deltalake(self.uri, lines, mode="append", **options))
        self._notes += 1
        if self._notes % NOTES_PER_MERGE == 0:
            self.merge()

    def append_finished(self, finished: Sequence[tuple[str, str, int | None, int | None]], run_id: str) -> None:
        """Note units as finished for a model version: (shard_id, model_version, rows, stop); rows None = open again."""
        columns = list(zip(*finished, strict=True)) if finished else [(), (), (), ()]
        count = len(finished)
        self.append(
            pa.table(
                {
                    "shard_id": pa.array(columns[0], pa.string()),
                    "model_version": pa.array(columns[1], pa.string()),
                    "fingerprint": pa.nulls(count, pa.string()),
                    "size_bytes": pa.nulls(count, pa.int64()),
                    "rows": pa.array(columns[2], pa.int64()),
                    "stop": pa.array(columns[3], pa.int64()),
                    "run_id": pa.array([run_id] * count, pa.string()),
                }
            )
        )

    def append_plan(self, plan: pa.Table, run_id: str) -> None:
        """Note units as planned, with their fingerprints."""
        count = len(plan)
        columns = {name: plan.column(name) for name in ("shard_id", "fingerprint", "size_bytes", "rows", "stop")}
        self.append(
            pa.table(
                columns
                | {
                    "model_version": pa.array([""] * count, pa.string()),
                    "run_id": pa.array([run_id] * count, pa.string()),
                }
            )
        )

    def append_forgotten(self, shard_ids: Sequence[str], run_id: str) -> None:
        """Note units as no longer part of the source."""
        count = len(shard_ids)
        self.append(
            pa.table(
                {"shard_id": pa.array(shard_ids, pa.string()), "model_version": pa.array([""] * count, pa.string())}
                | {
                    name: pa.nulls(count, UNITS.field(name).type)
                    for name in ("fingerprint", "size_bytes", "rows", "stop")
                }
                | {"run_id": pa.array([run_id] * count, pa.string())}
            )
        )


def last_lines(log: pa.Table) -> pa.Table:
    """The line that counts of each (shard_id, model_version)."""
    newest = log.group_by(["shard_id", "model_version"]).aggregate([("order", "max")])
    return log.filter(pc.is_in(log.column("order"), value_set=newest.column("order_max").combine_chunks()))


def planned(log: pa.Table) -> pa.Table:
    """The counting plan line of each unit that is not forgotten."""
    last = last_lines(log)
    return last.filter(pc.and_(pc.equal(last.column("model_version"), ""), pc.is_valid(last.column("fingerprint"))))


def finished(log: pa.Table, version: str) -> pa.Table:
    """The counting lines of units finished for one model version."""
    last = last_lines(log)
    return last.filter(pc.and_(pc.equal(last.column("model_version"), version), pc.is_valid(last.column("rows"))))


def finished_of(log: pa.Table, shard_ids: Iterable[str]) -> list[tuple[str, str]]:
    """(shard_id, model_version) of everything that is finished of these units, whatever the model."""
    last = last_lines(log)
    rows = last.filter(
        pc.and_(
            pc.is_in(last.column("shard_id"), value_set=pa.array(shard_ids, pa.string())),
            pc.and_(pc.not_equal(last.column("model_version"), ""), pc.is_valid(last.column("rows"))),
        )
    )
    return list(zip(rows.column("shard_id").to_pylist(), rows.column("model_version").to_pylist(), strict=True))


def join_log(plan: pa.Table, lines: pa.Table, columns: Sequence[str]) -> pa.Table:
    """`plan` in its own order, with `columns` of the log's lines beside it as `log_*` (null where there is none)."""
    index = plan.append_column("index", pa.array(np.arange(len(plan))))
    right = lines.select(["shard_id", *columns]).rename_columns(["shard_id", *[f"log_{name}" for name in columns]])
    right = right.append_column("log_known", pa.array(np.ones(len(right), bool)))
    # Acero joins no large_binary: the payload stays outside.
    joined = index.select(["shard_id", "index"]).join(right, "shard_id", join_type="left outer").sort_by("index")
    result = plan
    for name in [*[f"log_{name}" for name in columns], "log_known"]:
        result = result.append_column(name, joined.column(name))
    return result


def is_finished(plan: pa.Table, log: pa.Table, version: str) -> pa.ChunkedArray:
    """Per unit of the plan: is it finished for this model version, as far as the plan's `stop` asks?"""
    joined = join_log(plan, finished(log, version), ["rows", "stop"])
    known = pc.fill_null(joined.column("log_known"), False)
    whole = pc.is_null(joined.column("log_stop"))
    enough = pc.fill_null(pc.greater_equal(joined.column("log_stop"), joined.column("stop")), False)
    return pc.and_(known, pc.or_(whole, enough))


def changed(plan: pa.Table, log: pa.Table) -> pa.ChunkedArray:
    """Per unit of the plan: was it planned before with another fingerprint?"""
    joined = join_log(plan, planned(log), ["fingerprint"])
    return pc.fill_null(pc.not_equal(joined.column("fingerprint"), joined.column("log_fingerprint")), False)


def to_note(plan: pa.Table, log: pa.Table) -> pa.Table:
    """Units whose plan line is missing in the log or says something else."""
    joined = join_log(plan, planned(log), ["fingerprint", "rows", "stop"])

    def differs(name: str) -> pa.ChunkedArray:
        missing = pa.scalar(-1, pa.int64())
        return pc.not_equal(
            pc.fill_null(joined.column(name), missing), pc.fill_null(joined.column(f"log_{name}"), missing)
        )

    same_print = pc.fill_null(pc.equal(joined.column("fingerprint"), joined.column("log_fingerprint")), False)
    return plan.filter(pc.or_(pc.invert(same_print), pc.or_(differs("rows"), differs("stop"))))


def coverage(log: pa.Table, version: str) -> Coverage:
    """How many rows the planned units hold: stated, counted when finished, else estimated from size."""
    plan = planned(log)
    joined = join_log(plan, finished(log, version), ["rows", "stop"])
    # A count beats a statement: an unreadable tail is one row, whatever the plan expected.
    counted = pc.if_else(is_finished(plan, log, version), joined.column("log_rows"), pa.scalar(None, pa.int64()))
    rows = pc.coalesce(counted, joined.column("rows"))
    unknown = pc.is_null(rows)
    unknown_count = pc.sum(unknown.cast(pa.int64())).as_py() or 0
    known_rows = pc.sum(rows).as_py() or 0
    if unknown_count:
        known_bytes = pc.sum(joined.filter(pc.invert(unknown)).column("size_bytes")).as_py() or 0
        missing_bytes = pc.sum(joined.filter(unknown).column("size_bytes")).as_py() or 0
        guess = round(missing_bytes * known_rows / known_bytes) if known_bytes else unknown_count
        known_rows += max(guess, unknown_count)
    return Coverage(len(plan), known_rows, unknown_count > 0)
