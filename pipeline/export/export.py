"""An export from its plan to its last file, on the driver: what is asked for, which pieces are left, and the fold.

What is done is what lies in the folder `_export` of the export: plan.json says what the export is, a mark for each
piece that it is whole, export.json that all is. The same command goes on where it stopped; another one is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyroaring import BitMap

from pipeline.config import SourceConfig
from pipeline.config_export import ExportConfig
from pipeline.configfile import redacted, source_from
from pipeline.errors import ConfigError, SchemaError
from pipeline.export.base import Job, dumps, pretty
from pipeline.export.folder import PIECES, STATE, OutputFolder, piece_name
from pipeline.export.names import Namer
from pipeline.export.parts import Part, Piece, Scan, chosen, cut, describe, scan_parts
from pipeline.export.piece import MARK, NAMES, PieceWork, Work, export_piece
from pipeline.export.registry import FORMATS
from pipeline.redaction import redact_text
from pipeline.report.rows import ScoredTable, open_predicted
from pipeline.review import Choice, Survey, SurveyWork, rank, survey_piece
from pipeline.schema import MODEL
from pipeline.sources.base import Unit
from pipeline.sources.registry import open_source
from pipeline.storage import join, read_bytes, storage_errors
from pipeline.taxonomy import Taxonomy, build_taxonomy

__all__ = ["Export", "Mapper", "open_export", "read_summary"]

# Runs a function on many tasks somewhere and gives the results as they come.
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
SUMMARY = f"{STATE}/export.json"
PLAN = f"{STATE}/plan.json"
SURVEYS = f"{STATE}/survey"
CHOICE = f"{STATE}/choice.json"
MAX_STATE_BYTES = 1 << 30
# Parts of the survey of a review pack: whole row groups, as pieces are.
SURVEY_ROWS = 4096


@dataclass
class Export:
    """One export as its driver sees it. Call `prepare`, then `run`, then `fold`."""

    config: ExportConfig
    scored: ScoredTable
    other: ScoredTable | None
    job: Job
    source: SourceConfig | None
    folder: OutputFolder
    scan: Scan
    pieces: list[Piece]
    choice: list[Choice]

    @property
    def is_done(self) -> bool:
        return self.folder.exists(SUMMARY)

    @property
    def images(self) -> int:
        """Rows that go through, failed ones among them."""
        return sum(map(len, self.pieces))

    def prepare(self, mapper: Mapper, say: Callable[[str], None]) -> None:
        """Settle what is exported. Raises ConfigError where the folder holds something else; writes nothing before."""
        mark = self._fingerprint()
        if self.folder.exists(PLAN):
            if self._state(PLAN).get("fingerprint") != mark:
                raise ConfigError(
                    f"{self.folder.uri} holds an export of other rows or with other options; give another output.uri, "
                    "or remove the folder"
                )
        elif not self.folder.is_empty():
            raise ConfigError(f"output.uri must be an empty folder or hold the same export, {self.folder.uri} does not")
        else:
            self.folder.file(PLAN, pretty({"fingerprint": mark, "config": redacted(self.config)}))
        parts: Sequence[Part] = self.scan.parts
        if self.config.review is not None:
            self.choice = self._choose(mapper, say)
            wanted: dict[tuple[str, int], BitMap] = {}
            for one in self.choice:
                wanted.setdefault((one.path, one.group), BitMap()).add(one.ordinal)
            parts = chosen(parts, wanted)
        self.pieces = cut(parts, self.config.rows_per_piece)
        self.folder.pieces = len(self.pieces)
        # A shard's name says how many there are.
        self.job = replace(self.job, pieces=len(self.pieces))

    def _fingerprint(self) -> str:
        """Of the rows and of all that decides about the bytes; not of credentials, nor of who does the work."""
        asked = redacted(self.config)
        for name in ("workers", "ray_address"):
            asked.pop(name)
        for section in ("table", "output"):
            asked[section].pop("storage")
        (asked.get("source") or {}).pop("storage", None)
        whole = dumps([asked, self.job.version, self.job.taxonomy.describe()])
        digest = hashlib.blake2b(whole.encode(), digest_size=16)
        for data in describe(self.scan.parts):
            digest.update(data)
        return digest.hexdigest()

    def _choose(self, mapper: Mapper, say: Callable[[str], None]) -> list[Choice]:
        review = self.config.review
        if review is None:
            return []
        uri, storage = self.folder.uri, self.config.output.storage
        if not self.folder.exists(CHOICE):
            work = SurveyWork(
                table=self.scored.table.uri,
                storage=self.config.table.storage,
                task=self.job.task,
                taxonomy=self.job.taxonomy,
                by=review.by,
                against=None if self.other is None else _other_rows(self.other),
            )
            pieces = cut(self.scan.parts, SURVEY_ROWS)
            done = self.folder.listed(SURVEYS)
            left = [piece for piece in pieces if f"{piece.index:06d}.parquet" not in done]
            say(f"looking at {len(self.scan.parts)} row groups for the {review.n} images, by {review.by}")
            tasks = (Survey(work, piece, uri, storage, f"{SURVEYS}/{piece.index:06d}.parquet") for piece in left)
            for _ in mapper(survey_piece, tasks):
                pass
            found = rank(self.folder, [f"{SURVEYS}/{piece.index:06d}.parquet" for piece in pieces], review, self.job)
            self.folder.file(CHOICE, dumps([asdict(one) for one in found]).encode())
        return [Choice(**one) for one in self._state(CHOICE)]

    def run(self, mapper: Mapper) -> Iterator[dict[str, int]]:
        """Make the pieces that are not whole yet; gives each one's counts as it ends, those from before first."""
        marks = self.folder.listed(PIECES)
        done = [piece for piece in self.pieces if f"{piece.index:06d}.{MARK}" in marks]
        for piece in done:
            yield self._counts(piece)
        left = [piece for piece in self.pieces if f"{piece.index:06d}.{MARK}" not in marks]
        if left:
            yield from mapper(export_piece, self._tasks(left))

    def _counts(self, piece: Piece) -> dict[str, int]:
        counts: dict[str, int] = self._state(piece_name(piece.index, MARK))
        return counts

    def _state(self, name: str) -> Any:
        where = join(self.folder.uri, name)
        return json.loads(read_bytes(where, self.config.output.storage, max_bytes=MAX_STATE_BYTES))

    def _tasks(self, pieces: Sequence[Piece]) -> Iterator[PieceWork]:
        work = Work(
            job=self.job,
            table=self.scored.table.uri,
            table_storage=self.config.table.storage,
            output=self.folder.uri,
            output_storage=self.config.output.storage,
            namer=Namer(self.scan.shared),
            source=self.source,
            with_failed=self.config.review is not None,
        )
        units = self._units(pieces)
        for piece in pieces:
            shards = {shard for part in piece.parts for shard in part.shards}
            yield PieceWork(work, piece, {shard: units[shard] for shard in shards if shard in units})

    def _units(self, pieces: Sequence[Piece]) -> dict[str, Unit]:
        """The units of the source that hold images of these pieces."""
        if self.source is None:
            return {}
        wanted = {shard for piece in pieces for part in piece.parts for shard in part.shards}
        return {unit.shard_id: unit for unit in open_source(self.source).plan() if unit.shard_id in wanted}

    def fold(self) -> dict[str, Any]:
        """Put the pieces together, remove what was kept for that, and say that the export is whole. Returns what
        export.json says."""
        if self.is_done:
            return read_summary(self.folder.uri, self.config.output.storage)
        folder = self.folder
        counts = [self._counts(piece) for piece in self.pieces]
        FORMATS[self.job.format].fold(self.job, folder)
        with folder.spool("failed.json") as file:
            file.write(b"[")
            for number, line in enumerate(folder.lines("failed")):
                file.write(((",\n" if number else "\n") + line).encode())
            file.write(b"\n]\n")
        self._fold_names()
        if self.config.review is not None:
            folder.file("review.json", pretty(self._review()))
        summary = {
            "format": self.job.format,
            "task": self.job.task,
            "table": redact_text(self.scored.table.uri),
            "model": self.job.model,
            "model_version": self.job.version,
            "run_id": self.scored.run.get("run_id"),
            "images": sum(one["images"] for one in counts),
            "failed": sum(one["failed"] for one in counts),
            "images_copied": self.job.images,
            "taxonomy": self.job.taxonomy.describe(),
            "source": self.scored.run.get("config", {}).get("source"),
        }
        folder.file(SUMMARY, pretty(summary))
        for left in (PIECES, SURVEYS, CHOICE):
            folder.remove(left)
        return summary

    def _fold_names(self) -> None:
        folder = self.folder
        with folder.spool("names.parquet") as file, pq.ParquetWriter(file, NAMES, compression="zstd") as writer:
            for piece in self.pieces:
                name = piece_name(piece.index, "names.parquet")
                with storage_errors(join(folder.uri, name)), folder.fs.open(join(folder.base, name), "rb") as data:
                    writer.write_table(pq.read_table(data))

    def _review(self) -> dict[str, Any]:
        namer, review = Namer(self.scan.shared), self.config.review
        images = [
            {
                "rank": place,
                "image_id": one.image_id,
                "name": namer.name(one.image_id),
                "shard_id": one.shard_id,
                "position": one.position,
                "score": one.score,
                "why": one.why,
            }
            for place, one in enumerate(self.choice, 1)
        ]
        return {"by": review.by if review else None, "of": self.scan.rows, "images": images}


