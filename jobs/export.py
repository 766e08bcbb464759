"""The labels of a table for other tools: `maskmill export [CONFIG.yaml] table.uri=... format=... output.uri=...`."""

import os
import sys
import time
from collections.abc import Sequence
from functools import partial

from jobs.common import config_job
from jobs.driver import signals_interrupt
from pipeline.config_export import ExportConfig
from pipeline.dataflow import cluster
from pipeline.dataflow.export import map_on_cluster
from pipeline.export.export import Export, Mapper, open_export
from pipeline.export.threads import map_in_threads
from pipeline.progress import Reporter, duration

__all__ = ["export", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("export", ExportConfig, export, sys.argv[1:] if argv is None else argv)


def export(config: ExportConfig) -> int:
    """Export to the end. Raises RunError; pieces that are whole by then stay."""
    reporter = Reporter("exporting")
    started = time.monotonic()
    plan = open_export(config)
    reporter.say(f"{plan.scan.rows} rows of {plan.job.model} in {len(plan.scan.parts)} row groups")
    mapper = _mapper(config)
    # After connecting: Ray installs handlers of its own.
    with signals_interrupt():
        plan.prepare(mapper, reporter.say)
        if not plan.is_done:
            _pieces(plan, mapper, reporter)
        summary = plan.fold()
    reporter.say(
        f"{summary['images']} images as {summary['format']} in {config.output.uri}, "
        f"{summary['failed']} rows in failed.json, {duration(time.monotonic() - started)}"
    )
    return 0


def _mapper(config: ExportConfig) -> Mapper:
    """The cluster where one is named, else threads."""
    workers = None if config.workers == "auto" else config.workers
    if config.ray_address or os.environ.get("RAY_ADDRESS"):
        cluster.connect(config.ray_address)
        return partial(map_on_cluster, workers=workers)
    return partial(map_in_threads, workers=workers)


def _pieces(plan: Export, mapper: Mapper, reporter: Reporter) -> None:
    done = failed = 0
    reporter.start(plan.images, 0)
    try:
        for counts in plan.run(mapper):
            done, failed = done + counts["images"] + counts["failed"], failed + counts["failed"]
            reporter.update(done=min(done, plan.images), total=plan.images, failed=failed, limit="export")
    finally:
        reporter.stop()


if __name__ == "__main__":
    sys.exit(main())
