"""Sheets of predictions: colours by hand, the same images and bytes for any number of workers, and nothing that stops
a run."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import CPU, config, run_loop, run_workers, train_and_stop, validate_once

from pipeline.errors import MissingTargetError
from pipeline.masks import encode_rle
from pipeline.metrics.confusion import Confusion
from pipeline.metrics.depth import Depth, DepthOptions
from pipeline.metrics.detection_match import Objects
from pipeline.overlay import DEPTH_RAMP
from pipeline.taxonomy import load_taxonomy
from pipeline.training.events import EpochDone, Event, Saved, SaveFailed
from pipeline.training.loop import TrainingLoop
from pipeline.training.sheet import Shown, draw_depth, draw_labels, draw_objects, draw_sheet, sheet_places, show
from pipeline.training.workers import Workers

SCENES = load_taxonomy("scenes")
GRAY = np.full((270, 360, 3), 100, np.uint8)  # as large as its tile: no pixel is interpolated
TOP, LEFT, COLUMN = 58, 8, 362
CLOCK = {"seconds", "images_per_s", "ended_at"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def columns(sheet: bytes) -> list[Any]:
    """The first row's image, target and prediction as they stand on the sheet."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet))).astype(int)
    return [pixels[TOP : TOP + 270, LEFT + at * COLUMN : LEFT + at * COLUMN + 360] for at in range(3)]


def mixed(id_: int, share: float, ground: int = 100) -> list[int]:
    return [int(channel * share + ground * (1 - share)) for channel in SCENES.by_id[id_].color]


@pytest.mark.parametrize(
    ("images", "count", "expected"),
    [
        (20, 6, [1, 5, 8, 11, 15, 18]),
        (10, 5, [1, 3, 5, 7, 9]),
        (7, 1, [3]),
        (3, 6, [0, 1, 2]),
        (5, 0, []),
        (10**9, 2, [250_000_000, 750_000_000]),
    ],
)
def test_places_are_spread_evenly(images: int, count: int, expected: list[int]) -> None:
    assert sheet_places(images, count) == expected


def test_labels_by_hand() -> None:
    """Left and right halves; the prediction is right on the left, and right of it a sixth of the picture is void."""
    target_HW, pred_HW = np.full((270, 360), 2), np.full((270, 360), 2)
    target_HW[:, 180:], pred_HW[:, 180:], target_HW[:, 300:] = 5, 4, SCENES.void_id
    confusion = Confusion.from_maps(target_HW, pred_HW, SCENES)
    item = show(3, "a/b", GRAY, functools.partial(draw_labels, confusion, target_HW, pred_HW, SCENES))
    # Roads have 180 of 180 columns, cars 0 of 120, vegetation 0 of 120: the mean over the eight classes or those there.
    assert item.caption == f"a/b   mIoU {confusion.compute()['mIoU']:.3f}"
    assert confusion.compute()["mIoU"] == pytest.approx(1 / 3)
    assert item.category_ids == (2, 4, 5)
    sheet = draw_sheet([item], "semantic", SCENES, "epoch 1 of 2")
    image, target, pred = columns(sheet)
    assert (image == 100).all()
    assert target[100, 90].tolist() == pred[100, 90].tolist() == mixed(2, 0.6)
    assert target[100, 240].tolist() == mixed(5, 0.6)
    assert pred[100, 240].tolist() == pred[100, 330].tolist() == mixed(4, 0.6)
    whole = np.asarray(Image.open(io.BytesIO(sheet)))
    legend = {tuple(color) for color in whole[TOP + 270 + 20 :].reshape(-1, 3).tolist()}
    assert [id_ for id_ in SCENES.ids if SCENES.by_id[id_].color in legend] == [2, 4, 5]


