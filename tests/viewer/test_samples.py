"""Images of a page: one pass over a shard for all of them, each handed on as it comes, and nothing held for ever."""

import threading
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.config import ScenesSource
from pipeline.errors import RunError, StorageError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.viewer import samples as module
from pipeline.viewer.samples import Samples


class Fake:
    """A source of two shards of ten samples; it waits before position 5 until it may go on, and counts its passes."""

    def __init__(self) -> None:
        self.passes: list[str] = []
        self.goes_on = threading.Event()
        self.error: Exception | None = None

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        if self.error:
            raise self.error
        for shard_id in ("a", "b"):
            yield Unit(shard_id=shard_id, location=shard_id, size_bytes=1, fingerprint="f")

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        self.passes.append(unit.shard_id)
        for position in range(10):
            if position == 5:
                self.goes_on.wait(20)
            if position not in done:
                image = b"x" * 100
                yield Sample(
                    image_id=f"{unit.shard_id}{position}", shard_id=unit.shard_id, position=position, image=image
                )
        yield UnitEnd(rows=10)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    source = Fake()
    monkeypatch.setattr(module, "open_source", lambda _: source)
    return source


def opened() -> Samples:
    return Samples(ScenesSource(format="scenes"))


def test_one_pass_brings_what_the_page_shows_and_hands_on_what_it_has(fake: Fake) -> None:
    samples = opened()
    samples.expect(("a", position) for position in (1, 3, 8))
    with ThreadPoolExecutor(3) as pool:
        late = pool.submit(samples.get, "a", 8)
        early = samples.get("a", 1)  # while the pass still waits for position 5
        assert early is not None
        assert early.image_id == "a1"
        assert not late.done()
        fake.goes_on.set()
        found = late.result(20)
        assert found is not None
        assert found.image_id == "a8"
    assert samples.get("a", 3) is not None
    assert fake.passes == ["a"]
    assert samples.get("b", 2) is not None
    assert fake.passes == ["a", "b"]
    samples.close()


def test_what_is_not_there_is_none(fake: Fake) -> None:
    fake.goes_on.set()
    samples = opened()
    assert samples.get("c", 0) is None
    assert samples.get("a", 99) is None
    samples.close()


def test_a_source_that_is_gone_says_so_each_time(fake: Fake) -> None:
    fake.error = StorageError("the bucket is gone")
    samples = opened()
    for _ in range(2):
        with pytest.raises(StorageError, match="gone"):
            samples.get("a", 0)
    samples.close()


def test_an_error_while_reading_reaches_whoever_waits(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[Any]:
        raise ZeroDivisionError("a bug")
        yield

    monkeypatch.setattr(module, "read_unit", broken)
    samples = opened()
    with pytest.raises(RunError, match="ZeroDivisionError"):
        samples.get("a", 0)
    assert samples._passes == {}
    samples.close()


def test_kept_bytes_are_bounded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.goes_on.set()
    monkeypatch.setattr(module, "KEPT_BYTES", 250)
    samples = opened()
    samples.expect(("a", position) for position in range(10))
    assert samples.get("a", 0) is not None
    assert samples.get("a", 9) is not None
    assert len(samples._kept) <= 2
    assert samples._kept_bytes <= 250
    samples.close()
