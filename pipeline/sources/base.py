"""What every source promises: a cheap plan of units, and a reader that streams one unit's samples in order.

A unit is what one worker reads: a tar shard, a row group, a slice of a listing. Planning lists and never opens samples;
reading yields encoded bytes and never decodes them. A sample that cannot be read is yielded with its error, so that
nothing vanishes.
"""

import time
from collections.abc import Callable, Container, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.errors import RowError, StorageError, UnreadableError

__all__ = ["AllBut", "Sample", "Source", "Unit", "UnitEnd", "read_unit", "unreadable"]

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit of work, small enough to plan a million of.

    shard_id: URI relative to the source's root, plus `#n` where a file or listing is cut.
    location: what the reader opens (absolute, fsspec style).
    size_bytes: encoded size, for packing and ETA; 0 where unknown.
    fingerprint: changes whenever the content may have (size and etag or mtime).
    rows: how many samples it holds, where that is known without opening it.
    cut: which part of `location` (row group, slice).
    stop: only positions below it belong to this run (`source.limit`).
    payload: what else the reader needs, opaque to everybody else.
    """

    shard_id: str
    location: str
    size_bytes: int
    fingerprint: str
    rows: int | None = None
    cut: int = 0
    stop: int | None = None
    payload: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image as the source holds it.

    image: encoded bytes, empty where `error` is set or only targets were asked for.
    targets: encoded targets by kind: `semantic` (PNG), `panoptic` (PNG), `segments` (JSON), `instances` (JSON with
        `annotations`, and the image's `width` and `height` where they are known), `depth` (PNG, or .npy in
        metres); and `prompts` (JSON), which are no target but go the same way: where promptable models shall look
        (pipeline/prompts.py).
    fields: further columns that the source knows (captures of a path template, for slicing reports).
    """

    image_id: str
    shard_id: str
    position: int
    image: bytes
    targets: Mapping[str, bytes] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    error: RowError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitEnd:
    """The last thing a reader yields: how many positions the unit has, skipped and failed ones included.

    faults: of the storage, that were met and survived just before it.
    """

    rows: int
    faults: tuple[str, ...] = ()


class Source(Protocol):
    """Where samples come from. Instances are small, picklable and hold no open files.

    `images=False` is for targets alone: no image is asked for, so a missing or broken one is no error, and nothing is
    transferred for images where that can be helped. Units, image ids and positions are the same either way.
    """

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        """List the units in a stable order.

        Raises StorageError where the root is missing or refused, ConfigError where nothing matches or where the source
        has no images and they are asked for.
        """
        ...

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        """Stream the samples of `unit` whose position is not in `done`, by ascending position, then one UnitEnd.

        images: as in the call of `plan` that gave the unit. Raises StorageError for a fault that may pass (a reset, a
        timeout); what stays wrong is yielded as a Sample with an error.
        """
        ...


def unreadable(unit: Unit, position: int, reason: str) -> Iterator[Sample | UnitEnd]:
    """The rest of a unit from `position` on as one recorded failure."""
    where = f"{unit.shard_id}: {reason}" if position == 0 else f"{unit.shard_id} from sample {position} on: {reason}"
    yield Sample(
        image_id=f"{unit.shard_id}/!unreadable",
        shard_id=unit.shard_id,
        position=position,
        image=b"",
        error=UnreadableError(where),
    )
    yield UnitEnd(rows=position + 1)


@dataclass(frozen=True)
class AllBut:
    """The positions of a unit that are not wanted, as `Source.read` takes them. rows: of the unit, where known."""

    wanted: Set[int]
    rows: int | None = None

    def __contains__(self, position: object) -> bool:
        # Beyond the end nothing is done, or a reader that looks for the first open position would search for ever.
        end = max(self.wanted, default=-1) + 1 if self.rows is None else self.rows
        return position not in self.wanted and isinstance(position, int) and position < end


class _Both:
    """Two containers seen as one."""

    def __init__(self, first: Container[int], second: Container[int]) -> None:
        self.first, self.second = first, second

    def __contains__(self, position: object) -> bool:
        return position in self.first or position in self.second


def read_unit(
    source: Source,
    unit: Unit,
    done: Container[int],
    attempts: int = READ_ATTEMPTS,
    *,
    images: bool = True,
    on_fault: Callable[[StorageError], None] | None = None,
) -> Iterator[Sample | UnitEnd]:
    """`source.read` that survives passing storage faults: it reads again and skips what it has already yielded.

    It waits 0.5 s after the first fault and twice as long after each further one. After `attempts` faults without a
    sample in between, the rest of the unit becomes one failed sample. on_fault: told of each fault that it reads again
    after.
    """
    seen: set[int] = set()
    position = 0
    faults = 0
    while True:
        try:
            for item in source.read(unit, _Both(done, seen), images=images):
                if isinstance(item, UnitEnd):
                    yield item
                    return
                yield item
                seen.add(item.position)
                position, faults = item.position + 1, 0
            raise StorageError(f"{unit.shard_id}: the source ended without a UnitEnd")
        except StorageError as error:
            faults += 1
            if faults < attempts:
                if on_fault is not None:
                    on_fault(error)
                time.sleep(RETRY_PAUSE_S * 2 ** (faults - 1))
            else:
                while position in done:
                    position += 1
                yield from unreadable(unit, position, f"{error} (after {attempts} attempts)")
                return
