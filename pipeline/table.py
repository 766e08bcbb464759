"""The prediction table: commit files, what is done, vacuum.

A Delta Lake table partitioned by `model`. Workers put Parquet files under it; only the driver commits them. What is not
in the log does not exist. Each commit carries the driver's fencing number as an application transaction, so a second
driver on the same table makes the first one stop instead of doubling rows.
"""

import bisect
import contextlib
import io
import itertools
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction
from pyroaring import BitMap

from pipeline import deltalog
from pipeline.deltacalls import TAKEN_OVER, delta_errors, patiently
from pipeline.errors import SchemaError, StorageError
from pipeline.rows import LATER, PREDICTIONS
from pipeline.schema import FAILED, MODEL
from pipeline.storage import delta_options, join, open_fs, storage_errors
from pipeline.tablefiles import FileRecord, as_written, file_schema, stats_columns, write_file

__all__ = [
    "RowTable",
]

log = logging.getLogger(__name__)

FENCE = "maskmill"
MARK = deltalog.MARK
RETENTION = "delta.deletedFileRetentionDuration"
LOST = -1
SCAN_ROWS = 4096
# A checkpoint writes every file of the table: one is due after so many commits and so large a share of new files.
COMMITS_PER_CHECKPOINT = 100
FILES_PER_CHECKPOINT = 0.1
REWRITES_AT_ONCE = 16
REWRITES_PER_COMMIT = 200
OLD_LISTING = "the storage lists its log as it was before this run's last commit; run the same command again"
QUIET = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


