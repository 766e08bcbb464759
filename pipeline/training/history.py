"""What a run has come to, epoch by epoch: as JSON lines, as Parquet, and as a picture of its curves."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Row", "curve_png", "json_lines", "parquet"]

# `epoch` (counted from 1), `step`, `loss`, `learning_rate`, `images`, `failed`, `seconds`, `images_per_s`, and the
# validation's figures: None where a figure has no evidence, absent where the epoch was not validated.
Row = Mapping[str, float | int | None]

WIDTH, HEIGHT, MARGIN = 480, 320, 56
TICKS = 5
INK, GRID, LINE = (40, 40, 40), (220, 220, 220), (0, 104, 181)


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


def curve_png(rows: Sequence[Row], names: Sequence[str]) -> bytes:
    """One panel for each of `names`, over epochs, side by side; a figure that no epoch has is left out."""
    curves = {name: [(row["epoch"], row[name]) for row in rows if row.get(name) is not None] for name in names}
    shown: dict[str, Any] = {name: points for name, points in curves.items() if points}
    image = Image.new("RGB", (WIDTH * max(1, len(shown)), HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for at, (name, points) in enumerate(shown.items()):
        _panel(draw, at * WIDTH, name, points)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _panel(draw: ImageDraw.ImageDraw, left: int, name: str, points: Sequence[tuple[float, float]]) -> None:
    font = ImageFont.load_default(13)
    low, high = min(value for _, value in points), max(value for _, value in points)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    x0, y0, x1, y1 = left + MARGIN, MARGIN, left + WIDTH - MARGIN // 2, HEIGHT - MARGIN

    def place(epoch: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * (epoch - first) / (last - first), y1 - (y1 - y0) * (value - low) / (high - low)

    draw.text(((x0 + x1) / 2, MARGIN / 2), f"{name} (last {points[-1][1]:.4g})", INK, font, "mm")
    for tick in range(TICKS):
        value = low + (high - low) * tick / (TICKS - 1)
        _, y = place(first, value)
        draw.line((x0, y, x1, y), GRID)
        draw.text((x0 - 6, y), f"{value:.3g}", INK, font, "rm")
    for epoch in (first, last):
        draw.text((place(epoch, low)[0], y1 + 14), f"{epoch:g}", INK, font, "mm")
    draw.text(((x0 + x1) / 2, y1 + 30), "epoch", INK, font, "mm")
    draw.line([place(*point) for point in points], LINE, 2)
    for point in points:
        x, y = place(*point)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), LINE)
