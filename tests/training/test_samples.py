"""Batches of an epoch: the same images for any number of workers, and what cannot be learned from is listed."""

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import ScenesSource, SourceConfig, WebdatasetSource
from pipeline.config_train import TargetConfig
from pipeline.configfile import source_from
from pipeline.errors import ConfigError, MissingTargetError, StorageError, TargetMismatchError
from pipeline.sources.base import AllBut, Unit, UnitEnd
from pipeline.sources.pack import pack_unit
from pipeline.sources.registry import open_source
from pipeline.sources.scenes import render_scene
from pipeline.taxonomy import Category, Taxonomy, load_taxonomy
from pipeline.training.augment import AugmentOptions
from pipeline.training.order import EpochOrder
from pipeline.training.plan import SourcePlan, plan_source
from pipeline.training.reader import GroupReader, Share, ThreadReader
from pipeline.training.samples import Preparation, StepItems
from pipeline.training.task_targets import TaskTargets

SCENES = load_taxonomy("scenes")
SOURCE = ScenesSource(format="scenes", count=23, width=64, height=48, unit_images=5, targets=("semantic",))
OPTIONS = AugmentOptions(crop=(32, 32), scale=(0.7, 1.3), flip=0.5, brightness=0.3)


def reader(config: SourceConfig = SOURCE, *, source: Any = None, plan: SourcePlan | None = None) -> ThreadReader:
    opened = source or open_source(config)
    targets = TaskTargets(TargetConfig(), config, "semantic", SCENES)
    preparation = Preparation(targets=targets, options=OPTIONS, seed=4, max_pixels=config.max_pixels)
    return ThreadReader(GroupReader(opened, plan or plan_source(opened), threads=2), preparation)


def epoch(given: ThreadReader, *, number: int = 0, batch: int = 6, **share: int) -> list[StepItems]:
    order = EpochOrder(given.reader.plan.named_rows, seed=4, epoch=number, shuffle_images=9)
    return [*given.steps(Share(order=order, epoch=number, batch_images=batch, **share))]


def ids(steps: list[StepItems]) -> list[list[str]]:
    return [[item.image_id for item in step.items] for step in steps]


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_share_batches_and_see_the_same_pixels(workers: int) -> None:
    given = reader()
    whole = epoch(given)
    assert [len(step.items) for step in whole] == [6, 6, 6, 5]
    seen = list(itertools.chain.from_iterable(ids(whole)))
    assert sorted(seen) == [f"scenes/seed0-64x48/{index:09d}" for index in range(23)]
    shares = [epoch(given, worker=worker, workers=workers) for worker in range(workers)]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        together = [item for part in parts for item in part.items]
        assert [item.image_id for item in together] == [item.image_id for item in step.items]
        for one, other in zip(step.items, together, strict=True):
            assert one.example is not None
            assert other.example is not None
            assert all(torch.equal(one.example[name], other.example[name]) for name in one.example)


def test_an_epoch_goes_on_where_it_was() -> None:
    given = reader()
    whole = epoch(given, number=3)
    for first in range(5):
        rest = epoch(given, number=3, first_step=first)
        assert [step.step for step in rest] == [0, 1, 2, 3][first:]
        assert ids(rest) == ids(whole)[first:]


def test_epochs_differ_in_order_and_in_pixels() -> None:
    given = reader()
    first, second = ([item for step in epoch(given, number=n) for item in step.items] for n in (0, 1))
    assert [item.image_id for item in first] != [item.image_id for item in second]
    by_id = {item.image_id: item.example for item in second}
    same = [torch.equal(item.example["image"], by_id[item.image_id]["image"]) for item in first]  # type: ignore[index]
    assert sum(same) == 0


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_cannot_be_learned_from_is_listed_and_moves_nothing(tmp_path: Path) -> None:
    for index in range(12):
        scene = render_scene(index, width=64, height=48)
        label_HW = scene.semantic_HW.copy()
        if index == 2:
            label_HW = label_HW[:, :-1]
        if index == 3:
            label_HW[0, 0] = 99
        for kind, data in (("image", png(scene.image_HWC)), ("semantic", png(label_HW))):
            path = tmp_path / kind / f"{index:02d}.png"
            path.parent.mkdir(exist_ok=True)
            if (kind, index) != ("semantic", 4):
                path.write_bytes(data[:90] if (kind, index) == ("image", 1) else data)
    config = source_from(
        {
            "format": "files",
            "uri": str(tmp_path),
            "images": "image/{id}.png",
            "targets": {"semantic": "semantic/{id}.png"},
        }
    )
    steps = epoch(reader(config), batch=5)
    items = [item for step in steps for item in step.items]
    assert [len(step.items) for step in steps] == [5, 5, 2]
    assert sorted(item.image_id for item in items) == [f"image/{index:02d}.png" for index in range(12)]
    failures = {item.image_id: item.failure for item in items if item.failure is not None}
    assert {name: failure.error_type for name, failure in failures.items()} == {
        "image/01.png": "CorruptImageError",
        "image/02.png": "TargetMismatchError",
        "image/03.png": "TargetMismatchError",
        "image/04.png": "MissingTargetError",
    }
    assert "63x48" in failures["image/02.png"].message
    assert "99" in failures["image/03.png"].message
    assert all((item.example is None) == (item.failure is not None) for item in items)


