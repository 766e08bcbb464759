"""Tables of generated scenes for the viewer: every kind of row, in files of any cut, with a source that has them."""

import asyncio
import functools
import http.client
import json
import random
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from table_helpers import TIME

from pipeline.config import ScenesSource
from pipeline.masks import encode_depth, encode_label_map, encode_rle
from pipeline.sources.base import Sample, read_unit
from pipeline.sources.registry import open_source
from pipeline.table import RowTable
from pipeline.tablefiles import FILE_SCHEMA, write_file
from pipeline.targets import read_label_map
from pipeline.taxonomy import load_taxonomy
from pipeline.viewer.app import make_app, serve
from pipeline.viewer.viewer import Viewer

TOKEN = "a-token-of-the-tests"
SCENES = {"format": "scenes", "count": 12, "width": 64, "height": 48, "unit_images": 5}
TASKS = {"maps": "semantic", "objects": "instance", "near": "depth"}
CLASSES = (0, 1, 2, 3)


@functools.cache
def samples() -> list[Sample]:
    source = open_source(ScenesSource.model_validate(SCENES))
    return [item for unit in source.plan() for item in read_unit(source, unit, ()) if isinstance(item, Sample)]


def make_row(sample: Sample, model: str, seed: int) -> dict[str, Any]:
    """A row as a model would leave it: the target itself for maps, else something simple that differs by seed."""
    draw = random.Random(f"{seed} {model} {sample.shard_id} {sample.position}")
    row: dict[str, Any] = {
        "image_id": sample.image_id, "shard_id": sample.shard_id, "position": sample.position, "run_id": "run",
        "model_version": "v1", "labeled_at": TIME, "fields": {"city": "zürich"},
    }  # fmt: skip
    if draw.random() < 0.2:
        error = {"error_type": "CorruptImageError", "error_stage": "decode", "error_message": "made to fail"}
        return row | {"status": "failed", "attempts": 1, **error}
    confidence = np.float32(draw.random())
    row |= {"status": "ok", "width": 64, "height": 48, "quality": {"mean_max_probability": confidence}}
    if model == "maps":
        label_HW = read_label_map(sample.targets["semantic"], max_pixels=10**6)
        return row | {"semantic": {"format": "png", "data": encode_label_map(label_HW)}}
    if model == "near":
        return row | {"depth": encode_depth(np.tile(np.linspace(1, 9, 64, dtype=np.float32), (48, 1)), "metric_m")}
    segments = []
    for number in range(draw.randrange(4)):
        mask_HW = np.zeros((48, 64), bool)
        mask_HW[10 * number : 10 * number + 12, 8:40] = True
        segments.append(
            {
                "id": number + 1, "category_id": draw.choice(CLASSES), "score": float(np.float32(draw.random())),
                "area": int(mask_HW.sum()), "bbox": [8.0, 10.0 * number, 32.0, 12.0], "rle": encode_rle(mask_HW),
            }
        )  # fmt: skip
    return row | {"segments": segments}


def write_rows(
    uri: str | Path,
    rows: Sequence[tuple[str, dict[str, Any]]],
    rows_per_file: int = 3,
    storage: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Commit rows (model, row) in files of one model and version each, cut anywhere."""
    table = RowTable.open(str(uri), storage, create=True)
    table.take_over()
    files = []
    for key in sorted({(model, row["model_version"]) for model, row in rows}):
        own = [row for model, row in rows if (model, row["model_version"]) == key]
        for start in range(0, len(own), rows_per_file):
            part = pa.Table.from_pylist(own[start : start + rows_per_file], schema=FILE_SCHEMA)
            files.append(write_file(str(uri), storage, part, model=key[0], model_version=key[1], shard_id=""))
    table.commit(files)


def write_run(uri: str | Path, models: Sequence[str] = tuple(TASKS), **config: Any) -> None:
    taxonomy = load_taxonomy("scenes").describe()
    described = [
        {
            "label": label, "version": "v1", "task": TASKS.get(label, "semantic"), "taxonomy": taxonomy,
            "score_taxonomy": taxonomy,
        }
        for label in models
    ]  # fmt: skip
    run = {"run_id": "run", "state": "done", "models": described, "config": {"source": SCENES, **config}}
    Path(uri, "run.json").write_text(json.dumps(run))


def write_table(uri: str | Path, *, seed: int = 0, rows_per_file: int = 3) -> list[tuple[str, dict[str, Any]]]:
    """A table of all TASKS over SCENES, rows in no certain order in its files. Returns its rows by model."""
    rows = [(model, make_row(sample, model, seed)) for model in TASKS for sample in samples()]
    random.Random(seed).shuffle(rows)
    write_rows(uri, rows, rows_per_file)
    write_run(uri)
    return rows


class Running:
    """A viewer that is served from a thread, under http://127.0.0.1:`port`/TOKEN/."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        self.base = f"http://127.0.0.1:{self.port}/{TOKEN}/"

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()

        def ready(port: int) -> None:
            self.port = port
            self._ready.set()

        await serve(make_app(self.viewer, TOKEN), "127.0.0.1", 0, ready, self._ended)

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, body. path: below the token, or from the root with a slash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        whole = path if path.startswith("/") else f"/{TOKEN}/{path}"
        connection.request(method, whole, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, zlib.decompress(body) if found.get("content-encoding") == "deflate" else body

    def json(self, path: str, status: int = 200) -> dict[str, Any]:
        found, _, body = self.ask(path)
        assert found == status, body[:500]
        value: dict[str, Any] = json.loads(body)
        return value

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)


@contextmanager
def running(uri: str | Path) -> Iterator[Running]:
    server = Running(Viewer(str(uri), {}))
    try:
        yield server
    finally:
        server.stop()
