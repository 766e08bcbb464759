"""The unit log: the last line counts, finished means as far as the plan asks, and a million units are cheap."""

import random
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import units
from pipeline.schema import UNITS
from pipeline.sources.base import Unit
from pipeline.units import PLAN, Coverage, UnitLog, plan_table, row_to_unit

SIZES = st.integers(0, 2**62)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
UNIT = st.builds(
    Unit,
    shard_id=TEXT,
    location=TEXT,
    size_bytes=SIZES,
    fingerprint=TEXT,
    rows=st.none() | SIZES,
    cut=SIZES,
    stop=st.none() | SIZES,
    payload=st.binary(max_size=30),
)


def unit(shard_id: str, **fields: Any) -> Unit:
    return Unit(**{"shard_id": shard_id, "location": "", "size_bytes": 100, "fingerprint": "f", **fields})


@pytest.fixture
def log(tmp_path: Path) -> UnitLog:
    log = UnitLog(str(tmp_path / "o ut"), {})
    log.create(1)
    return log


@settings(max_examples=50, deadline=None)
@given(st.lists(UNIT, max_size=5))
def test_a_plan_keeps_every_unit(planned: list[Unit]) -> None:
    table = plan_table(iter(planned))
    assert table.schema.equals(PLAN)
    assert [row_to_unit(row) for row in table.to_pylist()] == planned


def test_a_plan_of_several_chunks_keeps_the_order() -> None:
    table = plan_table(unit(str(index)) for index in range(2 * units.CHUNK + 1))
    assert table.column("shard_id").to_pylist() == [str(index) for index in range(2 * units.CHUNK + 1)]


def test_the_log_comes_back_as_written(log: UnitLog) -> None:
    assert log.read().equals(UNITS.empty_table())
    log.append_plan(plan_table([unit("a", rows=3), unit("b", stop=7, fingerprint="g")]), "r1")
    log.append_finished([("a", "v1", 3, None), ("b", "v1", 7, 7)], "r1")
    log.append_finished([], "r1")
    log.append_finished([("a", "v1", None, None)], "r2")
    log.append_forgotten(["b"], "r2")
    log.append_forgotten([], "r2")
    lines = log.read()
    assert lines.schema.equals(UNITS)
    assert [tuple(line.values())[1:] for line in lines.to_pylist()] == [
        ("a", "", "f", 100, 3, None, "r1"),
        ("b", "", "g", 100, None, 7, "r1"),
        ("a", "v1", None, None, 3, None, "r1"),
        ("b", "v1", None, None, 7, 7, "r1"),
        ("a", "v1", None, None, None, None, "r2"),
        ("b", "", None, None, None, None, "r2"),
    ]
    assert units.planned(lines).column("shard_id").to_pylist() == ["a"]
    assert units.finished(lines, "v1").column("shard_id").to_pylist() == ["b"]
    assert units.finished_of(lines, ["a", "b", "c"]) == [("b", "v1")]


def test_reopening_goes_on_after_the_last_line(log: UnitLog, tmp_path: Path) -> None:
    log.append_finished([("a", "v1", 3, None)], "r1")
    again = UnitLog(f"file://{tmp_path}/o ut", {})
    again.create(2)
    again.append_finished([("a", "v1", None, None)], "r2")
    # The first driver is late: whatever it notes now is older.
    log.append_finished([("a", "v1", 3, None), ("b", "v1", 4, None)], "r1")
    lines = UnitLog(str(tmp_path / "o ut"), {}).read()
    assert lines.column("order").to_pylist() == sorted(set(lines.column("order").to_pylist()))
    assert units.finished(lines, "v1").column("shard_id").to_pylist() == ["b"]


def test_many_notes_are_merged_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "NOTES_PER_MERGE", 4)
    uri = str(tmp_path)
    log, other = UnitLog(uri, {}), UnitLog(str(tmp_path / "other"), {})
    log.create(1)
    other.create(1)
    monkeypatch.setattr(other, "merge", lambda: None)
    for number in range(10):
        for each in (log, other):
            each.append_plan(plan_table([unit(f"é {number % 3}.tar", rows=number)]), "r1")
            each.append_finished([(f"é {number % 3}.tar", "v1", number or None, None)], "r1")
    assert log.read().equals(other.read())
    assert units.finished(log.read(), "v1").equals(units.finished(other.read(), "v1"))

    def files(each: UnitLog) -> int:
        return len(DeltaTable(each.uri).file_uris())

    # 5 merges; none of them rewrote what is as large as a merged file is to be.
    assert (files(log), files(other)) == (1, 20)
    reader = DeltaTable(log.uri)
    log.append_finished([("x", "v1", 1, None)], "r1")
    again = UnitLog(uri, {})
    other.create(2)  # more than enough notes of an earlier driver: merged at once
    again.create(2)
    assert files(again) == 2
    assert len(reader.to_pyarrow_table()) == 20  # its files are still there
    assert len(again.read()) == 21


