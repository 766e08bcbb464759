"""Whether a report's memory grows with images, and how fast it reads them: 100,000 score rows against 1,000.

    python tests/benchmarks/report_memory.py [--rows 1000 20000 100000] [--replicates 1000] [--kinds semantic depth]

Rows are made here: 1,000 different scores over and over, each with its own image_id, in files of 1,000 rows. semantic:
19 classes, 8 of them in each image, as Cityscapes has. depth: one image's sums. Each report runs in a process of its
own, whose largest resident size counts. 1,000 rows are less than one block of a report, 20,000 are several: only what
comes after them is growth.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth
from pipeline.metrics.score import SCORE
from pipeline.report.report import ReportOptions, write_report
from pipeline.report.rows import open_scored
from pipeline.rows import SCORES
from pipeline.table import RowTable
from pipeline.tablefiles import file_schema, write_file
from pipeline.taxonomy import load_taxonomy

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "metrics")]

from report_helpers import MODEL, VERSION, describe, write_run  # noqa: E402

DISTINCT = 1000
TAXONOMY = "cityscapes19"


def scores(kind: str) -> pa.StructArray:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    ids = load_taxonomy(TAXONOMY).ids
    for _ in range(DISTINCT):
        if kind == "depth":
            target_HW = rng.uniform(1, 80, (20, 30))
            pred_HW = target_HW * np.exp(rng.normal(0, 0.2, target_HW.shape))
            rows.append({"depth": Depth.from_image(pred_HW, target_HW).to_row()})
            continue
        classes = rng.choice(ids, 8, replace=False)
        target_HW = rng.choice(classes, (30, 40)).astype(np.uint8)
        pred_HW = np.where(rng.random(target_HW.shape) < 0.3, rng.choice(classes, target_HW.shape), target_HW)
        state = Confusion.from_maps(target_HW, pred_HW.astype(np.uint8), ids)
        rows.append({"confusion": state.to_row(), "classes": state.class_counts().to_row()})
    return pa.array(rows, SCORE)


def write_scores(uri: str, kind: str, rows: int) -> None:
    schema = file_schema(SCORES)
    table = RowTable.open(uri, {}, create=True, schema=SCORES)
    table.take_over()
    column = scores(kind)
    files = []
    for start in range(0, rows, DISTINCT):
        shard_id = f"shard-{start // DISTINCT:06d}.tar"
        columns = {
            "image_id": pa.array([f"{shard_id}/{n:06d}" for n in range(DISTINCT)]),
            "shard_id": pa.array([shard_id] * DISTINCT),
            "position": pa.array(np.arange(DISTINCT, dtype=np.int32)),
            "width": pa.array(np.full(DISTINCT, 2048, np.int32)),
            "height": pa.array(np.full(DISTINCT, 1024, np.int32)),
            "status": pa.array(["ok"] * DISTINCT),
            "model_version": pa.array([VERSION] * DISTINCT),
            "score": column,
        }
        part = pa.table([columns.get(f.name, pa.nulls(DISTINCT, f.type)) for f in schema], schema=schema)
        files.append(write_file(uri, {}, part, model=MODEL, model_version=VERSION, shard_id=shard_id))
    table.commit(files)
    write_run(uri, job="evaluate", models=[describe(MODEL, load_taxonomy(TAXONOMY))])


def measure(uri: str, replicates: int) -> dict[str, float]:
    """In a process of its own: seconds and the largest resident size."""
    started = time.perf_counter()
    report = write_report(open_scored(uri, {})[0], f"{uri}/_report", {}, ReportOptions(replicates=replicates))
    seconds = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": report["counts"]["ok"], "seconds": seconds, "peak_bytes": peak_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[DISTINCT, 20 * DISTINCT, 100 * DISTINCT])
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=("semantic", "depth"), default=("semantic", "depth"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.replicates)))
        return
    for kind in arguments.kinds:
        found = []
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory() as uri:
                write_scores(uri, kind, rows)
                command = [sys.executable, __file__, "--measure", uri, "--replicates", str(arguments.replicates)]
                result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found.append(json.loads(result.stdout))
            print(
                f"{kind}: {found[-1]['rows']} rows in {found[-1]['seconds']:.1f} s, "
                f"peak {found[-1]['peak_bytes'] / 1e6:.0f} MB"
            )
        for small, large in itertools.pairwise(found):
            rows = large["rows"] - small["rows"]
            rate = rows / (large["seconds"] - small["seconds"])
            growth = (large["peak_bytes"] - small["peak_bytes"]) / 1e6
            print(f"{kind}: {small['rows']} to {large['rows']} rows: {rate:.0f} rows/s, peak {growth:+.0f} MB")


if __name__ == "__main__":
    main()
