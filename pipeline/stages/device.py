"""The one thread that talks to the accelerator: forward passes of all calls of a worker pass through it in order."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Generic, TypeVar

import torch

from pipeline.errors import PredictTimeoutError

__all__ = ["Device", "Job"]

Result = TypeVar("Result")
OnPause = Callable[[float, float], None]
POLL_S = 0.5


class Job(Generic[Result]):
    """A call that waits for, or runs on, the device thread.

    on_pause: told on that thread, before the call, from when to when there was nothing to run (time.monotonic).
    """

    def __init__(self, function: Callable[[], Result], on_pause: OnPause | None = None) -> None:
        self.function = function
        self.on_pause = on_pause
        self.started = 0.0
        self.future: Future[Result] = Future()


class Device:
    """Runs jobs one after the other in one thread, so that two batches never compete for memory or cores.

    A job that does not end in `timeout_s` costs its rows, not the run: its thread is left behind and a new one takes
    over (Python cannot stop a thread).
    """

    def __init__(self, *, torch_threads: int, timeout_s: float) -> None:
        self._torch_threads = torch_threads
        self._timeout_s = timeout_s
        self._executor = self._start()
        self._lock = threading.Lock()  # nothing is submitted to an executor that is being replaced
        self.busy_s = 0.0
        self._running: Job[Any] | None = None
        self._idle_since: float | None = None  # None: at work, or not begun
        self._clock = threading.Lock()  # a thread that hung may come back beside the new one

    def begin(self) -> None:
        """There is work to come: pauses count from the first of these calls on."""
        with self._clock:
            if self._running is None and self._idle_since is None:
                self._idle_since = time.monotonic()

    def _start(self) -> ThreadPoolExecutor:
        # The number of intra-op threads belongs to the calling thread under OpenMP, so it is set in this one.
        return ThreadPoolExecutor(1, "maskmill-device", torch.set_num_threads, (self._torch_threads,))

    def submit(self, function: Callable[[], Result], on_pause: OnPause | None = None) -> Job[Result]:
        """Run `function` when its turn comes. on_pause: see Job."""
        job = Job(function, on_pause)
        self._enqueue(job)
        return job

    def _enqueue(self, job: Job[Result]) -> None:
        with self._lock:
            job.future = self._executor.submit(self._timed, job)

    def _timed(self, job: Job[Result]) -> Result:
        job.started = time.monotonic()
        with self._clock:
            idle_since, self._idle_since = self._idle_since, None
            self._running = job
        if idle_since is not None and job.on_pause is not None:
            job.on_pause(idle_since, job.started)
        try:
            return job.function()
        finally:
            self._note_end(job)

    def _note_end(self, job: Job[Result]) -> None:
        """Once for each job: when it ends, or when it is given up."""
        with self._clock:
            if self._running is job:
                self._running = None
                self._idle_since = time.monotonic()
                self.busy_s += self._idle_since - job.started

    def wait(self, job: Job[Result]) -> Result:
        """The job's result. Raises PredictTimeoutError where it runs for longer than `timeout_s`."""
        while True:
            try:
                return job.future.result(timeout=POLL_S)
            except FutureTimeoutError:
                if job.started and time.monotonic() - job.started > self._timeout_s:
                    self._note_end(job)
                    self._replace()
                    raise PredictTimeoutError(f"no answer from the model in {self._timeout_s:g} s") from None
            except CancelledError:
                # It waited behind a job that hung.
                self._enqueue(job)

    def _replace(self) -> None:
        with self._lock:
            hung, self._executor = self._executor, self._start()
        hung.shutdown(wait=False, cancel_futures=True)