def test_depth_by_hand() -> None:
    """The target goes from 1 to 10 m, left to right; the prediction is 10 m: far away by the target's range, though the
    only depth there is."""
    target_HW = np.broadcast_to(np.linspace(1, 10, 360), (270, 360)).copy()
    target_HW[:20] = np.nan
    pred_HW = np.full((270, 360), 10.0)
    depth = Depth.from_image(pred_HW, target_HW)
    draw = functools.partial(draw_depth, depth, target_HW, pred_HW, "metric_m", DepthOptions())
    item = show(0, "a", GRAY, draw)
    expected = np.mean(np.abs(np.linspace(1, 10, 360) - 10) / np.linspace(1, 10, 360))
    assert item.caption == f"a   AbsRel {expected:.3f}"
    _, target, pred = columns(draw_sheet([item], "depth", SCENES, ""))
    assert pred[100, 100].tolist() == target[100, 359].tolist() == list(DEPTH_RAMP[0])
    assert target[100, 0].tolist() == list(DEPTH_RAMP[-1])
    middle = np.array(DEPTH_RAMP[2])  # of 5.5 m, between columns 179 and 180
    assert np.abs(target[100, 179:181] - middle).max() <= 2
    assert set(np.unique(target[:20])) == {96, 130}  # hatched


def square(*places: tuple[int, int], **more: Any) -> Objects:
    """Masks of 40 x 40 pixels at (row, column)."""
    masks = np.zeros((len(places), 270, 360), np.uint8)
    for mask_HW, (row, column) in zip(masks, places, strict=True):
        mask_HW[row : row + 40, column : column + 40] = 1
    rles = [{"size": [270, 360], "counts": encode_rle(np.asfortranarray(mask_HW))} for mask_HW in masks]
    return Objects(height=270, width=360, bbox_N4=None, segmentation=rles, **more)


def test_objects_by_hand() -> None:
    """Two cars and a crowd of people; one car is found, and a person that is hardly believed is not drawn."""
    crowd = np.array([False, False, True])
    target = square((10, 10), (10, 200), (200, 200), category_id=np.array([5, 5, 6]), crowd=crowd)
    pred = square((10, 10), (100, 100), category_id=np.array([5, 6]), score=np.array([0.9, 0.3]))
    item = show(0, "a", GRAY, functools.partial(draw_objects, target, pred, SCENES))
    assert item.caption == "a   1 predicted with a score of 0.5 or more, 2 in the target, 1 crowd"
    assert item.category_ids == (5, 6)
    _, target_HWC, pred_HWC = columns(draw_sheet([item], "instance", SCENES, ""))
    assert target_HWC[30, 30].tolist() == target_HWC[30, 220].tolist() == pred_HWC[30, 30].tolist() == mixed(5, 0.5)
    assert target_HWC[220, 220].tolist() == mixed(6, 0.5)
    assert pred_HWC[30, 220].tolist() == pred_HWC[120, 120].tolist() == [100] * 3
    assert target_HWC[10, 30].tolist() == [255] * 3  # outline


def test_what_cannot_be_drawn_says_why() -> None:
    def broken(image_HWC: Any) -> Any:
        raise ZeroDivisionError("by hand")

    for draw, text in ((MissingTargetError("none\nthere"), "MissingTargetError: none there"), (broken, "by hand")):
        item = show(2, "a", GRAY, draw)
        assert item.caption.endswith(text)
        assert len(item.pictures) == 1
        image, target, _ = columns(draw_sheet([item], "semantic", SCENES, ""))
        assert (image == 100).all()
        assert len(np.unique(target.reshape(-1, 3), axis=0)) == 1
    alone = show(0, "a", None, MissingTargetError("x"))
    assert alone.pictures == ()
    assert columns(draw_sheet([alone], "semantic", SCENES, ""))[0].shape == (270, 360, 3)
    assert Shown.from_row(item.to_row()) == item


TREE: dict[str, Any] = {
    "source": {"format": "scenes", "count": 11, "width": 64, "height": 48, "unit_images": 4},
    "batch_images": 2,
    "sheet_images": 4,
}