class RowTable:
    """A table of predictions or scores as one driver sees it."""

    def __init__(self, uri: str, storage: Mapping[str, Any], table: DeltaTable, schema: pa.Schema) -> None:
        self.uri = uri
        self.schema = schema
        self.storage = dict(storage)
        self._table = table
        self._fence = LOST
        self._fs, self._base = open_fs(uri, storage)
        self._appends = deltalog.can_append(self._fs, table)
        self._writer = uuid.uuid4().hex
        self._version = table.version()
        self._is_behind = False
        self._commits, self._added, self._checkpointed = 0, 0, 0

    @classmethod
    def open(
        cls, uri: str, storage: Mapping[str, Any], *, create: bool = False, schema: pa.Schema = PREDICTIONS
    ) -> "RowTable":
        """Open the table at `uri`, or create an empty one. schema: PREDICTIONS or SCORES of rows.py.

        Raises StorageError where it is missing or refused, SchemaError where its columns are other ones.
        """
        kind = "prediction" if schema is PREDICTIONS else "score"
        where = f"output {uri}"
        options = delta_options(storage)
        if create:
            configuration = {
                "delta.checkpointInterval": "100",
                "delta.dataSkippingStatsColumns": ",".join(stats_columns(schema)),
            }
            table = patiently(
                where,
                lambda: DeltaTable.create(
                    _delta_uri(uri),
                    schema=schema,
                    partition_by=[MODEL],
                    mode="ignore",
                    name=f"maskmill {kind}s",
                    configuration=configuration,
                    storage_options=options,
                ),
            )
        else:
            try:
                table = patiently(where, lambda: DeltaTable(_delta_uri(uri), storage_options=options))
            except StorageError as error:
                if isinstance(error.__cause__, TableNotFoundError):
                    raise StorageError(f"no {kind} table at {uri}") from error
                raise
        columns = {field.name for field in table.schema().fields}
        missing = [name for name in schema.names if name not in columns and name not in LATER]
        if missing:
            raise SchemaError(f"{uri} is no {kind} table: it lacks the column {', '.join(missing)}")
        later = [field for field in schema if field.name in LATER and field.name not in columns]
        if later and create:
            with delta_errors(where):
                table.alter.add_columns(Schema.from_arrow(pa.schema(later)).fields)
                table.update_incremental()
        return cls(uri, storage, table, schema)

    def take_over(self) -> int:
        """Fence off every earlier driver: from now on their commits fail. Returns this driver's epoch, from 1 up."""
        self._fence = (self._table.transaction_version(FENCE) or 0) + 1
        self._commit([])
        return self._fence

    def commit(self, files: Sequence[FileRecord]) -> None:
        """Make files part of the table, all or none. Raises StorageError where another driver has taken over."""
        if not files:
            return
        if not self._appends:
            self._check_fence()
            self._fence += 1
            self._commit([_add_action(file) for file in files])
            return
        where = f"output {self.uri}"
        if self._fence == LOST:
            raise StorageError(f"{where}: {TAKEN_OVER}")
        self._fence += 1
        with delta_errors(where), self._last_chance():
            # No look at the fence before: whoever took over has written the version that this one would be.
            additions = [_addition(file) for file in files]
            self._version = deltalog.append(
                self._fs, self._base, self._version, FENCE, self._fence, self._writer, additions
            )
        self._is_behind = True
        self._commits += 1
        self._added += len(files)
        if self._commits >= COMMITS_PER_CHECKPOINT and self._added >= FILES_PER_CHECKPOINT * self._checkpointed:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write the log's state in one piece, so that readers need not read it commit by commit; drop expired ones.

        Costs time and memory for every file of the table. Readers do without it: where it fails, that is only said.
        """
        try:
            with delta_errors(f"output {self.uri}"):
                self._state().create_checkpoint()
                self._state().cleanup_metadata()
            self._checkpointed += self._added
        except StorageError as error:
            log.warning("no checkpoint of the table's log: %s", error)
        self._commits = self._added = 0

    def _state(self) -> DeltaTable:
        """The table as it is after this driver's commits."""
        if self._is_behind:
            patiently(f"output {self.uri}", self._table.update_incremental)
            self._is_behind = False
        return self._table

    @contextlib.contextmanager
    def _last_chance(self) -> Iterator[None]:
        """After a commit that failed this driver is out: the number that it tried may be another driver's by now."""
        try:
            yield
        except Exception:
            self._fence = LOST
            raise

    def _check_fence(self) -> None:
        where = f"output {self.uri}"
        patiently(where, self._table.update_incremental)
        found = patiently(where, lambda: self._table.transaction_version(FENCE)) or 0
        if found != self._fence:
            raise StorageError(f"{where}: {TAKEN_OVER if found > self._fence else OLD_LISTING}")
        self._version, self._is_behind = self._table.version(), False

    def _commit(self, actions: list[AddAction | RemoveAction]) -> None:
        mark, before = uuid.uuid4().hex, self._table.version()
        with delta_errors(f"output {self.uri}"), self._last_chance():
            try:
                self._table.create_write_transaction(
                    actions,
                    mode="append",
                    schema=self._table.schema(),
                    partition_by=[MODEL],
                    commit_properties=CommitProperties(
                        custom_metadata={MARK: mark}, app_transactions=[Transaction(FENCE, self._fence)]
                    ),
                    post_commithook_properties=QUIET,
                )
            except CommitFailedError:
                # Where the answer to a commit is lost, the client sends it again and meets what it wrote itself.
                self._table.update_incremental()
                if not self._wrote(mark, before):
                    raise
            self._table.update_incremental()
            self._version, self._is_behind = self._table.version(), False

    def _wrote(self, mark: str, before: int) -> bool:
        """Whether the commit with this mark is among those after version `before`."""
        fs, base = open_fs(self.uri, self.storage)
        with storage_errors(f"output {self.uri}"):
            return any(
                mark.encode() in fs.cat_file(join(base, "_delta_log", f"{version:020}.json"))
                for version in range(before + 1, self._table.version() + 1)
            )

    def files(self) -> pa.Table:
        """What the log knows of each file: path, model, model_version, shard_id, rows, failed. No file is opened.

        shard_id and model_version are null where the log's bounds do not tell: in a file that holds several (after
        compaction), or whose writer cut long strings off (deltalake's own).
        """
        return self.listing().drop_columns(["first_shard_id", "first_position", "last_shard_id", "last_position"])

    def listing(self) -> pa.Table:
        """`files`, and where each begins and ends: the smallest (first_shard_id, first_position) and the largest
        (last_shard_id, last_position) of each column; null where the log does not tell."""
        actions = self._actions()

        def column(name: str, kind: pa.DataType) -> pa.Array:
            # A column without statistics in any file is left out by deltalake.
            if name in actions.column_names:
                return actions.column(name).cast(kind)
            return pa.nulls(len(actions), kind)

        def single(name: str) -> pa.Array:
            low, high = column(f"min.{name}", pa.string()), column(f"max.{name}", pa.string())
            return pc.if_else(pc.equal(low, high), low, pa.scalar(None, pa.string()))

        rows = column("num_records", pa.int64())
        return pa.table(
            {
                "path": _paths(actions),
                "model": column(f"partition.{MODEL}", pa.string()),
                "model_version": single("model_version"),
                "shard_id": single("shard_id"),
                "rows": rows,
                "failed": pc.subtract(rows, column("null_count.error_type", pa.int64())),
                "size_bytes": column("size_bytes", pa.int64()),
                "first_shard_id": column("min.shard_id", pa.string()),
                "first_position": column("min.position", pa.int32()),
                "last_shard_id": column("max.shard_id", pa.string()),
                "last_position": column("max.position", pa.int32()),
            }
        )

    def _actions(self) -> pa.Table:
        """What the log says of each file, as deltalake names it."""
        state = self._state()
        return patiently(f"output {self.uri}", lambda: pa.table(state.get_add_actions(flatten=True)))

    def shards(self) -> pa.Array:
        """Every shard_id that has rows. Opens only those files whose shard the log does not tell."""
        return self.shard_files().column("shard_id").combine_chunks().unique()

    def shard_files(self) -> pa.Table:
        """One row for each shard in each file: path, model, model_version (null: several), shard_id, rows of the shard.

        Opens only those files whose shard the log does not tell, and reads that column alone.
        """
        names = ["path", "model", "model_version", "shard_id", "rows"]
        files = self.files().select(names)
        unknown = pc.is_null(files.column("shard_id"))
        found = [files.filter(pc.invert(unknown))]
        for file in files.filter(unknown).to_pylist():
            with storage_errors(join(self.uri, file["path"])), self._fs.open(join(self._base, file["path"])) as data:
                shards = pq.read_table(data, columns=["shard_id"]).column(0).cast(pa.string()).value_counts()
            count = len(shards)
            columns = [pa.array([file[name]] * count, pa.string()) for name in names[:3]]
            found.append(pa.table([*columns, shards.field("values"), shards.field("counts")], names=names))
        return pa.concat_tables(found)

    def counts(self, model: str, version: str) -> tuple[int, int]:
        """Rows and failed rows of one version of a model: from the log, or scanned where the log does not tell."""
        files = self.files().filter(pc.field("model") == model)
        columns = [files.column(name) for name in ("model_version", "rows", "failed")]
        if not any(column.null_count for column in columns):
            own = files.filter(pc.field("model_version") == version)
            return pc.sum(own.column("rows")).as_py() or 0, pc.sum(own.column("failed")).as_py() or 0
        rows = failed = 0
        for batch in self.scan(["status"], {MODEL: model, "model_version": version}):
            rows += len(batch)
            failed += pc.sum(pc.equal(batch["status"], FAILED)).as_py() or 0
        return rows, failed

    def scan(
        self, columns: Sequence[str], where: Mapping[str, str | pa.Array] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Stream rows in batches of bounded size. A column that an older table lacks (`LATER`) is null.

        where: the value of a column, or the values it may have.
        """
        values = {
            name: wanted if isinstance(wanted, pa.Array) else pa.array([wanted])
            for name, wanted in (where or {}).items()
        }
        expected = pa.schema([self.schema.field(name) for name in columns])
        read = pa.schema([self.schema.field(name) for name in dict.fromkeys((*columns, *values))])
        fs, base = open_fs(self.uri, self.storage)
        with delta_errors(f"output {self.uri}"):
            # Not a dataset of pyarrow: it costs 40 KB a file, and its threads crash an interpreter that ends.
            for path, model in self._may_hold(values):
                with fs.open(join(base, path), "rb") as file:
                    stored = pq.ParquetFile(file, pre_buffer=False)
                    present = [name for name in read.names if name in stored.schema_arrow.names]
                    for batch in stored.iter_batches(SCAN_ROWS, columns=present, use_threads=False):
                        rows = as_written(batch, read, {MODEL: model})
                        for name, wanted in values.items():
                            rows = rows.filter(pc.is_in(rows.column(name), value_set=wanted))
                        if len(rows):
                            yield rows.select(expected.names)

    def _may_hold(self, where: Mapping[str, pa.Array]) -> list[tuple[str, str]]:
        """(path, model) of the files that may hold rows with such values, as far as the log's bounds tell."""
        actions = self._actions()
        if not len(actions):
            return []
        for name, values in where.items():
            low, high = (f"partition.{MODEL}",) * 2 if name == MODEL else (f"min.{name}", f"max.{name}")
            if low in actions.column_names:
                lows, highs = (actions.column(bound).to_pylist() for bound in (low, high))
                ordered = sorted(values.to_pylist())
                may = [_any_between(ordered, *bounds) for bounds in zip(lows, highs, strict=True)]
                actions = actions.filter(pa.array(may, pa.bool_()))
        return list(zip(_paths(actions).to_pylist(), actions.column(f"partition.{MODEL}").to_pylist(), strict=True))

    def done(self, shard_ids: Sequence[str], versions: Mapping[str, str]) -> dict[tuple[str, str], BitMap]:
        """Committed positions of some units: {(shard_id, model): bitmap}, for the current version of each model."""
        result: dict[tuple[str, str], BitMap] = {}
        if not shard_ids:
            return result
        wanted = {
            "shard_id": pa.array(shard_ids, pa.string()),
            "model_version": pa.array(versions.values(), pa.string()),
        }
        for batch in self.scan(["shard_id", "position", MODEL, "model_version"], wanted):
            table = pa.table(batch)
            for name, version in versions.items():
                own = table.filter((pc.field(MODEL) == name) & (pc.field("model_version") == version))
                for shard_id in own.column("shard_id").unique().to_pylist():
                    positions = own.filter(pc.field("shard_id") == shard_id).column("position").to_numpy()
                    result.setdefault((shard_id, name), BitMap()).update(positions)
        return result

    def failed_attempts(self, versions: Mapping[str, str]) -> dict[tuple[str, str], dict[int, int]]:
        """Failed rows of the current versions: {(shard_id, model): {position: attempts so far}}."""
        result: dict[tuple[str, str], dict[int, int]] = {}
        for batch in self.scan(["shard_id", "position", MODEL, "model_version", "attempts"], {"status": FAILED}):
            for row in batch.to_pylist():
                if versions.get(row[MODEL]) == row["model_version"]:
                    result.setdefault((row["shard_id"], row[MODEL]), {})[row["position"]] = row["attempts"] or 1
        return result

    def delete_failed(self, versions: Mapping[str, str]) -> int:
        """Take the failed rows of these models out, so that they count as not yet done. Returns how many."""

        def is_gone(model: str, rows: pa.Table) -> pa.ChunkedArray:
            own = pc.equal(rows.column("model_version"), versions[model])
            return pc.and_(own, pc.equal(rows.column("status"), FAILED))

        files = self.files()
        version = pa.array([versions.get(model) for model in files.column("model").to_pylist()], pa.string())
        other = pc.fill_null(pc.not_equal(files.column("model_version"), version), False)
        none = pc.fill_null(pc.equal(files.column("failed"), 0), False)
        return self._delete(files.filter(pc.and_not(pc.is_valid(version), pc.or_(other, none))), is_gone)

    def delete_units(self, shard_ids: Sequence[str]) -> int:
        """Take every row of these units out. Returns how many."""
        listed = pa.array(shard_ids, pa.string())
        files = self.files()
        own = pc.or_(pc.is_in(files.column("shard_id"), value_set=listed), pc.is_null(files.column("shard_id")))
        return self._delete(files.filter(own), lambda model, rows: pc.is_in(rows.column("shard_id"), value_set=listed))

    def _delete(self, files: pa.Table, is_gone: Callable[[str, pa.Table], pa.ChunkedArray]) -> int:
        """Replace files by ones without the rows that `is_gone`, some files in one commit. Returns how many rows.

        Not `DeltaTable.delete`: what it writes are string views, on which pyarrow's datasets cannot filter.
        """
        fs, base = open_fs(self.uri, self.storage)

        def rewrite(file: Mapping[str, Any]) -> tuple[int, list[AddAction | RemoveAction]]:
            with storage_errors(join(self.uri, file["path"])):
                stored = pq.ParquetFile(io.BytesIO(fs.cat_file(join(base, file["path"])))).read()
            rows = as_written(stored, file_schema(self.schema))
            kept = rows.filter(pc.invert(is_gone(file["model"], rows)))
            if len(kept) == len(rows):
                return 0, []
            partition = {MODEL: file["model"]}
            gone = RemoveAction(file["path"], True, int(time.time() * 1000), file["size_bytes"], partition)
            if not len(kept):
                return len(rows), [gone]
            record = write_file(self.uri, self.storage, kept, model=file["model"], model_version="", shard_id="")
            return len(rows) - len(kept), [gone, _add_action(record)]

        removed = 0
        with ThreadPoolExecutor(REWRITES_AT_ONCE) as pool:
            for start in range(0, len(files), REWRITES_PER_COMMIT):
                chunk = files.slice(start, REWRITES_PER_COMMIT).to_pylist()
                counts, actions = zip(*pool.map(rewrite, chunk), strict=True)
                if sum(counts):
                    self._check_fence()
                    self._fence += 1
                    self._commit(list(itertools.chain(*actions)))
                    removed += sum(counts)
        return removed

    def replace(self, old: Sequence[Mapping[str, Any]], new: Sequence[FileRecord]) -> None:
        """Exchange files (path, size_bytes, model) for others with the same rows, all or none."""
        now = int(time.time() * 1000)
        removed = [RemoveAction(f["path"], False, now, f["size_bytes"], {MODEL: f["model"]}) for f in old]
        added = [AddAction(f.path, f.size_bytes, {MODEL: f.model}, now, False, f.stats) for f in new]
        self._check_fence()
        self._fence += 1
        self._commit([*removed, *added])

    def keep_removed(self, hours: int) -> None:
        """From now on files that leave the table stay in storage that long, for readers that began before."""
        if self._kept_hours() != hours:
            self._check_fence()
            with delta_errors(f"output {self.uri}"):
                self._table.alter.set_table_properties({RETENTION: f"interval {hours} hours"})
                self._table.update_incremental()
            self._version = self._table.version()

    def _kept_hours(self) -> int:
        value = re.fullmatch(r"interval (\d+) hours?", self._table.metadata().configuration.get(RETENTION) or "")
        return int(value[1]) if value else 0

    def _kept(self) -> set[str]:
        """Files that have left the table not longer ago than they are to be kept."""
        hours = self._kept_hours()
        if not hours:
            return set()
        with delta_errors(f"output {self.uri}"):
            gone, expired = (
                set(self._table.vacuum(age, dry_run=True, enforce_retention_duration=False)) for age in (0, hours)
            )
        return {unquote(path) for path in gone - expired}

    def vacuum(self) -> int:
        """Delete data files that the log does not name: what killed runs left behind, and what left the table longer
        ago than `keep_removed` says. Returns how many.

        Raises StorageError, and deletes nothing, where another driver has taken over.
        """
        fs, base = open_fs(self.uri, self.storage)
        present: dict[str, str] = {}
        with storage_errors(f"output {self.uri}"):
            fs.invalidate_cache()
            for folder in fs.ls(base, detail=False):
                name = folder.rstrip("/").rpartition("/")[2]
                if name.startswith(f"{MODEL}="):
                    present |= {f"{name}/{path[len(folder) :].strip('/')}": path for path in fs.find(folder)}
        # Listed before the check: no file among them can be a later driver's, which may not have committed it yet.
        self._check_fence()
        known = {*self.files().column("path").to_pylist(), *self._kept()}
        orphans = [path for name, path in present.items() if name.endswith(".parquet") and name not in known]
        with storage_errors(f"output {self.uri}"):
            for start in range(0, len(orphans), 1000):
                fs.rm(orphans[start : start + 1000])
        return len(orphans)


def _paths(actions: pa.Table) -> pa.ChunkedArray:
    """Of files, as storage names them: the log's are URIs."""
    paths = actions.column("path").cast(pa.string())
    if pc.any(pc.match_substring(paths, "%")).as_py():
        return pa.chunked_array([pa.array(map(unquote, paths.to_pylist()), pa.string())])
    return paths


def _any_between(ordered: Sequence[Any], low: Any, high: Any) -> bool:
    """Whether one of some values lies within bounds; what has none may hold any."""
    if low is None or high is None:
        return True
    place = bisect.bisect_left(ordered, low)
    return place < len(ordered) and bool(ordered[place] <= high)


def _addition(file: FileRecord) -> deltalog.Addition:
    return {
        "path": file.path,
        "size": file.size_bytes,
        "partitionValues": {MODEL: file.model},
        "modificationTime": int(time.time() * 1000),
        "stats": file.stats,
    }


def _add_action(file: FileRecord) -> AddAction:
    return AddAction(file.path, file.size_bytes, {MODEL: file.model}, int(time.time() * 1000), True, file.stats)


def _delta_uri(uri: str) -> str:
    return uri.removeprefix("file://")
