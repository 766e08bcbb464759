"""Cells, rows and tables that the sections of a report have in common: figures, their intervals, shares, counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.charts import Axis, bar, interval_bar, swatch
from pipeline.report.formats import DASH, count, figure_format, is_number, percent
from pipeline.report.skeleton import Cell, Column, Row, Table

__all__ = [
    "Palette",
    "Tree",
    "by_value",
    "class_swatch",
    "count_cell",
    "dim_lead",
    "figure_axis",
    "figure_cells",
    "figure_table",
    "figure_value",
    "interval_of",
    "interval_text",
    "level_text",
    "share_cell",
    "text_cell",
]

Palette = Mapping[int, Sequence[int]]
Tree = Mapping[str, Any]


def figure_value(report: Tree, path: str) -> float | None:
    """The figure at a path of the report, None where it has none."""
    found: Any = report
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if is_number(found) else None


def interval_of(report: Tree, path: str) -> tuple[float | None, float | None]:
    """The ends of a figure's interval, None without one."""
    low, high = (report.get("intervals") or {}).get(path) or (None, None)
    return (float(low), float(high)) if is_number(low) and is_number(high) else (None, None)


def figure_axis(report: Tree, path: str) -> Axis:
    """What a figure's interval is drawn on: all of 0 to 1 for shares, else from 0 to well above it."""
    if figure_format(path).kind == "share":
        return Axis(0, 1, ())
    high = interval_of(report, path)[1] or figure_value(report, path)
    return Axis(0, 1.5 * high if high else 1.0, ())


def interval_text(report: Tree, path: str) -> str:
    """`79.3 to 84.8`, without a unit."""
    low, high = interval_of(report, path)
    shown = figure_format(path)
    return DASH if low is None else f"{shown.show(low)} to {shown.show(high)}"


def level_text(report: Tree) -> str:
    """`95 % interval`."""
    level = (report.get("bootstrap") or {}).get("level", 0.95)
    return f"{100 * float(level):g} % interval"


def text_cell(text: Any, title: str = "") -> Cell:
    return Cell(str(text), str(text), title=title)


def count_cell(value: Any) -> Cell:
    return Cell(count(value), float(value) if is_number(value) else None)


def share_cell(value: Any, *, chart: bool = True, mark: float | None = None, kind: str = "accent") -> Cell:
    """A share in per cent, with its bar."""
    known = float(value) if is_number(value) else None
    drawn = bar(known, mark=mark, kind=kind) if chart else None
    return Cell(percent(known), known, drawn, "" if known is None else f"{known:.8g}")


def figure_cells(report: Tree, path: str) -> tuple[Cell, Cell, Cell]:
    """Value, interval as text, and both drawn."""
    value, (low, high) = figure_value(report, path), interval_of(report, path)
    drawn = interval_bar(value, low, high, figure_axis(report, path), "")
    exact = "" if value is None else f"{value:.10g}"
    return (
        Cell(figure_format(path).show(value, unit=True), value, title=exact),
        Cell(interval_text(report, path), low),
        Cell("", chart=drawn),
    )


def figure_table(report: Tree, paths: Sequence[str]) -> Table:
    rows = tuple(
        Row((text_cell(figure_format(path).name, figure_format(path).help), *figure_cells(report, path)),
            dim=figure_value(report, path) is None)
        for path in paths
    )  # fmt: skip
    columns = (Column("figure", "text"), Column("value"), Column(level_text(report)), Column("0 to 100 %", "plot"))
    return Table("Figures with their intervals", columns, rows, still=True)


def by_value(rows: Sequence[Row], column: int) -> tuple[Row, ...]:
    """The largest first, rows without a value last."""

    def key(row: Row) -> tuple[bool, float]:
        value = row.cells[column].value
        return (True, 0.0) if not isinstance(value, float | int) else (False, -value)

    return tuple(sorted(rows, key=key))


def dim_lead(rows: Sequence[Row]) -> str:
    dim = sum(row.dim for row in rows)
    return f"{dim} of {len(rows)} classes have no evidence: they are shown dim, and are in no mean." if dim else ""


def class_swatch(identifier: str, palette: Palette) -> Markup | None:
    color = palette.get(int(identifier)) if identifier.isdecimal() else None
    return None if color is None else swatch(color)