def test_validation_shows_its_images_and_counts_as_before() -> None:
    """That they are the same for any number of workers, test_validate.py sees: they are part of the gathered row."""
    figures, row = validate_once(Workers(), dict(TREE))
    shown = [Shown.from_row(item) for item in row["shown"]]
    assert [item.place for item in shown] == [1, 4, 6, 9]
    assert [item.caption.split()[0] for item in shown] == [f"scenes/seed0-64x48/00000000{n}" for n in (1, 4, 6, 9)]
    expected = draw_sheet(shown, "semantic", SCENES, "t")
    assert draw_sheet(shown[::-1], "semantic", SCENES, "t") == expected
    bare, none = validate_once(Workers(), {**TREE, "sheet_images": 0})
    assert none["shown"] == []
    assert bare == pytest.approx(figures, rel=0, abs=0, nan_ok=True)
    assert {**row, "shown": []} == none


def test_an_image_is_shown_small() -> None:
    large = {**TREE["source"], "width": 1024, "height": 768, "count": 1}
    _, row = validate_once(Workers(), {**TREE, "source": large})
    (shown,) = (Shown.from_row(item) for item in row["shown"])
    image, target, pred = columns(draw_sheet([shown], "semantic", SCENES, ""))
    assert len(shown.pictures) == 3
    assert sum(map(len, shown.pictures)) < 3 * 4 / 3 * 360 * 270 * 3
    assert np.abs(image - target).mean() > 5
    assert np.abs(target - pred).mean() > 0.5


def files(folder: Path) -> dict[str, bytes]:
    """By address in the output."""
    paths = [*sorted((folder / "sheets").glob("*")), *folder.glob("sheet*.png")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_leaves_the_same_sheets_with_any_number_of_workers(tmp_path: Path) -> None:
    """At a learning rate that moves nothing, or the models would be equal to six digits only."""
    options = {
        "model": {"weights": "bundled:unet_small_scenes"},
        "batch_images": 11,
        "batch_norm": "frozen",
        "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0},
    }
    run_loop(config(tmp_path / "one", **options))
    run_workers(train_and_stop, [2], config(tmp_path / "two", **options))
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    first, last = "sheets/epoch-0001.png", "sheets/epoch-0002.png"
    assert [*one] == [first, last, "sheet.png"]
    assert one == two
    assert one["sheet.png"] == one[last] != one[first]  # the heading


def rows(events: list[Event]) -> list[dict[str, Any]]:
    done = [event.row for event in events if isinstance(event, EpochDone)]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in done]


def test_sheets_are_of_validated_epochs_and_change_nothing(tmp_path: Path) -> None:
    given = config(tmp_path / "a", epochs=3)
    validation = given.validation.model_copy(update={"every_epochs": 2})  # type: ignore[union-attr]
    _, events = run_loop(given.model_copy(update={"validation": validation}))
    assert [*files(tmp_path / "a")] == ["sheets/epoch-0002.png", "sheets/epoch-0003.png", "sheet.png"]
    output = given.output.model_copy(update={"uri": str(tmp_path / "b")})
    bare = {"validation": validation.model_copy(update={"sheet_images": 0}), "output": output}
    _, others = run_loop(given.model_copy(update=bare))
    assert files(tmp_path / "b") == {}
    assert rows(others) == rows(events)


class NoPictures:
    """A storage that takes no sheets."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def pipe_file(self, path: str, data: bytes) -> None:
        if path.rpartition("/")[0].endswith("/sheets"):
            raise OSError("no room for pictures")
        self.fs.pipe_file(path, data)


def test_a_sheet_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    loop = TrainingLoop(config(tmp_path, checkpoint={"attempts": 1}), workers=Workers(), device=CPU)
    loop.record.store.fs = NoPictures(loop.record.store.fs)
    events = list(loop.run())
    failed = [event for event in events if isinstance(event, SaveFailed)]
    assert [event.what for event in failed] == ["history", "history"]
    assert "no room for pictures" in str(failed[0].error)
    assert sum(isinstance(event, Saved) for event in events) == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
