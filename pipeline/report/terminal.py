"""A report as tables for the terminal: figures with their intervals, classes, slices, counts and problems."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.report.formats import DASH, count, figure_format, percent

__all__ = ["CLASS_FIGURES", "FIGURES", "plain_table", "report_tables"]

Tree = Mapping[str, Any]

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
DEPTH = ("AbsRel", "SqRel", "SqRel_squared", "RMSE", "RMSElog", "log10", "SILog", "delta1", "delta2", "delta3")
GROUPS = [f"{group}.{name}" for group in ("All", "Things", "Stuff") for name in ("PQ", "SQ", "RQ")]
FIGURES = (
    *(f"semantic.{name}" for name in ("mIoU", "mIoU_present", "fwIoU", "pixel_accuracy", "mean_accuracy", "dice")),
    "boundary.mIoU",
    *(f"{section}.{name}" for section in ("panoptic", "boundary_panoptic") for name in GROUPS),
    *(f"detection.{kind}.{name}" for kind in ("bbox", "segm") for name in AP),
    *(f"depth.{name}" for name in DEPTH),
)
# Columns of the table of classes, all of them shares.
CLASS_FIGURES = (
    "semantic.IoU",
    "semantic.accuracy",
    "boundary.IoU",
    "panoptic.PQ",
    "panoptic.SQ",
    "panoptic.RQ",
    "boundary_panoptic.PQ",
    "detection.bbox.AP",
    "detection.bbox.AP50",
    "detection.segm.AP",
    "detection.segm.AP50",
)
SLICE_FIGURES = (
    "semantic.mIoU",
    "semantic.pixel_accuracy",
    "boundary.mIoU",
    "panoptic.All.PQ",
    "boundary_panoptic.All.PQ",
    "detection.bbox.AP",
    "detection.segm.AP",
    "depth.AbsRel",
    "depth.RMSE",
    "depth.delta1",
)
MAX_ROWS = 40


def report_tables(report: Tree) -> Iterator[Table]:
    """Tables of a report (`write_report`), those for which it has something."""
    yield _counts(report["counts"])
    figures = [path for path in FIGURES if _value(report, path) is not None]
    if figures:
        yield _figures(report, figures)
    classes = [path for path in CLASS_FIGURES if _class_rows(report, path)]
    if classes:
        yield _classes(report, classes)
    found = report.get("slices") or []
    for slices in [found] if isinstance(found, Mapping) else found:
        yield _slices(slices)
    if report["problems"]:
        yield _problems(report["problems"])


def _counts(counts: Tree) -> Table:
    table = plain_table(*counts, left=0)
    table.add_row(*(count(value) for value in counts.values()))
    return table


def _figures(report: Tree, paths: Sequence[str]) -> Table:
    level = report["bootstrap"]["level"]
    table = plain_table("figure", "value", f"{percent(level, 0)} % interval")
    for path in paths:
        shown = figure_format(path)
        low, high = report["intervals"].get(path) or (None, None)
        span = DASH if low is None else f"{shown.show(low)} to {shown.show(high)}"
        table.add_row(shown.name, shown.show(_value(report, path), unit=True), span)
    return table


def _classes(report: Tree, paths: Sequence[str]) -> Table:
    names: dict[str, str] = {}
    for path in paths:
        names |= {identifier: row["name"] for identifier, row in _class_rows(report, path).items()}
    table = plain_table("class", *(figure_format(path).name for path in paths))
    for identifier in sorted(names, key=int)[:MAX_ROWS]:
        values = (_class_rows(report, path).get(identifier, {}).get(path.rpartition(".")[2]) for path in paths)
        table.add_row(Text(names[identifier]), *map(percent, values))
    return _cut(table, len(names), "classes")


def _slices(slices: Tree) -> Table:
    values = slices["values"]
    paths = [path for path in SLICE_FIGURES if any(_value(entry, path) is not None for entry in values)]
    table = plain_table(slices["by"], "ok", "images", *(figure_format(path).name for path in paths))
    for entry in values[:MAX_ROWS]:
        cells = (figure_format(path).show(_value(entry, path)) for path in paths)
        table.add_row(Text(entry["value"]), count(entry["counts"]["ok"]), count(entry["counts"]["images"]), *cells)
    return _cut(table, len(values), "values")


def _problems(problems: Sequence[Tree]) -> Table:
    table = plain_table("rows", "outcome", "stage", "kind", "for example", left=5)
    table.columns[0].justify = "right"
    for problem in problems:
        first = problem["examples"][0]
        example = Text(f"{first['image_id']}: {first['message']}")
        table.add_row(count(problem["count"]), problem["outcome"], problem["stage"], Text(problem["type"]), example)
    return table


def plain_table(*columns: str, left: int = 1) -> Table:
    """left: how many columns are text."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if place < left else "right", overflow="fold")
    return table


def _cut(table: Table, rows: int, what: str) -> Table:
    if rows > MAX_ROWS:
        table.caption = f"{rows - MAX_ROWS} further {what} in report.json"
        table.caption_justify = "left"
    return table


def _value(tree: Tree, path: str) -> Any:
    found: Any = tree
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _class_rows(report: Tree, path: str) -> Tree:
    section = _value(report, path.rpartition(".")[0])
    return section.get("per_class", {}) if isinstance(section, Mapping) else {}
