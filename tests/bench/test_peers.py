"""The benchmark's arms on a few images: the same corpus for a seed, the same rows from peers, the right moments."""

import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import bench, bench_arm
from pipeline.bench import launch as launching
from pipeline.bench.corpora import MIXED_SIZES, jpeg, make_corpus
from pipeline.bench.launch import launch
from pipeline.bench.limit import decode_limit, model_limit
from pipeline.bench.outputs import compare, our_times, peer_rows, peer_times
from pipeline.bench.peers_loop import run_loop
from pipeline.bench.peers_transformers import refusal, run_transformers
from pipeline.bench.reading import list_shards, read_shard
from pipeline.bench.store import delayed, served
from pipeline.bench.worker import PEER_ROWS, READY, ROWS, Task, Worker, one_model, write_rows
from pipeline.config import LabelConfig
from pipeline.errors import ConfigError, SchemaError
from pipeline.sources.registry import open_source
from pipeline.stages.label import Labeller
from pipeline.stages.work import LabelPlan, WorkItem
from pipeline.table import RowTable

SMALL = (96, 64)
UNET = {"name": "unet_small", "weights": "bundled:unet_small_scenes"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora of small images."""
    monkeypatch.setattr("pipeline.bench.corpora.COCO_SIZE", SMALL)
    monkeypatch.setattr("pipeline.bench.limit.LEAST_S", 0.01)


def a_task(folder: Path, kind: Any = "tar", model: Any = UNET, images: int = 4, **resources: Any) -> Task:
    corpus = make_corpus(kind, folder / "corpora", images=images, shards=2, seed=1)
    config = LabelConfig.model_validate(
        {
            "source": corpus.source,
            "models": [model],
            "output": {"uri": str(folder / "out"), "rows_per_file": 2},
            "score": None,
            "resources": {"batch_pixels": 20_000, "torch_threads": 1, **resources},
        }
    )
    return Task(config=config, preprocess=one_model(config).preprocess, batch_images=3)


def maskmill_rows(task: Task, uri: Path) -> dict[str, dict[str, Any]]:
    """What the label job's stages write of the task's corpus, by key."""
    output = task.config.output.model_copy(update={"uri": str(uri)})
    plan = LabelPlan(
        source=task.config.source,
        models=task.config.models,
        output=output,
        resources=task.config.resources,
        versions={},
        scorers=(None,),
        run_id="test",
        seed=task.config.seed,
    )
    table = RowTable.open(str(uri), {}, create=True)
    table.take_over()
    labeller = Labeller(plan)
    for index, unit in enumerate(open_source(task.config.source).plan()):
        for window in labeller.label(WorkItem(index=index, unit=unit, done=((),), attempts=({},))):
            if window.files:
                table.commit(list(window.files))
    return {row["key"]: row for row in bench.our_rows(uri)}


def test_a_seed_makes_the_same_corpus(small: None, tmp_path: Path) -> None:
    folders = [make_corpus("tar", tmp_path / name, images=5, shards=2, seed=3).folder for name in "ab"]
    assert len(list(folders[0].iterdir())) == 2
    for one, other in zip(*(sorted(folder.iterdir()) for folder in folders), strict=True):
        assert one.read_bytes() == other.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    make_corpus("tar", tmp_path / "a", images=5, shards=2, seed=3)
    assert before == {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    assert make_corpus("tar", tmp_path / "a", images=5, shards=2, seed=4).folder != folders[0]


def test_sizes_of_a_mixture() -> None:
    assert max(MIXED_SIZES) == (3840, 2160)
    assert Image.open(io.BytesIO(jpeg(0, 1500, 20, seed=0))).size == (1500, 20)


def test_tars_and_parquet_hold_the_same(small: None, tmp_path: Path) -> None:
    tar, parquet = (a_task(tmp_path, kind) for kind in ("tar", "parquet"))
    read = [
        dict(member for shard in list_shards(task.config) for member in read_shard(task.config, shard))
        for task in (tar, parquet)
    ]
    assert read[0] == read[1]
    assert sorted(read[0]) == [f"{number:06d}" for number in range(4)]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_loop_does_what_maskmill_does(small: None, tmp_path: Path, kind: str) -> None:
    task = a_task(tmp_path, kind)
    run_loop(Task.from_json(task.to_json()), processes=0)
    ours = maskmill_rows(task, tmp_path / "table")
    found = compare(ours, peer_rows(tmp_path / "out"), "semantic", one_model(task.config).taxonomy)
    assert (found["images"], found["equal"], found["loss"]) == (4, 4, 0)
    theirs = {row["key"]: row for row in peer_rows(tmp_path / "out")}
    assert all(theirs[key]["quality"] == pytest.approx(row["quality"], rel=1e-5) for key, row in ours.items())


def test_depth_too(small: None, tmp_path: Path) -> None:
    task = a_task(tmp_path, "tar", {"name": "unet_small_depth"}, images=2)
    run_loop(task, processes=0)
    found = compare(
        maskmill_rows(task, tmp_path / "table"), peer_rows(tmp_path / "out"), "depth", one_model(task.config).taxonomy
    )
    # Batches of other sizes round otherwise.
    assert (found["images"], found["missing"]) == (2, 0)
    assert found["loss"] < 1e-4


def test_limits(small: None, tmp_path: Path) -> None:
    task = a_task(tmp_path, model={**UNET, "options": {}}, images=3)
    assert model_limit(task) > 0
    assert decode_limit(task) > 0
    result = tmp_path / "result.json"
    (tmp_path / "task.json").write_text(task.to_json())
    assert bench_arm.main(["decode", str(tmp_path / "task.json"), str(result)]) == 0
    assert json.loads(result.read_text())["images_per_s"] > 0


def test_an_image_that_is_tiled_counts_once(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.bench.corpora.COCO_SIZE", (512, 256))
    task = a_task(tmp_path, images=2, tile_pixels=65_536)
    from pipeline.bench.limit import _ready

    model = one_model(task.config)
    batches = list(_ready(task.config, model, torch.device("cpu")))
    assert len(batches) > 2
    assert sum(images for _, _, images in batches) == pytest.approx(2)


def test_a_peer_that_cheats_is_seen(small: None, tmp_path: Path) -> None:
    task = a_task(tmp_path)
    ours = maskmill_rows(task, tmp_path / "table")
    worker = Worker(task.config)
    images = dict(member for shard in list_shards(task.config) for member in read_shard(task.config, shard))
    keys = sorted(images)
    honest = worker.label(keys, [worker.prepare(images[key]) for key in keys])
    blank = worker.label(["000001"], [worker.prepare(images["000000"])])
    other = worker.label(["000009"], [worker.prepare(images["000000"])])
    small_one = worker.label(["000002"], [worker.prepare(jpeg(0, 32, 32, seed=0))])
    write_rows(task.config, 0, [honest[0], honest[0], *blank, *other, *small_one])
    found = compare(ours, peer_rows(tmp_path / "out"), "semantic", worker.model.taxonomy)
    assert {name: found[name] for name in ("images", "equal", "missing", "strange", "twice", "unlike")} == {
        "images": 2, "equal": 1, "missing": 1, "strange": 1, "twice": 1, "unlike": 1,
    }  # fmt: skip
    assert found["loss"] > 0
    assert "TargetMismatchError" in found["cause"]


def test_moments_of_a_peer(tmp_path: Path) -> None:
    (tmp_path / ROWS).mkdir()
    (tmp_path / READY).write_text("1000.0")
    rows = [{"key": str(number)} for number in range(10)]
    for number, (count, moment) in enumerate(((0, 900), (6, 1002), (4, 1005))):
        path = tmp_path / ROWS / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[:count], schema=PEER_ROWS), path)
        os.utime(path, (moment, moment))
    found = peer_times(tmp_path)
    assert (found.rows, found.first_at, found.last_at, found.images_per_s) == (10, 1002, 1005, 2.0)


def test_moments_of_maskmill(small: None, tmp_path: Path) -> None:
    (tmp_path / ROWS).mkdir()
    with pytest.raises(SchemaError, match="has no rows"):
        peer_times(tmp_path)
    task = a_task(tmp_path)
    began = time.time()
    maskmill_rows(task, tmp_path / "table")
    about = {"images": 4, "label_s": 2.0, "models": []}
    (tmp_path / "table" / "run.json").write_text(json.dumps(about))
    found = our_times(tmp_path / "table")
    assert found.images_per_s == 2.0
    assert began - 0.1 <= found.first_at <= found.last_at <= time.time() + 0.1


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit('no such thing')", "exit 1: no such thing"),
        ("import time; time.sleep(60)", "no end within 0.5 s"),
        ("pass", "has no rows"),
    ],
)
def test_a_run_that_fails_has_its_problem(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    script = tmp_path / "arm.sh"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    script.chmod(0o700)
    monkeypatch.setattr(launching.sys, "executable", str(script))
    (tmp_path / "out" / ROWS).mkdir(parents=True)
    limit_s = 0.5 if "no end" in problem else 30.0
    run = launch("loop", a_task(tmp_path), tmp_path / "run", {}, limit_s)
    assert problem in run.problem
    assert run.images_per_s is None


def test_the_transformers_pipeline_gives_depth_of_the_image_s_size(small: None, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = {
        "resize": 56, "hidden_size": 24, "layers": 4, "heads": 2, "out_layers": [0, 1, 2, 3],
        "neck_sizes": [8, 8, 8, 8], "fusion_size": 8, "image_size": 56,
    }  # fmt: skip
    task = a_task(tmp_path, "tar", {"name": "depth_anything_v2", "options": options}, images=3)
    run_transformers(task)
    rows = list(peer_rows(tmp_path / "out"))
    assert [row["key"] for row in rows] == ["000000", "000001", "000002"]
    assert {(row["width"], row["height"], row["depth"]["kind"]) for row in rows} == {(*SMALL, "inverse_relative")}
    with pytest.raises(ConfigError, match="not one of transformers'"):
        run_transformers(a_task(tmp_path / "other"))
    assert refusal(one_model(task.config)) == ""


def test_daft_gives_the_same_images(small: None, tmp_path: Path) -> None:
    pytest.importorskip("daft", reason="daft is not installed")
    from pipeline.bench.peers_daft import run_daft

    task = a_task(tmp_path)
    run_daft(task)
    ours = maskmill_rows(task, tmp_path / "table")
    found = compare(ours, peer_rows(tmp_path / "out"), "semantic", one_model(task.config).taxonomy)
    assert (found["images"], found["missing"], found["strange"], found["twice"]) == (4, 0, 0, 0)
    assert found["figures"]["pixel_accuracy"] > 0.95


def test_a_store_answers_late() -> None:
    started = time.perf_counter()
    assert delayed(lambda environ, start: [b"x"], 0.05)({}, None) == [b"x"]
    assert time.perf_counter() - started >= 0.05


def test_a_folder_is_served_as_a_bucket(small: None, tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="moto[server] is not installed")
    corpus = make_corpus("s3", tmp_path, images=2, shards=1, seed=1)
    with served(corpus.folder, 0.01) as place:
        config = a_task(tmp_path / "other").config
        source = config.source.model_copy(update=place)
        config = config.model_copy(update={"source": source})
        assert [key for shard in list_shards(config) for key, _ in read_shard(config, shard)] == ["000000", "000001"]
    port = int(place["storage"]["endpoint_url"].rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--cells", "nothing"], "unknown cell"),
        (["--arms", "spark"], "--arms must be of"),
        (["--images", "0"], "--images must be above 0"),
        (["--latency-ms", "-1"], "--latency-ms must be 0 or more"),
    ],
)
def test_what_is_refused(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == 2
    assert text in capsys.readouterr().err


def test_a_whole_benchmark_with_arms_in_this_process(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []

    def run_here(arm: str, task: Task, folder: Path, environment: Any, limit_s: float) -> launching.Run:
        order.append(arm)
        output = Path(task.config.output.uri)
        if arm == "maskmill":
            maskmill_rows(task, output)
            return launching.Run(arm=arm, images_per_s=5.0, wall_s=2.0, first_row_s=1.0)
        if arm == "limit":
            return launching.Run(arm=arm, images_per_s=10.0)
        run_loop(task, processes=0)
        return launching.Run(arm=arm, images_per_s=peer_times(output).images_per_s, wall_s=3.0, first_row_s=2.0)

    monkeypatch.setattr(bench, "launch", run_here)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    argv = ["--cells", "light", "--images", "4", "--shards", "2", "--rounds", "2", "--arms", "limit,loop,daft"]
    assert bench.main([*argv, "--out", str(tmp_path / "bench"), "--json"]) == 0
    assert order == ["limit", "maskmill", "loop"] * 2
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "bench" / "bench.json").read_text())
    (one,) = printed["cells"]
    arms = {arm["name"]: arm for arm in one["arms"]}
    assert arms["loop"]["agreement"]["equal"] == 4
    assert 'pip install "maskmill[peers]"' in arms["daft"]["problem"]
    assert arms["maskmill"]["figures"]["runs"] == 2
    assert "all equal" in (tmp_path / "bench" / "bench.md").read_text()
    assert (tmp_path / "bench" / "bench.svg").read_text().startswith("<svg")
