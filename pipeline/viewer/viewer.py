"""Everything that the page can ask for, as plain values and bytes: the table, a page of rows, a row, its pixels.

Each call may block and may come from any thread; what it keeps between calls is bounded. HTTP is app.py's.
"""

import io
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import ValidationError

from pipeline.config import ScoreConfig, SourceConfig
from pipeline.configfile import source_from
from pipeline.errors import ConfigError, MaskmillError, RunError, SchemaError, StorageError
from pipeline.images import DEFAULT_MAX_PIXELS, decode_image
from pipeline.printable import printable
from pipeline.redaction import redact_text
from pipeline.runfile import read_run
from pipeline.schema import MODEL
from pipeline.sources.base import Sample
from pipeline.stages.score import Scorer
from pipeline.table import RowTable
from pipeline.taxonomy import Category, Taxonomy, build_taxonomy
from pipeline.viewer.maps import MAX_SIDE, any_color, row_map, target_map
from pipeline.viewer.query import MAX_PAGE_ROWS, PAGE_ROWS, SORTS, START, Key, Query, parse_query, whole
from pipeline.viewer.ranking import MOST_RANKED, Rankings
from pipeline.viewer.samples import Samples
from pipeline.viewer.scan import Stop, find_page, read_shown
from pipeline.viewer.shown import MAX_VALUE, shown_class, shown_map, shown_row, stored_figures
from pipeline.viewer.stored import Place, Snapshot, Stored, bounds, read_columns

__all__ = ["MissingError", "Viewer"]

# How long a request searches before it says how far it is.
SEARCH_S = 1.5
THREADS = 8
KEPT_PLACES = 20_000
KEPT_BYTES = 192 << 20
# Larger row groups are read in batches for every row.
LARGEST_KEPT = 64 << 20
BATCH = 32
PIXELS = ("width", "height", "semantic", "segments", "depth")
INT32 = 2**31 - 1
JPEG_QUALITY = 88
MAX_FIELDS = 50
UNNAMED = Taxonomy(
    "unnamed", "classes without a run.json", tuple(Category(n, f"class {n}", "stuff", any_color(n)) for n in range(255))
)


class MissingError(LookupError):
    """What was asked for is not there; the message says what, for people."""


@dataclass
class _Model:
    label: str
    version: str | None
    task: str
    taxonomy: Taxonomy
    scorer: Scorer | None


@dataclass
class _Opened:
    """A snapshot with what is known of it."""

    snapshot: Snapshot
    rankings: Rankings
    at: float = field(default_factory=time.time)
    places: OrderedDict[tuple[str, str, str, int], Place] = field(default_factory=OrderedDict)


