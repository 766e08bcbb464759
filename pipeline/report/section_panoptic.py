"""The page's sections on panoptic segmentation: PQ = SQ × RQ of groups and classes, and the segments behind it."""

from collections.abc import Iterator, Mapping

from pipeline.report.cells import (
    Palette,
    Tree,
    by_value,
    class_swatch,
    count_cell,
    figure_cells,
    figure_value,
    interval_text,
    level_text,
    share_cell,
    text_cell,
)
from pipeline.report.charts import Point, quality_map, stack
from pipeline.report.formats import figure_format, is_number, percent
from pipeline.report.skeleton import Beside, Block, Cell, Chart, Charts, Column, Prose, Row, Section, Table

__all__ = ["panoptic_sections"]

HITS = (("right", "tp"), ("wrong", "fp"), ("missed", "fn"))


def panoptic_sections(report: Tree, palette: Palette) -> Iterator[Section]:
    panoptic, boundary = report["panoptic"], report.get("boundary_panoptic") or {}
    groups = [name for name in ("All", "Things", "Stuff") if panoptic.get(name)]
    rows = [_group_row(report, name, bool(boundary)) for name in groups]
    columns = (
        Column("categories", "text"),
        Column("PQ %"),
        Column(level_text(report)),
        Column("0 to 100 %", "plot"),
        Column("SQ %", title=figure_format("SQ").help),
        Column("RQ %", title=figure_format("RQ").help),
        *([Column("boundary PQ %", title="matched by the smaller of mask IoU and boundary IoU")] if boundary else []),
        *([Column(level_text(report))] if boundary else []),
        Column("n", title="categories with evidence, over which the means are taken"),
    )
    lead = "PQ = SQ × RQ: how well matched segments fit, times how many are matched; means over n categories."
    blocks: list[Block] = [Table("Panoptic quality", columns, tuple(rows), still=True)]
    per_class: Mapping[str, Tree] = panoptic.get("per_class") or {}
    points = [
        Point(str(row["name"]), row.get("RQ"), row.get("SQ"),
              f"{row['name']}: PQ {percent(row.get('PQ'))}, SQ {percent(row.get('SQ'))}, RQ {percent(row.get('RQ'))}",
              "thing" if row.get("kind") == "thing" else "stuff")
        for row in per_class.values()
        if is_number(row.get("PQ"))
    ]  # fmt: skip
    if points:
        chart = Chart(
            "Where quality is lost, by class",
            quality_map(points, "SQ over RQ of each class; the values are in the table below"),
            "Left: segments are missed or made up. Low: they are found, but fit badly. Lines: equal PQ.",
            (("thing", "thing"), ("stuff", "stuff")),
        )
        blocks.append(Beside((Charts((chart,)), _hit_table(per_class))))
    yield Section("panoptic", "Panoptic quality", tuple(blocks), lead)
    tables: list[Block] = []
    edges: Mapping[str, Tree] = boundary.get("per_class") or {}
    for kind, heading in (("thing", "Things"), ("stuff", "Stuff")):
        own = [
            _segment_row(identifier, row, edges, palette)
            for identifier, row in per_class.items()
            if row.get("kind") == kind
        ]
        if own:
            tables += [Prose("", heading), Table(heading, _segment_columns(bool(edges)), by_value(own, 1))]
    yield Section(
        "panoptic-classes", "Classes", tuple(tables), "Bars of segments: right (TP), wrong (FP) and missed (FN)."
    )


def _group_row(report: Tree, group: str, boundary: bool) -> Row:
    value, span, drawn = figure_cells(report, f"panoptic.{group}.PQ")
    found = report["panoptic"][group]
    path = f"boundary_panoptic.{group}.PQ"
    edges = [share_cell(figure_value(report, path), chart=False), Cell(interval_text(report, path))] if boundary else []
    cells = (
        text_cell(group),
        Cell(percent(found.get("PQ")), value.value, title=value.title),
        span,
        drawn,
        *(share_cell(found.get(name), chart=False) for name in ("SQ", "RQ")),
        *edges,
        count_cell(found.get("n")),
    )
    return Row(cells, not is_number(found.get("PQ")))


def _hit_table(per_class: Mapping[str, Tree]) -> Table:
    """Segments that are right, wrong and missed, by kind."""
    rows = []
    for name, kinds in (("All", ("thing", "stuff")), ("Things", ("thing",)), ("Stuff", ("stuff",))):
        own = [row for row in per_class.values() if row.get("kind") in kinds]
        hits = [(what, float(sum(row.get(key) or 0 for row in own)), key) for what, key in HITS]
        drawn = stack(hits, "") if any(value for _, value, _ in hits) else None
        rows.append(Row((text_cell(name), *(count_cell(value) for _, value, _ in hits), Cell("", chart=drawn))))
    columns = (
        Column("segments", "text"),
        *(Column(f"{what} ({key.upper()})") for what, key in HITS),
        Column("", "plot"),
    )
    return Table("Segments that are right, wrong and missed", columns, tuple(rows), still=True)


def _segment_columns(boundary: bool) -> tuple[Column, ...]:
    return (
        Column("class", "text"),
        Column("PQ %", "bar"),
        *([Column("boundary PQ %", "bar")] if boundary else []),
        Column("SQ %"),
        Column("RQ %"),
        Column("TP", title="matched segments"),
        Column("FP", title="predicted segments without a match"),
        Column("FN", title="target segments without a match"),
        Column("segments", "plot"),
    )


def _segment_row(identifier: str, row: Tree, edges: Mapping[str, Tree], palette: Palette) -> Row:
    hits = [(name, float(row.get(key) or 0), key) for name, key in HITS]
    cells = (
        text_cell(row["name"], f"id {identifier}"),
        share_cell(row.get("PQ")),
        *([share_cell((edges.get(identifier) or {}).get("PQ"), kind="soft")] if edges else []),
        share_cell(row.get("SQ"), chart=False),
        share_cell(row.get("RQ"), chart=False),
        *(count_cell(row.get(key)) for key in ("tp", "fp", "fn")),
        Cell("", sum(value for _, value, _ in hits), stack(hits, "") if any(value for _, value, _ in hits) else None),
    )
    return Row(cells, not is_number(row.get("PQ")), class_swatch(identifier, palette))