class Ending:
    """A source whose storage fails for good after some samples of each unit."""

    def __init__(self, good: int) -> None:
        self.inner, self.good = open_source(SOURCE), good

    def plan(self, *, images: bool = True) -> Any:
        return self.inner.plan(images=images)

    def read(self, unit: Unit, done: Any, *, images: bool = True) -> Any:
        for item in self.inner.read(unit, done, images=images):
            if isinstance(item, UnitEnd) or item.position >= self.good:
                raise StorageError("the connection was reset")
            yield item


def test_a_unit_that_ends_early_loses_its_rest_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.base.RETRY_PAUSE_S", 0.0)
    source = Ending(3)
    items = [item for step in epoch(reader(source=source, plan=plan_source(source))) for item in step.items]
    assert len(items) == 23
    failed = [item.failure for item in items if item.failure is not None]
    # Units have 5, 5, 5, 5 and 3 images.
    assert len(failed) == 8
    assert {failure.error_type for failure in failed} == {"UnreadableError"}
    assert all("connection was reset" in failure.message for failure in failed)


@pytest.mark.timeout(60)
def test_a_fault_after_the_last_wanted_image_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.base.RETRY_PAUSE_S", 0.0)
    source = Ending(5)
    items = [item for step in epoch(reader(source=source, plan=plan_source(source))) for item in step.items]
    assert len(items) == 23
    assert not [item for item in items if item.failure is not None]


def test_uncounted_units_are_counted_and_read(tmp_path: Path) -> None:
    source = open_source(SOURCE)
    for index, unit in enumerate(source.plan()):
        pack_unit(source, unit, index, str(tmp_path), {}, images_per_shard=100)
    tars = open_source(WebdatasetSource(format="webdataset", uri=str(tmp_path)))
    assert {unit.rows for unit in tars.plan()} == {None}
    plan = plan_source(tars)
    assert sorted(plan.rows) == [3, 5, 5, 5, 5]
    limited = plan_source(open_source(WebdatasetSource(format="webdataset", uri=str(tmp_path), limit=7)))
    assert limited.images == 7
    assert limited.fingerprint != plan.fingerprint
    assert plan_source(tars).fingerprint == plan.fingerprint


def test_all_but() -> None:
    done = AllBut({1, 3}, rows=5)
    assert [position for position in range(8) if position not in done] == [1, 3, 5, 6, 7]


FINE = Taxonomy(
    "fine",
    "a test",
    (
        Category(1, "car", "thing", (0, 0, 0)),
        Category(2, "lorry", "thing", (0, 0, 0)),
        Category(7, "sky", "stuff", (0, 0, 0)),
        Category(9, "mist", "stuff", (0, 0, 0)),
    ),
    void_ids=(0,),
)


def task_targets(monkeypatch: pytest.MonkeyPatch, **options: Any) -> TaskTargets:
    monkeypatch.setattr("pipeline.training.task_targets.target_taxonomy", lambda score, source: FINE)
    return TaskTargets(TargetConfig.model_validate(options), SOURCE, "semantic", SCENES)


CAR, SKY, VOID = 5, 0, 255


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [VOID, CAR, VOID, SKY, VOID]),
        ({"merge": {"car": ["car", "lorry"]}}, [VOID, CAR, CAR, SKY, VOID]),
        ({"ids": {9: 0}, "ignore": [1]}, [VOID, VOID, VOID, SKY, SKY]),
        ({"other": "road"}, [VOID, CAR, 2, SKY, 2]),
    ],
)
def test_targets_become_the_models_classes(
    options: Mapping[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = task_targets(monkeypatch, **options)
    found_HW = targets.label_map({"semantic": png(np.array([[0, 1, 2, 7, 9]], np.uint8))})
    assert found_HW.tolist() == [expected]


def test_unknown_ids_fail_unless_they_are_void(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"semantic": png(np.array([[1, 44]], np.uint8))}
    with pytest.raises(TargetMismatchError, match="44"):
        task_targets(monkeypatch).label_map(data)
    assert task_targets(monkeypatch, unknown_is_void=True).label_map(data).tolist() == [[CAR, VOID]]


def test_lacking_targets_say_what_there_is() -> None:
    targets = TaskTargets(TargetConfig(), SOURCE, "depth", SCENES)
    with pytest.raises(MissingTargetError, match="expected a target of kind depth, got semantic"):
        targets.depth({"semantic": b""})
    with pytest.raises(MissingTargetError, match="got none"):
        targets.annotations({}, height=1, width=1)


def test_a_source_without_images_is_refused() -> None:
    class Empty:
        def plan(self, *, images: bool = True) -> Any:
            return iter(())

    with pytest.raises(ConfigError, match="no images"):
        plan_source(Empty())  # type: ignore[arg-type]
