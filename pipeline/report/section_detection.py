"""The page's sections on detection: AP and AR of boxes and masks, curves, scores, classes."""

from collections.abc import Iterator, Sequence

from pipeline.report.cells import (
    Palette,
    Tree,
    by_value,
    class_swatch,
    count_cell,
    figure_value,
    interval_of,
    interval_text,
    level_text,
    share_cell,
    text_cell,
)
from pipeline.report.charts import Axis, Layer, Series, histogram, line_chart, share_axis
from pipeline.report.formats import figure_format, is_number
from pipeline.report.skeleton import Cell, Chart, Charts, Column, Row, Section, Table

__all__ = ["detection_sections"]

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
NAMES = {"segm": "masks", "bbox": "boxes"}


def detection_sections(report: Tree, palette: Palette) -> Iterator[Section]:
    kinds = [kind for kind in NAMES if report["detection"].get(kind)]
    lead = "Means over the classes with targets, as COCO's evaluation has them."
    yield Section("detection", "Average precision", (_figures(report, kinds),), lead)
    curves = [
        _precision_chart(report["detection"][kind], kind) for kind in kinds if report["detection"][kind].get("pr_curve")
    ]
    scores = [
        _score_chart(report["detection"][kind], kind) for kind in kinds if report["detection"][kind].get("scores")
    ]
    blocks = [Charts(tuple(charts)) for charts in (curves, scores) if charts]
    yield Section(
        "curves", "Precision, recall and scores", tuple(blocks), "Means over the classes; all sizes, 100 predictions."
    )
    yield _object_classes(report["detection"], kinds, palette)


def _figures(report: Tree, kinds: Sequence[str]) -> Table:
    """The 12 figures of boxes and masks; intervals where there are any."""
    paths = {kind: [f"detection.{kind}.{name}" for name in FIGURES] for kind in kinds}
    spanned = [kind for kind in kinds if any(interval_of(report, path)[0] is not None for path in paths[kind])]
    columns = [Column("figure", "text")]
    for kind in kinds:
        columns.append(Column(f"{NAMES[kind]} %", "bar"))
        columns += [Column(level_text(report))] if kind in spanned else []
    rows = []
    for at, name in enumerate(FIGURES):
        cells = [text_cell(figure_format(name).name, figure_format(name).help)]
        values = [figure_value(report, paths[kind][at]) for kind in kinds]
        for kind, value in zip(kinds, values, strict=True):
            cells.append(share_cell(value))
            cells += [Cell(interval_text(report, paths[kind][at]))] if kind in spanned else []
        rows.append(Row(tuple(cells), all(value is None for value in values)))
    return Table("Average precision and recall", tuple(columns), tuple(rows), still=True)


def _precision_chart(found: Tree, kind: str) -> Chart:
    curve = found["pr_curve"]
    kinds = (("0.5", "IoU 0.50", "first"), ("0.75", "IoU 0.75", "second"), ("mean", "mean of 0.50 to 0.95", "third"))
    series = [
        Series(name, list(zip(curve["recall"], curve["precision"][key], strict=True)), look)
        for key, name, look in kinds
        if key in curve["precision"]
    ]
    title = f"Precision over recall, {NAMES[kind]}"
    drawn = line_chart(series, share_axis("recall %"), share_axis("precision %"), title)
    return Chart(title, drawn, keys=tuple((line.name, f"line {line.kind}") for line in series))


def _score_chart(found: Tree, kind: str) -> Chart:
    scores = found["scores"]
    layers = [Layer("right", scores["tp"], "tp"), Layer("wrong", scores["fp"], "fp")]
    title = f"Predictions by score, {NAMES[kind]}"
    axis = Axis(0, 1, tuple((tick / 4, f"{tick / 4:g}") for tick in range(5)), "score")
    note = "At IoU 0.50; what lies in crowds is left out."
    return Chart(title, histogram(scores["edges"], layers, axis, title), note, (("right", "tp"), ("wrong", "fp")))


def _object_classes(detection: Tree, kinds: Sequence[str], palette: Palette) -> Section:
    tables = {kind: detection[kind].get("per_class") or {} for kind in kinds}
    first = tables[kinds[0]] if kinds else {}
    rows = []
    for identifier, row in first.items():
        cells = [text_cell(row["name"], f"id {identifier}")]
        for at, kind in enumerate(kinds):
            own = tables[kind].get(identifier) or {}
            cells += [share_cell(own.get("AP"), kind="soft" if at else "accent")]
            cells += [share_cell(own.get(name), chart=False) for name in ("AP50", "AR100")]
        rows.append(
            Row(
                (*cells, count_cell(row.get("targets"))),
                not is_number(row.get("AP")),
                class_swatch(identifier, palette),
            )
        )
    columns = [Column("class", "text")]
    for kind in kinds:
        name = NAMES[kind]
        columns += [Column(f"AP {name} %", "bar"), Column(f"AP50 {name}"), Column(f"AR {name}", title="100 per image")]
    columns.append(Column("targets"))
    table = Table("Classes", tuple(columns), by_value(rows, 1))
    return Section("detection-classes", "Classes", (table,) if rows else (), "Classes with targets; others have no AP.")
