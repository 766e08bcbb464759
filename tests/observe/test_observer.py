"""The observer of a run: every figure once, whatever comes twice, and every event as a line."""

import io
import json
from typing import Any

import pytest
from observe_helpers import Clock, Recorded
from pyroaring import BitMap

from pipeline.config import CostConfig
from pipeline.observe.cost import ClusterSize, CostMeter
from pipeline.observe.log import EventLog
from pipeline.observe.observer import Observer
from pipeline.stages.work import FAILED_ROW, RETRY, Note, Window
from pipeline.tablefiles import FileRecord


def file(rows: int, failed: int = 0, model: str = "m") -> FileRecord:
    return FileRecord(
        path="p", size_bytes=1, model=model, model_version="v", shard_id="s", rows=rows, failed=failed,
        positions=BitMap(range(rows)).serialize(), stats="{}",
    )  # fmt: skip


def window(**more: Any) -> Window:
    given: dict[str, Any] = {
        "index": 0, "files": (file(4, 1),), "images": 4, "bytes_read": 1000, "batches": 2, "batch_pixels": 600,
        "queued": 3, "seconds": {"read": 1.0, "decode": 2.0, "prepare": 1.0, "predict": 6.0},
        "waits": {"read": 3.0, "other": 1.0},
    }  # fmt: skip
    return Window(**{**given, **more})


@pytest.fixture
def observed() -> tuple[Observer, Recorded, Clock, io.StringIO]:
    metrics, clock, text = Recorded(), Clock(), io.StringIO()
    meter = CostMeter(CostConfig(per_node_hour=36.0), lambda: ClusterSize(nodes=1, gpus=0, cpus=0))
    log = EventLog(text, run_id="r")
    return Observer(log=log, metrics=metrics, meter=meter, clock=clock), metrics, clock, text


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.getvalue().splitlines()]


def shard() -> str:
    return "s.tar"


def test_figures(observed: tuple[Observer, Recorded, Clock, io.StringIO]) -> None:
    observer, metrics, clock, text = observed
    observer.tick(units_left=5)
    observer.window(window(), shard, booked=True)
    clock.now += 2
    observer.window(window(files=(file(4, model="n"),)), shard, booked=True)
    clock.now += 3
    observer.tick(units_left=4)
    assert dict(metrics.values) == {
        ("maskmill_images_total", "m", "ok"): 3,
        ("maskmill_images_total", "m", "failed"): 1,
        ("maskmill_images_total", "n", "ok"): 4,
        ("maskmill_bytes_read_total",): 2000,
        ("maskmill_stage_seconds_total", "read"): 2,
        ("maskmill_stage_seconds_total", "decode"): 6,
        ("maskmill_stage_seconds_total", "predict"): 12,
        ("maskmill_stage_seconds_total", "wait"): 8,
        ("maskmill_accelerator_busy_share",): 0.6,
        ("maskmill_commit_lag_seconds",): 5,
        ("maskmill_queue_items", "units"): 4,
        ("maskmill_queue_items", "files"): 2,
        ("maskmill_queue_items", "batches"): 1.5,
        ("maskmill_batch_pixels",): 300,
        ("maskmill_cost",): pytest.approx(0.05),
    }
    observer.committed([file(4, 1), file(4)])
    clock.now += 1
    observer.tick(units_left=4)
    assert metrics.values["maskmill_rows_committed_total",] == 8
    assert metrics.values["maskmill_commit_lag_seconds",] == 0
    assert metrics.values["maskmill_queue_items", "files"] == 0
    clock.now += 100  # what is older than a minute says nothing of now
    observer.tick(units_left=4)
    assert metrics.values["maskmill_accelerator_busy_share",] == 0
    assert observer.stalls().busy_share == 0.6
    observer.window(window(files=(), batch_pixels=800), shard, booked=True)
    observer.tick(units_left=4)
    assert metrics.values["maskmill_batch_pixels",] == 300  # a moment ago
    observer.tick(units_left=4, last=True)
    assert metrics.values["maskmill_batch_pixels",] == 400
    assert lines(text) == [{"level": "info", "event": "commit", "run_id": "r", "files": 2, "rows": 8, "failed": 1}]


def test_a_window_that_came_before_spends_time_and_counts_no_row(
    observed: tuple[Observer, Recorded, Clock, io.StringIO],
) -> None:
    observer, metrics, clock, text = observed
    note = Note(event=FAILED_ROW, image_id="i")
    observer.window(window(notes=(note,)), shard, booked=False)
    clock.now += 9
    observer.tick(units_left=0)
    assert not any(key[0] == "maskmill_images_total" for key in metrics.values)
    assert metrics.values["maskmill_commit_lag_seconds",] == 0
    assert metrics.values["maskmill_stage_seconds_total", "predict"] == 6
    assert lines(text) == [
        {"level": "warning", "event": "window_dropped", "run_id": "r", "shard_id": "s.tar", "files": 1}
    ]


def test_notes_become_lines(observed: tuple[Observer, Recorded, Clock, io.StringIO]) -> None:
    observer, _, _, text = observed
    failed = Note(
        event=FAILED_ROW, image_id="s.tar/7", position=7, model="m", stage="decode", error_type="CorruptImageError",
        message="cut off", attempts=1,
    )  # fmt: skip
    observer.window(window(notes=(failed, Note(event=RETRY, stage="read", message="reset"))), shard, booked=True)
    observer.state("stopped", job="label", error="why")
    assert lines(text) == [
        {
            "level": "error", "event": "failed_row", "run_id": "r", "shard_id": "s.tar", "image_id": "s.tar/7",
            "position": 7, "model": "m", "stage": "decode", "error_type": "CorruptImageError", "message": "cut off",
            "attempts": 1,
        },
        {"level": "warning", "event": "retry", "run_id": "r", "shard_id": "s.tar", "stage": "read", "message": "reset"},
        {"level": "error", "event": "run_stopped", "run_id": "r", "job": "label", "error": "why"},
    ]  # fmt: skip


def test_deaths_are_told_once(observed: tuple[Observer, Recorded, Clock, io.StringIO]) -> None:
    observer, _, _, text = observed
    first, again, other, late = ("a", "h:1", False), ("a", "h:3", True), ("b", "h:2", False), ("c", "h:4", True)
    for worker in (first, other, first, again, again, late, other):
        observer.window(window(worker=worker), shard, booked=True)
    assert observer.deaths == 2
    assert [(line["event"], line["worker"], line.get("process"), line["replaced_by"]) for line in lines(text)] == [
        ("worker_death", "a", "h:1", "h:3"),
        ("worker_death", "c", None, "h:4"),  # which died before it gave anything
    ]


def test_made_without_anything_it_adds_up() -> None:
    observer = Observer()
    observer.window(window(), shard, booked=True)
    observer.committed([file(4)])
    observer.tick(units_left=1)
    assert observer.bill(images=1, left=1, working_since_s=0) is None
    assert observer.bytes_read == 1000
    assert observer.stalls().bound == "reader"
