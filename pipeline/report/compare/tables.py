"""The sections of a page of differences: every figure as a forest plot, single images, classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from pipeline.report.cells import Palette, Tree, class_swatch, count_cell, level_text, text_cell
from pipeline.report.charts import Layer, histogram, nice_axis, stack
from pipeline.report.compare.cells import CHANGES, DIFFERENCE, signed, signed_interval
from pipeline.report.compare.charts import difference_bar, diverging_bar
from pipeline.report.formats import FigureFormat, figure_format, is_number, percent
from pipeline.report.skeleton import Block, Cell, Chart, Charts, Column, Details, Row, Section, Table

__all__ = ["change_kind", "class_section", "draw_difference", "figure_section", "image_section", "reach_of"]

# One figure of classes for each section.
CLASS_PATHS = (
    "semantic.IoU",
    "panoptic.PQ",
    "detection.segm.AP",
    "detection.bbox.AP",
    "boundary.IoU",
    "boundary_panoptic.PQ",
)


def _bounds(entry: Tree) -> tuple[float | None, float | None]:
    low, high = entry.get("interval") or (None, None)
    return low, high


def reach_of(entries: Sequence[Tree]) -> float:
    """How far from 0 the differences and their intervals go."""
    values = [
        abs(value) for entry in entries for value in (entry.get("difference"), *_bounds(entry)) if is_number(value)
    ]
    return 1.05 * max(values, default=0.0) or 1.0


def draw_difference(entry: Tree, reach: float, label: str = "") -> Markup:
    """An entry of `figures` around 0."""
    return difference_bar(entry.get("difference"), *_bounds(entry), reach, change_kind(entry), label)


def change_kind(entry: Tree) -> str:
    """The class of the colour of what an entry says."""
    return CHANGES[entry.get("change")][2]


def figure_section(comparison: Tree) -> Section:
    """A forest plot: shares on one scale, errors each on its own."""
    figures: Mapping[str, Tree] = comparison["figures"]
    shares = [figure for path, figure in figures.items() if figure_format(path).kind == "share"]
    reach = reach_of(shares)
    rows = []
    for path, figure in figures.items():
        shown = figure_format(path)
        arrow, word, _ = CHANGES[figure["change"]]
        drawn = draw_difference(figure, reach if shown.kind == "share" else reach_of([figure]))
        rows.append(
            Row(
                (
                    text_cell(shown.name, shown.help),
                    *(
                        Cell(shown.show(figure[side]), figure[side], title=f"{figure[side]:.10g}")
                        for side in ("a", "b")
                    ),
                    _difference_cell(shown, figure),
                    Cell(signed_interval(shown, figure["interval"]), _bounds(figure)[0]),
                    Cell("", chart=drawn),
                    Cell(f"{arrow} {word}".strip(), word),
                )
            )
        )
    scale = f"±{100 * reach:.2g} points" if shares else "each on its own scale"
    columns = (
        Column("figure", "text"),
        Column("A"),
        Column("B"),
        Column(DIFFERENCE),
        Column(level_text(comparison)),
        Column(scale, "plot"),
        Column("B is", "word"),
    )
    clear = sum(bool(figure["excludes_zero"]) for figure in figures.values())
    lead = (
        f"The interval leaves 0 out for {clear} of {len(figures)} figures; these are coloured. Shares are in per cent, "
        "their differences in percentage points."
    )
    if len(shares) < len(figures):
        lead += " Errors, where less is better, are drawn each on its own scale."
    return Section("figures", "Figures", (Table("Figures of A and B", columns, tuple(rows)),), lead)


def _difference_cell(shown: FigureFormat, entry: Tree) -> Cell:
    value = entry["difference"]
    return Cell(signed(shown, value), value, title=f"{value:.10g}" if is_number(value) else "")


def image_section(comparison: Tree) -> Iterator[Section]:
    rows, charts = [], []
    for path, figure in comparison["images"].items():
        shown = figure_format(path)
        parts = [(name, float(figure[key]), kind) for key, name, kind in (
            ("better", "better", "tp"), ("equal", "equal", "track"), ("worse", "worse", "fp"))]  # fmt: skip
        rows.append(
            Row(
                (
                    text_cell(shown.name, shown.help),
                    Cell(
                        "", chart=stack(parts, f"{shown.name}: " + ", ".join(f"{n:.0f} {name}" for name, n, _ in parts))
                    ),
                    *(count_cell(figure[name]) for name in ("better", "worse", "equal")),
                    Cell(signed(shown, figure["mean_change"], unit=True), figure["mean_change"]),
                    Cell(signed(shown, figure["median_change"], unit=True), figure["median_change"]),
                )
            )
        )
        if figure["histogram"]:
            charts.append(_change_chart(shown, figure["histogram"]))
    columns = (
        Column("figure of one image", "text"),
        Column("better, equal, worse", "plot"),
        *(Column(name) for name in ("better", "worse", "equal", "mean change", "median change")),
    )
    if rows:
        blocks: list[Block] = [Table("Images that got better or worse", columns, tuple(rows), still=True)]
        blocks += [Charts(tuple(charts))] if charts else []
        lead = "Each image scored alone in both runs."
        if charts:
            lead += " The charts leave out images that did not change; those beyond their ends are gray."
        yield Section("images", "Images", tuple(blocks), lead)


def _change_chart(shown: FigureFormat, found: Tree) -> Chart:
    scale = 100 if shown.kind == "share" else 1
    edges = [scale * edge for edge in found["edges"]]
    unit = "points" if shown.kind == "share" else shown.unit
    middle = len(found["counts"]) // 2
    falls, rises = ([*found["counts"][:middle], *[0] * middle], [*[0] * middle, *found["counts"][middle:]])
    layers = [
        Layer("images better", falls if shown.lower else rises, "tp"),
        Layer("images worse", rises if shown.lower else falls, "fp"),
    ]
    title = f"Change of {shown.name}"
    axis = nice_axis(edges[0], edges[-1], f"{DIFFERENCE} ({unit})" if unit else DIFFERENCE, ticks=8)
    drawn = histogram(edges, layers, axis, title, beyond=(found["below"], found["above"]), mark=0.0)
    return Chart(title, drawn, keys=(("better", "tp"), ("worse", "fp")))


def class_section(comparison: Tree, palette: Palette) -> Iterator[Section]:
    tables = [
        (path, _class_table(comparison, path, comparison["per_class"][path], palette))
        for path in CLASS_PATHS
        if path in comparison["per_class"]
    ]
    if not tables:
        return
    first, table = tables[0]
    entries = list(comparison["per_class"][first].values())
    tested = [entry for entry in entries if entry["excludes_zero"] is not None]
    moved = [sum(entry["change"] == word for entry in tested) for word in ("better", "worse")]
    lead = f"{figure_format(first).name} by class, those that changed most first."
    if tested:
        chance = percent(1 - comparison["bootstrap"]["level"], 0)
        lead += (
            f" By their intervals {moved[0]} of {len(tested)} classes got better and {moved[1]} worse. Without any "
            f"real change about {chance} % of them would seem to have changed."
        )
    further = [Details(f"{figure_format(path).name} by class", (other,)) for path, other in tables[1:]]
    yield Section("classes", "Classes", (table, *further), lead)


def _class_format(path: str) -> FigureFormat:
    """All figures of classes are shares."""
    return replace(figure_format(path), kind="share", unit="%")


def _class_table(comparison: Tree, path: str, classes: Mapping[str, Tree], palette: Palette) -> Table:
    shown = _class_format(path)
    reach = reach_of(list(classes.values()))
    with_intervals = any(entry["interval"] for entry in classes.values())
    order = sorted(
        classes.items(),
        key=lambda item: (-abs(item[1]["difference"]) if is_number(item[1]["difference"]) else 1.0, int(item[0])),
    )
    rows = []
    for identifier, entry in order:
        bounds = _bounds(entry)
        cells = (
            text_cell(entry["name"], f"id {identifier}"),
            *(Cell(shown.show(entry[side]), entry[side]) for side in ("a", "b")),
            _difference_cell(shown, entry),
            Cell("", entry["difference"], diverging_bar(entry["difference"], *bounds, reach, change_kind(entry))),
            *([Cell(signed_interval(shown, entry["interval"]), bounds[0])] if with_intervals else []),
        )
        rows.append(Row(cells, entry["difference"] is None, class_swatch(identifier, palette)))
    columns = (
        Column("class", "text"),
        Column(f"A {shown.unit}".strip()),
        Column(f"B {shown.unit}".strip()),
        Column(DIFFERENCE),
        Column(f"±{100 * reach:.2g} points", "plot"),
        *([Column(level_text(comparison))] if with_intervals else []),
    )
    return Table(f"{shown.name} by class", columns, tuple(rows))
