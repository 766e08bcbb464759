"""What an epoch is made of: the units of a source, each with its number of images."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.sources.base import Source, Unit, UnitEnd, read_unit

__all__ = ["SourcePlan", "plan_source"]

COUNTING_THREADS = 16


@dataclass(frozen=True)
class SourcePlan:
    """units, and how many images each has. fingerprint: changes whenever an image may have changed, come or gone."""

    units: tuple[Unit, ...]
    rows: tuple[int, ...]
    fingerprint: str

    @property
    def images(self) -> int:
        return sum(self.rows)

    @property
    def named_rows(self) -> list[tuple[str, int]]:
        return [(unit.shard_id, rows) for unit, rows in zip(self.units, self.rows, strict=True)]


def plan_source(source: Source) -> SourcePlan:
    """Plan a source and count what nobody has counted: a tar is read once for that, without its images.

    Raises ConfigError where there is no image, and what `source.plan` raises.
    """
    units = tuple(source.plan())
    with ThreadPoolExecutor(COUNTING_THREADS, "maskmill-count") as pool:
        rows = tuple(pool.map(lambda unit: _rows(source, unit), units))
    if not sum(rows):
        raise ConfigError("the source has no images")
    digest = hashlib.blake2b(digest_size=16)
    for unit, count in zip(units, rows, strict=True):
        digest.update(f"{unit.shard_id}\n{unit.fingerprint}\n{count}\n".encode())
    return SourcePlan(units, rows, digest.hexdigest())


def _rows(source: Source, unit: Unit) -> int:
    rows = unit.rows
    if rows is None:
        (rows,) = (item.rows for item in read_unit(source, unit, (), images=False) if isinstance(item, UnitEnd))
    return rows if unit.stop is None else min(rows, unit.stop)
