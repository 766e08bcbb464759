"""Runs of seconds: resumed ones end as uninterrupted ones do, whatever stopped them, on one worker or on several."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from border_helpers import weight_formula
from job_helpers import jpeg, png, tar_bytes
from PIL import Image
from torch import Tensor
from training_helpers import CPU, config, run_loop, run_workers, train_and_stop

from pipeline.config import ModelConfig
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    FailureBudgetExceeded,
    SourceChangedError,
    StorageError,
    TrainingDivergedError,
)
from pipeline.models.load import load_model
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.training.events import EpochDone, Event, Saved, SaveFailed, StepDone, Stopped
from pipeline.training.history import Row
from pipeline.training.loop import TrainingLoop
from pipeline.training.order import EpochOrder
from pipeline.training.plan import plan_source
from pipeline.training.workers import Workers

CHANGED = ("source", "validation", "model", "target", "augment", "batch_images", "accumulate")
CLOCK = {"seconds", "images_per_s", "ended_at"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows(events: list[Event]) -> list[Row]:
    return [
        {name: value for name, value in event.row.items() if name not in CLOCK}
        for event in events
        if isinstance(event, EpochDone)
    ]


def of_kind(events: list[Event], kind: Any) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def state(loop: TrainingLoop) -> dict[str, Tensor]:
    module = loop.module if loop.ema is None else loop.ema.module
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class After:
    """Asked to stop in its n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, averaged": {"optimizer": {"kind": "sgd", "learning_rate": 0.05}, "ema": 0.8, "clip_norm": 1.0},
    "accumulated": {"accumulate": 3, "schedule": {"kind": "cosine", "warmup_epochs": 0.5}, "batch_norm": "frozen"},
    "half precision": {"precision": "fp16"},
    "thawed": {"freeze": {"stages": 2, "epochs": 1}},
}


@pytest.mark.parametrize(("variant", "stop"), [("adamw", 1), ("adamw", 4), *((variant, 6) for variant in VARIANTS)])
def test_resumed_is_uninterrupted(variant: str, stop: int, tmp_path: Path) -> None:
    """Four steps to an epoch, two epochs: stopped in the middle, at an epoch's end, and in the second epoch."""
    whole, events = run_loop(config(tmp_path / "whole", **VARIANTS[variant]))
    first, before = run_loop(config(tmp_path / "cut", **VARIANTS[variant]), should_stop=After(stop))
    assert isinstance(before[-1], Stopped)
    assert len(of_kind(before, StepDone)) == stop
    second, after = run_loop(config(tmp_path / "cut", **VARIANTS[variant]))
    assert len(of_kind(after, StepDone)) == 8 - stop
    assert_equal(state(second), state(whole))
    assert rows(before) + rows(after) == rows(events)
    assert second.record.run_id == first.record.run_id != whole.record.run_id
    if whole.scaler is not None and second.scaler is not None:
        assert second.scaler.state_dict() == whole.scaler.state_dict()
    steps = of_kind(before, StepDone) + of_kind(after, StepDone)
    assert [step.result.loss for step in steps] == [step.result.loss for step in of_kind(events, StepDone)]


