"""The page's section on depth: errors, how far off pixels are, and how many are near enough."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.report.cells import Tree, figure_cells, level_text, text_cell
from pipeline.report.charts import Axis, Layer, Series, histogram, line_chart, share_axis
from pipeline.report.formats import count, figure_format, is_number, percent
from pipeline.report.skeleton import Block, Cell, Chart, Charts, Column, Row, Section, Table

__all__ = ["depth_section"]

FIGURES = ("AbsRel", "SqRel", "SqRel_squared", "RMSE", "RMSElog", "log10", "SILog", "delta1", "delta2", "delta3")
DELTA_MARKS = ((1.25, "1.25"), (1.25**2, "1.25²"), (1.25**3, "1.25³"))
RATIO_TICKS = ((0.33, "×0.33"), (0.5, "×0.5"), (0.8, "×0.8"), (1.0, "×1"), (1.25, "×1.25"), (2.0, "×2"), (3.0, "×3"))


def depth_section(report: Tree) -> Section:
    depth = report["depth"]
    pixels = depth.get("per_pixel") or {}
    rows = []
    for name in FIGURES:
        shown, path = figure_format(name), f"depth.{name}"
        value, span, _ = figure_cells(report, path)
        over = Cell(shown.show(pixels.get(name)), pixels.get(name))
        rows.append(
            Row((text_cell(shown.name, shown.help), value, span, over, Cell("lower" if shown.lower else "higher")))
        )
    columns = (
        Column("figure", "text"),
        Column("mean over images", title="each image counts the same, as official scripts do"),
        Column(level_text(report)),
        Column("over all pixels", title="each pixel counts the same"),
        Column("better is", "text"),
    )
    blocks: list[Block] = [Table("Depth errors", columns, tuple(rows), still=True)]
    charts = []
    if depth.get("histogram"):
        charts.append(_ratio_chart(depth["histogram"]))
    if depth.get("delta_curve"):
        charts.append(_delta_chart(depth["delta_curve"]))
    blocks += [Charts(tuple(charts))] if charts else []
    without = depth.get("pixels_without_prediction") or 0
    lead = f"{count(depth.get('pixels'))} pixels of {count(depth.get('images'))} images are scored."
    lead += f" {count(without)} of them have no prediction and count as the nearest depth." if without else ""
    empty = depth.get("images_without_evidence") or 0
    lead += f" {count(empty)} images have no pixel with a known depth." if empty else ""
    return Section("depth", "Depth errors", tuple(blocks), lead)


def _ratio_chart(found: Tree) -> Chart:
    edges = [math.exp(edge) for edge in found["edges"]]
    ticks = tuple(tick for tick in RATIO_TICKS if edges[0] <= tick[0] <= edges[-1])
    title = "Predicted depth as a multiple of the target's"
    drawn = histogram(
        edges,
        [Layer("pixels", found["counts"])],
        Axis(edges[0], edges[-1], ticks, "prediction / target", log=True),
        title,
        beyond=(found.get("below"), found.get("above")),
        mark=1.0,
    )
    return Chart(title, drawn, "Left of ×1 the prediction is too near, right of it too far.")


def _delta_chart(curve: Tree) -> Chart:
    thresholds = [value for value in curve["threshold"] if is_number(value)]
    points = list(zip(curve["threshold"], curve["share"], strict=True))
    ticks = tuple((value, f"{value:g}") for value in (1, 1.5, 2, 2.5, 3) if value <= max(thresholds, default=1))
    title = "Pixels within a factor of the target"
    x = Axis(1, max(thresholds, default=2), ticks, "factor")
    y = share_axis("pixels %")
    marks = [mark for mark in DELTA_MARKS if mark[0] <= x.high]
    drawn = line_chart([Series("share of pixels", points)], x, y, title, marks)
    at = [f"{name}: {percent(_share_at(points, value))} %" for value, name in marks]
    return Chart(title, drawn, "Below a factor of " + ", ".join(at) + "." if at else "")


def _share_at(points: Sequence[tuple[Any, Any]], wanted: float) -> float | None:
    """The value at the point nearest to `wanted`."""
    known = [(abs(x - wanted), y) for x, y in points if is_number(x) and is_number(y)]
    return min(known)[1] if known else None
