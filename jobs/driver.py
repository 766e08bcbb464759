"""Driving a run of units to its end: windows booked and committed, progress shown, signals and errors in order."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import pyarrow as pa

from jobs.common import Interrupted
from pipeline.errors import EXIT_INTERRUPTED, RunError, StorageError
from pipeline.progress import Reporter, counted
from pipeline.run import Run
from pipeline.stages.stream import ticking
from pipeline.stages.work import Window

__all__ = ["books_kept", "drive", "leave", "signals_interrupt"]

PASSES = 3
TICK_S = 1.0
# How old what `maskmill status` says of a run that goes on may be.
PROGRESS_S = 30.0
# Counting a table of millions of files takes the driver seconds: at most one in fifty.
COUNTING_SHARE = 50.0


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM (a spot instance going away, `ray job stop`) ends a run as Ctrl-C does: commit, say so, exit 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def books_kept(run: Run, reporter: Reporter) -> Iterator[None]:
    """However the run ends inside, what is booked is committed and run.json says how it ended."""
    try:
        yield
    except KeyboardInterrupt:
        reporter.stop()
        run.commit()
        run.write_run("interrupted", **_ending(run))
        raise
    except RunError as error:
        reporter.stop()
        # What stopped the run may stop the last commit too; it must not keep the reason from being written.
        with contextlib.suppress(RunError):
            run.commit()
        with contextlib.suppress(RunError):
            run.write_run("stopped", error=str(error), **_ending(run))
        raise
    reporter.stop()
    run.table.vacuum()
    run.write_run("done", images=run.images, seconds=run.seconds, label_s=run.label_s, **_ending(run))


def _ending(run: Run) -> dict[str, Any]:
    """What run.json says of a run that has ended in some way."""
    counts = plain_counts(run)
    return {"counts": counts, "observed": run.observed(max((count["pending"] for count in counts), default=0))}


def drive(
    run: Run,
    windows_of: Callable[[pa.Table], Iterator[Window]],
    reporter: Reporter,
    *,
    commit_interval_s: float,
    limit: Callable[[], str],
    workers: str,
    pending: Callable[[], pa.Table] | None = None,
) -> None:
    """Run the dataflow over what is left until nothing is. windows_of: the windows of units (rows of run.WORK).

    limit: what limits the run so far. pending: what is left, `run.pending` by default. Raises
    RunError.
    """
    pending = pending or run.pending
    work = pending()
    for _ in range(PASSES):
        if not len(work):
            return
        reporter.say(f"{len(work)} of {len(run.plan)} units to do with {workers}")
        _one_pass(run, windows_of(work), reporter, commit_interval_s, limit)
        # Units can only be left where a task ran twice with another cut; they are simply planned again.
        work = pending()
    if len(work):
        raise StorageError(
            f"{counted(len(work), 'unit')} could not be finished in {PASSES} passes; run the same command again"
        )


def _one_pass(
    run: Run,
    windows: Iterator[Window],
    reporter: Reporter,
    commit_interval_s: float,
    limit: Callable[[], str],
) -> None:
    total, done = _images(run)
    reporter.start(total, done)
    taken = run.images
    committed = counted = noted = time.monotonic()
    counting_s = 0.0
    stream = ticking(windows, count=64, weight=lambda _: 0, limit=1, tick_s=TICK_S)
    with contextlib.closing(stream):  # type: ignore[type-var]
        for window in stream:
            if window is not None:
                run.take(window)
            now = time.monotonic()
            if now - committed >= commit_interval_s:
                run.commit()
                committed = now
            if now - counted >= max(commit_interval_s, COUNTING_SHARE * counting_s):
                total, _ = _images(run)
                counted = time.monotonic()
                counting_s = counted - now
            shown = done + run.images - taken
            left = max(0, total - shown)
            if now - noted >= PROGRESS_S:
                run.write_progress(left)
                noted = now
            run.observer.tick(units_left=run.units_left)
            bill = run.bill(left)
            cost = "" if bill is None else bill.short()
            reporter.update(done=shown, total=total, failed=run.failed, limit=limit(), cost=cost)
    run.commit()
    run.observer.tick(units_left=run.units_left, last=True)


def _images(run: Run) -> tuple[int, int]:
    """Images in all and images that have all their rows, from the table."""
    counts = run.counts()
    return max(count.expected for count in counts), min(count.ok + count.failed for count in counts)


def plain_counts(run: Run) -> list[dict[str, Any]]:
    """Rows by model for run.json."""
    return [
        {
            "model": count.model,
            "model_version": count.model_version,
            "expected": count.expected,
            "ok": count.ok,
            "failed": count.failed,
            "pending": count.pending,
        }
        for count in run.counts()
    ]


def leave(code: int) -> NoReturn:
    """End the process of a job; an interrupted one does not wait for threads that are still at work."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_INTERRUPTED:
        os._exit(code)
    sys.exit(code)
