"""Waits of a call, and the pauses of an accelerator that they explain."""

import time
from collections.abc import Iterator
from math import inf

import pytest

from pipeline.stages.waits import CAUSES, Span, Waits, idle_by_cause


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], {"other": 10.0}),
        ([("read", 0.0, 200.0)], {"read": 10.0}),
        ([("read", 0.0, 100.0)], {"other": 10.0}),
        ([("read", 110.0, 200.0)], {"other": 10.0}),
        ([("dispatch", -inf, 103.0), ("read", 103.0, 110.0)], {"dispatch": 3.0, "read": 7.0}),
        # What was waited for while the accelerator was at work explains nothing.
        ([("decode", 0.0, 99.0), ("write", 101.0, 108.0)], {"write": 7.0, "other": 3.0}),
        ([("read", 101.0, 102.0), ("decode", 102.0, 104.0), ("read", 105.0, 109.0)],
         {"read": 5.0, "decode": 2.0, "other": 3.0}),
    ],
)  # fmt: skip
def test_a_pause_by_cause(spans: list[Span], expected: dict[str, float]) -> None:
    seconds = idle_by_cause(spans, 100.0, 110.0)
    assert seconds == pytest.approx(expected)
    assert set(seconds) <= set(CAUSES)
    assert sum(seconds.values()) == pytest.approx(10)


def test_waits_are_handed_over_once() -> None:
    waits = Waits()
    started = time.monotonic()
    time.sleep(0.01)
    waits.add("write", started)
    waits.add("encode", time.monotonic())  # nothing to speak of
    (dispatch, write) = waits.take()
    assert dispatch[:2] == ("dispatch", -inf)
    assert write[:2] == ("write", started)
    assert write[2] - started >= 0.01
    assert waits.take() == []


def test_waiting_over_an_iterable_notes_what_it_took_to_come() -> None:
    def slow() -> Iterator[int]:
        yield 1
        time.sleep(0.02)
        yield 2
        time.sleep(0.02)

    waits = Waits()
    waits.take()
    started = time.monotonic()
    for _ in waits.over("read", slow()):
        time.sleep(0.05)  # the consumer's own time
    spans = waits.take()
    assert {cause for cause, _, _ in spans} == {"read"}
    assert 0.04 <= sum(end - begin for _, begin, end in spans) <= time.monotonic() - started - 0.1


def test_what_an_iterable_raises_comes_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("here")

    seen = []
    with pytest.raises(KeyError, match="here"):
        seen.extend(Waits().over("read", broken()))