class Viewer:
    """A table as the page sees it. source: as in a config, what of it is not as run.json has it.

    Raises StorageError or SchemaError where there is no table of predictions.
    """

    def __init__(self, uri: str, storage: Mapping[str, Any], source: Mapping[str, Any] | SourceConfig | None = None):
        self.uri = uri
        self._storage = dict(storage)
        self._pool = ThreadPoolExecutor(THREADS, "table")
        self._stored = Stored(uri, storage)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._opened = self._open()
        self._run = self._read_run()
        self._samples, self._no_source = self._open_source(source)
        self._max_pixels = self._samples.config.max_pixels if self._samples else DEFAULT_MAX_PIXELS
        self._models = {model.label: model for model in self._describe_models()}

    def close(self) -> None:
        """Give up what goes on."""
        self._opened.rankings.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._samples is not None:
            self._samples.close()

    def _open(self) -> _Opened:
        return _Opened(Snapshot(RowTable.open(self.uri, self._storage)), Rankings(self._pool))

    def _read_run(self) -> dict[str, Any]:
        """run.json, nothing where there is none: masks can be shown without names."""
        try:
            return read_run(self.uri, self._storage)
        except (StorageError, SchemaError):
            return {}

    def _open_source(self, given: Mapping[str, Any] | SourceConfig | None) -> tuple[Samples | None, str]:
        """The source, or why there is none."""
        try:
            if given is None or isinstance(given, Mapping):
                config = self._run.get("config")
                described = config.get("source") if isinstance(config, dict) else None
                if not isinstance(described, dict) and not given:
                    return None, "run.json does not say where the images came from; give source.format and source.uri"
                given = source_from({**(described or {}), "storage": {}, **(given or {})})
            return Samples(given), ""
        except (MaskmillError, ValidationError) as error:
            return None, _said(error)

    def _describe_models(self) -> list[_Model]:
        models: list[_Model] = []
        config = self._run.get("config")
        try:
            score = ScoreConfig.model_validate((config.get("score") if isinstance(config, dict) else None) or {})
        except ValidationError:
            score = ScoreConfig()
        for described in self._run.get("models", ()):
            try:
                taxonomy = build_taxonomy(described["taxonomy"], "run.json")
                target = described.get("score_taxonomy")
                target = build_taxonomy(target, "run.json") if target else taxonomy
            except (ConfigError, KeyError):
                taxonomy = target = UNNAMED
            try:
                scorer = Scorer.build(score, taxonomy, target, max_pixels=self._max_pixels)
            except ConfigError:
                scorer = None
            task = str(described.get("task") or "")
            models.append(_Model(str(described["label"]), str(described["version"]), task, taxonomy, scorer))
        known = {model.label for model in models}
        stored = {row["model"] for row in self._opened.snapshot.totals()} - known
        models += [_Model(label, None, "", UNNAMED, None) for label in sorted(stored)]
        return models

    # What the page asks for.

    def table(self, *, fresh: bool = False) -> dict[str, Any]:
        """What the table is, its models with their classes, and how many rows it has. fresh: read its log again."""
        if fresh:
            opened = self._open()
            with self._lock:
                old, self._opened = self._opened, opened
            old.rankings.close()
        with self._lock:
            snapshot = self._opened.snapshot
        totals = snapshot.totals()
        return {
            "uri": printable(redact_text(self.uri)),
            "run": {name: printable(str(self._run.get(name) or "")) for name in ("run_id", "state")},
            "source": printable(self._no_source),
            "sorts": SORTS,
            "rows": sum(row["rows"] for row in totals),
            "files": len(snapshot.files),
            "models": [
                {
                    "label": model.label,
                    "shown": printable(model.label),
                    "version": model.version,
                    "task": model.task,
                    "taxonomy": printable(model.taxonomy.name),
                    "classes": []
                    if model.taxonomy is UNNAMED
                    else [shown_class(entry) for entry in model.taxonomy.categories],
                    "versions": [row for row in totals if row["model"] == model.label],
                }
                for model in self._models.values()
            ],
        }

    def rows(self, words: Mapping[str, str], stop: Stop) -> dict[str, Any]:
        """One page of rows: `rows`, `next` (None at the end), `searched` of `total`, and `ranking` where one is still
        being made. words: see `parse_query`, and start (a `next`), count. Raises ConfigError, StorageError."""
        query = parse_query(words, self._versions())
        count = whole(words, "count", MAX_PAGE_ROWS, PAGE_ROWS) or PAGE_ROWS
        with self._lock:
            opened = self._opened
        if query.sort != "order":
            answer = self._ranked(opened, query, words.get("start", ""), count, stop)
        else:
            start = _start(words.get("start", ""))
            page = find_page(opened.snapshot, self._stored, self._pool, query, start, count, stop)
            following = None if page.following is None else json.dumps(page.following, ensure_ascii=False)
            answer = {"rows": page.rows, "next": following, "searched": page.searched, "total": page.total}
        self._remember(opened, answer["rows"])
        return {**answer, "rows": [shown_row(row) for row in answer["rows"]]}

    def _ranked(self, opened: _Opened, query: Query, start: str, count: int, stop: Stop) -> dict[str, Any]:
        first = whole({"start": start}, "start", MOST_RANKED, 0) or 0
        ranking = opened.rankings.get(opened.snapshot, self._stored, query)
        while not ranking.done.wait(0.05) and not stop.reached:
            pass
        answer: dict[str, Any] = {"searched": ranking.searched, "total": ranking.total}
        if not ranking.done.is_set() or ranking.stop.cancelled:
            return {**answer, "rows": [], "next": str(first), "ranking": True}
        if ranking.error is not None:
            raise ranking.error
        rows = ranking.rows(opened.snapshot, self._stored, first, count)
        for row in rows:
            row["value"] = abs(row["value"])  # no value is negative but by its place in a falling order
        left = first + count < len(ranking.places)
        listed = {"listed": len(ranking.places), "unranked": ranking.unranked, "cut": ranking.cut, "first": first}
        return {**answer, **listed, "rows": rows, "next": str(first + count) if left else None}

    def row(self, words: Mapping[str, str]) -> dict[str, Any]:
        """An image with the row of each model: `rows`, first that asked for; figures and fields with each. Raises
        MissingError where there is no such row."""
        shard_id, position = _place_of(words)
        label, version = words.get("model", ""), words.get("version") or None
        with self._lock:
            opened = self._opened
        rows = [self._detail(opened, label, version or self._version(label), shard_id, position)]
        for model in self._models.values():
            if (model.label, model.version) != (label, rows[0]["model_version"]) and model.label != label:
                try:
                    rows.append(self._detail(opened, model.label, model.version, shard_id, position))
                except MissingError:
                    continue
        self._remember(opened, rows)
        return {"rows": [shown_row(row) for row in rows]}

    def _detail(self, opened: _Opened, label: str, version: str | None, shard_id: str, position: int) -> dict[str, Any]:
        place = self._find(opened, label, version, shard_id, position)
        file = opened.snapshot[place.file]
        with self._stored.open(file.path) as stored:
            (row,) = read_shown(stored, place.file, place.group, [place.row], file.model)
            more = read_columns(stored, place.group, ["score", "fields", "run_id", "labeled_at"]).slice(place.row, 1)
        row["figures"] = stored_figures(more)
        values = {name: more.column(name)[0].as_py() for name in more.column_names if name != "score"}
        fields = dict(values.get("fields") or ())
        row["fields"] = {str(name): str(value) for name, value in list(fields.items())[:MAX_FIELDS]}
        row["run_id"] = values.get("run_id")
        row["labeled_at"] = values["labeled_at"].isoformat(" ", "seconds") if values.get("labeled_at") else None
        return row

    def pixels(self, words: Mapping[str, str]) -> bytes:
        """The prediction of a row as `PixelMap.encode`. words: model, version, shard, position, size. Raises
        MissingError, and what `row_map` raises."""
        shard_id, position = _place_of(words)
        label = words.get("model", "")
        with self._lock:
            opened = self._opened
        place = self._find(opened, label, words.get("version") or self._version(label), shard_id, position)
        row = self._pixels_of(opened.snapshot[place.file].path, place)
        found = row_map(row, self._models[label].taxonomy, _side(words), max_pixels=self._max_pixels)
        if found is None:
            raise MissingError("this row has no prediction")
        return shown_map(found).encode()

    def target(self, words: Mapping[str, str]) -> bytes:
        """The target that a row is held against, as `pixels` gives the row. Raises MissingError, and what `target_map`
        and the source raise."""
        shard_id, position = _place_of(words)
        label = words.get("model", "")
        with self._lock:
            opened = self._opened
        place = self._find(opened, label, words.get("version") or self._version(label), shard_id, position)
        model = self._models[label]
        with self._stored.open(opened.snapshot[place.file].path) as stored:
            (row,) = read_shown(stored, place.file, place.group, [place.row], label)
        sample = self._sample(shard_id, position)
        if model.scorer is None or not row["width"]:
            raise MissingError("this row has no target")
        sizes = {"width": row["width"], "height": row["height"]}
        found = target_map(sample.targets, row["kind"], model.scorer, _side(words), **sizes)
        if found is None:
            raise MissingError("the source has no target of this kind for this image")
        return shown_map(found).encode()

    def image(self, words: Mapping[str, str]) -> tuple[bytes, int, int]:
        """An image of a row as JPEG of at most `size` pixels a side, and its width and height at full size. Raises
        MissingError, RowError for what is no image, RunError where the source cannot be read."""
        shard_id, position = _place_of(words)
        label = words.get("model", "")
        with self._lock:
            opened = self._opened
        self._find(opened, label, words.get("version") or self._version(label), shard_id, position)
        sample = self._sample(shard_id, position)
        if sample.error is not None:
            raise sample.error
        if not sample.image:
            raise MissingError("the source has no images, only targets")
        image_HWC = decode_image(sample.image, max_pixels=self._max_pixels)
        height, width = image_HWC.shape[:2]
        scale = min(1.0, _side(words) / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = Image.fromarray(image_HWC)
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue(), width, height

    # Where things are.

    def _versions(self) -> dict[str, str | None]:
        return {model.label: model.version for model in self._models.values()}

    def _version(self, label: str) -> str | None:
        if label not in self._models:
            raise MissingError("there is no such model in this table")
        return self._models[label].version

    def _sample(self, shard_id: str, position: int) -> Sample:
        if self._samples is None:
            raise MissingError(self._no_source)
        sample = self._samples.get(shard_id, position)
        if sample is None:
            raise MissingError("the source does not have this image any more")
        return sample

    def _remember(self, opened: _Opened, rows: Sequence[Mapping[str, Any]]) -> None:
        """Where rows are stored that are shown now, because their pixels are asked for next."""
        with self._lock:
            for row in rows:
                key = (row[MODEL], row["model_version"], row["shard_id"], row["position"])
                opened.places[key] = row["place"]
                opened.places.move_to_end(key)
            while len(opened.places) > KEPT_PLACES:
                opened.places.popitem(last=False)
        if self._samples is not None:
            self._samples.expect((row["shard_id"], row["position"]) for row in rows)

    def _find(self, opened: _Opened, label: str, version: str | None, shard_id: str, position: int) -> Place:
        """Where a row is stored. Raises MissingError."""
        if label not in self._models:
            raise MissingError("there is no such model in this table")
        with self._lock:
            place = opened.places.get((label, version or "", shard_id, position))
        if place is not None:
            return place
        for number in opened.snapshot.holding(label, version, shard_id, position):
            with self._stored.open(opened.snapshot[number].path) as file:
                for group in range(file.num_row_groups):
                    low, high = bounds(file.metadata, group, "shard_id")
                    if low is not None and not low <= shard_id <= high:
                        continue
                    keys = read_columns(file, group, ["shard_id", "position", "model_version"])
                    mask = pc.and_(
                        pc.equal(keys.column("shard_id"), shard_id), pc.equal(keys.column("position"), position)
                    )
                    if version is not None:
                        mask = pc.and_(mask, pc.equal(keys.column("model_version"), version))
                    found = pc.index(mask, pa.scalar(True)).as_py()
                    if found >= 0:
                        return Place(number, group, found)
        raise MissingError("there is no such row in this table")

    def _pixels_of(self, path: str, place: Place) -> dict[str, Any]:
        """PIXELS of a row. The row groups that a page shows are kept; of a large one the row is read alone."""
        key = (path, place.group)
        with self._reading:
            group = self._groups.get(key)
            if group is None:
                with self._stored.open(path) as file:
                    if file.metadata.row_group(place.group).total_byte_size > LARGEST_KEPT:
                        return _row_of(file, place)
                    group = self._groups[key] = read_columns(file, place.group, PIXELS)
                while sum(kept.nbytes for kept in self._groups.values()) > KEPT_BYTES and len(self._groups) > 1:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
        (row,) = group.slice(place.row, 1).to_pylist()
        return dict(row)


def _row_of(file: Any, place: Place) -> dict[str, Any]:
    first = 0
    names = [name for name in PIXELS if name in file.schema_arrow.names]
    for batch in file.iter_batches(BATCH, row_groups=[place.group], columns=names, use_threads=False):
        if place.row < first + len(batch):
            (row,) = batch.slice(place.row - first, 1).to_pylist()
            return dict(row)
        first += len(batch)
    raise SchemaError(f"a row group has {first} rows, expected more than {place.row}")


def _start(text: str) -> Key:
    """The key that a page begins with, from its `next`. Raises ConfigError."""
    if not text:
        return START
    try:
        shard_id, position, model = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError("start: expected the `next` of a page") from error
    if not isinstance(shard_id, str) or type(position) is not int or not isinstance(model, str):
        raise ConfigError("start: expected the `next` of a page")
    if not -1 <= position <= INT32:
        raise ConfigError("start: expected the `next` of a page")
    return Key(shard_id, position, model)


def _place_of(words: Mapping[str, str]) -> tuple[str, int]:
    position = whole(words, "position", INT32)
    if position is None or "shard" not in words:
        raise ConfigError("expected shard and position of a row")
    return words["shard"], position


def _side(words: Mapping[str, str]) -> int:
    return max(16, whole(words, "size", MAX_SIDE, MAX_SIDE) or MAX_SIDE)


def _said(error: Exception) -> str:
    return (
        " ".join(redact_text(str(error)).split())[:MAX_VALUE]
        if isinstance(error, RunError)
        else "run.json does not hold a config"
    )
