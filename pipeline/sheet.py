"""Pictures in rows under a heading, with captions and a legend: the layout of every sheet that a person looks at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.overlay import Color, Rgb

__all__ = ["BACKGROUND", "lay_out"]

TILE = 320
CAPTION = 20
MAX_CAPTION = 300
GAP = 8
TOP = 58
LEGEND_WIDTH, LEGEND_HEIGHT = 150, 22
BACKGROUND = (24, 26, 30)
TEXT, FAINT = (225, 228, 232), (140, 146, 155)
USUAL_SHAPE = 3 / 4


def lay_out(
    rows: Sequence[tuple[str, Sequence[Rgb]]],
    names: Sequence[str],
    legend: Sequence[tuple[str, Color]],
    title: str,
    *,
    tile: int = TILE,
) -> Image.Image:
    """One row of at most `len(names)` pictures for each caption, as many rows beside each other as a screen has room.

    names: over the columns. legend: names and colours, at the bottom. tile: pixels of a picture's width; pictures of
    other sizes are fitted into it.
    """
    across = 2 if len(names) < 3 else 1
    across = min(across * 2, len(rows)) if len(rows) > 2 else across
    across = max(1, min(across, len(rows)))
    shapes = [pictures[0].shape[0] / pictures[0].shape[1] for _, pictures in rows if pictures]
    tile_height = round(tile * (float(np.median(shapes)) if shapes else USUAL_SHAPE))
    tile_height = max(tile // 3, min(tile_height, tile * 3 // 2))
    cell_width = len(names) * (tile + 2) + GAP
    cell_height = tile_height + CAPTION + GAP
    down = -(-len(rows) // across)
    width = across * cell_width + GAP
    font, small = ImageFont.load_default(18), ImageFont.load_default(12)
    legend_columns = max(1, width // LEGEND_WIDTH)
    legend_rows = -(-len(legend) // legend_columns)
    bottom = TOP + down * cell_height
    sheet = Image.new("RGB", (width, bottom + legend_rows * LEGEND_HEIGHT + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), title, TEXT, font)
    for column in range(across):
        for place, name in enumerate(names):
            draw.text((GAP + column * cell_width + place * (tile + 2), 38), name, FAINT, small)
    for index, (caption, pictures) in enumerate(rows):
        left, upper = GAP + index % across * cell_width, TOP + index // across * cell_height
        for place, picture in enumerate(pictures):
            fitted = _fitted(picture, tile, tile_height)
            offset = ((tile - fitted.width) // 2, (tile_height - fitted.height) // 2)
            sheet.paste(fitted, (left + place * (tile + 2) + offset[0], upper + offset[1]))
        draw.text((left, upper + tile_height + 3), _cut(caption, draw, small, cell_width - 2 * GAP), TEXT, small)
    for index, (name, color) in enumerate(legend):
        left = GAP + index % legend_columns * LEGEND_WIDTH
        upper = bottom + GAP + index // legend_columns * LEGEND_HEIGHT
        draw.rectangle((left, upper, left + 14, upper + 14), tuple(int(channel) for channel in color))
        draw.text((left + 20, upper), name, TEXT, small)
    return sheet


def _fitted(picture: Rgb, width: int, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = min(width / image.width, height / image.height)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _cut(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """The end of a long id tells images apart, so its beginning is cut."""
    cut = "".join(character if character.isprintable() else "?" for character in text[-MAX_CAPTION:])
    cut = "…" + cut if len(text) > MAX_CAPTION else cut
    while cut and draw.textlength(cut, font) > width:
        cut = "…" + cut[2:] if cut.startswith("…") else "…" + cut[1:]
    return cut
