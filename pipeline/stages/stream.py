"""Threads between stages: read ahead with bounded memory, and map over a pool while keeping order."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import Any, Final, Generic, TypeVar

from pipeline.sources.base import UnitEnd

__all__ = ["Members", "map_ordered", "read_ahead", "ticking"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Final = object()


class Members(Generic[Item]):
    """What a unit's stream gives before its UnitEnd. rows, faults: what that said, None and none until it came."""

    def __init__(self, stream: Iterable[Item | UnitEnd]) -> None:
        self.rows: int | None = None
        self.faults: tuple[str, ...] = ()
        self._stream = stream

    def __iter__(self) -> Iterator[Item]:
        for item in self._stream:
            if isinstance(item, UnitEnd):
                self.rows, self.faults = item.rows, item.faults
            else:
                yield item


def read_ahead(items: Iterable[Item], *, count: int, weight: Callable[[Item], int], limit: int) -> Iterator[Item]:
    """Iterate in a thread of its own, at most `count` items and about `limit` of weight (bytes) ahead.

    An exception of the iterable is raised at its place. The thread ends when the consumer stops.
    """
    for item in ticking(items, count=count, weight=weight, limit=limit, tick_s=None):
        if item is not None:
            yield item


def ticking(
    items: Iterable[Item], *, count: int, weight: Callable[[Item], int], limit: int, tick_s: float | None
) -> Iterator[Item | None]:
    """`read_ahead` that also gives None whenever nothing has come for `tick_s` seconds.

    An exception of the iterable is raised at its place. The thread ends when the consumer stops.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=count)
    room = threading.Condition()
    held = 0
    stopped = threading.Event()

    def put(value: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.2)
                return
            except queue.Full:
                continue

    def produce() -> None:
        nonlocal held
        try:
            for item in items:
                size = weight(item)
                with room:
                    # One item over the limit passes alone: it has to be read anyway.
                    while held and held + size > limit and not stopped.is_set():
                        room.wait(0.2)
                    held += size
                put((item, size))
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:  # noqa: BLE001  (raised again in the consumer)
            put(error)

    thread = threading.Thread(target=produce, name="maskmill-read", daemon=True)
    thread.start()
    try:
        while True:
            try:
                value = ready.get(timeout=tick_s)
            except queue.Empty:
                yield None
                continue
            if value is _END:
                return
            if isinstance(value, BaseException):
                raise value
            item, size = value
            with room:
                held -= size
                room.notify()
            yield item
    finally:
        stopped.set()


def map_ordered(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    count: int,
    weight: Callable[[Result], int],
    limit: int,
    waited: Callable[[float], None] | None = None,
) -> Iterator[Result]:
    """`function` over `items` in a pool, results in the items' order, at most `count` calls ahead.

    An exception of a call or of the iterable is raised at its place.

    No new call starts while finished results that wait for their turn weigh `limit` or more. waited: called after a
    result was waited for, with when that began (time.monotonic).
    """
    ahead: deque[Future[Result]] = deque()
    source = iter(items)
    exhausted = False
    failure: Exception | None = None
    try:
        while True:
            while not exhausted and len(ahead) < count:
                waiting = sum(weight(future.result()) for future in ahead if future.done() and not future.exception())
                if ahead and waiting >= limit:
                    break
                try:
                    ahead.append(pool.submit(function, next(source)))
                except StopIteration:
                    exhausted = True
                except Exception as error:  # noqa: BLE001  (raised below, when the results before it are out)
                    exhausted, failure = True, error
            if not ahead:
                if failure is not None:
                    raise failure
                return
            future = ahead.popleft()
            if waited is not None and not future.done():
                started = time.monotonic()
                wait((future,))
                waited(started)
            yield future.result()
    finally:
        for future in ahead:
            future.cancel()
