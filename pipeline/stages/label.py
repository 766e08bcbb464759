"""The labelling of one unit as one stream: read, decode, batch, predict, encode, write, in overlapping threads."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import torch

from pipeline.errors import ConfigError, PredictTimeoutError, RowError
from pipeline.models.load import load_model
from pipeline.models.spec import Prediction
from pipeline.predictions.stored import stored
from pipeline.schema import FAILED, OK
from pipeline.sources.base import UnitEnd
from pipeline.sources.registry import open_source
from pipeline.stages.batching import PixelBatcher
from pipeline.stages.decode import Decoded, Decoder
from pipeline.stages.device import Device, Job
from pipeline.stages.encode import encode
from pipeline.stages.predict import Predict, choose_device, default_batch_pixels
from pipeline.stages.prepare import Prepared
from pipeline.stages.score import Scorer, score_key, unscored
from pipeline.stages.stream import Members
from pipeline.stages.waits import Span, Waits, idle_by_cause
from pipeline.stages.work import FAILED_ROW, RETRY, STAGES, LabelPlan, Note, Window, WorkItem
from pipeline.tablefiles import FILE_SCHEMA, write_file

__all__ = ["Labeller", "thread_count"]

BATCHES_AHEAD = 3


def thread_count(setting: int | str) -> int:
    """Decoding threads of one worker on this node."""
    return setting if isinstance(setting, int) else max(2, min(8, len(os.sched_getaffinity(0))))


class _Open:
    """A window that is being labelled."""

    def __init__(self, item: WorkItem, models: int) -> None:
        self.item = item
        self.rows: list[list[Future[dict[str, Any]]]] = [[] for _ in range(models)]
        self.images = 0
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.waits: dict[str, float] = {}
        self.bytes_read = self.batches = self.batch_pixels = self.queued = 0
        self.notes: list[Note] = []
        self._lock = threading.Lock()

    def spent(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds

    def paused(self, spans: Sequence[Span], idle_from: float, idle_to: float) -> None:
        """The accelerator had nothing to run before a batch of this window. Only its thread says so."""
        for cause, seconds in idle_by_cause(spans, idle_from, idle_to).items():
            self.waits[cause] = self.waits.get(cause, 0.0) + seconds


class Labeller:
    """A worker: models on the device, thread pools, and the table's folder to write into.

    `label` may be called from several threads; their forward passes take turns.
    """

    def __init__(self, plan: LabelPlan) -> None:
        self.plan = plan
        device = choose_device()
        setting = plan.resources.torch_threads
        torch_threads = setting if isinstance(setting, int) else len(os.sched_getaffinity(0))
        torch.set_num_threads(torch_threads)
        batch_pixels = plan.resources.batch_pixels
        self.models = [
            load_model(config, seed=plan.seed, tile_pixels=plan.resources.tile_pixels) for config in plan.models
        ]
        for model in self.models:
            if plan.versions and plan.versions[model.label] != model.version:
                raise ConfigError(
                    f"model {model.label!r} changed while the run started: expected version "
                    f"{plan.versions[model.label]}, got {model.version}"
                )
        self._predict = [
            Predict(
                model,
                device=device,
                batch_pixels=batch_pixels if isinstance(batch_pixels, int) else default_batch_pixels(device),
                tile_pixels=plan.resources.tile_pixels,
            )
            for model in self.models
        ]
        threads = thread_count(plan.resources.decode_threads)
        self.device = Device(torch_threads=torch_threads, timeout_s=plan.resources.predict_timeout_s)
        self._pool = ThreadPoolExecutor(threads, "maskmill-cpu")
        self._writers = ThreadPoolExecutor(plan.resources.calls_per_worker, "maskmill-write")
        self._decoder = Decoder(
            open_source(plan.source),
            [model.preprocess for model in self.models],
            max_pixels=plan.source.max_pixels,
            pool=self._pool,
            threads=threads,
            targets=any(plan.scorers),
            prompts=[model.spec.prompts for model in self.models],
            refine=[model.refine for model in self.models],
        )

    def label(self, item: WorkItem) -> Iterator[Window]:
        """Label one unit, window by window. A window is a fixed range of positions and becomes one file per model, so
        that a repeated call makes the same files; its batches are made of it alone, so that their content does not
        depend on where a run was cut."""
        waits = Waits()
        yield from self.label_decoded(item, self._decoder.stream(item.unit, item.done, waits), waits)

    def label_decoded(
        self, item: WorkItem, stream: Iterable[Decoded | UnitEnd], waits: Waits | None = None
    ) -> Iterator[Window]:
        """`label` on samples that were decoded elsewhere. waits: what the stream notes its waits in."""
        waits = waits or Waits()
        self.device.begin()
        members = Members(stream)
        closing: Future[Window] | None = None
        for _, window in groupby(members, lambda decoded: decoded.position // self.plan.output.rows_per_file):
            opened = self._run(item, window, waits)
            if closing is not None:
                yield from self._closed(closing, waits)
            closing = self._writers.submit(self._close, opened)
        if closing is not None:
            yield from self._closed(closing, waits)
        faults = tuple(_fault(text) for text in members.faults) if self.plan.notes else ()
        yield Window(index=item.index, rows=members.rows, notes=faults)

    def _closed(self, closing: Future[Window], waits: Waits) -> Iterator[Window]:
        started = time.monotonic()
        window = closing.result()
        waits.add("write", started)
        started = time.monotonic()
        yield window
        waits.add("dispatch", started)  # until Ray had taken it

    def _run(self, item: WorkItem, window: Iterator[Decoded], waits: Waits) -> _Open:
        """Push one window through the models; returns when its last batch has left the device."""
        opened = _Open(item, len(self.models))
        batchers = [PixelBatcher[_Member](lambda predict=predict: predict.batch_pixels) for predict in self._predict]  # type: ignore[misc]
        ahead: _Ahead = deque()
        for decoded in window:
            opened.spent("read", decoded.read_s)
            opened.images += 1
            opened.bytes_read += decoded.bytes_read
            opened.spent("decode", decoded.decode_s)
            opened.spent("prepare", decoded.prepare_s)
            if self.plan.notes:
                opened.notes += [_fault(text, decoded) for text in decoded.faults]
            for index in range(len(self.models)):
                if decoded.position in item.done[index]:
                    continue
                future: Future[dict[str, Any]] = Future()
                opened.rows[index].append(future)
                member = _Member(decoded, future, item.attempts[index].get(decoded.position, 0) + 1, index)
                if self.plan.notes and member.attempt > 1:
                    opened.notes.append(self._note(RETRY, member, attempts=member.attempt))
                if decoded.error is not None:
                    future.set_result(self._failed_row(member, decoded.error, decoded.error_stage))
                    continue
                batch = batchers[index].add(member)
                if batch:
                    self._submit(opened, ahead, waits, batch)
        for batcher in batchers:
            for batch in batcher.flush():
                self._submit(opened, ahead, waits, batch)
        while ahead:
            self._wait(opened, ahead, waits)
        return opened

    def _note(self, event: str, member: "_Member", **more: Any) -> Note:
        decoded = member.decoded
        model = self.models[member.model].label
        return Note(event=event, image_id=decoded.image_id, position=decoded.position, model=model, **more)

    def _submit(self, opened: _Open, ahead: "_Ahead", waits: Waits, batch: list["_Member"]) -> None:
        while len(ahead) >= BATCHES_AHEAD:
            self._wait(opened, ahead, waits)
        height, width = batch[0].padded
        opened.batches += 1
        opened.batch_pixels += len(batch) * height * width
        opened.queued += sum(not job.started for job, _ in ahead)
        on_pause = partial(opened.paused, waits.take())
        ahead.append((self.device.submit(lambda: self._predict_batch(opened, batch), on_pause), batch))

    def _wait(self, opened: _Open, ahead: "_Ahead", waits: Waits) -> None:
        job, batch = ahead.popleft()
        try:
            self.device.wait(job)
        except PredictTimeoutError as error:
            opened.spent("predict", self.plan.resources.predict_timeout_s)
            for member in batch:
                _resolve(member.future, self._failed_row(member, error, "predict"))
        started = time.monotonic()
        for member in batch:
            member.future.result()  # encoded: what is in flight stays bounded by the batches ahead
        waits.add("encode", started)

    def _predict_batch(self, opened: _Open, batch: list["_Member"]) -> None:
        started = time.perf_counter()
        results = self._predict[batch[0].model]([member.prepared for member in batch])
        opened.spent("predict", time.perf_counter() - started)
        for member, result in zip(batch, results, strict=True):
            if isinstance(result, RowError):
                _resolve(member.future, self._failed_row(member, result, "predict"))
            else:
                self._pool.submit(self._encode, opened, member, result)

    def _encode(self, opened: _Open, member: "_Member", prediction: Prediction) -> None:
        started = time.perf_counter()
        decoded = member.decoded
        try:
            columns = encode(prediction, self.plan.output.format, width=decoded.width, height=decoded.height)
            row = {**self._row(member), "status": OK, **columns}
        except Exception as error:  # noqa: BLE001  (the row must end in some state, or its window would wait for ever)
            row = self._failed_row(member, RowError(f"{type(error).__name__}: {error}"), "encode")
        encoded = time.perf_counter()
        opened.spent("encode", encoded - started)
        scorer = self.plan.scorers[member.model]
        if scorer is not None and row["status"] == OK and decoded.targets:
            row["score"] = self._score(scorer, member, row, prediction)
            opened.spent("score", time.perf_counter() - encoded)
        _resolve(member.future, row)

    def _score(
        self, scorer: Scorer, member: "_Member", row: dict[str, Any], prediction: Prediction
    ) -> dict[str, Any] | None:
        """The row's score. Whatever is wrong with a target, the prediction is none the worse for it."""
        decoded = member.decoded
        try:
            return scorer.score(
                stored(row, self.models[member.model].spec.task, label_HW=prediction.label_HW),
                decoded.targets,
                key=score_key(decoded.image_id, decoded.fields),
                width=decoded.width,
                height=decoded.height,
            )
        except Exception as error:  # noqa: BLE001
            return unscored(error)

    def _row(self, member: "_Member") -> dict[str, Any]:
        decoded = member.decoded
        return {
            "image_id": decoded.image_id,
            "shard_id": decoded.shard_id,
            "position": decoded.position,
            "width": decoded.width or None,
            "height": decoded.height or None,
            "model_version": self.models[member.model].version,
            "run_id": self.plan.run_id,
            "fields": list(decoded.fields.items()) or None,
        }

    def _failed_row(self, member: "_Member", error: RowError, stage: str) -> dict[str, Any]:
        return {
            **self._row(member),
            "status": FAILED,
            "error_type": type(error).__name__,
            "error_stage": stage,
            "error_message": str(error)[:2000],
            "attempts": member.attempt,
        }

    def _close(self, opened: _Open) -> Window:
        """Write the window's files, one per model."""
        labeled_at = datetime.now(UTC)
        files = []
        for index, futures in enumerate(opened.rows):
            if not futures:
                continue
            model = self.models[index]
            rows = [{**future.result(), "labeled_at": labeled_at} for future in futures]
            started = time.perf_counter()
            files.append(
                write_file(
                    self.plan.output.uri,
                    self.plan.output.storage,
                    pa.Table.from_pylist(rows, schema=FILE_SCHEMA),
                    model=model.label,
                    model_version=model.version,
                    shard_id=opened.item.unit.shard_id,
                )
            )
            opened.spent("write", time.perf_counter() - started)
            if self.plan.notes:
                opened.notes += [_failure(row, model.label) for row in rows if row["status"] == FAILED]
        return Window(
            index=opened.item.index,
            files=tuple(files),
            images=opened.images,
            wall_s=time.perf_counter() - opened.started,
            seconds=dict(opened.seconds),
            bytes_read=opened.bytes_read,
            waits=dict(opened.waits),
            batches=opened.batches,
            batch_pixels=opened.batch_pixels,
            queued=opened.queued,
            notes=tuple(opened.notes),
        )


