"""Threads between stages: order, exceptions at their place, bounded reading ahead, and an end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stages.stream import map_ordered, read_ahead, ticking

BOUNDS = {"count": 4, "limit": 1000}


def one(_: object) -> int:
    return 1


def wait_for(condition: Callable[[], bool], timeout_s: float = 5) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def readers() -> int:
    return sum(thread.name == "maskmill-read" for thread in threading.enumerate())


class Source:
    """Numbers that remember how far they were read, and may raise."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.count, self.fail_at, self.read, self.closed = count, fail_at, 0, False

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                if number == self.fail_at:
                    raise KeyError("here")
                self.read = number + 1
                yield number
        finally:
            self.closed = True


@given(st.lists(st.integers(0, 50)), st.integers(1, 5), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_everything_comes_once_and_in_order(items: list[int], count: int, limit: int) -> None:
    assert list(read_ahead(items, count=count, weight=lambda item: item, limit=limit)) == items


@pytest.mark.parametrize("fail_at", [0, 3, 9])
def test_an_exception_is_raised_at_its_place(fail_at: int) -> None:
    seen: list[int] = []
    with pytest.raises(KeyError, match="here"):
        seen.extend(read_ahead(Source(10, fail_at), **BOUNDS, weight=one))
    assert seen == list(range(fail_at))
    assert wait_for(lambda: readers() == 0)


def test_a_weight_that_raises_is_raised_too() -> None:
    with pytest.raises(ZeroDivisionError):
        list(read_ahead([1], **BOUNDS, weight=lambda item: item // 0))


@pytest.mark.parametrize("bounds", [{"count": 3, "limit": 10**9}, {"count": 10**6, "limit": 5}])
def test_the_thread_ends_when_the_consumer_stops(bounds: dict[str, int]) -> None:
    source = Source(10**9)
    items = read_ahead(source, **bounds, weight=one)
    assert [next(items), next(items)] == [0, 1]
    assert readers() == 1
    items.close()
    assert wait_for(lambda: readers() == 0)
    assert wait_for(lambda: source.closed)


def test_nothing_is_read_before_the_first_item_is_asked_for() -> None:
    source = Source(5)
    items = read_ahead(source, **BOUNDS, weight=one)
    time.sleep(0.05)
    assert source.read == 0
    assert next(items) == 0
    items.close()


@pytest.mark.parametrize(
    ("bounds", "size", "most"),
    [
        ({"count": 3, "limit": 10**9}, 1, 3),
        ({"count": 10**6, "limit": 50}, 10, 5),
        ({"count": 10**6, "limit": 5}, 10, 1),  # an item over the limit passes alone
    ],
)
def test_reading_ahead_is_bounded(bounds: dict[str, int], size: int, most: int) -> None:
    source = Source(100)
    items = read_ahead(source, **bounds, weight=lambda _: size)
    for taken in range(1, 6):
        next(items)
        # One more is in the reader's hand: it has to be read before its weight is known.
        assert wait_for(lambda taken=taken: source.read >= taken + most)
        time.sleep(0.02)
        assert source.read <= taken + most + 1
    items.close()


def test_ticking_gives_none_while_nothing_comes() -> None:
    go = threading.Event()

    def slow() -> Iterator[str]:
        yield "first"
        go.wait(10)
        yield "second"

    items = ticking(slow(), **BOUNDS, weight=one, tick_s=0.01)
    seen: list[str | None] = []
    for item in items:
        seen.append(item)
        if seen.count(None) == 3:
            go.set()
    assert [item for item in seen if item] == ["first", "second"]
    assert seen[0] == "first" or seen[0] is None
    assert seen.count(None) >= 3


def test_read_ahead_never_ticks() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    assert list(read_ahead(slow(), **BOUNDS, weight=one)) == [0, 1, 2]


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_map_keeps_the_order(items: list[int], count: int, threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(item / 3000)
        return item * 10

    with ThreadPoolExecutor(threads) as pool:
        assert list(map_ordered(pool, work, items, count=count, weight=one, limit=3)) == [item * 10 for item in items]


@pytest.mark.parametrize("fail_at", [0, 4, 7])
@pytest.mark.parametrize("where", ["call", "source"])
def test_map_raises_at_its_place(fail_at: int, where: str) -> None:
    def work(item: int) -> int:
        if where == "call" and item == fail_at:
            raise KeyError("here")
        time.sleep(0.005)
        return item

    seen: list[int] = []
    source = Source(8, fail_at if where == "source" else None)
    with ThreadPoolExecutor(2) as pool:
        results = map_ordered(pool, work, source, count=4, weight=one, limit=9)
        with pytest.raises(KeyError, match="here"):
            seen.extend(results)
    assert seen == list(range(fail_at))


@pytest.mark.parametrize(("count", "weight", "most"), [(3, 0, 3), (8, 10, 4)])
def test_map_is_bounded_by_count_and_by_finished_weight(count: int, weight: int, most: int) -> None:
    source = Source(40)
    # One thread that finishes quickly: what waits for its turn is finished, and weighs.
    with ThreadPoolExecutor(1) as pool:
        results = map_ordered(pool, lambda item: item, source, count=count, weight=lambda _: weight, limit=30)
        for taken in range(1, 10):
            next(results)
            time.sleep(0.01)
            assert source.read <= taken + (count if weight == 0 else max(count, most))
        results.close()


def test_finished_results_that_wait_hold_back_new_calls() -> None:
    gate = threading.Event()
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 0:
            gate.wait(10)
        return item

    with ThreadPoolExecutor(4) as pool:
        results = map_ordered(pool, work, Source(100), count=50, weight=lambda _: 10, limit=10)
        thread = threading.Thread(target=lambda: next(results))
        thread.start()
        assert wait_for(lambda: len(started) >= 2)
        time.sleep(0.05)
        assert len(started) < 50
        gate.set()
        thread.join()
        results.close()


def test_a_consumer_that_stops_cancels_what_has_not_started() -> None:
    started: list[int] = []
    gate = threading.Event()

    def work(item: int) -> int:
        started.append(item)
        if item:
            gate.wait(10)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = map_ordered(pool, work, range(100), count=20, weight=one, limit=10**9)
        assert next(results) == 0
        results.close()
        gate.set()
    assert len(started) <= 2
