"""A run's books on the driver, be it labelling or scoring: what is planned, left, committed, failed. Never a sample,
never Ray.

The driver is the only one that commits. It keeps one bitmap per unit in work and model, and takes a window of rows only
where none of its positions is there yet, so a task that runs twice cannot double a row.
"""

import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyroaring import BitMap

from pipeline import units
from pipeline.config import EvaluateConfig, LabelConfig
from pipeline.configfile import redacted
from pipeline.errors import ConfigError, FailureBudgetExceeded, SourceChangedError, StorageError
from pipeline.observe.cost import Bill
from pipeline.observe.observer import Observer
from pipeline.rows import PREDICTIONS
from pipeline.runfile import SCORES_FOLDER, code_version, write_progress, write_run
from pipeline.stages.work import STAGES, Window, WorkItem
from pipeline.status import Counts, table_counts
from pipeline.storage import join
from pipeline.table import RowTable
from pipeline.tablefiles import FileRecord
from pipeline.units import UnitLog, row_to_unit

__all__ = ["WORK", "Run", "output_of", "row_to_work"]

log = logging.getLogger(__name__)

BUDGET_ROWS = 1000
# What travels to a worker: one row per unit. done: per model a serialized BitMap, null where nothing is done yet.
# attempts: JSON, per model {position: tries so far}.
WORK = pa.schema([*units.PLAN, ("index", pa.int64()), ("done", pa.list_(pa.large_binary())), ("attempts", pa.string())])


def row_to_work(row: Mapping[str, Any], models: int) -> WorkItem:
    """One row of WORK as the worker's item."""
    done = [BitMap.deserialize(data) for data in row["done"]] if row["done"] else [BitMap()] * models
    attempts = json.loads(row["attempts"]) if row["attempts"] else [{}] * models
    return WorkItem(
        index=row["index"],
        unit=row_to_unit(row),
        done=cast("tuple[Container[int], ...]", tuple(done)),
        attempts=tuple({int(position): tries for position, tries in entry.items()} for entry in attempts),
    )


@dataclass
class _UnitInWork:
    """One unit as its windows come.

    taken: positions that have rows, by model, committed before or taken in this run. finished: the models that had
    finished it before. rows: how many there are to be, once its reader has seen its end.
    """

    taken: dict[str, BitMap] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()
    rows: int | None = None

    def is_complete(self, model: str) -> bool:
        # An earlier run may have gone beyond this one's limit.
        return self.rows is not None and self.taken.get(model, BitMap()).range_cardinality(0, self.rows) == self.rows


