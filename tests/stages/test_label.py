"""One unit as one stream: every sample a row, the same bytes however a run was cut, and no work done twice."""

import io
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyroaring import BitMap
from torch import Tensor

from pipeline.config import (
    ModelConfig,
    OutputConfig,
    Resources,
    ScenesSource,
    ScoreConfig,
    SourceConfig,
    WebdatasetSource,
)
from pipeline.errors import ConfigError
from pipeline.images import decode_image
from pipeline.masks import decode_label_map
from pipeline.metrics.score import SCORE
from pipeline.models.zoo.unet import UNetSmall
from pipeline.predictions.stored import stored
from pipeline.rows import PREDICTIONS
from pipeline.sources.base import Sample, Unit
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.stages.label import Labeller
from pipeline.stages.score import Scorer
from pipeline.stages.transfer import pack_windows, unpack_window
from pipeline.stages.work import STAGES, LabelPlan, Window, WorkItem
from pipeline.tablefiles import FILE_SCHEMA
from pipeline.taxonomy import load_taxonomy

# Trained weights, because random ones say one class everywhere.
UNET = {"name": "unet_small", "weights": "bundled:unet_small_scenes"}
NULL = {"name": "null_model"}
COUNT = 20
ROWS_PER_FILE = 6


def make_plan(
    folder: Path,
    models: Sequence[dict[str, Any]] = (UNET,),
    source: SourceConfig | None = None,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    form: str = "png",
    **resources: Any,
) -> LabelPlan:
    scenes = ScenesSource(format="scenes", count=COUNT, width=48, height=32, unit_images=64, targets=())
    return LabelPlan(
        source=source or scenes,
        models=tuple(ModelConfig.model_validate(model) for model in models),
        output=OutputConfig.model_validate({"uri": str(folder), "rows_per_file": rows_per_file, "format": form}),
        resources=Resources.model_validate({"torch_threads": 1, "decode_threads": 2, **resources}),
        versions={},
        scorers=(None,) * len(models),
        run_id="run-1",
        seed=0,
    )


def make_item(plan: LabelPlan, done: Sequence[Any] | None = None, attempts: Any = None, index: int = 0) -> WorkItem:
    unit = list(open_source(plan.source).plan())[index]
    count = len(plan.models)
    return WorkItem(
        index=index,
        unit=unit,
        done=tuple(done or [BitMap()] * count),
        attempts=tuple(attempts or [{}] * count),
    )


