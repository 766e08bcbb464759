"""What a training worker spends its time on."""

from collections.abc import Iterator

import pytest

from pipeline.training import timing
from pipeline.training.timing import Stopwatch, slowest


class Clock:
    """Seconds pass when they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_seconds_by_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(), Stopwatch()
    monkeypatch.setattr(timing, "time", clock)

    def items() -> Iterator[int]:
        for index in range(3):
            clock.now += 2.0
            yield index
        clock.now += 5.0

    seen = []
    for item in watch.each("read", items()):
        with watch.during("learn"):
            clock.now += 1.0
        seen.append(item)

    def fail() -> None:
        with watch.during("save"):
            clock.now += 4.0
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        fail()
    assert seen == [0, 1, 2]
    assert watch.take() == {"read": 11.0, "learn": 3.0, "validate": 0.0, "save": 4.0}
    assert not any(watch.take().values())


def test_the_slowest_reader_is_what_the_others_wait_for() -> None:
    first = {"read": 1.0, "learn": 9.0, "validate": 0.0, "save": 0.0}
    second = {"read": 8.0, "learn": 2.0, "validate": 0.0, "save": 0.0}
    assert slowest([first, second]) is second
