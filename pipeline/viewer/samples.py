"""Images and targets of single rows, read again from the run's source: together where they stand in one shard.

A tar shard is a stream, so what a page shows of it is read in one pass, and each image is handed on as it comes.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import SourceConfig
from pipeline.errors import ConfigError, MaskmillError, RunError
from pipeline.sources.base import AllBut, Sample, Unit, UnitEnd, read_unit
from pipeline.sources.registry import open_source
from pipeline.units import plan_table, row_to_unit

__all__ = ["Samples"]

KEPT_BYTES = 256 << 20
LARGEST_KEPT = 64 << 20
READERS = 4
EXPECTED = 400

Place = tuple[str, int]


class Samples:
    """The samples of a source by shard and position. For many threads."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._source = open_source(config)
        self._pool = ThreadPoolExecutor(READERS, "reader")
        self._lock = threading.Lock()
        self._planned = threading.Lock()
        self._plan: pa.Table | None = None
        self._error: MaskmillError | None = None
        self._images = True
        self._kept: OrderedDict[Place, Sample] = OrderedDict()
        self._kept_bytes = 0
        self._expected: OrderedDict[Place, None] = OrderedDict()
        self._passes: dict[str, list[_Pass]] = {}

    def expect(self, places: Iterable[Place]) -> None:
        """These are likely to be asked for soon: a pass over their shard takes them along."""
        with self._lock:
            for place in places:
                self._expected[place] = None
                self._expected.move_to_end(place)
            while len(self._expected) > EXPECTED:
                self._expected.popitem(last=False)

    def get(self, shard_id: str, position: int) -> Sample | None:
        """A sample, None where the source has none at this place. Raises RunError where the source cannot be read."""
        place = (shard_id, position)
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
        unit = self._unit(shard_id)
        return None if unit is None else self._pass(unit, position).wait(position)

    def close(self) -> None:
        """End the threads; passes that go on end with their sample."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pass(self, unit: Unit, position: int) -> "_Pass":
        """The reading of a shard that brings a position: one that goes on, or a new one."""
        with self._lock:
            passes = self._passes.setdefault(unit.shard_id, [])
            for one in passes:
                if position in one.wanted:
                    return one
            taken = {at for one in passes for at in one.wanted}
            along = {at for shard_id, at in self._expected if shard_id == unit.shard_id}
            kept = {at for shard_id, at in self._kept if shard_id == unit.shard_id}
            new = _Pass({position, *along} - taken - kept)
            passes.append(new)
        self._pool.submit(self._read, unit, new)
        return new

    def _read(self, unit: Unit, one: "_Pass") -> None:
        try:
            left = set(one.wanted)
            for item in read_unit(self._source, unit, AllBut(one.wanted, unit.rows), images=self._images):
                if not isinstance(item, UnitEnd) and item.position in left:
                    self._keep(item)
                    one.put(item)
                    left.discard(item.position)
                    if not left:
                        break
            one.finish(None)
        except Exception as error:  # noqa: BLE001  (whoever waits raises it)
            one.finish(error)
        finally:
            with self._lock:
                passes = self._passes.get(unit.shard_id, [])
                passes.remove(one)
                if not passes:
                    self._passes.pop(unit.shard_id, None)

    def _keep(self, sample: Sample) -> None:
        size = _size(sample)
        with self._lock:
            place = (sample.shard_id, sample.position)
            if size > LARGEST_KEPT or place in self._kept:
                return
            self._kept[place] = sample
            self._kept_bytes += size
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _unit(self, shard_id: str) -> Unit | None:
        """The unit, from a plan that is made once; where that failed, it is not tried again."""
        with self._planned:
            if self._error is not None:
                raise self._error
            if self._plan is None:
                try:
                    self._plan = self._make_plan()
                except MaskmillError as error:
                    self._error = error
                    raise
        at = pc.index(self._plan.column("shard_id"), pa.scalar(shard_id, pa.string())).as_py()
        return None if at < 0 else row_to_unit(self._plan.slice(at, 1).to_pylist()[0])

    def _make_plan(self) -> pa.Table:
        try:
            return plan_table(self._source.plan())
        except ConfigError:
            # COCO's files without their folder have targets alone.
            self._images = False
            return plan_table(self._source.plan(images=False))


class _Pass:
    """One reading of a shard. What it finds stays with it until everybody who waited has it."""

    def __init__(self, wanted: Collection[int]) -> None:
        self.wanted = frozenset(wanted)
        self._found: dict[int, Sample] = {}
        self._error: Exception | None = None
        self._done = False
        self._change = threading.Condition()

    def put(self, sample: Sample) -> None:
        with self._change:
            self._found[sample.position] = sample
            self._change.notify_all()

    def finish(self, error: Exception | None) -> None:
        with self._change:
            self._error, self._done = error, True
            self._change.notify_all()

    def wait(self, position: int) -> Sample | None:
        with self._change:
            self._change.wait_for(lambda: self._done or position in self._found)
            if position not in self._found and self._error is not None:
                if isinstance(self._error, MaskmillError):
                    raise self._error
                raise RunError(f"the source cannot be read: {type(self._error).__name__}") from self._error
            return self._found.get(position)


def _size(sample: Sample) -> int:
    return len(sample.image) + sum(map(len, sample.targets.values()))
