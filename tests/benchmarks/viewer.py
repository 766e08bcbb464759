"""How long the viewer takes on a table of a million rows, and what it holds meanwhile.

    python tests/benchmarks/viewer.py [--rows 1000000] [--rows-per-file 256] [--folder FOLDER]

Two processes write the table, half of its rows a model of label maps, half a model of objects, of generated scenes of
8x8 pixels, one row in a thousand failed. Then `maskmill view` is started as a user starts it, in a process of its own,
and asked over HTTP for what its page asks for; then once more after `maskmill compact`. Each question is asked until
its page is full or the table has no more, as the page does. Seconds are wall clock; `start` is from the start of the
process to the address that it prints, most of it imports.

Exit status 1 says that the first page took a second or more from then on.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from pipeline.compaction import compact  # noqa: E402
from pipeline.config import ScenesSource  # noqa: E402
from pipeline.masks import encode_label_map, encode_rle  # noqa: E402
from pipeline.sources.registry import open_source  # noqa: E402
from pipeline.table import RowTable  # noqa: E402
from pipeline.tablefiles import FILE_SCHEMA, FileRecord, write_file  # noqa: E402
from pipeline.taxonomy import load_taxonomy  # noqa: E402

SIDE = 8
FILES_PER_COMMIT = 200
FAILED_EACH = 1000
RARE, OFTEN = 5, 2
LIMIT_S = 1.0
TIME = datetime(2026, 1, 1, tzinfo=UTC)
SPAWN = multiprocessing.get_context("spawn")


def write_unit(uri: str, model: str, shard_id: str, first: int, rows: int) -> FileRecord:
    """The rows of one unit; `first`: index of its first scene."""
    index_N = np.arange(first, first + rows)
    random = np.random.default_rng(first)
    confidence_N = random.beta(8, 2, rows).astype(np.float32)
    maps = [encode_label_map(np.full((SIDE, SIDE), value, np.uint8)) for value in range(8)]
    mask_HW = np.zeros((SIDE, SIDE), bool)
    mask_HW[2:6, 1:7] = True
    segment = {"area": 24, "bbox": [1.0, 2.0, 6.0, 4.0], "rle": encode_rle(mask_HW)}
    built = []
    for position, index in enumerate(index_N.tolist()):
        # One class in eight images, one in ten thousand.
        class_id = RARE if index % 10_000 == 5_000 else OFTEN if index % 8 == 0 else index % 2
        row: dict[str, Any] = {
            "image_id": f"{shard_id}/{index:09d}", "shard_id": shard_id, "position": position, "run_id": "bench",
            "model_version": "v1", "labeled_at": TIME,
        }  # fmt: skip
        if index % FAILED_EACH == FAILED_EACH - 1:
            error = {"error_type": "CorruptImageError", "error_stage": "decode", "error_message": "made to fail"}
            built.append(row | {"status": "failed", "attempts": 1, **error})
            continue
        quality = {"mean_max_probability": confidence_N[position], "mean_entropy": 1 - confidence_N[position]}
        row |= {"status": "ok", "width": SIDE, "height": SIDE, "quality": quality}
        if model == "maps":
            row["semantic"] = {"format": "png", "data": maps[class_id]}
        else:
            row["segments"] = [{"id": 1, "category_id": class_id, "score": confidence_N[position], **segment}]
        built.append(row)
    table = pa.Table.from_pylist(built, schema=FILE_SCHEMA)
    return write_file(uri, {}, table, model=model, model_version="v1", shard_id=shard_id)


def write_table(uri: str, rows: int, rows_per_file: int) -> None:
    source = {"format": "scenes", "count": rows // 2, "width": SIDE, "height": SIDE, "unit_images": rows_per_file}
    units = list(open_source(ScenesSource.model_validate(source)).plan())
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        written = []
        for number, unit in enumerate(units):
            for model in ("maps", "objects"):
                place = (number * rows_per_file, unit.rows or rows_per_file)
                written.append(pool.submit(write_unit, uri, model, unit.shard_id, *place))
            if len(written) >= FILES_PER_COMMIT or number == len(units) - 1:
                table.commit([future.result() for future in written])
                written.clear()
    taxonomy = load_taxonomy("scenes").describe()
    models = [
        {"label": label, "version": "v1", "task": task, "taxonomy": taxonomy, "score_taxonomy": taxonomy}
        for label, task in (("maps", "semantic"), ("objects", "instance"))
    ]
    run = {"run_id": "bench", "state": "done", "models": models, "config": {"source": source}}
    Path(uri, "run.json").write_text(json.dumps(run))


class Server:
    """`maskmill view` in a process of its own."""

    def __init__(self, uri: str) -> None:
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.view", uri],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.base = self.process.stdout.readline().strip()
        self.start_s = time.perf_counter() - started
        self.measured = psutil.Process(self.process.pid)

    def get(self, name: str, **words: Any) -> bytes:
        address = f"{self.base}{name}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(address) as answer:
            data: bytes = answer.read()
            return zlib.decompress(data) if answer.headers.get("Content-Encoding") == "deflate" else data

    def pages(self, **words: Any) -> Iterator[dict[str, Any]]:
        """Answers until a page is full, as view.js asks for them."""
        found, start = 0, words.pop("start", "")
        while start is not None and found < 48:
            answer: dict[str, Any] = json.loads(self.get("api/rows", start=start, count=48 - found, **words))
            yield answer
            found, start = found + len(answer["rows"]), answer["next"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def measure(uri: str, shard_id: str, last_image: str) -> dict[str, Any]:
    server = Server(uri)
    result: dict[str, Any] = {"start_s": round(server.start_s, 2)}
    try:

        def lap(name: str, **words: Any) -> dict[str, Any]:
            clock, cpu = time.perf_counter(), sum(server.measured.cpu_times()[:2])
            answers = list(server.pages(**words))
            rows = [row for answer in answers for row in answer["rows"]]
            spent = sum(server.measured.cpu_times()[:2]) - cpu
            result[name] = {
                "s": round(time.perf_counter() - clock, 3),
                "cpu_s": round(spent, 2),
                "rows": len(rows),
                "requests": len(answers),
            }
            return {"rows": rows, "next": answers[-1]["next"]}

        clock = time.perf_counter()
        for name in ("", "view.js", "draw.js", "view.css", "api/table"):
            server.get(name)
        first = lap("rows of the first page", model="maps")
        result["first_page_s"] = round(time.perf_counter() - clock, 3)
        (row,) = first["rows"][:1]
        words = {"model": row["model"], "version": row["version"], "shard": row["shard"], "position": row["position"]}
        for name in ("map", "image", "row"):
            clock = time.perf_counter()
            server.get(f"api/{name}", **words)
            result[name] = round(time.perf_counter() - clock, 3)
        lap("second page", model="maps", start=first["next"])
        lap("all models, from the middle", start=json.dumps([shard_id, 0, ""]), model="")
        lap("failed", model="maps", status="failed")
        lap("shard", model="maps", shard=shard_id)
        lap("objects of a frequent class", **{"model": "objects", "class": OFTEN, "score_min": 0.5})
        lap("objects of a rare class", **{"model": "objects", "class": RARE})
        lap("maps with a frequent class", **{"model": "maps", "class": OFTEN})
        lap("confidence of 0.999 and more", model="objects", conf_min=0.999)
        lap("one image by its id", model="", text=last_image)
        sorted_once = lap("sorted by confidence", model="maps", sort="confidence")
        lap("sorted by confidence, second page", model="maps", sort="confidence", start=sorted_once["next"])
        lowest = [row["confidence"] for row in sorted_once["rows"]]
        assert lowest == sorted(lowest), "the sorted page is not sorted"
        result["memory_mb"] = round(server.measured.memory_info().rss / 1e6)
    finally:
        server.stop()
    return result


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-file", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the table is left, or is already; default: removed")
    arguments = parser.parse_args()
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="maskmill-viewer-") as temporary:
        uri = str((arguments.folder or Path(temporary)) / "labels")
        if not Path(uri, "run.json").exists():
            clock = time.perf_counter()
            write_table(uri, arguments.rows, arguments.rows_per_file)
            print(f"written in {time.perf_counter() - clock:.0f} s", flush=True)
        shards = sorted(RowTable.open(uri, {}).shards().to_pylist())
        last = f"{arguments.rows // 2 - 1:09d}"
        for name in ("as written", "compacted"):
            if name == "compacted":
                compact(uri, {}, keep_hours=0)
            result = measure(uri, shards[len(shards) // 2], last)
            print(f"{name}, {len(RowTable.open(uri, {}).files())} files:", flush=True)
            for what, found in result.items():
                print(f"  {what}: {json.dumps(found)}", flush=True)
            if result["first_page_s"] >= LIMIT_S:
                missed.append(f"first page of the table {name}: {result['first_page_s']} s, expected less than 1 s")
    print("\n".join(missed) or "every bound was kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