def open_export(config: ExportConfig) -> Export:
    """Check what is asked for and look up which rows it has. Raises ConfigError, StorageError; writes nothing."""
    scored = open_predicted(config.table.uri, config.table.storage, config.table.model)[0]
    form = FORMATS[config.format]
    images = form.needs_images if config.images == "auto" else config.images
    source = None
    if images:
        told = scored.run.get("config", {}).get("source")
        if not told and not config.source:
            raise ConfigError(
                f"{config.table.uri}/run.json names no source of images; give source.format and source.uri"
            )
        source = source_from({**(told or {}), "storage": {}, **config.source})
    job = Job(
        format=config.format,
        task=scored.model["task"],
        taxonomy=_own_taxonomy(scored),
        model=scored.model["label"],
        version=scored.model["version"],
        pieces=0,
        images=bool(images),
        root=config.image_root,
        polygons=config.polygons,
        tolerance=config.tolerance,
        depth_scale=config.depth_scale,
    )
    form.check(job)
    other = _other(config, scored)
    folder = OutputFolder(config.output.uri, config.output.storage)
    scan = scan_parts(scored.table, scored.model)
    if not scan.rows:
        raise ConfigError(f"{config.table.uri} has no row of model {job.model} yet")
    return Export(config, scored, other, job, source, folder, scan, [], [])


