"""What of a corpus is looked at: units spread over the plan, positions spread over a unit, both by seed."""

import contextlib
import hashlib
import itertools
import random
from collections.abc import Container
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError
from pipeline.sources.base import AllBut, Source, Unit, UnitEnd
from pipeline.units import row_to_unit

__all__ = ["Corpus", "Part", "choose", "choose_units", "describe_plan"]

# An archive up to this size is read once to learn how many images it has; of larger ones the beginning is looked at.
COUNTED_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the plan says. size_bytes: None where some unit's is unknown. rows: of the units that say them.

    unstated: units that do not say their rows. unstated_bytes: their size in all. limit: of the config.
    """

    units: int
    size_bytes: int | None
    rows: int
    unstated: int
    unstated_bytes: int
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of one unit is looked at. done: positions that are not. rows: of the unit, None where it was not counted.

    last: its last position where chance did not choose it. What cut a unit off stands there.
    """

    unit: Unit
    done: Container[int]
    rows: int | None
    last: int | None = None


class _Everything:
    def __contains__(self, position: object) -> bool:
        return True


def describe_plan(plan: pa.Table, limit: int | None) -> Corpus:
    """plan: `units.plan_table` of a source."""
    rows, stop, sizes = plan.column("rows"), plan.column("stop"), plan.column("size_bytes")
    stated = pc.min_element_wise(rows, stop, skip_nulls=True).filter(pc.is_valid(rows))
    unstated = plan.filter(pc.is_null(rows))
    return Corpus(
        units=len(plan),
        size_bytes=None if not len(plan) or pc.min(sizes).as_py() == 0 else pc.sum(sizes).as_py(),
        rows=pc.sum(stated).as_py() or 0,
        unstated=len(unstated),
        unstated_bytes=pc.sum(unstated.column("size_bytes")).as_py() or 0,
        limit=limit,
    )


def choose_units(plan: pa.Table, count: int, seed: int) -> list[Unit]:
    """One unit at random from each of `count` equal stretches of the plan; all where there are no more."""
    draw = random.Random(seed)  # noqa: S311  (a sample, not a secret)
    if len(plan) <= count:
        places = list(range(len(plan)))
    else:
        edges = [index * len(plan) // count for index in range(count + 1)]
        places = [draw.randrange(low, high) for low, high in itertools.pairwise(edges)]
    return [row_to_unit(row) for row in plan.take(places).to_pylist()]


def choose(source: Source, unit: Unit, images: int, seed: int) -> Part:
    """At most `images` positions of a unit, at random where its rows are known or soon counted, else its first."""
    rows = unit.rows
    if rows is not None and unit.stop is not None:
        rows = min(rows, unit.stop)
    if rows is None and 0 < unit.size_bytes <= COUNTED_BYTES:
        rows = _count(source, unit)
    if rows is None:
        stop = images if unit.stop is None else min(images, unit.stop)
        return Part(unit=replace(unit, stop=stop), done=frozenset(), rows=None)
    if rows <= images:
        return Part(unit=unit, done=frozenset(), rows=rows)
    key = hashlib.blake2b(f"{seed} {unit.shard_id}".encode(), digest_size=8).digest()
    wanted = set(random.Random(int.from_bytes(key, "big")).sample(range(rows), images))  # noqa: S311
    last = None if rows - 1 in wanted else rows - 1
    return Part(unit=unit, done=AllBut(wanted | {rows - 1}, rows), rows=rows, last=last)


def _count(source: Source, unit: Unit) -> int | None:
    """Rows of a unit, a failed end included; None where storage fails, which reading its images will tell."""
    with contextlib.suppress(StorageError):
        for item in source.read(unit, _Everything()):
            if isinstance(item, UnitEnd):
                return item.rows
    return None
