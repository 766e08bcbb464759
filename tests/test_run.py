"""A run's books, driven by windows made by hand: whatever the order, repetition or death, each row is there once."""

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap
from table_helpers import keys, put

from pipeline import deltalog, units
from pipeline.config import LabelConfig
from pipeline.errors import FailureBudgetExceeded, SourceChangedError, StorageError
from pipeline.run import Run, row_to_work
from pipeline.runfile import read_run
from pipeline.sources.base import Unit
from pipeline.stages.work import Window, WorkItem
from pipeline.status import Counts
from pipeline.table import RowTable
from pipeline.units import UnitLog, plan_table

MODELS = ({"label": "m", "version": "v1"}, {"label": "n", "version": "w1"})
SECRET = "hunter2"


def make_unit(shard_id: str, rows: int | None = None, fingerprint: str = "f", stop: int | None = None) -> Unit:
    return Unit(shard_id=shard_id, location="", size_bytes=10, fingerprint=fingerprint, rows=rows, stop=stop)


def start(
    uri: str,
    plan: Sequence[Unit],
    models: Sequence[Mapping[str, Any]] = MODELS[:1],
    *,
    begin: bool = True,
    **fields: Any,
) -> Run:
    config = LabelConfig.model_validate(
        {
            "source": {"format": "scenes", "storage": {"secret": SECRET}, **fields.pop("source", {})},
            "models": [{"name": "null_model", "storage": {"key": SECRET}}],
            "output": {"uri": uri},
            **fields,
        }
    )
    run = Run(config, plan_table(plan), models)
    if begin:
        run.begin()
    return run


def items(run: Run) -> list[WorkItem]:
    return [row_to_work(row, len(run.models)) for row in run.pending().to_pylist()]


def label(run: Run, item: WorkItem, rows: int, *, failed: Collection[int] = (), per_file: int = 3) -> Iterator[Window]:
    """What a worker does with one unit of `rows` samples."""
    if item.unit.stop is not None:
        rows = min(rows, item.unit.stop)
    for first in range(0, rows, per_file):
        files = []
        images: set[int] = set()
        for index, (model, version) in enumerate(run.versions.items()):
            positions = [p for p in range(first, min(first + per_file, rows)) if p not in item.done[index]]
            images |= set(positions)
            attempts = {p: item.attempts[index].get(p, 0) + 1 for p in positions}
            if positions:
                file = put(
                    run.config.output.uri, item.unit.shard_id, positions, model=model, version=version,
                    failed=set(failed) & set(positions), attempts=attempts,
                )  # fmt: skip
                files.append(file)
        if files:
            yield Window(index=item.index, files=tuple(files), images=len(images), seconds={"predict": 0.5}, wall_s=1.0)
    yield Window(index=item.index, rows=rows)


def finish(run: Run, rows: Mapping[str, int], **options: Any) -> Run:
    for item in items(run):
        for window in label(run, item, rows[item.unit.shard_id], **options):
            run.take(window)
    run.commit()
    assert len(run.pending()) == 0
    return run


def every(rows: Mapping[str, int], models: Sequence[Mapping[str, Any]] = MODELS[:1]) -> list[tuple[str, str, int]]:
    return sorted((m["label"], shard, position) for m in models for shard, n in rows.items() for position in range(n))


def table_keys(uri: str) -> list[tuple[str, str, int]]:
    return keys(RowTable.open(uri, {}))


