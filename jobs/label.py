"""Label a corpus: `maskmill label CONFIG.yaml [dotted.key=value ...]`, or the same as `python -m jobs.label`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from jobs.common import Interrupted, config_job
from pipeline.config import LabelConfig
from pipeline.dataflow import cluster
from pipeline.dataflow.label import label_windows, resolve_models
from pipeline.errors import RunError, StorageError
from pipeline.models.load import check_models
from pipeline.progress import Reporter, counts_table, duration, limiting_stage, stage_shares
from pipeline.run import LabelRun
from pipeline.sources.registry import open_source
from pipeline.stages.label import thread_count
from pipeline.stages.stream import ticking
from pipeline.stages.work import LabelPlan
from pipeline.units import plan_table

__all__ = ["label", "main"]

PASSES = 3
TICK_S = 1.0
# Counting a table of millions of files takes the driver seconds: at most one in fifty.
COUNTING_SHARE = 50.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("label", LabelConfig, label, sys.argv[1:] if argv is None else argv)


def label(config: LabelConfig) -> int:
    """Run one labelling job to its end. Raises RunError; everything committed by then stays."""
    reporter = Reporter()
    check_models(config.models)
    started = time.monotonic()
    plan = plan_table(open_source(config.source).plan())
    reporter.say(f"planned {len(plan)} units in {time.monotonic() - started:.1f} s")
    cluster.connect(config.ray_address, config.resources.object_store_bytes)
    # After connecting: Ray installs handlers of its own.
    with _signals_interrupt():
        pool = cluster.plan_pool(config.resources)
        models = resolve_models(config, pool)
        for model in models:
            warning = "" if model["commercial"] else "  (no commercial use)"
            reporter.say(
                f"model {model['label']} {model['version']}, {model['parameters'] / 1e6:.1f} M parameters, "
                f"taxonomy {model['taxonomy']['name']}, licence {model['license']}{warning}"
            )
        run = LabelRun(config, plan, models)
        run.begin()
        if run.orphans:
            reporter.say(f"removed {run.orphans} files that an earlier run wrote but did not commit")
        try:
            _label_all(config, run, pool, models, reporter)
        except KeyboardInterrupt:
            reporter.stop()
            run.commit()
            run.write_run("interrupted", counts=_plain(run))
            raise
        except RunError as error:
            reporter.stop()
            # What stopped the run may stop the last commit too; it must not keep the reason from being written.
            with contextlib.suppress(RunError):
                run.commit()
            with contextlib.suppress(RunError):
                run.write_run("stopped", error=str(error), counts=_plain(run))
            raise
        reporter.stop()
        run.table.vacuum()
        run.write_run("done", counts=_plain(run), images=run.images, seconds=run.seconds, label_s=run.label_s)
    _summarise(config, run, reporter, pool)
    run.check_final_budget()
    return 0


def _label_all(
    config: LabelConfig, run: LabelRun, pool: cluster.Pool, models: list[dict[str, Any]], reporter: Reporter
) -> None:
    work = run.pending()
    for _ in range(PASSES):
        if not len(work):
            return
        label_plan = LabelPlan(
            source=config.source,
            models=config.models,
            output=config.output,
            resources=config.resources,
            versions=run.versions,
            run_id=run.run_id,
            seed=config.seed,
        )
        reporter.say(f"{len(work)} of {len(run.plan)} units to label with {pool.workers} workers")
        _label_pass(config, run, label_windows(work, label_plan, pool, models), pool, reporter)
        # Units can only be left where a task ran twice with another cut; they are simply planned again.
        work = run.pending()
    if len(work):
        raise StorageError(f"{len(work)} units could not be finished in {PASSES} passes; run the same command again")


def _label_pass(
    config: LabelConfig, run: LabelRun, windows: Iterator[Any], pool: cluster.Pool, reporter: Reporter
) -> None:
    total, done = _images(run)
    reporter.start(total, done)
    taken = run.images
    started = committed = counted = time.monotonic()
    counting_s = 0.0
    threads = thread_count(config.resources.decode_threads)
    stream = ticking(windows, count=64, weight=lambda _: 0, limit=1, tick_s=TICK_S)
    with contextlib.closing(stream):  # type: ignore[type-var]
        for window in stream:
            if window is not None:
                run.take(window)
            now = time.monotonic()
            if now - committed >= config.output.commit_interval_s:
                run.commit()
                committed = now
            if now - counted >= max(config.output.commit_interval_s, COUNTING_SHARE * counting_s):
                total, _ = _images(run)
                counted = time.monotonic()
                counting_s = counted - now
            limit = limiting_stage(
                run.seconds,
                wall_s=now - started,
                workers=pool.workers,
                threads=threads,
                calls=config.resources.calls_per_worker,
            )
            reporter.update(done=done + run.images - taken, total=total, failed=run.failed, limit=limit)
    run.commit()


def _images(run: LabelRun) -> tuple[int, int]:
    """Images in all and images that have all their rows, from the table."""
    counts = run.counts()
    return max(count.expected for count in counts), min(count.ok + count.failed for count in counts)


def _plain(run: LabelRun) -> list[dict[str, Any]]:
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


def _summarise(config: LabelConfig, run: LabelRun, reporter: Reporter, pool: cluster.Pool) -> None:
    seconds = time.monotonic() - run.started
    uri = config.output.uri
    reporter.console.print(counts_table(run.counts()))
    if run.rows:
        shares = "  ".join(f"{stage} {share:.0%}" for stage, share in stage_shares(run.seconds).items())
        reporter.say(
            f"this run: {run.images} images, {run.rows} rows ({run.failed} failed) in {duration(seconds)}, "
            f"{run.images / seconds:.1f} img/s with {pool.workers} workers, {run.commits} commits"
        )
        reporter.say(f"thread time: {shares}")
    else:
        reporter.say(f"nothing was left to label; looked for {duration(seconds)}")
    reporter.say(f"table: {uri}  (run {run.run_id}, see run.json)")
    reporter.say(f"  maskmill status {uri}    maskmill preview {uri}")
    options = ", storage_options=..." if config.output.storage else ""
    reporter.say(f'  python: deltalake.DeltaTable("{uri}"{options}).to_pyarrow_table(columns=["image_id", "status"])')


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM (a spot instance going away, `ray job stop`) ends a run as Ctrl-C does: commit, say so, exit 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code == 130 else sys.exit(code)