def rows_of(plan: LabelPlan, windows: Sequence[Window], model: str = "unet_small") -> list[dict[str, Any]]:
    """The rows of one model in the order of their files; what a clock made is left out."""
    rows: list[dict[str, Any]] = []
    for window in windows:
        for file in window.files:
            if file.model == model:
                table = pq.read_table(io.BytesIO(Path(plan.output.uri, file.path).read_bytes()))
                assert table.schema.equals(FILE_SCHEMA)
                assert (file.rows, BitMap.deserialize(file.positions)) == (
                    len(table),
                    BitMap(table["position"].to_numpy()),
                )
                rows += [{k: v for k, v in row.items() if k != "labeled_at"} for row in table.to_pylist()]
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    plan = make_plan(tmp_path_factory.mktemp("whole"))
    return rows_of(plan, [*Labeller(plan).label(make_item(plan))])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were decoded: one entry each."""
    calls: list[int] = []

    def spy(data: bytes, **options: Any) -> Any:
        calls.append(len(data))
        return decode_image(data, **options)

    monkeypatch.setattr("pipeline.stages.decode.decode_image", spy)
    return calls


def test_every_sample_becomes_a_row_in_windows_by_position(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    labeller = Labeller(plan)
    item = make_item(plan)
    *windows, end = labeller.label(item)
    assert end == Window(index=0, rows=COUNT)
    assert [window.images for window in windows] == [6, 6, 6, 2]
    positions = [[*BitMap.deserialize(file.positions)] for window in windows for file in window.files]
    assert positions == [[*range(6)], [*range(6, 12)], [*range(12, 18)], [18, 19]]
    for window in windows:
        assert set(window.seconds) == set(STAGES)
        assert all(window.seconds[stage] > 0 for stage in ("decode", "predict", "encode", "write"))
        assert window.wall_s > 0
    model = labeller.models[0]
    rows = rows_of(plan, windows)
    assert [row["position"] for row in rows] == [*range(COUNT)]
    for row in rows:
        assert (row["status"], row["error_type"], row["attempts"]) == ("ok", None, None)
        assert row["image_id"] == f"scenes/seed0-48x32/{row['position']:09d}"
        assert row["shard_id"] == item.unit.shard_id
        assert (row["width"], row["height"]) == (48, 32)
        assert (row["model_version"], row["run_id"]) == (model.version, "run-1")
        assert 0 < row["quality"]["mean_max_probability"] <= 1
        label_HW = decode_label_map(row["semantic"]["data"], "png", width=48, height=32)
        # The same as the plain module on the plain picture.
        image_HWC = render_scene(row["position"], width=48, height=32).image_HWC
        values = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (model.preprocess.mean, model.preprocess.std))
        with torch.inference_mode():
            expected_HW = model.module(((values - mean) / std)[None])[0].argmax(0).numpy()
        assert (label_HW == expected_HW).mean() > 0.999
    assert len({row["semantic"]["data"] for row in rows}) == COUNT


def test_resuming_at_any_window_makes_the_same_bytes(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    plan = make_plan(tmp_path)
    labeller = Labeller(plan)
    windows = [BitMap(range(first, min(first + ROWS_PER_FILE, COUNT))) for first in range(0, COUNT, ROWS_PER_FILE)]
    for choice in range(2 ** len(windows)):
        done = BitMap().union(*(window for bit, window in enumerate(windows) if choice >> bit & 1))
        *made, end = labeller.label(make_item(plan, [done]))
        assert end.rows == COUNT
        assert rows_of(plan, made) == [row for row in whole if row["position"] not in done]


@pytest.mark.parametrize(
    "resources",
    [
        {"calls_per_worker": 1},
        {"calls_per_worker": 4, "decode_threads": 1},
        {"decode_threads": 5},
        {"batch_pixels": "auto", "object_store_bytes": None},
    ],
)
def test_rows_do_not_depend_on_the_workers_share(
    tmp_path: Path, whole: list[dict[str, Any]], resources: dict[str, Any]
) -> None:
    plan = make_plan(tmp_path, **resources)
    assert rows_of(plan, [*Labeller(plan).label(make_item(plan))]) == whole


@pytest.mark.parametrize("rows_per_file", [1, 7, 20, 1000])
def test_rows_per_file(tmp_path: Path, rows_per_file: int, whole: list[dict[str, Any]]) -> None:
    plan = make_plan(tmp_path, rows_per_file=rows_per_file)
    *windows, _ = Labeller(plan).label(make_item(plan))
    sizes = [file.rows for window in windows for file in window.files]
    assert sizes == [min(rows_per_file, COUNT - first) for first in range(0, COUNT, rows_per_file)]
    assert [row["image_id"] for row in rows_of(plan, windows)] == [row["image_id"] for row in whole]
    assert len(list(tmp_path.glob("model=*/*.parquet"))) == len(sizes)


def test_zstd_holds_the_same_labels(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    plan = make_plan(tmp_path, form="zstd")
    for row, png in zip(rows_of(plan, [*Labeller(plan).label(make_item(plan))]), whole, strict=True):
        label_HW = decode_label_map(row["semantic"]["data"], row["semantic"]["format"], width=48, height=32)
        assert row["semantic"]["format"] == "zstd"
        np.testing.assert_array_equal(label_HW, decode_label_map(png["semantic"]["data"], "png", width=48, height=32))


def test_two_models_decode_once_and_only_what_one_of_them_lacks(
    tmp_path: Path, decoded: list[int], whole: list[dict[str, Any]]
) -> None:
    plan = make_plan(tmp_path, (UNET, NULL))
    labeller = Labeller(plan)
    windows = [*labeller.label(make_item(plan))]
    assert len(decoded) == COUNT
    assert [[file.model for file in window.files] for window in windows[:-1]] == [["unet_small", "null_model"]] * 4
    assert rows_of(plan, windows) == whole
    null = rows_of(plan, windows, "null_model")
    assert [row["image_id"] for row in null] == [row["image_id"] for row in whole]
    assert all(not decode_label_map(row["semantic"]["data"], "png", width=48, height=32).any() for row in null)

    decoded.clear()
    done = (BitMap(range(12)), BitMap(range(6, 18)))
    windows = [*labeller.label(make_item(plan, done))]
    assert len(decoded) == COUNT - 6
    assert rows_of(plan, windows) == whole[12:]
    assert rows_of(plan, windows, "null_model") == [*null[:6], *null[18:]]
    assert [[file.model for file in w.files] for w in windows[:-1]] == [
        ["null_model"], ["unet_small"], ["unet_small", "null_model"],
    ]  # fmt: skip

    decoded.clear()
    assert [*labeller.label(make_item(plan, [BitMap(range(COUNT))] * 2))] == [Window(index=0, rows=COUNT)]
    assert decoded == []


def test_calls_from_two_threads_make_the_same_rows(tmp_path: Path) -> None:
    scenes = ScenesSource(format="scenes", count=24, width=48, height=32, unit_images=8, targets=())
    plan = make_plan(tmp_path, (UNET, NULL), scenes, rows_per_file=3)
    labeller = Labeller(plan)
    every = [make_item(plan, index=index) for index in range(3)]
    alone = [[*labeller.label(item)] for item in every]
    start = threading.Barrier(3)

    def together(item: WorkItem) -> list[Window]:
        start.wait()
        return [*labeller.label(item)]

    with ThreadPoolExecutor(3) as pool:
        at_once = [*pool.map(together, every)]
    for one, other in zip(alone, at_once, strict=True):
        for model in ("unet_small", "null_model"):
            assert rows_of(plan, one, model) == rows_of(plan, other, model)


@pytest.fixture
def bad_shard(tmp_path: Path) -> WebdatasetSource:
    """Pictures of several sizes, and among them what cannot be read, decoded or is too large."""

    def png(index: int, width: int, height: int) -> bytes:
        return next(
            open_source(
                ScenesSource(format="scenes", start=index, count=1, width=width, height=height, targets=())
            ).read(Unit(shard_id="s", location="", size_bytes=0, fingerprint="", cut=index), ())
        ).image  # type: ignore[union-attr]

    members = [
        ("0.png", png(0, 96, 64)),
        ("1.png", b"no picture"),
        ("2.png", png(1, 32, 32)),
        ("3.png", b""),
        ("4.seg.png", b"a target without its image"),
        ("5.png", png(2, 160, 160)),
        ("6.png", png(3, 96, 64)[:-40]),
        ("7.png", png(4, 33, 61)),
    ]
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "bad.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return WebdatasetSource(format="webdataset", uri=str(folder), max_pixels=20_000)


BAD = {
    1: ("decode", "CorruptImageError", "not a readable JPEG"),
    3: ("decode", "CorruptImageError", "0 bytes"),
    4: ("read", "UnreadableError", "no image member"),
    5: ("decode", "ImageTooLargeError", "160x160"),
    6: ("decode", "CorruptImageError", ""),
}


def test_what_fails_is_a_row_with_its_reason(tmp_path: Path, bad_shard: WebdatasetSource) -> None:
    plan = make_plan(tmp_path, (UNET, NULL), bad_shard, rows_per_file=5)
    attempts = ({1: 2, 5: 7}, {})
    *windows, end = Labeller(plan).label(make_item(plan, attempts=attempts))
    assert end.rows == 8
    assert [[file.failed for file in window.files] for window in windows] == [[3, 3], [2, 2]]
    for place, model in enumerate(("unet_small", "null_model")):
        rows = rows_of(plan, windows, model)
        assert [row["image_id"] for row in rows] == [f"bad.tar/{n}" for n in range(8)]
        for row in rows:
            position = row["position"]
            if position in BAD:
                stage, kind, text = BAD[position]
                assert (row["status"], row["error_stage"], row["error_type"]) == ("failed", stage, kind)
                assert text in row["error_message"]
                assert row["attempts"] == attempts[place].get(position, 0) + 1
                assert (row["semantic"], row["width"], row["quality"]) == (None, None, None)
            else:
                assert (row["status"], row["error_type"], row["attempts"]) == ("ok", None, None)
                assert row["semantic"]["data"]
        assert [(row["width"], row["height"]) for row in rows if row["status"] == "ok"] == [
            (96, 64),
            (32, 32),
            (33, 61),
        ]


def test_an_image_that_cannot_be_resized_costs_its_row(
    tmp_path: Path, bad_shard: WebdatasetSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("pipeline.stages.prepare.resized", refuse)
    model = {**UNET, "options": {"resize": 32}}
    plan = make_plan(tmp_path, (model,), bad_shard)
    rows = rows_of(plan, [*Labeller(plan).label(make_item(plan))])
    assert len(rows) == 8
    assert rows[2]["status"] == "ok"  # of that size already
    assert (rows[0]["error_stage"], rows[0]["error_type"]) == ("prepare", "PredictError")
    assert "96x64 cannot be resized" in rows[0]["error_message"]


def test_an_empty_unit_has_only_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tarfile.open(folder / "empty.tar", "w").close()
    plan = make_plan(tmp_path / "out", source=WebdatasetSource(format="webdataset", uri=str(folder)))
    assert [*Labeller(plan).label(make_item(plan))] == [Window(index=0, rows=0)]
    assert not list(tmp_path.glob("out/model=*"))


def test_packed_windows_are_labelled_the_same(tmp_path: Path, bad_shard: WebdatasetSource) -> None:
    plan = make_plan(tmp_path, (UNET, NULL), bad_shard, rows_per_file=4)
    labeller = Labeller(plan)
    item = make_item(plan, [BitMap([0, 2]), BitMap([2, 3])])
    direct = [*labeller.label(item)]
    packed = [*pack_windows(labeller._decoder.stream(item.unit, item.done), 4)]
    assert [rows for _, rows in packed] == [None, None, 8]
    assert packed[-1][0] == b""
    preprocesses = tuple(model.preprocess for model in labeller.models)
    windows = [
        window for data, _ in packed[:-1] for window in labeller.label_decoded(item, unpack_window(data, preprocesses))
    ]
    for model in ("unet_small", "null_model"):
        assert rows_of(plan, windows, model) == rows_of(plan, direct, model)


def test_packing_keeps_everything(tmp_path: Path, bad_shard: WebdatasetSource) -> None:
    plan = make_plan(tmp_path, (UNET, NULL), bad_shard)
    labeller = Labeller(plan)
    item = make_item(plan, [BitMap([0]), BitMap([2])])
    preprocesses = tuple(model.preprocess for model in labeller.models)
    before = [*labeller._decoder.stream(item.unit, item.done)][:-1]
    windows = [data for data, _ in pack_windows(iter(before), 3) if data]
    after = [decoded for data in windows for decoded in unpack_window(data, preprocesses)]
    assert len(windows) == 3
    assert len(after) == len(before) == 8
    for one, other in zip(before, after, strict=True):
        for name in ("image_id", "shard_id", "position", "width", "height", "error_stage", "read_s", "decode_s"):
            assert getattr(one, name) == getattr(other, name), name  # type: ignore[union-attr]
        assert (type(one.error), str(one.error)) == (type(other.error), str(other.error))  # type: ignore[union-attr]
        assert len(one.prepared) == len(other.prepared)  # type: ignore[union-attr]
        for left, right in zip(one.prepared, other.prepared, strict=True):  # type: ignore[union-attr]
            assert (left is None) == (right is None)
            if left is not None and right is not None:
                assert (left.frame, left.padded) == (right.frame, right.padded)
                assert torch.equal(left.image_CHW, right.image_CHW)


def test_a_model_that_hangs_costs_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, (UNET, NULL), rows_per_file=5, predict_timeout_s=0.3)
    labeller = Labeller(plan)
    forward, calls, release = UNetSmall.forward, 0, threading.Event()

    def hang_once(self: UNetSmall, image_BCHW: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            release.wait(20)
        return forward(self, image_BCHW)

    monkeypatch.setattr(UNetSmall, "forward", hang_once)
    started = time.monotonic()
    windows = [*labeller.label(make_item(plan))]
    release.set()
    assert time.monotonic() - started < 15
    rows = rows_of(plan, windows)
    hung = [row for row in rows if row["status"] == "failed"]
    assert {row["position"] for row in hung} == {*range(5, 10)}
    assert {(row["error_type"], row["error_stage"]) for row in hung} == {("PredictTimeoutError", "predict")}
    assert "0.3 s" in hung[0]["error_message"]
    assert len(rows) == COUNT
    assert [row["status"] for row in rows_of(plan, windows, "null_model")] == ["ok"] * COUNT


def test_a_model_that_fails_on_one_image_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path)
    labeller = Labeller(plan)
    forward = UNetSmall.forward
    unlucky = render_scene(7, width=48, height=32).image_HWC.mean()

    def fail(self: UNetSmall, image_BCHW: Tensor) -> Tensor:
        preprocess = labeller.models[0].preprocess
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (preprocess.mean, preprocess.std))
        means = ((image_BCHW * std + mean) * 255).mean(dim=(1, 2, 3))
        if (means - unlucky).abs().min() < 1e-2:
            raise ValueError("not this one")
        return forward(self, image_BCHW)

    monkeypatch.setattr(UNetSmall, "forward", fail)
    rows = rows_of(plan, [*labeller.label(make_item(plan))])
    assert [row["position"] for row in rows if row["status"] == "failed"] == [7]
    assert (rows[7]["error_type"], rows[7]["error_stage"]) == ("PredictError", "predict")
    assert "ValueError: not this one" in rows[7]["error_message"]


def test_a_prediction_that_cannot_be_encoded_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> dict[str, Any]:
        raise OverflowError("too long")

    monkeypatch.setattr("pipeline.stages.label.encode", refuse)
    plan = make_plan(tmp_path)
    rows = rows_of(plan, [*Labeller(plan).label(make_item(plan))])
    assert {(row["status"], row["error_stage"], row["error_message"]) for row in rows} == {
        ("failed", "encode", "OverflowError: too long")
    }


def test_another_model_than_the_driver_saw_stops_the_run(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    wrong = LabelPlan(**{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, "versions": {"unet_small": "x"}})
    with pytest.raises(ConfigError, match="'unet_small' changed while the run started: expected version x"):
        Labeller(wrong)


def test_storage_that_refuses_the_file_stops_the_unit(tmp_path: Path) -> None:
    (tmp_path / "model=unet_small").write_text("in the way")
    plan = make_plan(tmp_path)
    with pytest.raises(Exception, match="model=unet_small") as caught:
        list(Labeller(plan).label(make_item(plan)))
    assert caught.type.__name__ == "StorageError"


def test_output_in_memory(whole: list[dict[str, Any]]) -> None:
    import fsspec

    plan = make_plan(Path("x"))
    output = OutputConfig.model_validate({"uri": "memory://label-test", "rows_per_file": ROWS_PER_FILE})
    plan = LabelPlan(**{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, "output": output})

    def files() -> Iterator[pa.Table]:
        for window in Labeller(plan).label(make_item(plan)):
            for file in window.files:
                yield pq.read_table(io.BytesIO(fsspec.filesystem("memory").cat_file(f"/label-test/{file.path}")))

    table = pa.concat_tables(files())
    assert table["semantic"].to_pylist() == [row["semantic"] for row in whole]
    assert set(table.schema.names) | {"model"} == set(PREDICTIONS.names)


def scored_plan(folder: Path) -> LabelPlan:
    source = ScenesSource(format="scenes", count=12, width=48, height=32, unit_images=64)
    plan = make_plan(folder, source=source)
    taxonomy = load_taxonomy("scenes")
    return replace(plan, scorers=(Scorer.build(ScoreConfig(), taxonomy, taxonomy, max_pixels=10_000),))


def test_rows_are_scored_as_they_are_labelled(tmp_path: Path) -> None:
    plan = scored_plan(tmp_path / "fused")
    labeller = Labeller(plan)
    windows = [*labeller.label(make_item(plan))]
    rows = rows_of(plan, windows)
    assert sum(window.seconds.get("score", 0.0) for window in windows) > 0
    samples = [item for item in open_source(plan.source).read(make_item(plan).unit, ()) if isinstance(item, Sample)]
    for row, sample in zip(rows, samples, strict=True):
        expected = plan.scorers[0].score(stored(row, "semantic"), sample.targets, key=row["image_id"])  # type: ignore[union-attr]
        assert pa.array([expected], SCORE).to_pylist() == [row["score"]]
        assert row["score"]["confusion"]["pixels"]
    split = scored_plan(tmp_path / "split")
    packed = [
        data for data, _ in pack_windows(labeller._decoder.stream(make_item(plan).unit, [BitMap()]), ROWS_PER_FILE)
    ]
    preprocesses = tuple(model.preprocess for model in labeller.models)
    other = Labeller(split)
    windows = [
        w for data in packed[:-1] for w in other.label_decoded(make_item(split), unpack_window(data, preprocesses))
    ]
    assert rows_of(split, windows) == rows


def test_a_target_that_does_not_fit_leaves_the_prediction_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scored_plan(tmp_path)
    monkeypatch.setattr("pipeline.stages.score.read_label_map", lambda data, **_: np.zeros((3, 3), np.uint8))
    rows = rows_of(plan, [*Labeller(plan).label(make_item(plan))])
    assert {(row["status"], row["score"]["error_type"]) for row in rows} == {("ok", "TargetMismatchError")}
    assert all(row["semantic"] and "3x3" in row["score"]["error_message"] for row in rows)

    def explode(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("pipeline.stages.score.read_label_map", explode)
    plan = scored_plan(tmp_path / "again")
    rows = rows_of(plan, [*Labeller(plan).label(make_item(plan))])
    assert {(row["status"], row["score"]["error_message"]) for row in rows} == {("ok", "no luck")}
