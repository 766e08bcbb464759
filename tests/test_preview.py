"""Contact sheets: colours by hand, the same picks for the same rows, and a picture from any names and targets."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from table_helpers import put

from pipeline.config import ScenesSource, WebdatasetSource
from pipeline.errors import ConfigError
from pipeline.masks import encode_depth, encode_label_map, encode_rle
from pipeline.overlay import DEPTH_RAMP
from pipeline.preview import (
    contact_sheet,
    overlay,
    pick_rows,
    read_images,
)
from pipeline.sheet import BACKGROUND
from pipeline.sources import pack
from pipeline.sources.base import UnitEnd
from pipeline.sources.scenes import Scenes, render_scene
from pipeline.table import RowTable
from pipeline.taxonomy import build_taxonomy, load_taxonomy

TAXONOMY = build_taxonomy(
    {
        "name": "two",
        "source": "this test",
        "categories": [
            {"id": 0, "name": "zero", "kind": "stuff", "color": [200, 100, 0]},
            {"id": 3, "name": "three", "kind": "thing", "color": [0, 50, 250]},
        ],
    },
    "here",
)
SCENES = ScenesSource(format="scenes", count=6, width=64, height=48, unit_images=4)


def label_row(label_HW: Any, **fields: Any) -> dict[str, Any]:
    height, width = np.asarray(label_HW).shape
    data = encode_label_map(np.asarray(label_HW, np.uint8))
    return {"semantic": {"format": "png", "data": data}, "width": width, "height": height, **fields}


def test_label_map_by_hand() -> None:
    image_HWC = np.array(
        [[[30, 60, 90], [0, 0, 0], [255, 255, 255]], [[90, 60, 30], [10, 20, 30], [3, 3, 3]]], np.uint8
    )
    label_HW = [[0, 0, 3], [0, 0, 255]]
    found = overlay(image_HWC, label_row(label_HW), TAXONOMY)
    assert (found.shape, found.dtype) == ((2, 3, 3), np.uint8)
    # 0.6 of the colour and 0.4 of the gray value, 60 here.
    assert found[0, 0].tolist() == [144, 84, 24]
    assert found[0, 1].tolist() == [120, 60, 0]
    assert found[1, 0].tolist() == [144, 84, 24]
    # Right of and below a border: 0.4 of that and 0.6 of white. Void is black.
    assert found[0, 2].tolist() == [int(0.4 * (0.6 * c + 0.4 * 255) + 153) for c in (0, 50, 250)]
    assert found[1, 2].tolist() == [int(0.4 * (0.4 * 3) + 153)] * 3
    assert found[1, 1].tolist() == [128, 68, 8]


def test_segments_by_hand() -> None:
    image_HWC = np.full((5, 6, 3), 100, np.uint8)
    below_HW = np.zeros((5, 6), bool)
    below_HW[0:5, 0:5] = True
    above_HW = np.zeros((5, 6), bool)
    above_HW[1:4, 1:4] = True
    segments = [
        {"category_id": 3, "rle": encode_rle(above_HW)},
        {"category_id": 0, "rle": encode_rle(below_HW)},
    ]
    found = overlay(image_HWC, {"segments": segments}, TAXONOMY)
    assert found[2, 5].tolist() == [100, 100, 100]
    assert found[2, 2].tolist() == [
        int((100 + 200) / 2 / 2 + 0),
        int((100 / 2 + 50) / 2 + 25),
        int((100 / 2) / 2 + 125),
    ]
    assert (found[1:4, 1:4].reshape(-1, 3) == 255).all(1).sum() == 8  # the outline of the one on top
    assert found[3, 4].tolist() == [255, 255, 255]  # a border of the mask against what lies beside it
    assert found[0, 2].tolist() == [150, 100, 50]  # the picture's edge is no border
    assert overlay(image_HWC, {"segments": []}, TAXONOMY).tolist() == image_HWC.tolist()


def test_depth_is_bright_where_it_is_near() -> None:
    depth_HW = np.tile(np.linspace(1, 9, 101, dtype=np.float32), (2, 1))
    depth_HW[0, 0] = np.nan
    image_HWC = np.zeros((2, 101, 3), np.uint8)
    far, near = (list(DEPTH_RAMP[place]) for place in (0, -1))
    for kind, first, last in (("metric_m", near, far), ("relative", near, far), ("inverse_relative", far, near)):
        found = overlay(image_HWC, {"depth": encode_depth(depth_HW, kind)}, TAXONOMY)
        assert found[0, 0].tolist() == [0, 0, 0]
        assert found[1, 0].tolist() == first
        assert found[1, 100].tolist() == last
        assert np.abs(found[1, 50].astype(int) - DEPTH_RAMP[2]).max() <= 1
    nothing = encode_depth(np.full((2, 3), np.nan, np.float32), "metric_m")
    assert not overlay(np.full((2, 3, 3), 9, np.uint8), {"depth": nothing}, TAXONOMY).any()
    flat = overlay(
        np.zeros((2, 3, 3), np.uint8), {"depth": encode_depth(np.ones((2, 3), np.float32), "relative")}, TAXONOMY
    )
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_a_row_without_labels_is_the_image() -> None:
    image_HWC = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert (
        overlay(image_HWC, {"semantic": None, "segments": None, "depth": None}, TAXONOMY).tolist() == image_HWC.tolist()
    )


@pytest.fixture
def table(tmp_path: Path) -> RowTable:
    table = RowTable.open(str(tmp_path / "t"), {}, create=True)
    table.take_over()
    return table


def picks(table: RowTable, count: int, seed: int = 0, version: str = "v1") -> list[tuple[str, int]]:
    rows = pick_rows(table, "m", version, count, seed)
    assert all(set(row) >= {"image_id", "width", "height", "semantic", "segments", "depth"} for row in rows)
    return [(row["shard_id"], row["position"]) for row in rows]


def test_picks_are_the_same_for_the_same_rows(table: RowTable, tmp_path: Path) -> None:
    shards = [f"it's {n}#{n}" for n in range(9)]
    table.commit([put(table.uri, shard, range(10), failed={0, 3}) for shard in shards])
    table.commit([put(table.uri, "other", range(10), version="v2"), put(table.uri, "other", range(10), model="n")])
    # The same rows in other files, committed in another order.
    again = RowTable.open(str(tmp_path / "again"), {}, create=True)
    again.take_over()
    for first in (7, 4, 0):
        cut = range(first, {0: 4, 4: 7, 7: 10}[first])
        again.commit([put(again.uri, shard, cut, failed={0, 3} & set(cut)) for shard in shards[::-1]])
    for count in (1, 4, 9, 20, 500):
        found = picks(table, count)
        assert found == picks(table, count) == picks(again, count) == sorted(set(found))
        assert len(found) == min(count, 72)
        assert not {position for _, position in found} & {0, 3}
        spread = [sum(shard == own for own, _ in found) for shard in shards]
        assert max(spread) - min(spread) <= 1
    assert len({tuple(picks(table, 4, seed)) for seed in range(8)}) > 4
    assert picks(table, 3, version="v3") == []


def test_picks_where_most_shards_have_nothing(table: RowTable) -> None:
    table.commit([put(table.uri, f"s{n}", [0], failed={0}) for n in range(20)] + [put(table.uri, "good", range(3))])
    assert picks(table, 2, seed=3) == picks(table, 2, seed=3)
    assert {shard for shard, _ in picks(table, 16)} == {"good"}
    assert len(picks(table, 16)) == 3


def scene_rows(places: Sequence[int]) -> list[dict[str, Any]]:
    """Rows that say of each scene what its target says."""
    units = list(Scenes(SCENES).plan())
    rows = []
    for place in places:
        unit = units[place // 4]
        scene = render_scene(place, width=64, height=48)
        ids = {"shard_id": unit.shard_id, "position": place % 4, "image_id": f"scenes/{place}"}
        rows.append(label_row(scene.semantic_HW, **ids))
    return rows


def tiles(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)


def test_read_images_gives_exactly_what_was_asked_for() -> None:
    rows = scene_rows([5, 0, 3])
    found = {index: sample.image_id[-3:] for sample, index in read_images(SCENES, rows)}
    assert found == {0: "005", 1: "000", 2: "003"}
    lost = {"shard_id": "elsewhere", "position": 0}
    assert [index for _, index in read_images(SCENES, [lost, *rows])] == [2, 3, 1]


def test_contact_sheet_shows_image_prediction_and_target() -> None:
    taxonomy = load_taxonomy("scenes")
    sheet = contact_sheet(SCENES, scene_rows([1]), taxonomy, "title")
    pixels = tiles(sheet).astype(int)
    # One row of three tiles of 320 x 240: the prediction is the target, the image is not.
    top, left, size = 58, 8, 320
    image, pred, target = (pixels[top : top + 240, left + n * 322 : left + n * 322 + size] for n in range(3))
    scene = render_scene(1, width=64, height=48)
    assert (pred == target).all()
    assert np.abs(image[2::5, 2::5] - scene.image_HWC).mean() < 12
    assert np.abs(image - pred).mean() > 10
    # The legend names what is there, in its colours.
    legend = pixels[top + 240 + 20 :].reshape(-1, 3).tolist()
    for category in taxonomy.categories:
        assert (list(category.color) in legend) == (category.id in scene.semantic_HW)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_contact_sheets_of_any_number(count: int) -> None:
    sheet = contact_sheet(SCENES, scene_rows(range(count)), load_taxonomy("scenes"), "t")
    pixels = tiles(sheet)
    assert 900 < sheet.width < 2100
    assert (pixels[-1] == BACKGROUND).all()
    drawn = (pixels != BACKGROUND).any(2)[58:].mean()
    assert drawn > 0.5


@pytest.mark.parametrize(
    "image_id",
    ["\x00\x1b[31m\n\t\u202e", "x" * 5000, "日本語/naïve.jpg", "", "\U0001f600", "\ud7ff\ue000\ufffe"],
)
def test_ids_that_cannot_be_printed(image_id: str) -> None:
    (row,) = scene_rows([0])
    sheet = contact_sheet(SCENES, [{**row, "image_id": image_id}], load_taxonomy("scenes"), "title\n\x00")
    assert sheet.width < 1100


def depth_rows(places: Sequence[int]) -> list[dict[str, Any]]:
    rows = scene_rows(places)
    for row, place in zip(rows, places, strict=True):
        depth_HW = render_scene(place, width=64, height=48).depth_HW
        row |= {"semantic": None, "depth": encode_depth(np.where(depth_HW == 0, np.nan, depth_HW), "metric_m")}
    return rows


def segment_rows(places: Sequence[int]) -> list[dict[str, Any]]:
    rows = scene_rows(places)
    for row, place in zip(rows, places, strict=True):
        scene = render_scene(place, width=64, height=48)
        segments = [
            {"category_id": segment.category_id, "rle": encode_rle(scene.segment_HW == segment.id)}
            for segment in scene.segments
            if segment.category_id >= 5
        ]
        row |= {"semantic": None, "segments": segments}
    return rows


@pytest.mark.parametrize("make_rows", [depth_rows, segment_rows])
def test_targets_of_the_predictions_kind(make_rows: Any) -> None:
    sheet = contact_sheet(SCENES, make_rows([2]), load_taxonomy("scenes"), "t")
    pixels = tiles(sheet).astype(int)
    pred, target = (pixels[58:298, 8 + n * 322 : 8 + n * 322 + 320] for n in (1, 2))
    assert np.abs(pred - target).mean() < 1.5
    assert np.abs(pred - pixels[58:298, 8:328]).mean() > 1


@pytest.fixture
def packed(tmp_path: Path) -> WebdatasetSource:
    """Two scenes in a tar, with a target of another size and one that is no target."""
    unit = next(Scenes(SCENES).plan())
    samples = [sample for sample in Scenes(SCENES).read(unit, (3,)) if hasattr(sample, "image")]
    small = next(iter(Scenes(SCENES.model_copy(update={"width": 32, "height": 32})).read(unit, ())))
    fields = ("image_id", "shard_id", "position", "image")

    class Changed:
        def plan(self) -> Iterator[Any]:
            yield unit

        def read(self, unit: Any, done: Any, *, images: bool = True) -> Iterator[Any]:
            for index, sample in enumerate(samples):
                kept = {name: getattr(sample, name) for name in fields}
                targets = [small.targets, {"semantic": b"no png", "instances": b"{"}, sample.targets][index]  # type: ignore[union-attr]
                yield type(sample)(**kept, targets=targets)
            yield UnitEnd(rows=len(samples))

    pack.pack_unit(Changed(), unit, 0, str(tmp_path / "tars"), {}, images_per_shard=9)
    return WebdatasetSource(format="webdataset", uri=str(tmp_path / "tars"))


@pytest.mark.parametrize("make_rows", [scene_rows, segment_rows, depth_rows])
def test_targets_that_do_not_fit_are_left_out(packed: WebdatasetSource, make_rows: Any) -> None:
    rows = [{**row, "shard_id": "shard-000000-000.tar"} for row in make_rows([0, 1])]
    sheet = contact_sheet(packed, rows, load_taxonomy("scenes"), "t")
    assert sheet.width > 600


def test_images_that_are_no_longer_what_was_labelled_are_left_out(packed: WebdatasetSource) -> None:
    good, other = ({**row, "shard_id": "shard-000000-000.tar"} for row in scene_rows([0, 1]))
    other |= label_row(np.zeros((3, 3)))
    both = contact_sheet(packed, [good, other], load_taxonomy("scenes"), "t")
    assert both.size == contact_sheet(packed, [good], load_taxonomy("scenes"), "t").size
    for rows in ([other], [{**good, "shard_id": "gone.tar"}]):
        with pytest.raises(ConfigError, match="none of the labelled images could be read"):
            contact_sheet(packed, rows, load_taxonomy("scenes"), "t")


def test_jobs_preview_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on a table that is made by hand."""
    from jobs.preview import main

    uri = str(tmp_path / "out")
    table = RowTable.open(uri, {}, create=True)
    table.take_over()
    label = {"format": "png", "data": encode_label_map(np.full((48, 64), 5, np.uint8))}
    unit = next(Scenes(SCENES).plan())
    table.commit([put(uri, unit.shard_id, range(4), semantic=label, width=64, height=48)])
    model = {"label": "m", "version": "v1", "taxonomy": load_taxonomy("scenes").describe()}
    run = {"models": [model], "config": {"source": SCENES.model_dump(mode="json")}}
    Path(uri, "run.json").write_text(json.dumps(run))
    picture = tmp_path / "new" / "sheet.png"
    assert main([uri, "--n", "3", "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert capsys.readouterr().out == f"{picture}: 3 images, {image.width}x{image.height} pixels\n"
    for arguments, code, text in (
        ([uri, "--n", "0"], 2, "--n must be 1 or more"),
        ([uri, "--model", "x"], 2, "no model 'x'"),
        ([str(tmp_path / "none")], 4, "does not exist"),
    ):
        assert main(arguments) == code
        assert text in capsys.readouterr().err
