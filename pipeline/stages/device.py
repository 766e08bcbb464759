"""The one thread that talks to the accelerator: forward passes of all calls of a worker pass through it in order."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

import torch

from pipeline.errors import PredictTimeoutError

__all__ = ["Device", "Job"]

Result = TypeVar("Result")
POLL_S = 0.5


class Job(Generic[Result]):
    """A call that waits for, or runs on, the device thread."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function = function
        self.started = 0.0
        self.future: Future[Result] = Future()

    def run(self) -> Result:
        self.started = time.monotonic()
        return self.function()


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

    def _start(self) -> ThreadPoolExecutor:
        # The number of intra-op threads belongs to the calling thread under OpenMP, so it is set in this one.
        return ThreadPoolExecutor(1, "maskmill-device", torch.set_num_threads, (self._torch_threads,))

    def submit(self, function: Callable[[], Result]) -> Job[Result]:
        job = Job(function)
        self._enqueue(job)
        return job

    def _enqueue(self, job: Job[Result]) -> None:
        with self._lock:
            job.future = self._executor.submit(self._timed, job)

    def _timed(self, job: Job[Result]) -> Result:
        try:
            return job.run()
        finally:
            self.busy_s += time.monotonic() - job.started

    def wait(self, job: Job[Result]) -> Result:
        """The job's result. Raises PredictTimeoutError where it runs for longer than `timeout_s`."""
        while True:
            try:
                return job.future.result(timeout=POLL_S)
            except FutureTimeoutError:
                if job.started and time.monotonic() - job.started > self._timeout_s:
                    self._replace()
                    raise PredictTimeoutError(f"no answer from the model in {self._timeout_s:g} s") from None
            except CancelledError:
                # It waited behind a job that hung.
                self._enqueue(job)

    def _replace(self) -> None:
        with self._lock:
            hung, self._executor = self._executor, self._start()
        hung.shutdown(wait=False, cancel_futures=True)
