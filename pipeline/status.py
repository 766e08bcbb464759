"""How far an output is: expected = ok + failed + pending, from its logs alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import units
from pipeline.table import RowTable
from pipeline.units import UnitLog

__all__ = ["Counts", "table_counts"]


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