def read_summary(uri: str, storage: Mapping[str, Any]) -> dict[str, Any]:
    """export.json of an export that is whole. Raises StorageError where there is none, SchemaError where it is none."""
    data = read_bytes(join(uri, SUMMARY), storage, max_bytes=MAX_STATE_BYTES)
    try:
        summary: dict[str, Any] = json.loads(data)
        [summary[name] for name in ("format", "task", "taxonomy", "images")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SchemaError(f"{join(uri, SUMMARY)} says nothing of an export: {error}") from error
    return summary


def _own_taxonomy(scored: ScoredTable) -> Taxonomy:
    """The label space of the rows, which scores may be in another one of."""
    return build_taxonomy(scored.model["taxonomy"], f"{scored.table.uri}/run.json")


def _other(config: ExportConfig, scored: ScoredTable) -> ScoredTable | None:
    """The model that a review by disagreement holds against."""
    if config.review is None or config.review.by != "disagreement":
        return None
    labels = [model["label"] for model in scored.run["models"] if model["label"] != scored.model["label"]]
    label = config.review.against or (labels[0] if len(labels) == 1 else None)
    if label is None:
        raise ConfigError(
            f"review.against must say which other model of {config.table.uri} to compare with; there are "
            f"{', '.join(labels) or 'none'}"
        )
    other = open_predicted(config.table.uri, config.table.storage, label)[0]
    if other.model["task"] != scored.model["task"] or _own_taxonomy(other) != _own_taxonomy(scored):
        raise ConfigError(
            f"review.by=disagreement: {label} and {scored.model['label']} have other tasks or label spaces "
            "(maskmill compare maps them)"
        )
    return other


def _other_rows(other: ScoredTable) -> dict[str, Any]:
    """What a worker needs to find the other model's rows: the files of each shard."""
    files = other.table.shard_files().filter(pc.field(MODEL) == other.model["label"])
    paths: dict[str, list[str]] = {}
    for shard_id, path in zip(files.column("shard_id").to_pylist(), files.column("path").to_pylist(), strict=True):
        paths.setdefault(shard_id, []).append(path)
    return {"version": other.model["version"], "paths": paths}