def test_a_merge_that_fails_is_said_and_the_lines_are_there(
    log: UnitLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(units, "NOTES_PER_MERGE", 2)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(DeltaTable, "create_checkpoint", refuse)
    log.append_finished([("a", "v1", 3, None)], "r1")
    log.append_finished([("b", "v1", 3, None)], "r1")
    assert "the unit log was not merged" in caplog.text
    assert len(log.read()) == 2


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert UnitLog(str(tmp_path / "none"), {}).read().equals(UNITS.empty_table())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seed", range(5))
def test_the_last_line_wins(log: UnitLog, seed: int) -> None:
    draw = random.Random(seed)
    expected: dict[tuple[str, str], tuple[int | None, int | None]] = {}
    for _ in range(6):
        batch = []
        for _ in range(draw.randint(0, 8)):
            line = (draw.choice("abcd"), draw.choice(["v1", "v2"]), draw.choice([None, 5, 10]), draw.choice([None, 5]))
            batch.append(line)
            expected[line[:2]] = line[2:]
        log.append_finished(batch, "r")
    lines = log.read()
    for version in ("v1", "v2", "v3"):
        want = {shard: value for (shard, own), value in expected.items() if own == version and value[0] is not None}
        found = units.finished(lines, version).select(["shard_id", "rows", "stop"]).to_pylist()
        assert {row["shard_id"]: (row["rows"], row["stop"]) for row in found} == want
        assert len(found) == len(want)


@pytest.mark.parametrize(
    ("planned_stop", "line", "expected"),
    [
        (None, (10, None), True),
        (None, (10, 10), False),
        (5, (10, None), True),
        (5, (5, 5), True),
        (4, (5, 5), True),
        (6, (5, 5), False),
        (5, (None, None), False),
        (None, (0, None), True),
        (None, None, False),
    ],
)
def test_finished_is_as_far_as_the_plan_asks(
    log: UnitLog, planned_stop: int | None, line: tuple[int | None, int | None] | None, expected: bool
) -> None:
    plan = plan_table([unit("x"), unit("a", stop=planned_stop), unit("y")])
    log.append_finished([("a", "v1", *line)] if line else [], "r")
    assert units.is_finished(plan, log.read(), "v1").to_pylist() == [False, expected, False]
    assert units.is_finished(plan, log.read(), "v2").to_pylist() == [False, False, False]


def test_changed_and_to_note(log: UnitLog) -> None:
    first = [unit("a"), unit("b", rows=3), unit("c", stop=4)]

    def note(plan: Sequence[Unit]) -> list[str]:
        table = plan_table(plan)
        new = units.to_note(table, log.read())
        assert new.schema.equals(PLAN)
        log.append_plan(new, "r")
        assert len(units.to_note(table, log.read())) == 0
        assert not any(units.changed(table, log.read()).to_pylist())
        return list(new.column("shard_id").to_pylist())

    assert units.changed(plan_table(first), log.read()).to_pylist() == [False] * 3
    assert note(first) == ["a", "b", "c"]
    assert note(first) == []
    second = [unit("new"), replace(first[2], stop=None), replace(first[0], fingerprint="g"), replace(first[1], rows=4)]
    assert units.changed(plan_table(second), log.read()).to_pylist() == [False, False, True, False]
    assert note(second) == ["new", "c", "a", "b"]
    assert note(first) == ["a", "b", "c"]
    log.append_forgotten(["a"], "r")
    assert units.changed(plan_table(first), log.read()).to_pylist() == [False] * 3
    assert note(first) == ["a"]
    assert [row_to_unit(row).payload for row in plan_table([unit("p", payload=b"x")]).to_pylist()] == [b"x"]


@pytest.mark.parametrize(
    ("planned", "finished", "expected"),
    [
        ([], [], Coverage(0, 0, False)),
        ([unit("a", rows=3), unit("b", rows=4)], [], Coverage(2, 7, False)),
        # 100 bytes held 10 rows, so 300 hold 30.
        ([unit("a"), unit("b", size_bytes=300)], [("a", "v1", 10, None)], Coverage(2, 40, True)),
        ([unit("a"), unit("b", size_bytes=300)], [("a", "v1", 10, None), ("b", "v1", 1, None)], Coverage(2, 11, False)),
        ([unit("a"), unit("b")], [("a", "v2", 10, None)], Coverage(2, 2, True)),
        ([unit("a", size_bytes=0), unit("b", size_bytes=0)], [("a", "v1", 10, None)], Coverage(2, 11, True)),
        # A count beats a statement, but not one of fewer rows than are asked for now.
        ([unit("a", rows=9)], [("a", "v1", 4, None)], Coverage(1, 4, False)),
        ([unit("a", rows=9)], [("a", "v1", 4, 4)], Coverage(1, 9, False)),
        ([unit("a", rows=4, stop=4)], [("a", "v1", 9, None)], Coverage(1, 9, False)),
    ],
)
def test_coverage(
    log: UnitLog, planned: list[Unit], finished: list[tuple[str, str, int | None, int | None]], expected: Coverage
) -> None:
    log.append_plan(plan_table(planned), "r")
    log.append_finished(finished, "r")
    assert units.coverage(log.read(), "v1") == expected


def test_a_million_units(log: UnitLog) -> None:
    count = 1_000_000
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    # What a source yields, without the cost of making the names in Python.
    plan = plan_table(unit(f"train/{index:07d}.tar") for index in range(count))
    lap("plan_table")
    assert plan.nbytes < 200 * count
    log.append_plan(plan, "r")
    lap("append_plan")
    halves = [(f"train/{index:07d}.tar", "v1", 10, None) for index in range(0, count, 2)]
    log.append_finished(halves, "r")
    lap("append_finished")
    lines = log.read()
    lap("read")
    done = units.is_finished(plan, lines, "v1")
    lap("is_finished")
    assert pa.compute.sum(done).as_py() == count // 2
    assert done[0].as_py()
    assert not done[1].as_py()
    assert not pa.compute.any(units.changed(plan, lines)).as_py()
    lap("changed")
    assert len(units.to_note(plan, lines)) == 0
    lap("to_note")
    assert units.coverage(lines, "v1") == Coverage(count, 10 * count, True)
    lap("coverage")
    print({name: round(value, 2) for name, value in seconds.items()})
    assert sum(seconds.values()) < 60, seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6_000_000, "kilobytes"
