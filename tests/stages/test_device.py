"""The device thread: one job at a time, and a job that hangs costs itself alone."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import PredictTimeoutError
from pipeline.stages import device as module
from pipeline.stages.device import Device


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What hanging jobs wait for; set at the end, so that their threads end too."""
    event = threading.Event()
    yield event
    event.set()


def device(timeout_s: float = 30) -> Device:
    return Device(torch_threads=1, timeout_s=timeout_s)


def test_jobs_of_many_threads_run_one_at_a_time_and_in_order() -> None:
    worker, running, order = device(), threading.Semaphore(1), []

    def job(number: int) -> int:
        assert running.acquire(blocking=False)
        order.append(number)
        time.sleep(0.002)
        running.release()
        return number * 2

    jobs = [worker.submit(lambda number=number: job(number)) for number in range(20)]
    results: dict[int, int] = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: worker.wait(jobs[n])})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number * 2 for number in range(20)}
    assert order == list(range(20))
    assert worker.busy_s >= 20 * 0.002


def test_an_exception_reaches_the_one_who_waits() -> None:
    worker = device()
    wrong, right = worker.submit(lambda: 1 // 0), worker.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        worker.wait(wrong)
    assert worker.wait(right) == 7


def test_a_job_that_hangs_times_out_and_the_others_run(hang: threading.Event) -> None:
    worker = device(timeout_s=0.1)
    before = worker.submit(lambda: "before")
    hung = worker.submit(lambda: hang.wait(20))
    behind = [worker.submit(lambda number=number: number) for number in range(3)]
    assert worker.wait(before) == "before"
    with pytest.raises(PredictTimeoutError, match=r"no answer from the model in 0.1 s"):
        worker.wait(hung)
    assert [worker.wait(job) for job in behind] == [0, 1, 2]
    assert worker.wait(worker.submit(lambda: "later")) == "later"


def test_two_jobs_that_hang(hang: threading.Event) -> None:
    worker = device(timeout_s=0.1)
    jobs = [worker.submit(lambda: hang.wait(20)) for _ in range(2)]
    last = worker.submit(lambda: "last")
    for job in jobs:
        with pytest.raises(PredictTimeoutError):
            worker.wait(job)
    assert worker.wait(last) == "last"


def test_waiting_in_the_queue_is_no_timeout() -> None:
    worker = device(timeout_s=0.15)
    jobs = [worker.submit(lambda: time.sleep(0.06)) for _ in range(5)]
    for job in reversed(jobs):
        assert worker.wait(job) is None


def test_others_submit_while_a_job_hangs(hang: threading.Event) -> None:
    worker = device(timeout_s=0.05)
    results: list[int] = []

    def client(start: int) -> None:
        results.extend(worker.wait(worker.submit(lambda number=number: number)) for number in range(start, start + 50))

    hung = worker.submit(lambda: hang.wait(20))
    threads = [threading.Thread(target=client, args=(start,)) for start in (0, 100)]
    for thread in threads:
        thread.start()
    with pytest.raises(PredictTimeoutError):
        worker.wait(hung)
    for thread in threads:
        thread.join()
    assert sorted(results) == [*range(50), *range(100, 150)]


def test_the_thread_has_its_number_of_torch_threads() -> None:
    worker = Device(torch_threads=1, timeout_s=10)
    assert worker.wait(worker.submit(torch.get_num_threads)) == 1


def test_pauses_are_told_to_the_job_that_ends_them() -> None:
    worker, pauses = device(), []

    def on_pause(idle_from: float, idle_to: float) -> None:
        pauses.append(idle_to - idle_from)

    worker.wait(worker.submit(lambda: None, on_pause))
    assert pauses == []  # nobody had said that there was work to come
    worker.begin()  # which is no news any more
    time.sleep(0.05)
    jobs = [worker.submit(lambda: time.sleep(0.05), on_pause) for _ in range(3)]
    for job in jobs:
        worker.wait(job)
    assert 0.04 < pauses[0] < 5
    assert len(pauses) == 3  # one job after the other: pauses of no length to speak of
    assert sum(pauses[1:]) < 1
    assert worker.busy_s >= 0.15


def test_a_job_that_is_given_up_counts_as_work_until_then(hang: threading.Event) -> None:
    worker, pauses = device(0.1), []
    worker.begin()
    hung = worker.submit(lambda: hang.wait(20))
    with pytest.raises(PredictTimeoutError):
        worker.wait(hung)
    busy_s = worker.busy_s
    assert busy_s >= 0.1
    worker.wait(worker.submit(lambda: None, lambda start, end: pauses.append(end - start)))
    assert len(pauses) == 1
    hang.set()
    hung.future.result(5)
    assert worker.busy_s < busy_s + 5
    assert worker.busy_s - busy_s < 0.1  # what it does afterwards is nobody's work
