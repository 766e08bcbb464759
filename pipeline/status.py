"""How far an output is: expected = ok + failed + pending, from its logs alone, and what its newest run was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import units
from pipeline.errors import SchemaError
from pipeline.storage import join, open_fs, storage_errors
from pipeline.table import RowTable
from pipeline.units import UnitLog

__all__ = ["RUN_FILE", "SCORES_FOLDER", "Counts", "read_run", "table_counts"]

RUN_FILE = "run.json"
# Where `evaluate` puts the scores of a prediction table by default, below it.
SCORES_FOLDER = "_scores"
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


def table_counts(table: RowTable, unit_log: UnitLog, versions: Mapping[str, str]) -> list[Counts]:
    """Count rows from the logs; data files are opened only where their log entries do not tell whose they are."""
    lines = unit_log.read()
    result = []
    for model, version in versions.items():
        rows, failed = table.counts(model, version)
        cover = units.coverage(lines, version)
        # An estimate may be too low for a shard in work.
        expected = max(cover.expected, rows)
        result.append(Counts(model, version, expected, rows - failed, failed, cover.estimated))
    return result


def read_run(uri: str, storage: Mapping[str, Any]) -> dict[str, Any]:
    """The newest run's run.json. Raises StorageError where there is none, SchemaError where it is none."""
    fs, base = open_fs(uri, storage)
    with storage_errors(join(uri, RUN_FILE)):
        data = fs.cat_file(join(base, RUN_FILE), start=0, end=MAX_RUN_BYTES)
    try:
        run: dict[str, Any] = json.loads(data)
        [(model["label"], model["version"]) for model in run["models"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(
            f"{join(uri, RUN_FILE)} is no run.json of maskmill: {type(error).__name__}: {error}"
        ) from error
    return run
