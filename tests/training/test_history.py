"""The history as files, and the places and colours of its curves."""

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from training_helpers import config, run_loop

from pipeline.training.history import BEST, LINE, RUN_COLUMNS, Row, best_epoch, curve_png, json_lines, parquet


def history(*figures: float | None, name: str = "mIoU") -> list[Row]:
    return [{"epoch": epoch, "loss": 1 / epoch, name: value} for epoch, value in enumerate(figures, 1)]


@pytest.mark.parametrize(
    ("figures", "lower", "expected"),
    [
        ((0.1, 0.4, 0.3), False, 2),
        ((0.4, 0.1, 0.3), True, 2),
        ((0.4, 0.1, 0.4), False, 1),
        ((None, 0.0, None), False, 2),
        ((None, None), False, None),
        ((), True, None),
    ],
)
def test_the_best_epoch(figures: Any, lower: bool, expected: int | None) -> None:
    assert best_epoch(history(*figures), "mIoU", lower) == expected


def test_files_hold_every_figure_of_any_epoch() -> None:
    rows: list[Row] = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5, "mIoU": 0.25, "IoU/car": None}]
    assert [json.loads(line) for line in json_lines(rows).decode().splitlines()] == rows
    table = pq.read_table(pa.BufferReader(parquet(rows)))
    assert table.to_pydict() == {"epoch": [1, 2], "loss": [2.0, 1.5], "mIoU": [None, 0.25], "IoU/car": [None, None]}
    assert table.schema.field("IoU/car").type == pa.float64()


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_curves_by_hand() -> None:
    """Epochs 1 to 3 lie on columns 60, 260, 460; values from -0.06 to 1.06 on rows 268 to 48."""
    drawn = pixels(curve_png(history(0.0, 1.0, 0.5), ("mIoU",), best=2))
    assert drawn.shape == (320, 480, 3)

    def row_of(value: float) -> int:
        return round(268 - 220 * (value + 0.06) / 1.12)

    assert drawn[row_of(1), 260].tolist() == [*BEST]
    assert drawn[row_of(0.3), 260].tolist()[0] > 200  # the thin line down to the epoch
    assert drawn[row_of(0.3), 260].tolist()[2] < 160
    for column, value in ((60, 0.0), (160, 0.5), (360, 0.75), (459, 0.5)):
        assert np.abs(drawn[row_of(value), column] - LINE).max() < 80, column
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):  # round ticks
        assert (drawn[row_of(value) - 1 : row_of(value) + 2, 430] < 250).any()
    blank = drawn[row_of(0.1), 300:440]
    assert (blank == 255).all()
    assert not (pixels(curve_png(history(0.0, 1.0, 0.5), ("mIoU",))) == BEST).all(axis=2).any()


def test_a_panel_for_each_figure_that_there_is() -> None:
    rows = history(None, None)
    assert pixels(curve_png(rows, ("loss", "mIoU"), best=None)).shape == (320, 480, 3)
    assert pixels(curve_png(history(0.1, 0.2), ("loss", "mIoU"), best=2)).shape == (320, 960, 3)
    assert pixels(curve_png([], ("loss",))).shape == (320, 480, 3)


def test_epochs_are_those_of_all_panels() -> None:
    """A figure of the second and fourth epoch alone stands below the loss of the same epochs."""
    drawn = pixels(curve_png(history(None, 0.5, None, 0.7), ("loss", "mIoU"), best=4))
    columns = np.flatnonzero((drawn[60:260] == BEST).all(axis=2).any(axis=0))
    first, second = columns[columns < 480], columns[columns >= 480]
    assert first.mean() == pytest.approx(460, abs=1)
    assert second.mean() == pytest.approx(940, abs=1)


@pytest.mark.parametrize(
    "figures",
    [(0.5,), (0.0,), (0.3, 0.3), (1e-9, 2e-9), (1e9, 1.5), (-5.0, 5.0), tuple(math.sin(n) for n in range(400))],
)
def test_any_run_has_curves(figures: tuple[float, ...]) -> None:
    rows = history(*figures)
    drawn = pixels(curve_png(rows, ("mIoU",), best=best_epoch(rows, "mIoU", False)))
    assert (drawn == BEST).all(axis=2).sum() > 20


def test_a_row_has_what_is_documented(tmp_path: Path) -> None:
    before = time.time()
    loop, _ = run_loop(config(tmp_path, epochs=1, validation=None))
    (row,) = loop.record.history
    assert set(row) == set(RUN_COLUMNS)
    assert before < row["ended_at"] < time.time()  # type: ignore[operator]
