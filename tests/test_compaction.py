"""Compaction: the same rows in fewer files, whatever dies in between, and everything known of the table stays known."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_helpers import keys, make_rows, put

from jobs import compact as job
from pipeline import compaction
from pipeline.compaction import compact, groups
from pipeline.config import TableSource
from pipeline.errors import StorageError
from pipeline.rows import PREDICTIONS
from pipeline.runfile import write_run
from pipeline.sources.base import Sample
from pipeline.sources.table import TableTargets
from pipeline.table import RowTable
from pipeline.tablefiles import merge_files, write_file

VERSIONS = {"m": "v1", "n": "w"}


def create(uri: str) -> RowTable:
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    return table


def rows_of(uri: str) -> pa.Table:
    order = [(name, "ascending") for name in ("model", "model_version", "shard_id", "position")]
    return pa.Table.from_batches(list(RowTable.open(uri, {}).scan(PREDICTIONS.names)), PREDICTIONS).sort_by(order)


def facts(uri: str) -> list[Any]:
    """What resume, status and retry read of a table."""
    table = RowTable.open(uri, {})
    shards = sorted(table.shards().to_pylist())
    return [
        shards,
        table.done(shards, VERSIONS),
        table.failed_attempts(VERSIONS),
        [table.counts(model, version) for model in "mn" for version in ("v1", "v2", "w")],
    ]


FILES = st.lists(
    st.tuples(
        st.sampled_from(["a.tar", "é b#1", "a" * 80]), st.sampled_from(["m", "n"]), st.sampled_from(["v1", "v2", "w"]),
        st.integers(1, 6), st.floats(0, 1),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(files=FILES, file_bytes=st.sampled_from([1, 70_000, 200_000, 1 << 30]), seed=st.integers(0, 9))
def test_whatever_the_files_the_rows_stay_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, files: list[Any], file_bytes: int, seed: int
) -> None:
    uri = str(tmp_path_factory.mktemp("t"))
    table = create(uri)
    draw, ends = random.Random(seed), dict[Any, int]()
    records = []
    for shard, model, version, count, share in files:
        first = ends.setdefault((shard, model, version), 0)
        ends[shard, model, version] += count
        failed = {position for position in range(first, first + count) if draw.random() < share}
        odd = {"quality": {"mean_max_probability": float("nan"), "mean_entropy": -0.0, "low_confidence_share": None}}
        records.append(put(uri, shard, range(first, first + count), model=model, version=version, failed=failed, **odd))
    table.commit(records)
    before, known = rows_of(uri), facts(uri)
    result = compact(uri, {}, file_bytes=file_bytes, keep_hours=0)
    after = rows_of(uri)
    # NaN is not equal to itself; its bits are.
    assert after.drop_columns("quality").equals(before.drop_columns("quality"))
    assert after.column("quality").to_pylist().__repr__() == before.column("quality").to_pylist().__repr__()
    assert facts(uri) == known
    listed = RowTable.open(uri, {}).files()
    assert len(listed) == result["files_after"] <= result["files_before"] == len(files)
    assert listed.column("model_version").null_count == 0
    assert {path.name for path in Path(uri).glob("model=*/*")} == {
        path.rpartition("/")[2] for path in listed.column("path").to_pylist()
    }
    if file_bytes == 1 << 30:
        assert len(listed) == len({entry[1:3] for entry in files})
        assert compact(uri, {}, file_bytes=file_bytes, keep_hours=0)["rewritten"] == 0


def test_groups_are_of_one_model_and_version_in_order_and_large_files_stay() -> None:
    def file(size: int, model: str, version: str | None, shard: str, first: int) -> dict[str, Any]:
        row = {"size_bytes": size, "model": model, "model_version": version, "first_shard_id": shard}
        return {**row, "first_position": first, "path": f"{model}{version}{shard}{first}"}

    files = [file(10, "m", "v1", "b", 0), file(50, "m", "v1", "a", 8), file(10, "m", "v1", "a", 4),
             file(10, "m", "v1", "a", 0), file(10, "m", "v2", "a", 0), file(10, "n", "v1", "a", 0),
             file(10, "n", "v1", "a", 1), file(10, "n", None, "a", 2), file(40, "n", "v1", "b", 0),
             file(40, "n", "v1", "c", 0), file(40, "n", "v1", "d", 0)]  # fmt: skip
    found = [[entry["path"] for entry in group] for group in groups(pa.Table.from_pylist(files), 100)]
    assert found == [["mv1a0", "mv1a4", "mv1b0"], ["nv1a0", "nv1a1", "nv1b0", "nv1c0"]]


@pytest.mark.parametrize("step", ["merge_files", "replace", "checkpoint", "vacuum"])
@pytest.mark.parametrize("is_done_first", [False, True], ids=["before", "after"])
def test_a_death_between_steps_loses_nothing_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_done_first: bool
) -> None:
    uri = str(tmp_path)
    table = create(uri)
    table.commit([put(uri, shard, range(n, n + 2), failed={n}) for shard in "abcd" for n in range(0, 6, 2)])
    before, known = rows_of(uri), facts(uri)
    monkeypatch.setattr(compaction, "COMMIT_S", 0.0)
    monkeypatch.setattr(compaction, "THREADS", 1)
    calls = 0
    owner: Any = compaction if step == "merge_files" else RowTable
    original = getattr(owner, step)

    def die(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        # The first vacuum comes before anything else; every other step dies the second time it is called, if it is.
        if calls == (1 if step == "checkpoint" else 2):
            if is_done_first:
                original(*arguments)
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, step, die)
    size = 4 * max(RowTable.open(uri, {}).files().column("size_bytes").to_pylist())
    with pytest.raises(KeyboardInterrupt):
        compact(uri, {}, file_bytes=size, keep_hours=0, threads=1)
    monkeypatch.setattr(owner, step, original)
    assert rows_of(uri).equals(before)
    assert facts(uri) == known
    compact(uri, {}, file_bytes=1 << 30, keep_hours=0)
    assert rows_of(uri).equals(before)
    assert facts(uri) == known
    assert len(list(Path(uri).glob("model=*/*"))) == 1


def test_a_running_driver_and_a_compaction_stop_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    driver = create(uri)
    driver.commit([put(uri, "a", [0]), put(uri, "a", [1])])
    late = put(uri, "b", [0])
    compact(uri, {}, keep_hours=0)
    with pytest.raises(StorageError, match="taken over"):
        driver.commit([late])
    assert keys(RowTable.open(uri, {})) == [("m", "a", 0), ("m", "a", 1)]

    # A run that starts in the middle takes the new files for orphans: they must not be committed then.
    create(uri).commit([put(uri, "c", [0])])

    def start_a_run(*arguments: Any) -> Any:
        record = merge_files(*arguments)
        run = create(uri)
        run.vacuum()
        return record

    monkeypatch.setattr(compaction, "merge_files", start_a_run)
    with pytest.raises(StorageError, match="taken over"):
        compact(uri, {}, keep_hours=0)
    assert len(rows_of(uri)) == 3


def test_replaced_files_stay_as_long_as_the_user_says(tmp_path: Path) -> None:
    uri = str(tmp_path)
    create(uri).commit([put(uri, "a", [0]), put(uri, "b", [0])])
    old = {path.name for path in Path(uri).glob("model=*/*")}
    reader = RowTable.open(uri, {})  # began before
    assert compact(uri, {}, keep_hours=24)["removed"] == 0
    run = create(uri)
    run.commit([put(uri, "c", [0])])
    orphan = put(uri, "c", [1])
    assert run.vacuum() == 1  # the orphan, not what is kept
    assert not Path(uri, orphan.path).exists()
    assert old < {path.name for path in Path(uri).glob("model=*/*")}
    assert len(keys(reader)) == 2
    run.keep_removed(0)
    assert run.vacuum() == 2
    assert len(rows_of(uri)) == 3
    run.commit([put(uri, "d", [0])])
    assert len(rows_of(uri)) == 4


def test_rows_that_are_missing_in_a_file_stop_it(tmp_path: Path) -> None:
    uri = str(tmp_path)
    table = create(uri)
    table.commit([put(uri, "a", [0, 1]), put(uri, "b", [0])])
    short = put(uri, "a", [0])
    listed = table.listing().to_pylist()
    Path(uri, short.path).replace(Path(uri, next(row["path"] for row in listed if row["shard_id"] == "a")))
    with pytest.raises(StorageError, match="expected 3 rows in 2 files as the log says, got 2"):
        compact(uri, {}, keep_hours=0)
    assert len(RowTable.open(uri, {}).files()) == 2


def test_a_compacted_table_still_serves_as_targets(tmp_path: Path) -> None:
    uri = str(tmp_path)
    table = create(uri)
    rows = {shard: make_rows(shard, range(5), failed={2}) for shard in ("a", "b", "c")}
    for shard, part in rows.items():
        # Not in order: the second half comes first.
        for half in (part.slice(3), part.slice(0, 3)):
            table.commit([write_file(uri, {}, half, model="m", model_version="v1", shard_id=shard)])
    write_run(uri, {}, {"run_id": "r", "models": [{"label": "m", "version": "v1", "task": "semantic"}]})
    source = TableTargets(TableSource(format="table", uri=uri))

    def samples() -> list[Any]:
        found = []
        for unit in source.plan(images=False):
            assert unit.rows == 5
            found += [(s.image_id, s.position, s.targets) for s in source.read(unit, {1}) if isinstance(s, Sample)]
        return found

    before = samples()
    assert len(before) == 12
    compact(uri, {}, keep_hours=0)
    assert RowTable.open(uri, {}).files().column("shard_id").null_count == 1
    assert samples() == before


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path)
    create(uri).commit([put(uri, shard, [0]) for shard in "abc"])
    run = {"run_id": "r1", "models": [{"label": "m", "version": "v1"}], "state": "running"}
    write_run(uri, {}, run)
    assert job.main([uri]) == 2
    assert "run r1 is at work" in capsys.readouterr().err
    assert job.main([uri, "--keep-hours", "-1"]) == 2
    assert job.main([uri, "--file-mb", "0"]) == 2
    assert job.main([uri, "--take-over", "--keep-hours", "0"]) == 0
    assert "3 files are 1 now" in capsys.readouterr().out
    write_run(uri, {}, {**run, "state": "done"})
    assert job.main([uri]) == 0
    assert "1 files are 1 now" in capsys.readouterr().out
    assert len(rows_of(uri)) == 3