class Run:
    """One run from its plan to its last commit. Not thread-safe: the driver's main thread owns it."""

    def __init__(
        self,
        config: LabelConfig | EvaluateConfig,
        plan: pa.Table,
        models: Sequence[Mapping[str, Any]],
        schema: pa.Schema = PREDICTIONS,
    ) -> None:
        """plan: `units.plan_table` of the source. models: `LoadedModel.describe()` of each, in the config's order.

        schema: of the table's rows, PREDICTIONS or SCORES.
        """
        self.config = config
        self.job = "label" if isinstance(config, LabelConfig) else "evaluate"
        self.uri, self.storage = output_of(config)
        self.schema = schema
        self.models = list(models)
        self.versions = {model["label"]: model["version"] for model in models}
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self.started_at = datetime.now(UTC)
        self.started = time.monotonic()
        self.plan = plan
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.images = 0
        self.rows = 0
        self.failed = 0
        self.first_window: float | None = None
        self.last_window = self.started
        self.commits = 0
        self.orphans = 0
        self.dropped = 0
        self.observer = Observer()
        self._planned = 0
        self._attempts: Mapping[tuple[str, str], Mapping[int, int]] = {}
        self._names = list(self.versions)
        self._in_work: dict[int, _UnitInWork] = {}
        self._finished_units = BitMap()
        self._files: list[FileRecord] = []
        self._finished: list[tuple[str, str, int | None, int | None]] = []

    def begin(self) -> None:
        """Take the table over, clean up what dead runs left, check the source against what was labelled before.

        Raises StorageError, SchemaError, and SourceChangedError where units changed and `on_changed` says stop.
        """
        self.table = RowTable.open(self.uri, self.storage, create=True, schema=self.schema)
        self.unit_log = UnitLog(self.uri, self.storage)
        self.unit_log.create(self.table.take_over())
        self.orphans = self.table.vacuum()
        lines = self.unit_log.read()
        self._check_changed(lines)
        if self.config.retry == "failed":
            self._reopen_failed()
        lines = self.unit_log.read()
        self.unit_log.append_plan(units.to_note(self.plan, lines), self.run_id)
        self.write_run("running")

    def _check_changed(self, lines: pa.Table) -> None:
        """Units that were labelled from other content: stop, or forget their rows."""
        changed = self.plan.filter(units.changed(self.plan, lines)).column("shard_id")
        labelled = self.table.shards()
        affected = changed.filter(pc.is_in(changed, value_set=labelled)).to_pylist()
        stale = self._vanished(lines) if self.config.on_changed == "relabel" else []
        if affected and self.config.on_changed == "stop":
            shown = ", ".join(affected[:5]) + (f" and {len(affected) - 5} more" if len(affected) > 5 else "")
            raise SourceChangedError(
                f"{len(affected)} units changed after they were labelled: {shown}; "
                "on_changed=relabel drops their rows and labels them again"
            )
        # First the note, then the deletion: a death in between leaves rows that are looked at again. Of every model,
        # because rows of every model are dropped; of units without rows too, which may have been empty before.
        if len(changed) or stale:
            reopened = units.finished_of(lines, [*changed.to_pylist(), *stale])
            self.unit_log.append_finished([(*key, None, None) for key in reopened], self.run_id)
        if affected or stale:
            log.warning("relabelling %d changed units", len(affected) + len(stale))
            self.table.delete_units([*affected, *stale])
            self.unit_log.append_forgotten(stale, self.run_id)

    def _vanished(self, lines: pa.Table) -> list[str]:
        """Units whose rows have no place any more.

        Of labels: slices of a listing that no longer exist, because their images moved to other slices, which changed
        with it. Of scores: every unit that this source does not have; they are soon made again, and a report of two
        sources at once would be wrong.
        """
        if self.config.source.limit is not None:
            return []
        now = set(self.plan.column("shard_id").to_pylist())
        gone = set(units.planned(lines).column("shard_id").to_pylist()) - now
        if self.job == "label":
            bases = {shard_id.rpartition("#")[0] for shard_id in now if "#" in shard_id}
            gone = {shard_id for shard_id in gone if "#" in shard_id and shard_id.rpartition("#")[0] in bases}
        return sorted(gone)

    def _reopen_failed(self) -> None:
        self._attempts = self.table.failed_attempts(self.versions)
        reopened = [(shard_id, self.versions[model], None, None) for shard_id, model in self._attempts]
        # First the note, then the deletion: a death in between leaves finished units that look open, which is safe.
        self.unit_log.append_finished(reopened, self.run_id)
        self.table.delete_failed(self.versions)

    def pending(self) -> pa.Table:
        """The units that some model has not finished, as WORK rows in plan order."""
        lines = self.unit_log.read()
        finished = {name: units.is_finished(self.plan, lines, version) for name, version in self.versions.items()}
        every = functools.reduce(pc.and_, finished.values())
        left = self.plan.append_column("index", pa.array(np.arange(len(self.plan)))).filter(pc.invert(every))
        self._planned = len(left) + len(self._finished_units)
        done, attempts = self._done_columns(left, finished, lines)
        return left.append_column("done", done).append_column("attempts", attempts).cast(WORK)

    def _done_columns(
        self, left: pa.Table, finished: Mapping[str, pa.ChunkedArray], lines: pa.Table
    ) -> tuple[pa.Array, pa.Array]:
        """Bitmaps and attempts of the units in `left` that are partly done; null for all others."""
        shard_ids = left.column("shard_id")
        labelled = self.table.shards()
        begun = shard_ids.filter(pc.is_in(shard_ids, value_set=labelled)).to_pylist()
        committed = self.table.done(begun, self.versions)
        index = left.column("index").to_pylist()
        self._in_work = {}
        done: list[list[bytes] | None] = [None] * len(left)
        attempts: list[str | None] = [None] * len(left)
        begun_set = set(begun)
        # A unit of which every row failed has no row left, but has been tried.
        retried = {shard_id for shard_id, _ in self._attempts}
        rows_of = (
            {
                name: dict(zip(table.column("shard_id").to_pylist(), table.column("rows").to_pylist(), strict=True))
                for name, table in ((n, units.finished(lines, v)) for n, v in self.versions.items())
            }
            if begun
            else {}
        )
        for place, shard_id in enumerate(shard_ids.to_pylist()):
            if shard_id not in begun_set and shard_id not in retried:
                continue
            bitmaps = {}
            for name in self._names:
                bitmaps[name] = committed.get((shard_id, name), BitMap())
                if finished[name][index[place]].as_py():
                    bitmaps[name] = BitMap(range(rows_of[name][shard_id]))
            self._in_work[index[place]] = _UnitInWork(
                {name: BitMap(bitmap) for name, bitmap in bitmaps.items()},
                frozenset(name for name in self._names if finished[name][index[place]].as_py()),
            )
            done[place] = [bitmaps[name].serialize() for name in self._names]
            tries = [dict(self._attempts.get((shard_id, name), {})) for name in self._names]
            attempts[place] = json.dumps(tries) if any(tries) else None
        return pa.array(done, WORK.field("done").type), pa.array(attempts, pa.string())

    @property
    def units_left(self) -> int:
        """Of those that were last found pending."""
        return self._planned - len(self._finished_units)

    def take(self, window: Window) -> None:
        """Book one window. One that came before (a task that Ray ran twice) is left out: its files are orphans."""
        if self.first_window is None and window.seconds:
            # The first window was worked on before it came.
            self.first_window = time.monotonic() - max(window.wall_s, 0.0)
        self.last_window = time.monotonic()
        for stage, seconds in window.seconds.items():
            self.seconds[stage] += seconds
        booked = self._book(window)
        self.observer.window(window, lambda: self.plan.column("shard_id")[window.index].as_py(), booked=booked)
        if window.index in self._finished_units:
            return
        unit = self._in_work[window.index]
        if window.rows is not None:
            # Of two readings the one that got further counts: the other met a fault and recorded it as its last row.
            unit.rows = max(window.rows, unit.rows or 0)
        # Finished is what has been counted, not what was reported: windows may arrive in any order.
        if unit.rows is not None and all(unit.is_complete(name) for name in self._names):
            self._finish_unit(window.index, unit.rows)

    def _book(self, window: Window) -> bool:
        """Whether its files are taken; those that are not are orphans."""
        if window.index in self._finished_units:
            self.dropped += len(window.files)
            return False
        unit = self._in_work.setdefault(window.index, _UnitInWork())
        bitmaps = [(file, BitMap.deserialize(file.positions)) for file in window.files]
        if any(not unit.taken.setdefault(file.model, BitMap()).isdisjoint(bitmap) for file, bitmap in bitmaps):
            self.dropped += len(window.files)
            return False
        for file, bitmap in bitmaps:
            unit.taken[file.model] |= bitmap
            unit.finished -= {file.model}
            self.rows += file.rows
            self.failed += file.failed
            self._files.append(file)
        self.images += window.images
        return True

    def _finish_unit(self, index: int, rows: int) -> None:
        self._finished_units.add(index)
        earlier = self._in_work.pop(index).finished
        shard_id = self.plan.column("shard_id")[index].as_py()
        stop = self.plan.column("stop")[index].as_py()
        # A stop at or beyond the end was no stop.
        whole = stop is None or rows < stop
        self._finished += [
            (shard_id, version, rows, None if whole else stop)
            for name, version in self.versions.items()
            if name not in earlier
        ]

    def commit(self) -> None:
        """Make all booked windows part of the table. Raises StorageError, FailureBudgetExceeded."""
        if self._files:
            self.table.commit(self._files)
            self.commits += 1
            self.observer.committed(self._files)
            self._files = []
        if self._finished:
            self.unit_log.append_finished(self._finished, self.run_id)
            self._finished = []
        if self.rows >= BUDGET_ROWS:
            self._check_budget(self.failed, self.rows, "in this run")

    def _check_budget(self, failed: int, rows: int, where: str) -> None:
        if rows and failed / rows > self.config.failure_budget:
            raise FailureBudgetExceeded(
                f"{failed} of {rows} rows failed {where}: {failed / rows:.2%}, failure_budget is "
                f"{self.config.failure_budget:.2%}; what is committed stays, `maskmill status` lists the kinds"
            )

    def check_final_budget(self) -> None:
        """The budget over all rows of these models in the table. Raises FailureBudgetExceeded."""
        counts = self.counts()
        self._check_budget(sum(c.failed for c in counts), sum(c.ok + c.failed for c in counts), "in the table")

    def counts(self) -> list[Counts]:
        """Rows by model, from the table's log."""
        return table_counts(self.table, self.unit_log, self.versions)

    @property
    def label_s(self) -> float:
        """Seconds from the start of the first window to the arrival of the last: the run without its start-up."""
        return 0.0 if self.first_window is None else self.last_window - self.first_window

    def write_run(self, state: str, **more: Any) -> None:
        """Write run.json (the newest run) and _runs/RUN_ID.json (each run): which rows, from what, with what."""
        fingerprints = "\n".join(self.plan.column("fingerprint").to_pylist())
        run = {
            "run_id": self.run_id,
            "state": state,
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "job": self.job,
            "config": redacted(self.config),
            "models": self.models,
            "source": {
                "units": len(self.plan),
                "size_bytes": pc.sum(self.plan.column("size_bytes")).as_py() or 0,
                "fingerprint": hashlib.blake2b(fingerprints.encode(), digest_size=8).hexdigest(),
            },
            "code": code_version(),
            **more,
        }
        write_run(self.uri, self.storage, run)
        self.observer.state(state, job=self.job, error=more.get("error"))

    def bill(self, left: int) -> Bill | None:
        """What this run costs, where the config has prices. left: images that are still to do."""
        return self.observer.bill(images=self.images, left=left, working_since_s=self.first_window)

    def observed(self, left: int) -> dict[str, Any]:
        """What run.json says of how it went; the same figures while it runs are in its progress file."""
        bill = self.bill(left)
        return {
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": self.images,
            "rows": self.rows,
            "failed": self.failed,
            "bytes_read": self.observer.bytes_read,
            "worker_deaths": self.observer.deaths,
            "accelerator": self.observer.stalls().as_json(),
            "cost": bill and bill.as_json(),
        }

    def write_progress(self, left: int) -> None:
        """Say how far it is in a file of this run's own: run.json may be another's by now. Storage that fails is not
        worth stopping for."""
        try:
            write_progress(self.uri, self.storage, self.run_id, self.observed(left))
        except StorageError as error:
            log.warning("progress could not be written: %s", error)


def output_of(config: LabelConfig | EvaluateConfig) -> tuple[str, Mapping[str, Any]]:
    """Where a run writes: by default scores go beside what is scored, with its storage options."""
    if isinstance(config, LabelConfig):
        return config.output.uri, config.output.storage
    if config.output.uri is not None:
        return config.output.uri, config.output.storage
    if config.predictions.format != "table":
        raise ConfigError(f"output.uri must be given where predictions.format is {config.predictions.format}")
    return join(config.predictions.uri, SCORES_FOLDER), config.output.storage or config.predictions.storage
