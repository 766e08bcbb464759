"""Predictions of a table of ours: found by shard where the targets come from the same shards, else by an index."""

import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import errors
from pipeline.config import PredictionsConfig, SourceConfig
from pipeline.errors import ConfigError, RowError, SchemaError
from pipeline.predictions.base import Found, ScoredModel, UnitPredictions, join_payload
from pipeline.predictions.beside import extend_plan
from pipeline.predictions.stored import stored
from pipeline.runfile import read_run
from pipeline.schema import MODEL, OK
from pipeline.sources.base import Sample, Unit
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable
from pipeline.tablefiles import row_groups_of
from pipeline.taxonomy import build_taxonomy
from pipeline.units import PLAN

__all__ = ["TablePredictions"]

KEYS = ["image_id", "shard_id", "position", "model_version"]
PAYLOAD = ["image_id", "width", "height", "status", "error_type", "error_stage", "error_message",
           "semantic", "segments", "depth"]  # fmt: skip
# Row groups held at once for one unit: it is read in the order in which it was written.
OPEN_GROUPS = 4
LISTED = 5


@dataclass
class TablePredictions:
    """The source of `predictions.format: table`. See PredictionSource."""

    config: PredictionsConfig
    source: SourceConfig
    index: "_Index | None" = None

    @functools.cached_property
    def run(self) -> dict[str, Any]:
        """The newest labelling run of the table."""
        return read_run(self.config.uri, self.config.storage)

    def models(self) -> list[ScoredModel]:
        known = {model["label"]: model for model in self.run["models"]}
        unknown = [label for label in self.config.models if label not in known]
        if unknown:
            raise ConfigError(f"predictions.models: {self.config.uri} has no {unknown[0]!r}; it has {', '.join(known)}")
        return [
            ScoredModel(
                label=label,
                version=known[label]["version"],
                taxonomy=build_taxonomy(known[label]["taxonomy"], f"{self.config.uri}/run.json"),
                description=known[label],
            )
            for label in self.config.models or known
        ]

    def prepare(self, plan: pa.Table) -> pa.Table:
        table = RowTable.open(self.config.uri, self.config.storage)
        versions = {model.label: model.version for model in self.models()}
        files = _current(table.shard_files(), versions)
        shards = files.column("shard_id").drop_null().unique()
        known = plan.column("shard_id")
        if self.config.match == "image_id" and (not len(files) or pc.any(pc.is_in(known, value_set=shards)).as_py()):
            return self._by_shard(plan, files)
        self.index = _Index.build(table, versions, by_name=self.config.match == "name")
        mark = hashlib.blake2b(
            "\n".join(sorted(set(files.column("path").to_pylist()))).encode(), digest_size=8
        ).hexdigest()
        return extend_plan(plan, [(mark, b"")] * len(plan))

    def _by_shard(self, plan: pa.Table, files: pa.Table) -> pa.Table:
        paths: dict[str, dict[str, list[str]]] = {}
        columns = (files.column(name).to_pylist() for name in ("shard_id", "model", "path"))
        for shard_id, model, path in zip(*columns, strict=True):
            paths.setdefault(shard_id, {}).setdefault(model, []).append(path)

        def describe(shard_id: str) -> tuple[str, bytes]:
            own = {model: sorted(found) for model, found in paths.get(shard_id, {}).items()}
            text = json.dumps(own, sort_keys=True).encode()
            return hashlib.blake2b(text, digest_size=8).hexdigest(), zlib.compress(text)

        extended = extend_plan(plan, map(describe, plan.column("shard_id").to_pylist()))
        if self.source.limit is not None:
            return extended
        listed = pa.array(list(paths), pa.string())
        strangers = listed.filter(pc.invert(pc.is_in(listed, value_set=plan.column("shard_id").combine_chunks())))
        rows = []
        for shard_id in sorted(strangers.to_pylist()):
            mark, payload = describe(shard_id)
            unit = {"shard_id": shard_id, "location": "", "size_bytes": 0, "fingerprint": mark, "cut": 0}
            rows.append(unit | {"rows": None, "stop": None, "payload": join_payload(b"", payload)})
        return pa.concat_tables([extended, pa.Table.from_pylist(rows, schema=PLAN)])

    def open_unit(self, unit: Unit, payload: bytes, model: str) -> UnitPredictions:
        description = next(entry for entry in self.run["models"] if entry["label"] == model)
        reader = _Reader(self.config.uri, self.config.storage, description["task"])
        if self.index is not None:
            return _Indexed(reader, self.index, model)
        paths = json.loads(zlib.decompress(payload)).get(model, [])
        stop = unit.stop if self.source.limit is not None else None
        return _Sharded(reader, paths, unit.shard_id, stop, description["version"])

    def names(self, model: str) -> pa.Array | None:
        if self.index is None or self.source.limit is not None:
            return None
        rows = self.index.rows
        return rows.filter(pc.equal(rows.column(MODEL), model)).column("image_id").combine_chunks().cast(pa.string())