def test_a_run_leaves_what_a_person_wants(tmp_path: Path) -> None:
    loop, events = run_loop(config(tmp_path, ema=0.5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["images"] for line in lines] == [22, 22]
    assert all(line["validation_images"] == 7 for line in lines)
    assert pq.read_table(tmp_path / "metrics.parquet").to_pylist() == lines
    picture = Image.open(io.BytesIO((tmp_path / "curve.png").read_bytes()))
    assert picture.size == (960, 320)
    published = of_kind(events, Saved)[-1]
    assert published.published
    best = max(line["mIoU"] for line in lines)
    assert published.checkpoint.figure == best
    loaded = load_model(ModelConfig(weights=published.uri), seed=9, tile_pixels=2**20)
    assert published.checkpoint.step == next(line["step"] for line in lines if line["mIoU"] == best)
    assert_equal(dict(loaded.module.state_dict()), loop.record.store.read(published.checkpoint)[0])
    newest = loop.record.store.newest()
    assert newest is not None
    assert_equal(newest[1], state(loop))
    spec = json.loads((tmp_path / "checkpoint" / "spec.json").read_text())
    assert spec["options"] == {"width": 4, "depth": 2}
    assert spec["metrics"]["mIoU"] == best
    assert set(spec["metrics"]).isdisjoint({"loss", "seconds"})
    assert spec["run_id"] == loop.record.run_id
    assert spec["data"]["fingerprint"] == loop.plan.fingerprint
    assert "resize" in spec["preprocess"]


def test_a_checkpoint_claims_only_what_its_weights_reached(tmp_path: Path) -> None:
    _, events = run_loop(config(tmp_path, checkpoint={"every_steps": 3, "keep": 9}))
    claims = {}
    for event in of_kind(events, Saved):
        if not event.published:
            folder = tmp_path / "checkpoints" / event.checkpoint.name
            claims[event.checkpoint.step] = json.loads((folder / "spec.json").read_text())["metrics"].get("mIoU")
    figures = {row["step"]: row["mIoU"] for row in rows(events)}
    assert claims == {3: None, 6: None} | figures


def test_it_learns(tmp_path: Path) -> None:
    given = config(
        tmp_path, epochs=6, optimizer={"learning_rate": 0.02}, augment={}, batch_images=4, batch_norm="local"
    )
    _, events = run_loop(given)
    losses = [row["loss"] for row in rows(events)]
    assert losses[-1] < 0.75 * losses[0]  # type: ignore[operator]


def scenes(count: int, *targets: str) -> dict[str, Any]:
    return {"format": "scenes", "count": count, "width": 96, "height": 72, "targets": [*targets]}


def test_depth_is_learned_and_validated(tmp_path: Path) -> None:
    given = config(
        tmp_path,
        source=scenes(24, "depth"),
        validation={"source": scenes(24, "depth")},
        model={"spec": "training_models:DEPTH"},
        loss={"depth": {"kind": "silog"}},
        target={"depth": {"max_depth": 80.0}},
        optimizer={"learning_rate": 0.01},
        augment={"flip": 0.0},
        epochs=8,
        checkpoint={"best": "RMSElog"},
    )
    _, events = run_loop(given)
    found = rows(events)
    assert found[-1]["AbsRel"] < 0.8 * found[0]["AbsRel"]  # type: ignore[operator]
    chosen = of_kind(events, Saved)[-1].checkpoint
    assert chosen.figure == min(row["RMSElog"] for row in found)  # type: ignore[type-var]


def test_instances_are_learned_and_validated(tmp_path: Path) -> None:
    """Five images in batches of two passes: the last one has a pass without an image."""
    given = config(
        tmp_path,
        source=scenes(5, "instances"),
        validation={"source": scenes(3, "instances")},
        model={"spec": "training_models:INSTANCES"},
        target={"taxonomy": "scenes"},
        augment={"crop": [64, 96]},
        batch_images=2,
        accumulate=2,
    )
    whole, events = run_loop(given)
    assert [row["images"] for row in rows(events)] == [5, 5]
    assert {row["failed"] for row in rows(events)} == {0}
    assert whole.record.headline == "segm/AP"
    assert rows(events)[-1]["validation_images"] == 3
    assert 0 <= rows(events)[-1]["bbox/AR100"] <= 1  # type: ignore[operator]
    cut = config(tmp_path / "cut", **{name: getattr(given, name) for name in CHANGED})
    run_loop(cut, should_stop=After(4))
    resumed, _ = run_loop(cut)
    assert_equal(state(resumed), state(whole))


def test_a_run_that_has_ended_has_nothing_to_do(tmp_path: Path) -> None:
    whole, _ = run_loop(config(tmp_path))
    again, events = run_loop(config(tmp_path))
    assert not of_kind(events, StepDone)
    assert not of_kind(events, EpochDone)
    assert_equal(state(again), state(whole))


def test_any_number_of_workers_trains_the_same(tmp_path: Path) -> None:
    """22 images in batches of 6, the last of 4; synchronised batch normalisation, averaged weights, SGD. Two workers
    stop in the second epoch, and three go on."""
    options = {"batch_norm": "synced", "ema": 0.8, "optimizer": {"kind": "sgd", "learning_rate": 0.05}}
    whole, events = run_loop(config(tmp_path / "whole", **options))
    found = run_workers(train_and_stop, [2, 3], config(tmp_path / "shared", **options))
    epochs, expected = [], rows(events)
    for size, kinds in ((2, (5, 1)), (3, (3, 1))):
        for module, steps, own_rows, saved in found[size]:
            assert steps == kinds[0]
            assert len(own_rows) == kinds[1]
            assert (saved > 0) == (module is found[size][0][0])
        epochs += found[size][0][2]
    for one, other in zip(expected, epochs, strict=True):
        assert one["images"] == other["images"]
        assert one["step"] == other["step"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for module, *_ in found[3]:
        for name, value in whole.module.state_dict().items():
            torch.testing.assert_close(module[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kinds", [["semantic", "panoptic"], ["panoptic"], ["semantic", "instances"]])
def test_borders_between_objects_count_more(kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own batches hold the paper's weights, by distances in the scenes as they were painted."""
    found: dict[str, tuple[Any, Any]] = {}
    plain = TrainingLoop._batches

    def noted(self: TrainingLoop, share: Any) -> Any:
        (batch,) = plain(self, share)
        for at, item in enumerate(share.items):
            maps = [batch.targets[name][at].numpy() for name in ("semantic", "pixel_weight")]
            found[item.image_id] = (maps[0], maps[1])
        return [batch]

    options: dict[str, Any] = {
        "source": {"format": "scenes", "count": 8, "width": 64, "height": 48, "targets": kinds},
        "validation": None,
        "augment": {"flip": 0.0},
        "epochs": 1,
        "batch_images": 4,
    }
    weighted = {"class_weights": {"road": 0.5, "car": 3.0}}
    _, events = run_loop(config(tmp_path / "plain", **options, loss={"semantic": weighted}))
    monkeypatch.setattr(TrainingLoop, "_batches", noted)
    border = {"border": {"w0": 12.0, "sigma": 4.0}}
    _, others = run_loop(config(tmp_path / "border", **options, loss={"semantic": {**weighted, **border}}))
    # Of two runs that are the same bit for bit but for the border.
    assert rows(others)[0]["loss"] != pytest.approx(rows(events)[0]["loss"], rel=1e-3)
    most = 0.0
    for name, (label_HW, weight_HW) in found.items():
        scene = render_scene(int(name.rpartition("/")[2]), width=64, height=48)
        # Padded to a multiple of the U-Net's: that counts for nothing.
        assert (weight_HW[48:] == 0).all()
        assert (label_HW[48:] == 255).all()
        class_weight_K = np.array([1, 1, 0.5, 1, 1, 3, 1, 1])
        class_weight_HW = class_weight_K[np.where(scene.semantic_HW == 255, 0, scene.semantic_HW)]
        thing_HW = scene.segment_HW >= 6000
        cell_HW = np.where(thing_HW, scene.segment_HW, 0)
        expected_HW = weight_formula(cell_HW, class_weight_HW, w0=12.0, sigma=4.0)
        np.testing.assert_array_equal(label_HW[:48], scene.semantic_HW)
        np.testing.assert_allclose(weight_HW[:48], np.where(label_HW[:48] == 255, 0, expected_HW), rtol=1e-5, atol=1e-5)
        most = max(most, float(np.where(thing_HW, 0, expected_HW - class_weight_HW).max()))
    assert len(found) == 8
    assert most > 6


def test_an_epoch_is_the_training_set_however_often_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    plain = TrainingLoop._require_finite

    def noted(self: TrainingLoop, share: Any, *more: Any) -> None:
        seen.extend((self._progress.epoch, item.image_id) for item in share.items)
        plain(self, share, *more)

    # Between a batch's gradient and the step that follows it.
    monkeypatch.setattr(TrainingLoop, "_require_finite", noted)
    given = config(tmp_path)
    for stop in (1, 2, 3, 100):
        run_loop(given, should_stop=After(stop))
    order = EpochOrder(plan_source(open_source(given.source)).named_rows, seed=0, epoch=0, shuffle_images=8)
    assert order.images == 22
    assert len(seen) == 44
    for epoch in range(2):
        names = [name for at, name in seen if at == epoch]
        assert sorted(names) == [f"scenes/seed0-64x48/{index:09d}" for index in range(22)]


def test_a_loss_that_is_not_finite_stops_and_names_the_images(tmp_path: Path) -> None:
    given = config(tmp_path, optimizer={"learning_rate": 1e30}, checkpoint={"every_steps": 1})
    loop = TrainingLoop(given, workers=Workers(), device=CPU)
    said = r"step \d of epoch 0 .*scenes/seed0-64x48/0000000\d\d; all in"
    with pytest.raises(TrainingDivergedError, match=said) as caught:
        for _ in loop.run():
            pass
    (report,) = tmp_path.glob("diverged-*.json")
    assert str(report) in str(caught.value)
    found = json.loads(report.read_text())
    assert (found["epoch"], len(found["image_ids"])) == (0, 6)
    assert found["step"] >= 1
    newest = loop.record.store.newest()
    assert newest is not None
    assert newest[0].step == found["step"]


class Full:
    """A disk that is full for a while."""

    def __init__(self, fs: Any, times: int) -> None:
        self.fs, self.times = fs, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def pipe_file(self, path: str, data: bytes) -> None:
        if self.times > 0:
            self.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fs.pipe_file(path, data)


def test_a_checkpoint_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    given = config(tmp_path, checkpoint={"every_steps": 2, "attempts": 1})
    whole, _ = run_loop(config(tmp_path / "whole"))
    loop = TrainingLoop(given, workers=Workers(), device=CPU)
    loop.record.store.fs = Full(loop.record.store.fs, times=1)
    events = list(loop.run())
    (failed,) = of_kind(events, SaveFailed)
    assert "No space left" in str(failed.error)
    assert_equal(state(loop), state(whole))
    newest = loop.record.store.newest()
    assert newest is not None
    assert newest[0].step == 8


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    loop = TrainingLoop(config(tmp_path, epochs=1, checkpoint={"attempts": 1}), workers=Workers(), device=CPU)
    loop.record.store.fs = Full(loop.record.store.fs, times=99)
    with pytest.raises(StorageError, match="No space left"):
        list(loop.run())


def test_bad_images_teach_nothing(tmp_path: Path) -> None:
    """Without them a run learns what it learns from images that are void everywhere."""
    wrong_id_HW = render_scene(7, width=64, height=48).semantic_HW.copy()
    wrong_id_HW[5, 5] = 77
    bad = {
        "02.seg.png": png(np.zeros((24, 32), np.uint8)),
        "07.seg.png": png(wrong_id_HW),
        "09.jpg": jpeg(9, 64, 48)[:700],
    }
    void = {f"{name[:2]}.seg.png": png(np.full((48, 64), 255, np.uint8)) for name in bad}

    def learn(folder: Path, changed: dict[str, bytes]) -> tuple[dict[str, Tensor], list[EpochDone]]:
        members: dict[str, bytes] = {}
        for index in range(12):
            target_HW = render_scene(index, width=64, height=48).semantic_HW
            members |= {f"{index:02}.jpg": jpeg(index, 64, 48), f"{index:02}.seg.png": png(target_HW)}
        folder.mkdir()
        (folder / "bad.tar").write_bytes(tar_bytes(members | changed))
        given = config(
            folder / "out",
            source={"format": "webdataset", "uri": str(folder / "bad.tar")},
            validation=None,
            failure_budget=0.25,
            batch_norm="frozen",
            augment={"flip": 0.0},
            optimizer={"kind": "sgd", "learning_rate": 0.004},
        )
        loop, events = run_loop(given)
        return state(loop), of_kind(events, EpochDone)

    weights, epochs = learn(tmp_path / "bad", bad)
    expected, twins = learn(tmp_path / "void", void)
    assert [(done.row["images"], done.row["failed"]) for done in epochs] == [(9, 3)] * 2
    assert [(done.row["images"], done.row["failed"]) for done in twins] == [(12, 0)] * 2
    for done, twin in zip(epochs, twins, strict=True):
        assert done.row["loss"] == pytest.approx(twin.row["loss"], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    why = {failure.image_id: (failure.error_type, failure.message) for failure in epochs[0].failures}
    assert sorted(why) == ["bad.tar/02", "bad.tar/07", "bad.tar/09"]
    assert why["bad.tar/02"][0] == "TargetMismatchError"
    assert why["bad.tar/07"] == ("TargetMismatchError", "expected ids of scenes or its void, got [77]")
    assert why["bad.tar/09"][0] == "CorruptImageError"


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    source = {"format": "scenes", "count": 12, "width": 64, "height": 48, "targets": ["depth"]}
    with pytest.raises(FailureBudgetExceeded, match=r"12 of 12 images .*MissingTargetError"):
        run_loop(config(tmp_path, source=source, failure_budget=0.5))
    _, events = run_loop(config(tmp_path / "b", source=source, failure_budget=1.0, epochs=1, validation=None))
    (done,) = of_kind(events, EpochDone)
    assert (done.row["failed"], done.row["images"], len(done.failures)) == (12, 0, 12)


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"batch_images": 5}, ConfigError, "batch_images must be 6"),
        ({"seed": 1}, ConfigError, "seed must be 0"),
        ({"model": {"name": "unet_small", "options": {"width": 8, "depth": 2}}}, CheckpointError, "does not fit"),
        (
            {"source": {"format": "scenes", "count": 21, "width": 64, "height": 48}},
            SourceChangedError,
            "are not those",
        ),
    ],
)
def test_another_run_does_not_go_on(changes: dict[str, Any], kind: Any, part: str, tmp_path: Path) -> None:
    run_loop(config(tmp_path), should_stop=After(2))
    with pytest.raises(kind, match=part):
        run_loop(config(tmp_path, **changes))


def test_a_figure_that_there_is_not_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.best must be one of mIoU, .*, got 'AP'"):
        TrainingLoop(config(tmp_path, checkpoint={"best": "AP"}), workers=Workers(), device=CPU)


def test_weights_that_fit_in_part_start_a_model_of_other_classes(tmp_path: Path) -> None:
    weights = {"weights": "bundled:unet_small_scenes", "name": "unet_small", "taxonomy": "camvid11"}
    mapped = {"taxonomy": "scenes"}
    with pytest.raises(CheckpointError, match=r"head.weight is \(8, 16, 1, 1\), the model has \(11, 16, 1, 1\)"):
        TrainingLoop(config(tmp_path, model=weights, target=mapped), workers=Workers(), device=CPU)
    loop = TrainingLoop(
        config(tmp_path, model=weights, target=mapped, partial_weights=True), workers=Workers(), device=CPU
    )
    assert loop.unfilled == ["head.weight", "head.bias"]
    bundled = load_model(ModelConfig(weights="bundled:unet_small_scenes"), seed=0, tile_pixels=2**20)
    own = loop.module.state_dict()
    for name, value in bundled.module.state_dict().items():
        if name not in loop.unfilled:
            assert torch.equal(own[name], value), name


def test_class_weights_are_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scenes has no 'lorry'"):
        TrainingLoop(
            config(tmp_path, loss={"semantic": {"class_weights": {"lorry": 2.0}}}), workers=Workers(), device=CPU
        )
