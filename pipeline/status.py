"""How far an output is: expected = ok + failed + pending, from its logs alone, and what its newest run was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipeline import units
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import PredictionTable
from pipeline.units import UnitLog

__all__ = ["RUN_FILE", "Counts", "read_run", "table_counts"]

RUN_FILE = "run.json"
MAX_RUN_BYTES = 50_000_000


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of one model's current version: expected = ok + failed + pending, always."""

    model: str
    model_version: str
    expected: int
    ok: int
    failed: int
    estimated: bool

    @property
    def pending(self) -> int:
        return self.expected - self.ok - self.failed


def table_counts(table: PredictionTable, unit_log: UnitLog, versions: Mapping[str, str]) -> list[Counts]:
    """Count rows from the logs alone; no data file is opened."""
    files = table.files()
    lines = unit_log.read()
    result = []
    for model, version in versions.items():
        own = files.filter((pc.field("model") == model) & (pc.field("model_version") == version))
        rows, failed = (pc.sum(own.column(name)).as_py() or 0 for name in ("rows", "failed"))
        cover = units.coverage(lines, version)
        # An estimate may be too low for a shard in work.
        expected = max(cover.expected, rows)
        result.append(Counts(model, version, expected, rows - failed, failed, cover.estimated))
    return result


def read_run(uri: str, storage: Mapping[str, Any]) -> dict[str, Any]:
    """The newest run's run.json. Raises StorageError where there is none."""
    fs, base = open_fs(uri, storage)
    with storage_errors(join(uri, RUN_FILE)):
        data = fs.cat_file(join(base, RUN_FILE), start=0, end=MAX_RUN_BYTES)
    run: dict[str, Any] = json.loads(data)
    return run
