"""Reading a few positions of a unit: what is not wanted is skipped, and a fault behind the last of them ends."""

from collections.abc import Container, Iterator

import pytest

from pipeline.errors import StorageError, UnreadableError
from pipeline.sources import base
from pipeline.sources.base import AllBut, Sample, Unit, UnitEnd, read_unit

UNIT = Unit(shard_id="s", location="l", size_bytes=0, fingerprint="f")


class Breaks:
    """Four samples, then a fault that does not pass."""

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        yield UNIT

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        for position in range(4):
            if position not in done:
                yield Sample(image_id=f"s/{position}", shard_id="s", position=position, image=b"x")
        raise StorageError("cut")


@pytest.mark.parametrize("rows", [None, 6])
def test_a_fault_behind_the_last_wanted_sample_is_recorded_once(
    monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    monkeypatch.setattr(base, "RETRY_PAUSE_S", 0.0)
    items = [*read_unit(Breaks(), UNIT, AllBut(frozenset({1, 2}), rows))]
    samples = [item for item in items if isinstance(item, Sample)]
    assert [item.position for item in samples if item.error is None and item.position < 3] == [1, 2]
    assert isinstance(samples[-1].error, UnreadableError)
    assert isinstance(items[-1], UnitEnd)


def test_all_but() -> None:
    known, unknown = AllBut(frozenset({1, 3}), rows=5), AllBut(frozenset({1, 3}))
    assert [position in known for position in range(7)] == [True, False, True, False, True, False, False]
    assert [position in unknown for position in range(5)] == [True, False, True, False, False]
    assert 0 not in AllBut(frozenset())
