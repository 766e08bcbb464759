"""The observer of one run on the driver: what windows and commits tell becomes metrics, log lines and a summary."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pipeline.observe.cost import Bill, CostMeter
from pipeline.observe.log import EventLog
from pipeline.observe.metrics import Metrics, NoMetrics
from pipeline.observe.stalls import Stalls, attribute, metric_seconds
from pipeline.stages.work import FAILED_ROW, Window
from pipeline.tablefiles import FileRecord

__all__ = ["Observer"]

TICK_S = 1.0
BUSY_WINDOW_S = 60.0
LEVELS: Mapping[str, Literal["info", "warning", "error"]] = {"stopped": "error", "interrupted": "warning"}


class Observer:
    """Not thread-safe, like the Run that it belongs to. Made without anything it only adds up."""

    def __init__(
        self,
        *,
        log: EventLog | None = None,
        metrics: Metrics | None = None,
        meter: CostMeter | None = None,
        layout: Literal["fused", "split"] = "fused",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = log or EventLog()
        self.metrics: Metrics = metrics or NoMetrics()
        self.meter = meter
        self.layout = layout
        self.seconds: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self.bytes_read = 0
        self.deaths = 0
        self._clock = clock
        self._processes: dict[str, str] = {}
        self._booked_at: float | None = None
        self._uncommitted = 0
        self._ticked = clock()
        self._recent: deque[tuple[float, float, float]] = deque()  # when, seconds at work, seconds paused
        self._batches = self._pixels = self._queued = 0

    def window(self, window: Window, shard_id: Callable[[], str], *, booked: bool) -> None:
        """A window has come. booked: its rows count; else it is of a task that Ray ran twice, and only its time was
        spent."""
        if window.worker:
            self._note_worker(*window.worker)
        for stage, seconds in window.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for cause, seconds in window.waits.items():
            self.waits[cause] = self.waits.get(cause, 0.0) + seconds
        for stage, seconds in metric_seconds(window.seconds, window.waits).items():
            if seconds:
                self.metrics.add("maskmill_stage_seconds_total", seconds, stage=stage)
        if window.bytes_read:
            self.bytes_read += window.bytes_read
            self.metrics.add("maskmill_bytes_read_total", window.bytes_read)
        self._batches += window.batches
        self._pixels += window.batch_pixels
        self._queued += window.queued
        if window.batches:
            self._recent.append((self._clock(), window.seconds.get("predict", 0.0), sum(window.waits.values())))
        if not booked:
            if window.files:
                self.log.write("window_dropped", "warning", shard_id=shard_id(), files=len(window.files))
            return
        for file in window.files:
            for status, rows in (("ok", file.rows - file.failed), ("failed", file.failed)):
                if rows:
                    self.metrics.add("maskmill_images_total", rows, model=file.model, status=status)
        if window.files:
            self._uncommitted += len(window.files)
            self._booked_at = self._clock() if self._booked_at is None else self._booked_at
        for note in window.notes:
            fields = asdict(note)
            level: Literal["error", "warning"] = "error" if note.event == FAILED_ROW else "warning"
            self.log.write(fields.pop("event"), level, shard_id=shard_id(), **fields)

    def _note_worker(self, actor: str, process: str, restarted: bool) -> None:
        before = self._processes.get(actor)
        self._processes[actor] = process
        if process == before or (before is None and not restarted):
            return
        self.deaths += 1
        self.log.write("worker_death", "warning", worker=actor, process=before, replaced_by=process)

    def committed(self, files: Sequence[FileRecord]) -> None:
        """Files have become part of the table."""
        rows = sum(file.rows for file in files)
        self._booked_at, self._uncommitted = None, 0
        self.metrics.add("maskmill_rows_committed_total", rows)
        self.log.write("commit", files=len(files), rows=rows, failed=sum(file.failed for file in files))

    def state(self, state: str, **fields: Any) -> None:
        """The run has begun, or ended in some way."""
        self.log.write(f"run_{state}", LEVELS.get(state, "info"), **fields)

    def tick(self, *, units_left: int, last: bool = False) -> None:
        """Call it often: gauges are set once a second, and at the `last` of these calls."""
        now = self._clock()
        if self.meter is not None:
            self.meter.sample(now)
        if now - self._ticked < TICK_S and not last:
            return
        self._ticked = now
        while self._recent and now - self._recent[0][0] > BUSY_WINDOW_S:
            self._recent.popleft()
        busy, paused = (sum(entry[place] for entry in self._recent) for place in (1, 2))
        self.metrics.set("maskmill_accelerator_busy_share", busy / (busy + paused) if busy + paused else 0.0)
        lag = 0.0 if self._booked_at is None else now - self._booked_at
        self.metrics.set("maskmill_commit_lag_seconds", lag)
        self.metrics.set("maskmill_queue_items", units_left, queue="units")
        self.metrics.set("maskmill_queue_items", self._uncommitted, queue="files")
        if self._batches:
            self.metrics.set("maskmill_batch_pixels", self._pixels / self._batches)
            self.metrics.set("maskmill_queue_items", self._queued / self._batches, queue="batches")
            self._batches = self._pixels = self._queued = 0
        if self.meter is not None:
            self.metrics.set("maskmill_cost", self.meter.so_far(now))

    def stalls(self) -> Stalls:
        """Where the accelerators' time went so far."""
        return attribute(self.seconds, self.waits, layout=self.layout)

    def bill(self, *, images: int, left: int, working_since_s: float | None) -> Bill | None:
        """What it costs so far, where the config has prices (see CostMeter.bill)."""
        if self.meter is None:
            return None
        return self.meter.bill(self._clock(), images=images, left=left, working_since_s=working_since_s)