def _current(files: pa.Table, versions: Mapping[str, str]) -> pa.Table:
    """Files that hold rows of the current versions, or may."""
    wanted = pa.array([versions.get(model) for model in files.column("model").to_pylist()], pa.string())
    version = files.column("model_version")
    same = pc.or_(pc.is_null(version), pc.fill_null(pc.equal(version, wanted), False))
    return files.filter(pc.and_(pc.is_valid(wanted), same))


@dataclass
class _Reader:
    """Rows of the table's files, a row group at a time."""

    uri: str
    storage: Mapping[str, Any]
    task: str
    _files: dict[str, pq.ParquetFile] = field(default_factory=dict)
    _groups: dict[tuple[str, int], pa.Table] = field(default_factory=dict)

    def file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            if len(self._files) >= OPEN_GROUPS:
                self._files.pop(next(iter(self._files))).close()
            fs, base = open_fs(self.uri, self.storage)
            self._files[path] = pq.ParquetFile(fs.open(join(base, path), "rb"))
        return self._files[path]

    def keys(self, path: str, shard_id: str | None) -> Iterator[tuple[int, pa.Table]]:
        """The number and KEYS of each row group that may hold rows of the shard; None: of all."""
        with storage_errors(join(self.uri, path)):
            file = self.file(path)
            for group in range(file.num_row_groups) if shard_id is None else row_groups_of(file, shard_id):
                yield group, file.read_row_group(group, columns=KEYS)

    def found(self, path: str, group: int, row: int) -> Found:
        """One row, decoded."""
        if (path, group) not in self._groups:
            if len(self._groups) >= OPEN_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            with storage_errors(join(self.uri, path)):
                self._groups[path, group] = self.file(path).read_row_group(group, columns=PAYLOAD)
        (values,) = self._groups[path, group].slice(row, 1).to_pylist()
        found = Found(name=values["image_id"], width=values["width"] or 0, height=values["height"] or 0)
        if values["status"] != OK:
            error = _as_error(values["error_type"], values["error_message"])
            return replace(found, error=error, error_stage=values["error_stage"] or "predict")
        try:
            return replace(found, predicted=stored(values, self.task))
        except SchemaError as error:
            return replace(found, error=errors.PredictError(str(error)), error_stage="decode")


def _as_error(kind: str | None, message: str | None) -> RowError:
    """The error of a failed row again."""
    found = getattr(errors, kind or "", RowError)
    return found(message or "") if isinstance(found, type) and issubclass(found, RowError) else RowError(message or "")


