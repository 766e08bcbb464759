"""What a run has come to, epoch by epoch: as JSON lines, as Parquet, and as a picture of its curves."""

import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from pipeline.axes import nice_axis

__all__ = ["RUN_COLUMNS", "Row", "best_epoch", "curve_png", "json_lines", "parquet"]

# One epoch, in plain numbers:
#   epoch          counted from 1
#   step           optimiser steps of the whole run up to its end
#   loss           mean over its steps
#   learning_rate  of its last step, as the schedule gave it (before factors of single parameters)
#   images         that were learned from in it; failed: that could not be
#   seconds        for its steps and what stood between them (checkpoints), without its validation; of what was done
#                  after the last start where it was cut
#   images_per_s   images of those seconds over them
#   ended_at       when its steps and validation were done, seconds since 1970
# and, absent where it was not validated, the validation's figures by name (`mIoU`, `IoU/road`, `AbsRel`, `segm/AP`;
# None where a figure has no evidence), `validation_images` that were scored, `validation_failed` that could not be.
Row = Mapping[str, float | int | None]
RUN_COLUMNS = ("epoch", "step", "loss", "learning_rate", "images", "failed", "seconds", "images_per_s", "ended_at")

WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 48, 52
FINER = 2  # drawn larger and reduced, since Pillow draws no smooth lines
Y_TICKS, X_TICKS = 6, 8
HEADROOM = 0.06  # of the values' range, above and below
INK, FAINT, GRID, LINE, BEST = (40, 40, 40), (110, 110, 110), (224, 224, 224), (0, 104, 181), (213, 94, 0)


def json_lines(rows: Sequence[Row]) -> bytes:
    """One object per epoch."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Sequence[Row]) -> bytes:
    """One row per epoch; a column for every figure that any epoch has, null where it has it not."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    table = pa.table({name: column.cast(pa.float64()) if pa.types.is_null(column.type) else column
                      for name, column in columns.items()})  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def best_epoch(rows: Sequence[Row], name: str, lower_is_better: bool) -> int | None:
    """The epoch with the best of a figure, of equal ones the first; None where no epoch has it."""
    sign = 1.0 if lower_is_better else -1.0
    return min(((sign * value, epoch) for epoch, value in _points(rows, name)), default=(0.0, None))[1]


def curve_png(rows: Sequence[Row], names: Sequence[str], *, best: int | None = None) -> bytes:
    """One panel for each of `names`, over the same epochs, side by side; a figure that no epoch has is left out.

    best: the epoch that is marked in each panel that has it.
    """
    shown = {name: points for name in names if (points := _points(rows, name))}
    size = WIDTH * max(1, len(shown)) * FINER, HEIGHT * FINER
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    epochs = [epoch for points in shown.values() for epoch, _ in points]
    for at, (name, points) in enumerate(shown.items()):
        _panel(draw, at * WIDTH, name, points, (min(epochs), max(epochs)), best)
    buffer = io.BytesIO()
    image.reduce(FINER).save(buffer, "PNG")
    return buffer.getvalue()


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(epoch, value) where there is one."""
    return [(int(row["epoch"] or 0), value) for row in rows if (value := row.get(name)) is not None]


def _panel(
    draw: ImageDraw.ImageDraw,
    left: int,
    name: str,
    points: Sequence[tuple[int, float]],
    epochs: tuple[int, int],
    best: int | None,
) -> None:
    font, small = ImageFont.load_default(15 * FINER), ImageFont.load_default(12 * FINER)
    low, high = min(value for _, value in points), max(value for _, value in points)
    room = HEADROOM * (high - low) or 0.1 * abs(high) or 1.0
    up = nice_axis(low - room, high + room, ticks=Y_TICKS)
    # A single epoch stands in the middle.
    first, last = epochs if epochs[0] < epochs[1] else (epochs[0] - 0.5, epochs[1] + 0.5)
    across = nice_axis(first, last, ticks=X_TICKS, whole=True)
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def place(epoch: float, value: float) -> tuple[float, float]:
        return (x0 + (x1 - x0) * across.place(epoch)) * FINER, (y0 + (y1 - y0) * up.place(value)) * FINER

    for value, text in up.ticks:
        _, y = place(epochs[0], value)
        draw.line((x0 * FINER, y, x1 * FINER, y), GRID, FINER)
        draw.text(((x0 - 8) * FINER, y), text, INK, small, "rm")
    draw.line((x0 * FINER, y0 * FINER, x1 * FINER, y0 * FINER), FAINT, FINER)
    for epoch, text in across.ticks:
        x, _ = place(epoch, low)
        draw.line((x, y0 * FINER, x, (y0 + 4) * FINER), FAINT, FINER)
        draw.text((x, (y0 + 13) * FINER), text, INK, small, "mm")
    draw.text(((x0 + x1) / 2 * FINER, (y0 + 34) * FINER), "epoch", FAINT, small, "mm")
    draw.line([place(*point) for point in points], LINE, 2 * FINER, "curve")
    for point in points:
        _dot(draw, place(*point), 2.5 if len(points) <= 50 else 1, LINE)
    said = f"   last {points[-1][1]:.4g}"
    head_y, head_x = TOP / 2 * FINER, x1 * FINER
    draw.text((x0 * FINER, head_y), name, INK, font, "lm")
    draw.text((head_x, head_y), said, FAINT, small, "rm")
    for epoch, value in points:
        if epoch == best:
            x, y = place(epoch, value)
            draw.line((x, y0 * FINER, x, y), BEST, FINER)
            _dot(draw, (x, y), 4.5, BEST)
            text = f"best epoch {epoch}: {value:.4g}"
            draw.text((head_x - draw.textlength(said, small), head_y), text, BEST, small, "rm")


def _dot(draw: ImageDraw.ImageDraw, place: tuple[float, float], radius: float, color: tuple[int, int, int]) -> None:
    x, y = place
    reach = radius * FINER
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), color)
