"""What a run costs its driver, from its plan to its last commit, over a million rows.

    python tests/benchmarks/scale.py [--rows 1000000] [--unit-images 64] [--files-per-commit 16] [--units 1000000]
                                     [--log-files 100000] [--ray-rows 50000] [--folder FOLDER]

Rendering and Ray are left out, everything else is the real thing: the plan of the `scenes` source, the fence, the unit
log, windows booked and committed, resume, counts, compaction. Two processes play the workers: they write real Parquet
files of rows as the null model makes them, one for each unit. Each phase runs in a process of its own, with all that
`maskmill label` imports, so that its memory over idle is its own:

    label    plan, begin, and all but the last tenth of the units, some left half done: as a driver that was killed
    resume   plan, begin, what is left, the rest of the units
    status   counts, as `maskmill status` makes them
    compact  small files into large ones, then status once more

--units plans and resumes that many units without rows. --log-files commits that many files that are only named.
--ray-rows labels tiny scenes with the null model through Ray Data, a quarter of that many and then as many, and prints
the driver's peak and the seconds of each.
Exit status 1 says that a bound of issue 6 was missed.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from deltalake import DeltaTable

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "ray")]

import jobs.label  # noqa: E402, F401  (idle is a process that has imported what the job imports)
from pipeline.compaction import compact  # noqa: E402
from pipeline.config import LabelConfig  # noqa: E402
from pipeline.masks import encode_label_map  # noqa: E402
from pipeline.run import Run  # noqa: E402
from pipeline.sources.base import Unit  # noqa: E402
from pipeline.sources.registry import open_source  # noqa: E402
from pipeline.stages.work import Window  # noqa: E402
from pipeline.status import table_counts  # noqa: E402
from pipeline.table import RowTable  # noqa: E402
from pipeline.tablefiles import FILE_SCHEMA, write_file  # noqa: E402
from pipeline.units import UnitLog, plan_table  # noqa: E402

MODEL = {"label": "null_model", "version": "0123456789abcdef"}
WRITERS = 2
LEFT = 0.1  # share of the units that the first driver does not come to
MEMORY_BYTES, PLAN_S, RESUME_S, RATIO = 300e6, 10, 20, 2.0
SPAWN = multiprocessing.get_context("spawn")


def write_unit(uri: str, index: int, shard_id: str, first: int, end: int, rows: int) -> list[Window]:
    """A worker's part: the rows `first` to `end` of a unit of `rows` as one file, and the windows that say so."""
    count = end - first
    base, _, start = shard_id.partition("#")
    label_map = {"format": "png", "data": encode_label_map(np.zeros((8, 8), np.uint8), "png")}
    columns = {
        "image_id": [f"{base}/{int(start) + position:09d}" for position in range(first, end)],
        "shard_id": [shard_id] * count,
        "position": range(first, end),
        "width": [8] * count,
        "height": [8] * count,
        "model_version": [MODEL["version"]] * count,
        "status": ["ok"] * count,
        "semantic": [label_map] * count,
        "run_id": ["scale"] * count,
        "labeled_at": [datetime.now(UTC)] * count,
    }
    table = pa.table(
        [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in FILE_SCHEMA],
        schema=FILE_SCHEMA,
    )
    file = write_file(uri, {}, table, model=MODEL["label"], model_version=MODEL["version"], shard_id=shard_id)
    windows = [Window(index=index, files=(file,), images=count)]
    return windows if end < rows else [*windows, Window(index=index, rows=rows)]


def worked(uri: str, work: pa.Table, half: Callable[[int], bool]) -> Iterator[list[Window]]:
    """The windows of each unit as the workers write them; of units that `half` names only the first half."""
    ahead: list[Future[list[Window]]] = []
    with ProcessPoolExecutor(WRITERS, mp_context=SPAWN) as pool:
        for place, (index, shard_id, rows, done) in enumerate(
            zip(*(work.column(name).to_pylist() for name in ("index", "shard_id", "rows", "done")), strict=True)
        ):
            first = rows // 2 if done else 0
            end = rows // 2 if half(place) else rows
            ahead.append(pool.submit(write_unit, uri, index, shard_id, first, end, rows))
            if len(ahead) > 8 * WRITERS:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