@dataclass(frozen=True, slots=True)
class _Member:
    """One image on its way through one model; `future` becomes its row."""

    decoded: Decoded
    future: Future[dict[str, Any]]
    attempt: int
    model: int

    @property
    def prepared(self) -> Prepared:
        prepared = self.decoded.prepared[self.model]
        if prepared is None:
            raise RuntimeError(f"{self.decoded.image_id} was not prepared for model {self.model}")
        return prepared

    @property
    def padded(self) -> tuple[int, int]:
        return self.prepared.padded


# Batches on their way through the device, oldest first.
_Ahead = deque[tuple[Job[None], list[_Member]]]


def _fault(text: str, decoded: Decoded | None = None) -> Note:
    """The unit was read again after a fault of the storage. decoded: the sample that came after it."""
    return Note(
        event=RETRY,
        image_id=None if decoded is None else decoded.image_id,
        position=None if decoded is None else decoded.position,
        stage="read",
        error_type="StorageError",
        message=text[:2000],
    )


def _failure(row: Mapping[str, Any], model: str) -> Note:
    return Note(
        event=FAILED_ROW,
        image_id=row["image_id"],
        position=row["position"],
        model=model,
        stage=row["error_stage"],
        error_type=row["error_type"],
        message=row["error_message"],
        attempts=row["attempts"],
    )


def _resolve(future: Future[dict[str, Any]], row: dict[str, Any]) -> None:
    """Set a row once; a hung batch that answers after its timeout comes too late."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(row)
