"""What a reader asks of the table: which rows, in which order. Made from the words of an address, each checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.report.figures import IMAGE_FIGURES, image_figures
from pipeline.schema import FAILED, OK

__all__ = ["PAGE_ROWS", "SORTS", "Key", "Query", "parse_query"]

PAGE_ROWS = 48
MAX_PAGE_ROWS = 100
MAX_TEXT = 500
MAX_CLASS = 65535
NATURAL = "order"
OBJECTS = "objects"
# The columns of `quality` under the names that the page has for them.
QUALITY = {
    "confidence": "mean_max_probability",
    "entropy": "mean_entropy",
    "low_confidence": "low_confidence_share",
}
FIGURES = tuple(figure.name for figure in IMAGE_FIGURES)
# A leading minus: from the largest value down.
SORTS = (NATURAL, *(f"{sign}{name}" for name in (*QUALITY, OBJECTS, *FIGURES) for sign in ("", "-")))


class Key(NamedTuple):
    """Where a row stands in the natural order of a table."""

    shard_id: str
    position: int
    model: str

    def after(self) -> "Key":
        """The smallest key behind this one."""
        return Key(self.shard_id, self.position, f"{self.model}\0")


START = Key("", -1, "")


@dataclass(frozen=True, kw_only=True)
class Query:
    """Rows of the models in `versions` (None: of any version) that fit everything that is set.

    class_id: somewhere in the label map or among the segments. low_score, high_score: of a segment, of that class where
    there is one. low_confidence, high_confidence: of the mean largest probability. shard, text: parts of the shard_id
    and of the image_id, as they are written.
    """

    versions: Mapping[str, str | None] = field(hash=False)
    status: str = ""
    class_id: int | None = None
    low_score: float | None = None
    high_score: float | None = None
    low_confidence: float | None = None
    high_confidence: float | None = None
    shard: str = ""
    text: str = ""
    sort: str = NATURAL

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal questions."""
        rest = (self.status, self.class_id, self.low_score, self.high_score, self.low_confidence, self.high_confidence)
        return (*sorted(self.versions.items()), *rest, self.shard, self.text, self.sort)

    @property
    def asks_segments(self) -> bool:
        return self.class_id is not None or self.low_score is not None or self.high_score is not None

    @property
    def asks_confidence(self) -> bool:
        return self.low_confidence is not None or self.high_confidence is not None

    @property
    def columns(self) -> list[str]:
        """What `matches` needs of a row, as top-level columns and leaves (`semantic.format`)."""
        names = ["shard_id", "position", "model_version"]
        names += ["image_id"] * bool(self.text) + ["status"] * bool(self.status)
        names += ["quality"] * self.asks_confidence
        names += ["segments.category_id", "segments.score"] * self.asks_segments
        return names

    def matches(self, rows: pa.Table, model: str) -> pa.Array:
        """Which of a model's rows fit, but for the classes of label maps: a boolean array without nulls."""
        masks = [pa.repeat(pa.scalar(True), len(rows))]
        version = self.versions.get(model)
        if version is not None:
            masks.append(pc.equal(rows.column("model_version"), version))
        if self.status:
            masks.append(pc.equal(rows.column("status"), self.status))
        for name, text in (("shard_id", self.shard), ("image_id", self.text)):
            if text:
                masks.append(pc.match_substring(rows.column(name), text))
        if self.asks_confidence:
            value = pc.struct_field(rows.column("quality"), QUALITY["confidence"])
            masks.append(_between(value, self.low_confidence, self.high_confidence))
        if self.asks_segments:
            masks.append(self._has_segment(rows))
        whole = masks[0]
        for mask in masks[1:]:
            whole = pc.and_(whole, pc.fill_null(mask, False))
        return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole

    def _has_segment(self, rows: pa.Table) -> pa.Array:
        """Whether one segment fits; null where the row has none, so that its label map is asked."""
        lists = rows.column("segments").combine_chunks()
        values = pc.list_flatten(lists)
        fits = _between(pc.struct_field(values, "score"), self.low_score, self.high_score)
        if self.class_id is not None:
            fits = pc.and_(fits, pc.equal(pc.struct_field(values, "category_id"), self.class_id))
        found = np.zeros(len(rows), bool)
        parents = pc.list_parent_indices(lists).to_numpy()
        found[parents[pc.fill_null(fits, False).to_numpy(zero_copy_only=False)]] = True
        if not self.asks_maps:
            return pa.array(found)
        return pa.array(found | lists.is_null().to_numpy(zero_copy_only=False))

    @property
    def asks_maps(self) -> bool:
        """Whether rows of label maps alone are to be decoded: a map has no scores, so one that asks for them has none
        that fit."""
        return self.class_id is not None and self.low_score is None and self.high_score is None

    @property
    def sort_columns(self) -> list[str]:
        name = self.sort.removeprefix("-")
        if name in QUALITY:
            return ["quality"]
        return ["segments.category_id"] if name == OBJECTS else ["score"]

    def values(self, rows: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
        """What rows are sorted by, smallest first, (N,); NaN for rows that have no such value. Raises SchemaError."""
        name = self.sort.removeprefix("-")
        if name in QUALITY:
            column = pc.struct_field(rows.column("quality"), QUALITY[name])
        elif name == OBJECTS:
            column = pc.list_value_length(rows.column("segments"))
        else:
            column = pa.array(image_figures(rows.column("score").combine_chunks())[name])
        value_N: np.ndarray[Any, np.dtype[np.float64]] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return -value_N if self.sort.startswith("-") else value_N


def _between(values: pa.Array, low: float | None, high: float | None) -> pa.Array:
    fits = pc.is_valid(values)
    if low is not None:
        fits = pc.and_(fits, pc.greater_equal(values, low))
    if high is not None:
        fits = pc.and_(fits, pc.less_equal(values, high))
    return fits


def parse_query(words: Mapping[str, str], versions: Mapping[str, str | None]) -> Query:
    """A query from an address: model (a label, or label@version; none: every model), status, class, score_min,
    score_max, conf_min, conf_max, shard, text, sort.

    versions: the current version of each model. Raises ConfigError.
    """
    model = _text(words, "model")
    chosen = dict(versions)
    if model:
        label, at, version = model.rpartition("@")
        if model in versions:
            chosen = {model: versions[model]}
        elif at and label in versions:
            chosen = {label: version}
        else:
            raise ConfigError(f"model: there is no {model!r}")
    status, sort = _text(words, "status"), _text(words, "sort") or NATURAL
    if status not in ("", OK, FAILED):
        raise ConfigError(f"status: expected {OK} or {FAILED}, got {status!r}")
    if sort not in SORTS:
        raise ConfigError(f"sort: expected one of {', '.join(SORTS)}, got {sort!r}")
    return Query(
        versions=chosen,
        status=status,
        class_id=whole(words, "class", MAX_CLASS),
        low_score=_number(words, "score_min"),
        high_score=_number(words, "score_max"),
        low_confidence=_number(words, "conf_min"),
        high_confidence=_number(words, "conf_max"),
        shard=_text(words, "shard"),
        text=_text(words, "text"),
        sort=sort,
    )


def _text(words: Mapping[str, str], name: str) -> str:
    text = words.get(name, "")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{name}: expected at most {MAX_TEXT} characters, got {len(text)}")
    return text


def whole(words: Mapping[str, str], name: str, most: int, default: int | None = None) -> int | None:
    """A whole number from 0 to `most`, `default` where there is none. Raises ConfigError."""
    text = words.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= most):
        raise ConfigError(f"{name}: expected a whole number from 0 to {most}, got {text[:40]!r}")
    return int(text)


def _number(words: Mapping[str, str], name: str) -> float | None:
    text = words.get(name, "")
    if not text:
        return None
    try:
        value = float(text[:40])
    except ValueError as error:
        raise ConfigError(f"{name}: expected a number, got {text[:40]!r}") from error
    if not math.isfinite(value):
        raise ConfigError(f"{name}: expected a number, got {text[:40]!r}")
    return value