@pytest.mark.parametrize("seed", range(14))
def test_whatever_happens_each_row_is_there_once(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    uri = str(tmp_path)
    rows = {f"it's {index}.tar#{index}": draw.randint(0, 11) for index in range(draw.randint(1, 5))}
    plan = [make_unit(shard, draw.choice([None, count])) for shard, count in rows.items()]
    models = MODELS[: draw.randint(1, 2)]
    deaths = draw.randint(0, 5)
    while True:
        dies = deaths > 0
        deaths -= 1
        run = start(uri, plan, models)
        before = table_keys(uri)
        assert len(before) == len(set(before))
        for _ in range(3):
            work = items(run)
            windows: list[Window] = []
            for item in work:
                per_file = draw.randint(1, 4)
                again = [*label(run, item, rows[item.unit.shard_id], per_file=per_file)]
                # Ray ran the task once, or died at some place of the first time and ran it again, whole.
                if draw.random() < 0.5:
                    windows += [*label(run, item, rows[item.unit.shard_id], per_file=per_file)][: draw.randint(0, 9)]
                windows += again
                if draw.random() < 0.2:
                    windows += draw.sample(again, draw.randint(0, len(again)))
            if draw.random() < 0.7:
                draw.shuffle(windows)
            if dies:
                windows = windows[: draw.randint(0, len(windows))]
            for window in windows:
                run.take(window)
                if draw.random() < 0.2:
                    run.commit()
            if dies:
                break
            run.commit()
        if not dies:
            break
    assert len(run.pending()) == 0
    assert table_keys(uri) == every(rows, models)
    assert run.counts() == [
        Counts(model["label"], model["version"], sum(rows.values()), sum(rows.values()), 0, False) for model in models
    ]
    run.table.vacuum()
    on_disk = {f"{path.parent.name}/{path.name}" for path in tmp_path.glob("model=*/*.parquet")}
    assert on_disk == set(run.table.files().column("path").to_pylist())
    lines = UnitLog(uri, {}).read()
    for model in models:
        done = units.finished(lines, model["version"])
        assert dict(zip(done["shard_id"].to_pylist(), done["rows"].to_pylist(), strict=True)) == rows


def test_a_unit_is_finished_when_all_rows_of_all_models_are_counted(tmp_path: Path) -> None:
    run = start(str(tmp_path), [make_unit("a"), make_unit("b")], MODELS)
    first, second = items(run)
    *windows, end = label(run, first, 7)
    run.take(end)
    for window in windows[::-1]:
        run.commit()
        assert len(UnitLog(str(tmp_path), {}).read()) == 2  # the plan's lines alone
        run.take(window)
    run.commit()
    lines = UnitLog(str(tmp_path), {}).read()
    for version in ("v1", "w1"):
        assert units.finished(lines, version).select(["shard_id", "rows", "stop"]).to_pylist() == [
            {"shard_id": "a", "rows": 7, "stop": None}
        ]
    assert [item.unit.shard_id for item in items(run)] == ["b"]
    assert (run.images, run.rows, run.failed, run.dropped) == (7, 14, 0, 0)
    assert run.seconds["predict"] == 0.5 * len(windows)
    run.take(windows[0])  # late news of a finished unit
    run.commit()
    assert (run.images, run.rows, run.dropped) == (7, 14, 2)
    assert table_keys(str(tmp_path)) == every({"a": 7}, MODELS)
    for window in label(run, second, 0):
        run.take(window)
    run.commit()
    assert items(run) == []


def test_a_second_model_is_labelled_alone(tmp_path: Path) -> None:
    uri, rows = str(tmp_path), {"a": 5, "b": 4}
    plan = [make_unit("a"), make_unit("b"), make_unit("c", fingerprint="new")]
    finish(start(uri, plan[:2]), rows)
    run = start(uri, plan, MODELS)
    found = items(run)
    assert [item.unit for item in found] == plan
    assert [item.done for item in found] == [(BitMap(range(n)), BitMap()) for n in (5, 4, 0)]
    assert found[2].attempts == ({}, {})
    finish(run, {**rows, "c": 2})
    assert (run.images, run.rows) == (11, 13)
    assert table_keys(uri) == every({**rows, "c": 2}, MODELS)
    assert [count.pending for count in run.counts()] == [0, 0]
    # Another version of a model starts anew, beside the old rows.
    other = start(uri, plan, [{"label": "m", "version": "v2"}, MODELS[1]])
    assert [item.done for item in items(other)] == [(BitMap(), BitMap(range(n))) for n in (5, 4, 2)]


def test_done_bitmaps_of_partly_done_units(tmp_path: Path) -> None:
    uri = str(tmp_path)
    run = start(uri, [make_unit("a"), make_unit("b")], MODELS)
    windows = [*label(run, items(run)[0], 9)]
    run.take(windows[1])
    run.commit()
    run = start(uri, [make_unit("b"), make_unit("a")], MODELS)
    found = {item.unit.shard_id: item for item in items(run)}
    assert found["a"].done == (BitMap([3, 4, 5]), BitMap([3, 4, 5]))
    assert found["b"].done == (BitMap(), BitMap())
    assert (found["a"].index, found["b"].index) == (1, 0)


@pytest.mark.parametrize("name", ["x" * 400, "it's#1", "日本"])
def test_resuming_after_a_retry_and_a_compaction(tmp_path: Path, name: str) -> None:
    """Other writers' files tell the log less; nothing may be labelled twice for that."""
    uri = str(tmp_path)
    run = start(uri, [make_unit(name), make_unit("b")])
    for window in [*label(run, items(run)[0], 9, failed={1})][:2]:
        run.take(window)
    run.commit()
    run = start(uri, [make_unit(name), make_unit("b")], retry="failed")
    run.table._table.optimize.compact()
    finish(run, {name: 9, "b": 2})
    assert table_keys(uri) == every({name: 9, "b": 2})


def test_a_limit_after_a_whole_run(tmp_path: Path) -> None:
    """Rows beyond the limit are there already: the run ends, and what was finished whole stays so."""
    uri, rows = str(tmp_path), {"a": 6, "b": 5}
    run = start(uri, [make_unit("a"), make_unit("b")])
    first, second = items(run)
    for window in [*label(run, first, 6), *[*label(run, second, 5)][:-1]]:
        run.take(window)
    run.commit()  # a is finished, b has all of its rows but no end
    limited = [make_unit("a", rows=2, stop=2), make_unit("b", rows=2, stop=2)]
    run = finish(start(uri, limited, MODELS, source={"limit": 4}), rows)
    assert table_keys(uri) == sorted(every(rows) + every({"a": 2, "b": 2}, MODELS[1:]))
    run = start(uri, [make_unit("a"), make_unit("b")], MODELS)
    assert [item.done for item in items(run)] == [(BitMap(range(n)), BitMap([0, 1])) for n in (6, 5)]
    run = start(uri, [make_unit("a"), make_unit("b")])
    assert [item.unit.shard_id for item in items(run)] == ["b"]
    finish(start(uri, [make_unit("a"), make_unit("b")], MODELS), rows)
    assert table_keys(uri) == every(rows, MODELS)


def test_of_two_readings_the_one_that_got_further_counts(tmp_path: Path) -> None:
    uri = str(tmp_path)
    run = start(uri, [make_unit("a")])
    (item,) = items(run)
    faulty, whole = [*label(run, item, 5, failed={4})], [*label(run, item, 9)]
    for window in (faulty[0], faulty[1], whole[-1], faulty[-1], *whole[:-1]):
        run.take(window)
    run.commit()
    # Window [3, 4] came first, so [3, 4, 5] was left out: one more pass finds what is missing.
    (item,) = items(run)
    assert item.done == (BitMap([0, 1, 2, 3, 4, 6, 7, 8]),)
    finish(run, {"a": 9})
    assert table_keys(uri) == every({"a": 9})


def test_retry_takes_exactly_the_failed_rows_and_attempts_grow(tmp_path: Path) -> None:
    uri, rows = str(tmp_path), {"a": 7, "b": 3, "all": 2}
    plan = [make_unit(shard) for shard in rows]
    run = start(uri, plan, MODELS, failure_budget=1)
    for item in items(run):
        bad = {"a": {1, 5}, "b": set(), "all": {0, 1}}[item.unit.shard_id]
        for window in label(run, item, rows[item.unit.shard_id], failed=bad):
            run.take(window)
    run.commit()
    assert run.failed == 8
    assert items(start(uri, plan, MODELS)) == []
    for tries in (1, 2):
        run = start(uri, plan, MODELS, retry="failed")
        found = {item.unit.shard_id: item for item in items(run)}
        assert set(found) == {"a", "all"}
        assert found["a"].done == (BitMap([0, 2, 3, 4, 6]),) * 2
        assert found["a"].attempts == ({1: tries, 5: tries},) * 2
        assert found["all"].done == (BitMap(), BitMap())
        assert found["all"].attempts == ({0: tries, 1: tries},) * 2
        for item in found.values():
            for window in label(run, item, rows[item.unit.shard_id], failed=range(9)):
                run.take(window)
        run.commit()
        assert items(run) == []
        assert run.rows == 8
        assert [(count.ok, count.failed, count.pending) for count in run.counts()] == [(8, 4, 0)] * 2
    run = finish(start(uri, plan, MODELS, retry="failed"), rows)
    assert [(count.ok, count.failed) for count in run.counts()] == [(12, 0)] * 2
    assert table_keys(uri) == every(rows, MODELS)


def test_retry_that_dies_after_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    finish(start(uri, [make_unit("a")]), {"a": 4}, failed={2})

    def die(self: RowTable, versions: Mapping[str, str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(RowTable, "delete_failed", die)
    with pytest.raises(KeyboardInterrupt):
        start(uri, [make_unit("a")], retry="failed")
    monkeypatch.undo()
    run = start(uri, [make_unit("a")])
    assert [item.done for item in items(run)] == [(BitMap(range(4)),)]
    finish(run, {"a": 4})
    assert table_keys(uri) == every({"a": 4})


def test_the_budget_stops_after_a_thousand_rows_and_at_the_end(tmp_path: Path) -> None:
    uri = str(tmp_path)
    run = start(uri, [make_unit("a"), make_unit("b")], failure_budget=0.1)
    first, second = items(run)
    for window in label(run, first, 900, failed=range(100), per_file=900):
        run.take(window)
    run.commit()  # 11 %, of too few rows to judge
    with pytest.raises(FailureBudgetExceeded, match=r"100 of 900 rows failed in the table: 11\.11%, failure_budget is"):
        run.check_final_budget()
    for window in label(run, second, 100, per_file=100, failed={7}):
        run.take(window)
    with pytest.raises(FailureBudgetExceeded, match="101 of 1000 rows failed in this run"):
        run.commit()
    assert len(table_keys(uri)) == 1000  # what was booked is committed before
    calm = start(uri, [make_unit("a"), make_unit("b")], failure_budget=0.101)
    calm.check_final_budget()
    assert items(calm) == []


def test_changed_units_stop_the_run(tmp_path: Path) -> None:
    uri = str(tmp_path)
    finish(start(uri, [make_unit("a"), make_unit("b")]), {"a": 3, "b": 2})
    changed = [make_unit("a", fingerprint="g"), make_unit("b"), make_unit("c")]
    for _ in range(2):
        with pytest.raises(SourceChangedError, match="1 units changed after they were labelled: a; on_changed=relabel"):
            start(uri, changed)
    assert table_keys(uri) == every({"a": 3, "b": 2})
    other = str(tmp_path / "many")
    finish(start(other, [make_unit(str(i)) for i in range(9)]), {str(i): 1 for i in range(9)})
    with pytest.raises(SourceChangedError, match=r"9 units changed .*: 0, 1, 2, 3, 4 and 4 more;"):
        start(other, [make_unit(str(i), fingerprint="g") for i in range(9)])


def test_changed_units_are_labelled_again_for_every_model(tmp_path: Path) -> None:
    uri = str(tmp_path)
    finish(start(uri, [make_unit("a"), make_unit("b")], MODELS), {"a": 3, "b": 2})
    changed = [make_unit("a", fingerprint="g"), make_unit("b")]
    run = start(uri, changed, on_changed="relabel")
    assert [(item.unit.shard_id, item.done) for item in items(run)] == [("a", (BitMap(),))]
    finish(run, {"a": 5, "b": 2})
    assert table_keys(uri) == sorted(every({"a": 5, "b": 2}) + every({"b": 2}, MODELS[1:]))
    # The other model's rows of that unit are gone too, so it is open for it as well.
    run = start(uri, changed, MODELS)
    assert [(item.unit.shard_id, item.done) for item in items(run)] == [("a", (BitMap(range(5)), BitMap()))]
    finish(run, {"a": 5, "b": 2})
    assert table_keys(uri) == every({"a": 5, "b": 2}, MODELS)
    assert [(count.expected, count.pending) for count in run.counts()] == [(7, 0)] * 2


@pytest.mark.parametrize("place", ["delete_units", "_delete", "append_plan"])
def test_relabelling_that_dies_is_done_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    uri = str(tmp_path)
    finish(start(uri, [make_unit("a"), make_unit("b")]), {"a": 3, "b": 2})
    changed = [make_unit("a", fingerprint="g"), make_unit("b")]

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UnitLog if place == "append_plan" else RowTable, place, die)
    with pytest.raises(KeyboardInterrupt):
        start(uri, changed, on_changed="relabel")
    monkeypatch.undo()
    run = finish(start(uri, changed, on_changed="relabel"), {"a": 4, "b": 2})
    assert table_keys(uri) == every({"a": 4, "b": 2})
    assert run.rows == 4


@pytest.mark.parametrize("on_changed", ["stop", "relabel"])
def test_a_shard_that_was_empty_and_is_filled_later(tmp_path: Path, on_changed: str) -> None:
    uri = str(tmp_path)
    finish(start(uri, [make_unit("a"), make_unit("b")]), {"a": 0, "b": 2})
    changed = [make_unit("a", fingerprint="g"), make_unit("b")]
    finish(start(uri, changed, on_changed=on_changed), {"a": 3, "b": 2})
    assert table_keys(uri) == every({"a": 3, "b": 2})


def test_slices_that_vanished_are_forgotten(tmp_path: Path) -> None:
    uri = str(tmp_path)
    listing = [make_unit(f"images#{n}") for n in range(3)]
    other = [make_unit("x.tar"), make_unit("y.tar#0")]
    finish(start(uri, [*listing, *other]), {f"images#{n}": 4 for n in range(3)} | {"x.tar": 1, "y.tar#0": 1})
    # The listing became shorter; x.tar and y.tar are not looked for this time.
    shorter = [make_unit("images#0"), make_unit("images#1", fingerprint="g")]
    with pytest.raises(SourceChangedError):
        start(uri, shorter)
    limited = start(uri, shorter, on_changed="relabel", source={"limit": 8})
    assert ("m", "images#2", 0) in keys(limited.table)
    run = finish(start(uri, shorter, on_changed="relabel"), {"images#0": 4, "images#1": 3})
    left = {"images#0": 4, "images#1": 3, "x.tar": 1, "y.tar#0": 1}
    assert table_keys(uri) == every(left)
    assert [(count.expected, count.pending) for count in run.counts()] == [(9, 0)]


def test_run_json(tmp_path: Path) -> None:
    uri = str(tmp_path)
    run = start(uri, [make_unit("a"), make_unit("b", fingerprint="g")], seed=5)
    (folder,) = tmp_path.glob("_runs")
    run.write_run("done", images=3)
    written = read_run(uri, {})
    assert json.loads((folder / f"{run.run_id}.json").read_text()) == written
    assert SECRET not in (tmp_path / "run.json").read_text()
    assert written["config"]["source"]["storage"] == {"secret": "***"}
    assert (written["state"], written["images"], written["run_id"]) == ("done", 3, run.run_id)
    assert written["models"] == [*MODELS[:1]]
    assert (written["config"]["seed"], written["config"]["output"]["uri"]) == (5, uri)
    assert (written["source"]["units"], written["source"]["size_bytes"]) == (2, 20)
    assert {"maskmill", "commit", "python", "torch", "ray", "pyarrow"} <= set(written["code"])
    prints = {written["source"]["fingerprint"]}
    for plan in ([make_unit("a")], [make_unit("a", fingerprint="g"), make_unit("b", fingerprint="f")]):
        other = start(str(tmp_path / "other"), plan, on_changed="relabel")
        prints.add(read_run(other.config.output.uri, {})["source"]["fingerprint"])
    assert len(prints) == 3
    assert len([*folder.iterdir()]) == 1
    with pytest.raises(StorageError, match="does not exist"):
        read_run(str(tmp_path / "none"), {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": [{}]}', '{"models": 3}', "null"])
def test_a_run_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Exception, match=r"run\.json is no run\.json of maskmill") as caught:
        read_run(str(tmp_path), {})
    assert caught.type.__name__ == "SchemaError"


def test_a_death_between_the_tables_commit_and_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    run = start(uri, [make_unit("a"), make_unit("b")], MODELS)
    for item in items(run):
        for window in label(run, item, 5):
            run.take(window)

    def die(*arguments: Any) -> None:
        raise StorageError("gone")

    monkeypatch.setattr(UnitLog, "append_finished", die)
    with pytest.raises(StorageError, match="gone"):
        run.commit()
    monkeypatch.undo()
    assert table_keys(uri) == every({"a": 5, "b": 5}, MODELS)
    run = start(uri, [make_unit("a"), make_unit("b")], MODELS)
    assert [item.done for item in items(run)] == [(BitMap(range(5)),) * 2] * 2
    finish(run, {"a": 5, "b": 5})
    assert run.rows == 0
    assert table_keys(uri) == every({"a": 5, "b": 5}, MODELS)


@pytest.mark.parametrize("through", ["append", "deltalake"])
def test_an_interrupted_commit_is_made_again_without_doubling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """Ctrl-C arrives while the commit is made; the driver then commits once more before it ends."""
    uri = str(tmp_path)
    run = start(uri, [make_unit("a")])
    for window in label(run, items(run)[0], 4):
        run.take(window)
    commit, append = RowTable._commit, deltalog.append

    def landed_then_interrupted(self: RowTable, actions: Any) -> None:
        commit(self, actions)
        raise KeyboardInterrupt

    def appended_then_interrupted(*arguments: Any) -> int:
        append(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(RowTable, "_commit", landed_then_interrupted)
    monkeypatch.setattr(deltalog, "append", appended_then_interrupted)
    run.table._appends = through == "append"
    with pytest.raises(KeyboardInterrupt):
        run.commit()
    monkeypatch.undo()
    run.commit()
    assert table_keys(uri) == every({"a": 4})
    assert items(start(uri, [make_unit("a")])) == []


def test_a_run_that_lost_its_table_stops_and_adds_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path)
    first = start(uri, [make_unit("a")])
    windows = [*label(first, items(first)[0], 4)]
    second = start(uri, [make_unit("a")])
    for window in windows:
        first.take(window)
    for _ in range(2):
        with pytest.raises(StorageError, match="another run has taken over"):
            first.commit()
    finish(second, {"a": 4})
    assert table_keys(uri) == every({"a": 4})