@dataclass
class _Sharded:
    """Predictions of one shard, from the files that hold its rows. stop: positions from there on are not asked for."""

    reader: _Reader
    paths: list[str]
    shard_id: str
    stop: int | None
    version: str
    asked: set[str] = field(default_factory=set)

    @functools.cached_property
    def places(self) -> dict[str, tuple[str, int, int, int]]:
        """By image_id: path, row group, row in it, position."""
        places: dict[str, tuple[str, int, int, int]] = {}
        for path in self.paths:
            for group, keys in self.reader.keys(path, self.shard_id):
                own = pc.and_(
                    pc.equal(keys.column("shard_id"), self.shard_id),
                    pc.equal(keys.column("model_version"), self.version),
                ).to_numpy()
                image_ids, positions = keys.column("image_id").to_pylist(), keys.column("position").to_pylist()
                for row in np.flatnonzero(own).tolist():
                    if image_ids[row] in places:
                        raise SchemaError(f"{self.reader.uri}: image_id {image_ids[row]!r} has two rows of one model")
                    places[image_ids[row]] = (path, group, row, positions[row])
        return places

    def find(self, sample: Sample) -> Found | None:
        self.asked.add(sample.image_id)
        place = self.places.get(sample.image_id)
        return None if place is None else self.reader.found(*place[:3])

    def unused(self) -> Iterator[Found]:
        for image_id, (_, _, _, position) in self.places.items():
            if image_id not in self.asked and (self.stop is None or position < self.stop):
                yield Found(name=image_id)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _name(image_id: str) -> str:
    """The file name without folder and ending."""
    base = image_id.rpartition("/")[2]
    return base.rpartition(".")[0] or base


@dataclass(frozen=True)
class _Index:
    """Where each image's row is, for targets that come from other shards than the images did.

    rows: image_id, path, model, group, row, in the order of `hashes`, which are of model and key. About 100 bytes an
    image; workers read it in place.
    """

    rows: pa.Table
    hashes: npt.NDArray[np.uint64]
    by_name: bool

    @classmethod
    def build(cls, table: RowTable, versions: Mapping[str, str], *, by_name: bool) -> "_Index":
        """Raises ConfigError where two rows of a model have the same key."""
        reader = _Reader(table.uri, table.storage, "")
        parts: list[pa.Table] = []
        files = _current(table.files(), versions)
        for path, model in zip(files.column("path").to_pylist(), files.column("model").to_pylist(), strict=True):
            for group, keys in reader.keys(path, None):
                rows = np.flatnonzero(pc.equal(keys.column("model_version"), versions[model]).to_numpy())
                parts.append(
                    pa.table(
                        {
                            "image_id": keys.column("image_id").take(pa.array(rows)).cast(pa.large_string()),
                            "path": pa.array([path] * len(rows)).dictionary_encode().cast(DICTIONARY),
                            MODEL: pa.array([model] * len(rows)).dictionary_encode().cast(DICTIONARY),
                            "group": pa.array(np.full(len(rows), group, np.int32)),
                            "row": pa.array(rows.astype(np.int32)),
                        }
                    )
                )
        if not parts:
            raise ConfigError(f"{table.uri} has no labelled row of {', '.join(versions)} yet")
        rows = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        keys = [_name(value) if by_name else value for value in rows.column("image_id").to_pylist()]
        models = rows.column(MODEL).to_pylist()
        hashes = np.array([_hash(f"{model}\0{key}") for model, key in zip(models, keys, strict=True)], np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(same):
            ids = rows.column("image_id")
            first, second = (ids[int(order[same[0] + step])].as_py() for step in (0, 1))
            what = "the same file name" if by_name else "the same image_id"
            raise ConfigError(
                f"{len(same)} predictions share {what} with another: {first!r} and {second!r} (predictions.match)"
            )
        return cls(rows.take(pa.array(order)), hashes[order], by_name)

    def find(self, model: str, image_id: str) -> tuple[str, int, int] | None:
        key = _name(image_id) if self.by_name else image_id
        wanted = np.uint64(_hash(f"{model}\0{key}"))
        at = int(np.searchsorted(self.hashes, wanted))
        if at == len(self.hashes) or self.hashes[at] != wanted:
            return None
        row = {name: self.rows.column(name)[at].as_py() for name in ("path", "group", "row")}
        return row["path"], row["group"], row["row"]


DICTIONARY = pa.dictionary(pa.int32(), pa.string())


@dataclass
class _Indexed:
    """Predictions of any image, through the index."""

    reader: _Reader
    index: _Index
    model: str

    def find(self, sample: Sample) -> Found | None:
        place = self.index.find(self.model, sample.image_id)
        return None if place is None else self.reader.found(*place)

    def unused(self) -> Iterator[Found]:
        return iter(())
