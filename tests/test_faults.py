"""A table and its books while storage loses answers or lists old news, and while clocks jump; without Ray."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import deltalake
import pytest
from fault_proxy import Fault, FaultProxy
from s3_endpoint import S3
from table_helpers import keys, put
from test_run import finish, make_unit, start

import pipeline.run
import pipeline.table
from pipeline import deltacalls
from pipeline.errors import StorageError
from pipeline.table import RowTable
from pipeline.units import UnitLog

LOG = r"_delta_log/0+\d+\.json"
LOST: list[dict[str, Any]] = [
    {"what": "reset", "forwarded": True},
    {"status": 500, "body": b"", "forwarded": True},
    {"status": 503, "forwarded": True},
]


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with FaultProxy(s3.options["endpoint_url"]) as running:
        yield running


@pytest.fixture
def through(s3: S3, proxy: FaultProxy) -> dict[str, Any]:
    return {**s3.options, "endpoint_url": proxy.uri}


@pytest.mark.parametrize("lost", LOST, ids=["reset", "500", "503"])
def test_a_commit_whose_answer_is_lost_is_there_once(
    s3: S3, proxy: FaultProxy, through: dict[str, Any], lost: dict[str, Any]
) -> None:
    """Of every kind: taking the table over, adding files, taking rows out."""
    uri = f"s3://{s3.bucket(f'lost-answers-{LOST.index(lost)}')}/out"
    table = RowTable.open(uri, through, create=True)

    def lose_one() -> Fault:
        proxy.faults[:] = [Fault(method="PUT", path=LOG, times=1, **lost)]
        return proxy.faults[0]

    fault = lose_one()
    epoch = table.take_over()
    assert fault.happened == 1
    files = [put(uri, "a", range(4), failed={2}, storage=s3.options), put(uri, "b", range(3), storage=s3.options)]
    fault = lose_one()
    table.commit(files)
    assert fault.happened == 1
    fault = lose_one()
    assert table.delete_units(["b"]) == 3
    assert fault.happened == 1
    table.commit([put(uri, "c", [0], storage=s3.options)])
    proxy.faults.clear()
    found = RowTable.open(uri, s3.options)
    assert keys(found) == [("m", "a", 0), ("m", "a", 1), ("m", "a", 2), ("m", "a", 3), ("m", "c", 0)]
    assert found.take_over() == epoch + 4


def test_a_driver_that_lost_the_table_is_not_fooled_by_an_answer_that_is_lost(
    s3: S3, proxy: FaultProxy, through: dict[str, Any]
) -> None:
    uri = f"s3://{s3.bucket('lost-table')}/out"
    first = RowTable.open(uri, through, create=True)
    first.take_over()
    late = put(uri, "a", [0], storage=s3.options)
    second = RowTable.open(uri, s3.options)
    second.take_over()
    proxy.faults.append(Fault(method="PUT", path=LOG, times=1, what="reset", forwarded=True))
    with pytest.raises(StorageError, match="another run has taken over"):
        first.commit([late])
    second.commit([put(uri, "b", [0], storage=s3.options)])
    assert keys(RowTable.open(uri, s3.options)) == [("m", "b", 0)]


def test_a_listing_from_before_costs_no_row(s3: S3, proxy: FaultProxy, through: dict[str, Any]) -> None:
    """Files that an old log does not name are no orphans: the run stops, and says why, before it deletes any."""
    uri = f"s3://{s3.bucket('old-listings')}/out"
    table = RowTable.open(uri, through, create=True)
    table.take_over()
    table.commit([put(uri, "a", range(3), storage=through)])
    table.vacuum()
    proxy.faults.append(Fault(method="GET", path="list-type.*_delta_log", what="stale"))
    table.commit([put(uri, "b", range(3), storage=through)])
    with pytest.raises(StorageError) as caught:
        table.vacuum()
    assert proxy.faults[0].happened
    assert "lists its log as it was before" in str(caught.value)
    proxy.faults.clear()
    assert table.vacuum() == 0
    assert len(keys(RowTable.open(uri, s3.options))) == 6


def test_a_listing_that_is_cut_off_ends_no_run(
    s3: S3, proxy: FaultProxy, through: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """deltalake's client gives up on it at once; the table and the unit log ask again, and not where it is refused."""
    monkeypatch.setattr(deltacalls, "PAUSES_S", (0.0, 0.0))
    uri = f"s3://{s3.bucket('cut-listings')}/out"
    table, units = RowTable.open(uri, through, create=True), UnitLog(uri, through)
    units.create(table.take_over())

    def cut(kind: str) -> Fault:
        proxy.faults[:] = [Fault(method="GET", path=f"list-type.*{kind}", what="cut", times=2)]
        return proxy.faults[0]

    fault = cut("out%2F_delta_log")
    assert RowTable.open(uri, through).files().num_rows == 0
    assert fault.happened == 2
    fault = cut("_units")
    units.append_finished([("a", "v", 3, None)], "run")
    assert fault.happened == 2
    fault = cut("_units")
    assert units.read().column("shard_id").to_pylist() == ["a"]
    assert fault.happened == 2

    refused = Fault(method="GET", path="list-type", status=403, body=b"<Error><Code>AccessDenied</Code></Error>")
    proxy.faults[:] = [refused]
    with pytest.raises(StorageError, match="AccessDenied"):
        RowTable.open(uri, through)
    assert refused.happened == 1


class Jumping(datetime):
    """A clock that goes ten years back or forth at every look."""

    looks = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        cls.looks += 1
        shifted = datetime(2026, 1, 1, tzinfo=UTC) + (-1) ** cls.looks * timedelta(days=3650)
        return cls.fromisoformat(shifted.isoformat()).astimezone(tz)


def test_rows_do_not_depend_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is decided by the log's numbers, never by times: a run whose clock jumps, killed and begun again."""
    plan = [make_unit("a"), make_unit("b"), make_unit("c")]
    rows = {"a": 7, "b": 5, "c": 6}
    steady, jumping = str(tmp_path / "steady"), str(tmp_path / "jumping")
    finish(start(steady, plan), rows)

    looks = iter(range(10**6))
    monkeypatch.setattr(pipeline.run, "datetime", Jumping)
    monkeypatch.setattr(pipeline.table.time, "time", lambda: 1.7e9 + (-1) ** next(looks) * 3e8)
    finish(start(jumping, plan[:1]), rows)
    put(jumping, "b", [0, 1])  # of a run that died before its commit
    run = finish(start(jumping, plan), rows)
    assert run.orphans == 1
    assert Jumping.looks > 3
    assert keys(RowTable.open(jumping, {})) == keys(RowTable.open(steady, {}))
    assert not len(run.pending())
    assert deltalake.DeltaTable(jumping).to_pyarrow_table().num_rows == 18
    started = json.loads((tmp_path / "jumping" / "run.json").read_text())["started_at"]
    assert started[:4] in ("2016", "2035", "2036")
