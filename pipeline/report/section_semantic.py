"""The page's sections on semantic segmentation: figures, classes, confusions."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.report.cells import (
    Palette,
    Tree,
    by_value,
    class_swatch,
    count_cell,
    dim_lead,
    figure_table,
    share_cell,
    text_cell,
)
from pipeline.report.charts import bar, heat_map
from pipeline.report.formats import count, is_number, percent
from pipeline.report.skeleton import Beside, Block, Cell, Chart, Charts, Column, Row, Section, Table

__all__ = ["semantic_sections"]

MAX_HEAT_CLASSES = 40
CONFUSIONS = 15
MIN_CONFUSION = 0.005
FIGURES = ("mIoU", "mIoU_present", "fwIoU", "pixel_accuracy", "mean_accuracy", "dice")


def semantic_sections(report: Tree, palette: Palette) -> Iterator[Section]:
    """Of `semantic` and, beside it, `boundary`."""
    yield Section("semantic", "Figures", (figure_table(report, _paths(report)),), _lead(report))
    yield from _classes(report, palette)
    if report["semantic"].get("confusion"):
        yield _confusion(report["semantic"]["confusion"])


def _paths(report: Tree) -> list[str]:
    boundary = [f"boundary.{name}" for name in ("mIoU", "mIoU_present")] if report.get("boundary") else []
    return [*(f"semantic.{name}" for name in FIGURES), *boundary]


def _lead(report: Tree) -> str:
    semantic = report["semantic"]
    classes = len(semantic.get("per_class") or {})
    if semantic.get("n") == semantic.get("n_present") == classes:
        return f"mIoU is the mean over all {classes} classes; each of them occurs in the target."
    return (
        f"mIoU is the mean over {count(semantic.get('n'))} of {classes} classes, those that occur in the target or the "
        f"prediction; {count(semantic.get('n_present'))} occur in the target."
    )


def _classes(report: Tree, palette: Palette) -> Iterator[Section]:
    semantic = report["semantic"]
    per_class: Mapping[str, Tree] = semantic.get("per_class") or {}
    boundary: Mapping[str, Tree] = (report.get("boundary") or {}).get("per_class") or {}
    total = sum(row.get("target") or 0 for row in per_class.values())
    rows = []
    for identifier, row in per_class.items():
        right, pred, target = (row.get(name) or 0 for name in ("intersection", "pred", "target"))
        edges = [share_cell((boundary.get(identifier) or {}).get("IoU"), kind="soft")] if boundary else []
        cells = (
            text_cell(row["name"], f"id {identifier}"),
            share_cell(row.get("IoU")),
            *edges,
            share_cell(right / pred if pred else None, chart=False),
            share_cell(row.get("accuracy"), chart=False),
            share_cell(row.get("dice"), chart=False),
            share_cell(target / total if total else None, chart=False),
        )
        rows.append(Row(cells, not is_number(row.get("IoU")), class_swatch(identifier, palette)))
    columns = (
        Column("class", "text"),
        Column("IoU %", "bar", "intersection over union, pixels of all images summed before dividing"),
        *([Column("boundary IoU %", "bar", "IoU of the pixels near the borders of masks")] if boundary else []),
        Column("precision %", title="predicted pixels that are right"),
        Column("recall %", title="target pixels that are right (accuracy)"),
        Column("Dice %"),
        Column("pixels %", title="share of all target pixels"),
    )
    if rows:
        yield Section("semantic-classes", "Classes", (Table("Classes", columns, by_value(rows, 1)),), dim_lead(rows))


def _confusion(confusion: Tree) -> Section:
    names = [str(name) for name in confusion["names"]]
    matrix: list[list[int]] = confusion["matrix"]
    totals = [sum(row) for row in matrix]
    size = len(names)
    shown = list(range(size))
    lead = "Each row is a class of the target; a cell says how much of its pixels were predicted as the class above it."
    if size > MAX_HEAT_CLASSES:
        wrong = [totals[at] + sum(row[at] for row in matrix) - 2 * matrix[at][at] for at in range(size)]
        shown = sorted(sorted(range(size), key=lambda at: -wrong[at])[:MAX_HEAT_CLASSES])
        lead += (
            f" Drawn are the {MAX_HEAT_CLASSES} of {size} classes with the most wrong pixels; all are in report.json."
        )
    columns = [names[at] for at in shown]
    cells = [[matrix[row][at] for at in shown] for row in shown]
    if len(columns) < size:
        columns.append("other classes")
        for row, values in zip(shown, cells, strict=True):
            values.append(totals[row] - sum(values) - matrix[row][size])
    if any(row[size] for row in matrix):
        columns.append("no class")
        for row, values in zip(shown, cells, strict=True):
            values.append(matrix[row][size])
    shares = [
        [value / totals[row] if totals[row] else None for value in values]
        for row, values in zip(shown, cells, strict=True)
    ]
    label = f"Confusion matrix of {len(columns)} classes; the commonest confusions are in the table below"
    drawn = heat_map([names[at] for at in shown], columns, shares, label)
    chart = Chart(
        "Share of each class's target pixels, %", drawn, keys=(("right", "right"), ("seen as another", "accent"))
    )
    block = Beside((Charts((chart,), wide=True), *_confused(names, matrix, totals)))
    return Section("confusion", "Confusion", (block,), lead)


def _confused(names: Sequence[str], matrix: Sequence[Sequence[int]], totals: Sequence[int]) -> Iterator[Block]:
    """The largest confusions in words, where there are any."""
    seen_as = [*names, "no class"]
    found = [
        (value / totals[row], value, f"{name} seen as {seen_as[column]}")
        for row, name in enumerate(names)
        for column, value in enumerate(matrix[row])
        if column != row and totals[row] and value / totals[row] >= MIN_CONFUSION
    ]
    found.sort(key=lambda item: (-item[0], item[2]))
    found = found[:CONFUSIONS]
    rows = tuple(
        Row((text_cell(text), Cell(percent(share), share, bar(share, maximum=found[0][0])), count_cell(value)))
        for share, value, text in found
    )
    if rows:
        columns = (Column("largest confusions", "text"), Column("of the class, %", "bar"), Column("pixels"))
        yield Table("Largest confusions", columns, rows)
