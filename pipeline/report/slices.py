"""Figures of parts of the rows: of each value of a column or of a field that the source gave its images."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.report.rows import OUTCOMES, ScoredTable
from pipeline.report.states import States, headline
from pipeline.taxonomy import Taxonomy

__all__ = ["Slices", "check_columns"]

NONE = "(none)"
ALIASES = {"shard": "shard_id"}
MAX_VALUES = 1000
# Rows that are looked at for the names of fields.
LOOK_ROWS = 100_000


def check_columns(scored: ScoredTable, names: Sequence[str]) -> None:
    """Raises ConfigError for a name that comes twice, or is no plain column of the table and no field of its first
    rows."""
    if len(set(names)) < len(names):
        raise ConfigError(f"--by: expected each column once, got {', '.join(names)}")
    missing = {name for name in names if ALIASES.get(name, name) not in scored.columns}
    fields: set[str] = set()
    looked = 0
    for batch in scored.scan(["fields"]) if missing else ():
        fields |= set(pc.unique(batch["fields"].keys).to_pylist())
        looked += len(batch)
        if missing <= fields or looked >= LOOK_ROWS:
            break
    for name in names:
        if name in missing - fields:
            known = sorted({*scored.columns, *ALIASES, *fields})
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"--by: the rows have no column and no field {name!r}; {hint}")


class Slices:
    """Counts and states by value of one column or field."""

    def __init__(self, name: str, taxonomy: Taxonomy) -> None:
        """name: one that `check_columns` has let through."""
        self.name = name
        self.column = ALIASES.get(name, name)
        self._taxonomy = taxonomy
        self._states: dict[str, States] = {}
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, block: pa.RecordBatch) -> None:
        """Add rows of any outcome. Raises ConfigError where there are too many values."""
        values = self._values(block).dictionary_encode()
        names = values.dictionary.to_pylist()
        place = values.indices.to_numpy()
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(names) + 1)).tolist()
        part = block.select(["outcome", "score"]).take(pa.array(order))
        for name, start, stop in zip(names, starts, starts[1:], strict=False):
            if name not in self._counts and len(self._counts) == MAX_VALUES:
                raise ConfigError(f"--by {self.name} has more than {MAX_VALUES} values, such as {name!r}")
            counts = self._counts.setdefault(name, dict.fromkeys(("images", *OUTCOMES), 0))
            states = self._states.setdefault(name, States(self._taxonomy, confusion=False))
            own = part.slice(start, stop - start)
            counts["images"] += len(own)
            for outcome in own["outcome"].to_pylist():
                counts[outcome] += 1
            states.add(own.filter(pc.equal(own["outcome"], "ok"))["score"])

    def _values(self, block: pa.RecordBatch) -> pa.Array:
        if self.column in block.schema.names:
            return pc.fill_null(block[self.column].cast(pa.string()), NONE)
        return pc.fill_null(pc.map_lookup(block["fields"], self.name, "first"), NONE)

    def compute(self) -> dict[str, Any]:
        """{by, values: [{value, counts, and the headline figures of each section}]}, by value."""
        values = []
        for name in sorted(self._counts):
            sections = self._states[name].sections(self._states[name].detections())
            values.append({"value": name, "counts": self._counts[name], **headline(sections)})
        return {"by": self.name, "values": values}
