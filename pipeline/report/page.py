"""A report as one HTML page: what is its verdict, what it covers, its metrics, images, and the run behind it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.cells import (
    Palette,
    Tree,
    class_swatch,
    count_cell,
    figure_axis,
    figure_value,
    interval_of,
    interval_text,
    level_text,
    share_cell,
    text_cell,
)
from pipeline.report.charts import Layer, bar, histogram, interval_bar, log_axis, nice_axis, share_axis, stack
from pipeline.report.definitions import definitions
from pipeline.report.formats import FigureFormat, count, figure_format, is_number, moment, number, percent
from pipeline.report.gallery import MIN_SCORE, Picture
from pipeline.report.section_depth import depth_section
from pipeline.report.section_detection import detection_sections
from pipeline.report.section_panoptic import panoptic_sections
from pipeline.report.section_run import OUTCOMES, problem_sections, run_sections
from pipeline.report.section_semantic import semantic_sections
from pipeline.report.skeleton import (
    Block,
    Cell,
    Chart,
    Charts,
    Column,
    Gallery,
    Prose,
    Row,
    Section,
    Table,
    render,
)

__all__ = ["render_page"]

# The first of these that a report has is its verdict; the others stand beside it.
HEADLINES = (
    "semantic.mIoU",
    "panoptic.All.PQ",
    "detection.segm.AP",
    "detection.bbox.AP",
    "depth.AbsRel",
    "boundary.mIoU",
    "semantic.pixel_accuracy",
    "semantic.fwIoU",
    "panoptic.Things.PQ",
    "panoptic.Stuff.PQ",
    "boundary_panoptic.All.PQ",
    "detection.segm.AP50",
    "detection.bbox.AP50",
    "depth.delta1",
    "depth.RMSE",
    "depth.SILog",
)
TILES = 4
ERROR_KEYS = {
    "semantic": (("wrong", "fp"), ("no target (void)", "hatch")),
    "panoptic": (("found", "tp"), ("wrong", "fp"), ("missed", "fn"), ("void, crowd", "hatch")),
    "detection": (("found", "tp"), ("wrong", "fp"), ("missed", "fn")),
    "depth": (("too near", "near"), ("too far", "far"), ("no target", "hatch")),
}
PICTURE_NOTES = {
    "panoptic": "Segments are right, wrong or missed as PQ counts them.",
    "detection": f"Predictions with a score of {MIN_SCORE:g} or more, matched at IoU 0.50.",
    "depth": "Depth: near is bright. Error: the colour is full at a factor of 1.5.",
}
MAX_SLICES = 1000
MAX_LEGEND = 24
MAX_NAMES = 12


def render_page(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], *, palette: Palette | None = None
) -> str:
    """The page of a parsed report.json.

    pictures: by `worst:FIGURE` and `best:FIGURE` (a path of the report, as in its `worst`), or by any other heading.
    palette: display colours of the scored label space by id.
    """
    model = report.get("model") or {}
    paths = [path for path in HEADLINES if figure_value(report, path) is not None]
    sections = [
        *_metrics(report, palette or {}),
        *_distributions(report),
        *_slices(report),
        *_galleries(report, pictures, palette or {}),
        *problem_sections(report),
        *run_sections(report),
    ]
    name = str(model.get("label", "model"))
    return render(
        "report.html.j2",
        title=f"{name}: {_said(report, paths[0])}" if paths else name,
        sections=sections,
        notes=definitions(report),
        kicker=f"{model.get('task', 'evaluation')} report",
        name=name,
        about=_about(report),
        warnings=list(_warnings(report)),
        headline=_headline(report, paths[0]) if paths else None,
        tiles=[_tile(report, path) for path in paths[1 : TILES + 1]],
        coverage=_coverage(report),
        outcomes=_outcomes(report),
    )


def _said(report: Tree, path: str) -> str:
    """`mIoU 82.2 %`."""
    shown = figure_format(path)
    return f"{shown.name} {shown.show(figure_value(report, path), unit=True)}"


def _metrics(report: Tree, palette: Palette) -> Iterator[Section]:
    if report.get("semantic"):
        yield from semantic_sections(report, palette)
    if report.get("panoptic"):
        yield from panoptic_sections(report, palette)
    if report.get("detection"):
        yield from detection_sections(report, palette)
    if report.get("depth"):
        yield depth_section(report)


def _about(report: Tree) -> list[tuple[str, str]]:
    model, run = report.get("model") or {}, report.get("run") or {}
    source = (run.get("config") or {}).get("source") or {}
    where = " ".join(str(source[key]) for key in ("format", "uri") if source.get(key))
    space = str(model.get("score_taxonomy") or model.get("taxonomy") or "")
    known = {
        "version": model.get("version"),
        "data": where,
        "label space": space,
        "run": moment(run["updated_at"]) if run.get("updated_at") else "",
    }
    return [(name, str(value)) for name, value in known.items() if value]


def _warnings(report: Tree) -> Iterator[str]:
    """Why the figures may not be what they seem: images they do not cover, a run that did not end."""
    counts, state = report.get("counts") or {}, (report.get("run") or {}).get("state", "done")
    total, ok = counts.get("images") or 0, counts.get("ok") or 0
    if total and not ok:
        yield f"0 of {count(total)} images could be scored: there are no figures."
    elif ok < total:
        missing = [f"{count(counts[key])} {OUTCOMES[key][0]}" for key in OUTCOMES if key != "ok" and counts.get(key)]
        yield f"The figures cover {count(ok)} of {count(total)} images ({percent(ok / total)} %): {', '.join(missing)}."
    if state != "done":
        yield f"The run is not done: its state is {state}."
    unused = ((report.get("model") or {}).get("mapping") or {}).get("unused") or []
    if unused:
        names = ", ".join(map(str, unused[:MAX_NAMES])) + (", …" if len(unused) > MAX_NAMES else "")
        yield f"No class of the model counts as {names}: they score 0."


def _headline(report: Tree, path: str) -> dict[str, Any]:
    shown, value, (low, high) = figure_format(path), figure_value(report, path), interval_of(report, path)
    axis = figure_axis(report, path)
    ok = count((report.get("counts") or {}).get("ok"))
    interval = (
        f"{level_text(report)} {interval_text(report, path)}{f' {shown.unit}' if shown.unit else ''}, "
        if low is not None
        else ""
    )
    label = f"{shown.name} {shown.show(value, unit=True)}, {interval}{ok} images"
    return {
        "name": shown.name,
        "help": shown.help,
        "value": shown.show(value),
        "unit": shown.unit,
        "chart": interval_bar(value, low, high, axis, label),
        "low": "0",
        "high": "100 %" if shown.kind == "share" else shown.show(axis.high, unit=True),
        "text": f"{interval}over {ok} images{'; lower is better' if shown.lower else ''}",
    }


def _tile(report: Tree, path: str) -> dict[str, Any]:
    shown, value, (low, high) = figure_format(path), figure_value(report, path), interval_of(report, path)
    text = f"{shown.name}, {level_text(report)} {interval_text(report, path)}" if low is not None else shown.name
    return {
        "name": shown.name,
        "help": shown.help,
        "value": shown.show(value),
        "unit": shown.unit,
        "chart": interval_bar(value, low, high, figure_axis(report, path), text),
    }


def _coverage(report: Tree) -> Any:
    counts = report.get("counts") or {}
    parts = [(name, float(counts.get(key) or 0), kind) for key, (name, kind) in OUTCOMES.items()]
    return stack(parts, "Images: " + ", ".join(f"{value:.0f} {name}" for name, value, _ in parts))


def _outcomes(report: Tree) -> list[tuple[str, str]]:
    counts = report.get("counts") or {}
    return [
        (f"{count(counts.get(key) or 0)} {'images ' if key == 'ok' else ''}{name}", kind)
        for key, (name, kind) in OUTCOMES.items()
        if key == "ok" or counts.get(key)
    ]


def _distributions(report: Tree) -> Iterator[Section]:
    charts = []
    for path, found in (report.get("image_figures") or {}).items():
        if found and found.get("counts"):
            shown = figure_format(path)
            axis = (
                share_axis(f"{shown.name} %")
                if shown.kind == "share"
                else _span_axis(found["edges"], _with_unit(shown))
            )
            title = f"{shown.name} of single images"
            drawn = histogram(found["edges"], [Layer("images", found["counts"])], axis, title)
            charts.append(Chart(title, drawn))
    sizes = report.get("sizes") or {}
    if len(sizes.get("counts") or ()) > 1:
        title, unit = "Sizes of the images", str(sizes.get("unit", ""))
        axis = _span_axis(sizes["edges"], unit)
        charts.append(Chart(title, histogram(sizes["edges"], [Layer("images", sizes["counts"])], axis, title)))
    lead = "How the figure is spread over images, each scored alone; means of these are not the figures above."
    if len(sizes.get("counts") or ()) == 1:
        lead += f" All images have about {number(sizes['edges'][0])} {sizes.get('unit', '')}."
    yield Section("images", "Images", (Charts(tuple(charts)),) if charts else (), lead)


def _with_unit(shown: FigureFormat) -> str:
    return f"{shown.name} ({shown.unit})" if shown.unit else shown.name


def _span_axis(edges: Sequence[float], title: str) -> Any:
    """A scale of ratios where the bins are of one ratio, so that they are drawn equally wide."""
    low, high = edges[0], edges[-1]
    first, last = (edges[1] - low, high - edges[-2]) if len(edges) > 2 else (1, 1)
    return log_axis(low, high, title) if low > 0 and last > 1.01 * first else nice_axis(low, high, title)


def _slices(report: Tree) -> Iterator[Section]:
    found = report.get("slices") or []
    blocks: list[Block] = []
    for slices in [found] if isinstance(found, Mapping) else found:
        table = _slice_table(report, slices)
        blocks += [Prose("", f"By {slices.get('by')}"), table]
    lead = "The same figures over parts of the images; the tick in a bar is the figure over all of them."
    yield Section("slices", "Slices", tuple(blocks), lead)


def _slice_table(report: Tree, slices: Tree) -> Table:
    paths = [path for path in HEADLINES if figure_value(report, path) is not None]
    values: Sequence[Tree] = (slices.get("values") or [])[:MAX_SLICES]
    rows = []
    for part in values:
        counts = part.get("counts") or {}
        missing = sum(counts.get(key) or 0 for key in OUTCOMES if key != "ok")
        cells = [_slice_cell(report, values, part, path) for path in paths[: TILES + 1]]
        rows.append(
            Row(
                (text_cell(part.get("value")), *cells, count_cell(counts.get("ok")), count_cell(missing)),
                not counts.get("ok"),
            )
        )
    columns = [Column(str(slices.get("by")), "text")]
    for path in paths[: TILES + 1]:
        shown = figure_format(path)
        columns.append(Column(f"{shown.name} {shown.unit}".strip(), "bar", shown.help))
    columns += [Column("images"), Column("without figures")]
    return Table(f"Figures by {slices.get('by')}", tuple(columns), tuple(rows))


def _slice_cell(report: Tree, values: Sequence[Tree], part: Tree, path: str) -> Cell:
    shown, whole = figure_format(path), figure_value(report, path)
    if shown.kind == "share":
        return share_cell(figure_value(part, path), mark=whole)
    value = figure_value(part, path)
    top = max([figure_value(each, path) or 0 for each in values] + [whole or 0]) or 1.0
    return Cell(shown.show(value), value, bar(value, maximum=top, mark=whole), "" if value is None else f"{value:.8g}")


def _galleries(report: Tree, pictures: Mapping[str, Sequence[Picture]], palette: Palette) -> Iterator[Section]:
    """The worst images first; one gallery for each figure."""
    classes = _class_swatches(report, palette)
    notes: list[str] = []
    ends: dict[str, list[Block]] = {"worst": [], "best": []}
    for key, found in pictures.items():
        end, _, path = key.partition(":")
        shown = figure_format(path) if path else None
        kind = path.split(".")[0]
        shots = tuple((picture, _shot_value(picture, path)) for picture in found)
        if shots:
            heading = [Prose("", f"By {shown.name}")] if shown else []
            gallery = Gallery(shots, ERROR_KEYS.get(kind, ()), () if kind == "depth" else classes)
            ends.setdefault(end, []).extend([*heading, gallery])
            notes += [PICTURE_NOTES[kind]] if kind in PICTURE_NOTES and PICTURE_NOTES[kind] not in notes else []
    for at, (end, blocks) in enumerate(ends.items()):
        known = end in ("worst", "best")
        title = f"{end.title()} images" if known else end
        yield Section(end if known else f"pictures-{at}", title, tuple(blocks), " ".join(notes))


def _class_swatches(report: Tree, palette: Palette) -> tuple[tuple[str, Markup], ...]:
    """The classes of the first section that has any, where they are few enough for a legend."""
    found = [report.get("semantic"), report.get("panoptic"), *(report.get("detection") or {}).values()]
    classes: Mapping[str, Tree] = next(
        (section["per_class"] for section in found if section and section.get("per_class")), {}
    )
    if len(classes) > MAX_LEGEND:
        return ()
    known = ((str(row.get("name")), class_swatch(identifier, palette)) for identifier, row in classes.items())
    return tuple((name, drawn) for name, drawn in known if drawn is not None)


def _shot_value(picture: Picture, path: str) -> str:
    if not is_number(picture.value):
        return ""
    return figure_format(path).show(picture.value, unit=True) if path else number(picture.value)
