"""The page of a comparison: is B better, in what figures, on which classes and images, and what else differs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.cells import Palette, Tree, level_text
from pipeline.report.charts import stack
from pipeline.report.compare.cells import DIFFERENCE, signed, signed_interval
from pipeline.report.compare.sections import class_legend, page_name, problem_section, run_facts, setup_section
from pipeline.report.compare.tables import (
    change_kind,
    class_section,
    draw_difference,
    figure_section,
    image_section,
    reach_of,
)
from pipeline.report.definitions import definitions
from pipeline.report.formats import FigureFormat, count, figure_format, percent
from pipeline.report.gallery import Picture
from pipeline.report.page import ERROR_KEYS, HEADLINES, TILES
from pipeline.report.skeleton import Block, Gallery, Prose, Section, render

__all__ = ["render_comparison"]

COVERAGE = (
    ("common", "compared", "accent"),
    ("only_a", "ok in A alone", "fn"),
    ("only_b", "ok in B alone", "a4"),
    ("neither", "ok in neither", "fp"),
)
VERDICTS = {
    "better": "B is better",
    "worse": "B is worse",
    "equal": "B is the same",
    "unclear": "No clear difference",
    None: "B beside A",
}
ENDS = {"improved": "Images that got better", "regressed": "Images that got worse"}


def render_comparison(
    comparison: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], *, palette: Palette | None = None
) -> str:
    """The page of a parsed compare.json with differences.

    pictures: by `improved:FIGURE` and `regressed:FIGURE`, of the images that are listed there, in their order. palette:
    display colours of the label space by id.
    """
    figures = comparison["figures"]
    paths = [path for path in HEADLINES if path in figures] or list(figures)
    name = page_name(comparison, "→")
    return render(
        "compare.html.j2",
        title=f"{name}: {_said(paths[0], figures[paths[0]])}",
        sections=[
            figure_section(comparison),
            *image_section(comparison),
            *class_section(comparison, palette or {}),
            *_galleries(comparison, pictures, palette or {}),
            *problem_section(comparison["problems"]),
            *setup_section(comparison),
        ],
        notes=_notes(comparison),
        kicker="comparison of two runs",
        name=name,
        runs=run_facts(comparison),
        warnings=comparison["warnings"],
        headline=_headline(comparison, paths[0]),
        tiles=[_tile(path, figures[path]) for path in paths[1 : TILES + 1]],
        coverage=_coverage(comparison["counts"]),
        outcomes=[
            (f"{count(comparison['counts'][key])} {'images ' if key == 'common' else ''}{text}", kind)
            for key, text, kind in COVERAGE
            if key == "common" or comparison["counts"][key]
        ],
    )


def _said(path: str, figure: Tree) -> str:
    """`mIoU +0.42 points`."""
    shown = figure_format(path)
    return f"{shown.name} {signed(shown, figure['difference'], unit=True)}"


def _headline(comparison: Tree, path: str) -> dict[str, Any]:
    figure, shown = comparison["figures"][path], figure_format(path)
    values = " to ".join(shown.show(figure[side], unit=side == "b") for side in ("a", "b"))
    interval = f"{level_text(comparison)} {signed_interval(shown, figure['interval'])}, " if figure["interval"] else ""
    images = count(comparison["counts"]["common"])
    text = f"{VERDICTS[figure['change']]}: from {values}, {interval}over {images} images."
    drawn = draw_difference(figure, reach_of([figure]), f"{shown.name}: {text}")
    return _tile(path, figure) | {"text": text, "chart": drawn}


def _tile(path: str, figure: Tree) -> dict[str, Any]:
    shown, excludes = figure_format(path), figure["excludes_zero"]
    unit = "points" if shown.kind == "share" else shown.unit
    label = f"{_said(path, figure)}, {signed_interval(shown, figure['interval'])}"
    return {
        "name": shown.name,
        "help": shown.help,
        "value": signed(shown, figure["difference"]),
        "unit": unit,
        "kind": change_kind(figure) if excludes else "",
        "chart": draw_difference(figure, reach_of([figure]), label),
    }


def _coverage(counts: Tree) -> Any:
    parts = [(text, float(counts[key]), kind) for key, text, kind in COVERAGE]
    return stack(parts, "Images: " + ", ".join(f"{value:.0f} {text}" for text, value, _ in parts))


def _galleries(comparison: Tree, pictures: Mapping[str, Sequence[Picture]], palette: Palette) -> Iterator[Section]:
    legend = class_legend(next(iter(comparison["per_class"].values()), {}), palette)
    for end, title in ENDS.items():
        blocks: list[Block] = []
        for path, figure in comparison["images"].items():
            shown = figure_format(path)
            shots = tuple(
                (picture, _both(shown, entry))
                for picture, entry in zip(pictures.get(f"{end}:{path}", ()), figure[end], strict=False)
            )
            if shots:
                kind = path.split(".")[0]
                gallery = Gallery(shots, ERROR_KEYS.get(kind, ()), () if kind == "depth" else legend)
                blocks += [Prose("", f"By {shown.name}"), gallery]
        yield Section(end, title, tuple(blocks))


def _both(shown: FigureFormat, entry: Tree) -> str:
    values = " → ".join(shown.show(entry[side], unit=side == "b") for side in ("a", "b"))
    return f"{values} ({signed(shown, entry['difference'])})"


def _notes(comparison: Tree) -> list[tuple[str, str]]:
    bootstrap = comparison["bootstrap"]
    level = percent(bootstrap["level"], 0)
    found = {
        "Difference": f"{DIFFERENCE}, both over the same images: those that are ok in both runs. Images are the same "
        "where their image_id is.",
        "Interval": f"{level} % of {bootstrap['replicates']} bootstrap replicates of the difference. Each draws images "
        "anew, the same ones for A and B, so that what makes an image hard for both cancels out. Where the interval "
        "leaves 0 out, other images of the same kind would most likely show the same sign.",
        "Better": "Higher for shares, lower for errors. An image or a class without evidence in one of the runs is in "
        "no count of better, worse and equal; equal means the very same value.",
    }
    if not bootstrap["replicates"]:
        del found["Interval"]
    sections = {path.split(".")[0]: True for path in comparison["figures"]}
    return [*found.items(), *definitions({**sections, "run": comparison["b"]["run"]})]