class Gauge:
    """Seconds by step, and the most memory over what the process held when it began."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.idle = self.peak = self.process.memory_info().rss
        self.seconds: dict[str, float] = {}
        self._clock = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.02)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._clock, 2)
        self._clock = now

    def result(self, **more: Any) -> dict[str, Any]:
        return {"seconds": self.seconds, "over_idle_mb": round((self.peak - self.idle) / 1e6), **more}


def config_of(uri: str, rows: int, unit_images: int) -> LabelConfig:
    source = {"format": "scenes", "count": rows, "width": 8, "height": 8, "unit_images": unit_images, "targets": []}
    return LabelConfig.model_validate({"source": source, "models": [{"name": "null_model"}], "output": {"uri": uri}})


def begin(uri: str, rows: int, unit_images: int, gauge: Gauge) -> tuple[Run, pa.Table]:
    config = config_of(uri, rows, unit_images)
    plan = plan_table(open_source(config.source).plan())
    gauge.lap("plan")
    run = Run(config, plan, [MODEL])
    run.begin()
    gauge.lap("begin")
    work = run.pending()
    gauge.lap("pending")
    return run, work


def label(uri: str, rows: int, unit_images: int, files_per_commit: int, left: float) -> dict[str, Any]:
    """One driver's run."""
    gauge = Gauge()
    run, work = begin(uri, rows, unit_images, gauge)
    pending = len(work)
    work = work.slice(0, round(len(work) * (1 - left)))
    commit_s: list[float] = []
    take_s = 0.0
    memory: list[int] = []
    # Only the driver's own seconds: the rest is the workers'.
    for number, windows in enumerate(worked(uri, work, lambda place: left > 0 and place % 100 == 99), 1):
        clock = time.perf_counter()
        for window in windows:
            run.take(window)
        take_s += time.perf_counter() - clock
        if number % files_per_commit == 0 or number == len(work):
            clock = time.perf_counter()
            run.commit()
            commit_s.append(time.perf_counter() - clock)
            memory.append(gauge.process.memory_info().rss - gauge.idle)
    gauge.lap("label")
    counts = run.counts()[0]
    gauge.lap("counts")
    if not left:
        assert len(run.pending()) == 0, "units are left"
        run.table.vacuum()
        gauge.lap("end")
    run.write_run("done" if not left else "interrupted")
    tenth = max(1, len(commit_s) // 10)
    return gauge.result(
        pending=pending,
        rows=counts.ok,
        commits=len(commit_s),
        take_s=round(take_s, 2),
        commit_s=round(sum(commit_s), 2),
        commit_ms=[
            round(1000 * float(np.median(commit_s[n : n + tenth])), 1)
            for n in range(0, len(commit_s) - tenth + 1, tenth)
        ],
        last_to_first=round(sum(commit_s[-tenth:]) / sum(commit_s[:tenth]), 2),
        longest_commit_s=round(max(commit_s), 2),
        memory_mb=[round(value / 1e6) for value in memory[tenth - 1 :: tenth]],
    )


def status(uri: str, rows: int) -> dict[str, Any]:
    """Counts from the logs, and each row's key once: every row is there, none twice."""
    gauge = Gauge()
    table = RowTable.open(uri, {})
    gauge.lap("open")
    (counts,) = table_counts(table, UnitLog(uri, {}), {MODEL["label"]: MODEL["version"]})
    gauge.lap("counts")
    measured = gauge.result()
    shards = table.shards()
    gauge.lap("shards")
    starts = [
        np.char.rpartition(np.array(batch["image_id"].to_pylist()), "/")[:, 2].astype(int)
        for batch in table.scan(["image_id"])
    ]
    gauge.lap("scan")
    found = np.sort(np.concatenate(starts))
    assert (counts.ok, counts.pending) == (rows, 0), counts
    assert np.array_equal(found, np.arange(rows)), "rows are missing or doubled"
    log = list(Path(uri, "_delta_log").iterdir())
    checkpoints = [path for path in log if "checkpoint" in path.name]
    unit_log = list(Path(uri, "_units").glob("*.parquet"))
    return measured | {
        "seconds": gauge.seconds,
        "files": len(table.files()),
        "shards": len(shards),
        "table_mb": round(sum(path.stat().st_size for path in Path(uri).glob("model=*/*.parquet")) / 1e6),
        "log_files": len(log),
        "log_mb": round(sum(path.stat().st_size for path in log) / 1e6, 1),
        "checkpoint_mb": round(max((path.stat().st_size for path in checkpoints), default=0) / 1e6, 1),
        "unit_log_files": len(unit_log),
        "unit_log_named": len(DeltaTable(f"{uri}/_units").get_add_actions().column("path")),
        "unit_log_mb": round(sum(path.stat().st_size for path in unit_log) / 1e6, 1),
    }


def compacted(uri: str) -> dict[str, Any]:
    gauge = Gauge()
    result = compact(uri, {}, keep_hours=0)
    gauge.lap("compact")
    return gauge.result(**result)


def many_units(uri: str, count: int) -> dict[str, Any]:
    """Planning and resuming a corpus of `count` tar shards, nine tenths of them finished; no row is written."""
    gauge = Gauge()
    config = LabelConfig.model_validate(
        {"source": {"format": "webdataset", "uri": "memory://none"}, "models": [{"name": "null_model"}],
         "output": {"uri": uri}}
    )  # fmt: skip

    def plan() -> pa.Table:
        return plan_table(
            Unit(shard_id=f"train/{n:07d}.tar", location=f"bucket/train/{n:07d}.tar", size_bytes=100, fingerprint="f")
            for n in range(count)
        )

    run = Run(config, plan(), [MODEL])
    gauge.lap("plan")
    run.begin()
    gauge.lap("begin")
    assert len(run.pending()) == count
    gauge.lap("pending")
    step = max(1, count // 200)
    for start in range(0, count * 9 // 10, step):
        lines = [(f"train/{n:07d}.tar", MODEL["version"], 1000, None) for n in range(start, min(start + step, count))]
        run.unit_log.append_finished(lines, run.run_id)
    gauge.lap("finish")
    again = Run(config, plan(), [MODEL])
    gauge.lap("resume plan")
    again.begin()
    gauge.lap("resume begin")
    left = len(again.pending())
    gauge.lap("resume pending")
    assert left == count - len(range(0, count * 9 // 10, step)) * step, left
    again.counts()
    gauge.lap("counts")
    return gauge.result(units=count, left=left, plan_mb=round(again.plan.nbytes / 1e6))


def log_of_many_files(uri: str, count: int, per_commit: int) -> dict[str, Any]:
    """Commits of `count` files that are only named, and what the log of so many costs to open and to list."""
    (window, *_) = write_unit(uri, 0, "train/0000000.tar#0", 0, 256, 256)
    (file,) = window.files
    gauge = Gauge()
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    commit_s: list[float] = []
    for start in range(0, count, per_commit):
        shards = [f"train/{n:07d}.tar#0" for n in range(start, start + per_commit)]
        files = [
            replace(
                file,
                path=f"model=m/part-{n:032x}.parquet",
                shard_id=shard,
                stats=file.stats.replace(file.shard_id, shard),
            )
            for n, shard in enumerate(shards, start)
        ]
        clock = time.process_time()
        table.commit(files)
        commit_s.append(time.process_time() - clock)
    gauge.lap("commits")
    tenth = max(1, len(commit_s) // 10)
    log = list(Path(uri, "_delta_log").iterdir())
    over_idle_mb = round((gauge.peak - gauge.idle) / 1e6)
    clock = time.process_time()
    again = RowTable.open(uri, {})
    opened_s = time.process_time() - clock
    assert len(again.files()) == count
    return gauge.result(
        files=count,
        commits=len(commit_s),
        cpu_commit_ms=[round(1000 * float(np.median(commit_s[n : n + tenth])), 2) for n in (0, len(commit_s) - tenth)],
        cpu_checkpoint_s=round(max(commit_s), 2),
        cpu_all_s=round(sum(commit_s), 2),
        over_idle_mb_of_commits=over_idle_mb,
        cpu_open_s=round(opened_s, 2),
        json_mb=round(sum(path.stat().st_size for path in log if path.suffix == ".json") / 1e6, 1),
        checkpoints=sum(path.name.endswith(".checkpoint.parquet") for path in log),
        checkpoint_mb=round(max(path.stat().st_size for path in log if "checkpoint" in path.name) / 1e6, 1),
    )


def through_ray(rows: int) -> dict[str, Any]:
    """Whole runs of `maskmill label` over tiny scenes: is the driver's peak the same for four times the rows?"""
    from driver_memory import peak_bytes

    result: dict[str, Any] = {}
    for count in (rows // 4, rows):
        started = time.monotonic()
        peak = peak_bytes(count, 500, 3600)
        result[f"{count} rows"] = {"seconds": round(time.monotonic() - started), "peak_mb": round(peak / 1e6)}
    return result


def phase(name: str, body: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run one phase in a process of its own and print what it measured."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        result = pool.submit(body, *arguments).result()
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--unit-images", type=int, default=64, help="rows of one unit, which is one file")
    parser.add_argument("--files-per-commit", type=int, default=16)
    parser.add_argument("--units", type=int, default=0)
    parser.add_argument("--log-files", type=int, default=0)
    parser.add_argument("--ray-rows", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the table is left; default: a folder that is removed")
    arguments = parser.parse_args()
    missed: list[str] = []

    def bound(what: str, value: float, limit: float) -> None:
        if value >= limit:
            missed.append(f"{what}: {value}, expected less than {limit:g}")

    with tempfile.TemporaryDirectory(prefix="maskmill-scale-") as temporary:
        folder = str(arguments.folder or temporary)
        if arguments.rows:
            uri, size = f"{folder}/labels", (arguments.rows, arguments.unit_images)
            first = phase("label", label, uri, *size, arguments.files_per_commit, LEFT)
            second = phase("resume", label, uri, *size, arguments.files_per_commit, 0.0)
            for name, run in (("label", first), ("resume", second)):
                bound(f"{name}: memory over idle, MB", run["over_idle_mb"], MEMORY_BYTES / 1e6)
            bound("planning, s", sum(first["seconds"][step] for step in ("plan", "begin", "pending")), PLAN_S)
            bound("resume planning, s", sum(second["seconds"][step] for step in ("plan", "begin", "pending")), RESUME_S)
            bound("commits, last tenth to first", first["last_to_first"], RATIO)
            phase("status", status, uri, arguments.rows)
            phase("compact", compacted, uri)
            phase("status", status, uri, arguments.rows)
        if arguments.units:
            many = phase("units", many_units, f"{folder}/units", arguments.units)
            bound("planning of units, s", sum(many["seconds"][step] for step in ("plan", "begin", "pending")), PLAN_S)
            resumed = sum(many["seconds"][step] for step in ("resume plan", "resume begin", "resume pending"))
            bound("resume planning of units, s", resumed, RESUME_S)
        if arguments.log_files:
            phase("log", log_of_many_files, f"{folder}/log", arguments.log_files, 100)
        if arguments.ray_rows:
            phase("ray", through_ray, arguments.ray_rows)
    print("\n".join(missed) or "every bound was kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
