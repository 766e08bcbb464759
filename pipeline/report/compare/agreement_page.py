"""The page of two models without a target: where they disagree most, and how far they agree in all and by class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.cells import Palette, Tree, figure_axis, figure_value, interval_of, interval_text, level_text
from pipeline.report.charts import interval_bar, stack
from pipeline.report.compare.sections import class_legend, page_name, run_facts, setup_section
from pipeline.report.definitions import definitions
from pipeline.report.formats import count, figure_format
from pipeline.report.gallery import Picture
from pipeline.report.page import HEADLINES, TILES
from pipeline.report.section_depth import depth_section
from pipeline.report.section_detection import detection_sections
from pipeline.report.section_panoptic import panoptic_sections
from pipeline.report.section_run import problem_sections
from pipeline.report.section_semantic import semantic_sections
from pipeline.report.skeleton import Block, Gallery, Prose, Section, render

__all__ = ["render_agreement"]

OUTCOMES = (
    ("ok", "compared", "accent"),
    ("failed", "failed", "fp"),
    ("missing_target", "without A", "fn"),
    ("missing_prediction", "without B", "rest"),
)
KEYS = {
    "semantic": (("A and B differ", "fp"), ("A says nothing (void)", "hatch")),
    "panoptic": (("in both", "tp"), ("in B alone", "fp"), ("in A alone", "fn"), ("void", "hatch")),
    "detection": (("in both", "tp"), ("in B alone", "fp"), ("in A alone", "fn")),
    "depth": (("B is nearer", "near"), ("B is farther", "far"), ("A says nothing", "hatch")),
}


def render_agreement(
    comparison: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], *, palette: Palette | None = None
) -> str:
    """The page of a parsed compare.json with agreement.

    pictures: by figure, of the images that `disagreement` lists, in their order. palette: display colours of A's label
    space by id.
    """
    agreement: Tree = comparison["agreement"]
    paths = [path for path in HEADLINES if figure_value(agreement, path) is not None]
    name = page_name(comparison, "and")
    counts = agreement["counts"]
    return render(
        "compare.html.j2",
        title=f"{name}: agreement",
        sections=[
            *_galleries(comparison, pictures, palette or {}),
            *_metrics(agreement, palette or {}),
            *problem_sections(agreement),
            *setup_section(comparison),
        ],
        notes=_notes(comparison),
        kicker="agreement of two models",
        name=name,
        runs=run_facts(comparison),
        warnings=comparison["warnings"],
        headline=_tile(agreement, paths[0]) | {"text": _text(agreement, paths[0])} if paths else None,
        tiles=[_tile(agreement, path) for path in paths[1 : TILES + 1]],
        coverage=stack([(text, float(counts[key]), kind) for key, text, kind in OUTCOMES], "Images"),
        outcomes=[
            (f"{count(counts[key])} {'images ' if key == 'ok' else ''}{text}", kind)
            for key, text, kind in OUTCOMES
            if key == "ok" or counts[key]
        ],
    )


def _tile(agreement: Tree, path: str) -> dict[str, Any]:
    shown, value = figure_format(path), figure_value(agreement, path)
    axis, (low, high) = figure_axis(agreement, path), interval_of(agreement, path)
    label = f"{shown.name} {shown.show(value, unit=True)}, {level_text(agreement)} {interval_text(agreement, path)}"
    return {
        "name": shown.name,
        "help": shown.help,
        "value": shown.show(value),
        "unit": shown.unit,
        "kind": "",
        "chart": interval_bar(value, low, high, axis, label),
    }


def _text(agreement: Tree, path: str) -> str:
    shown = figure_format(path)
    low, _ = interval_of(agreement, path)
    interval = f"{level_text(agreement)} {interval_text(agreement, path)}, " if low is not None else ""
    most = "0 where they agree" if shown.lower else "100 % where they agree"
    return f"B held against A: {most} everywhere; {interval}over {count(agreement['counts']['ok'])} images."


def _galleries(comparison: Tree, pictures: Mapping[str, Sequence[Picture]], palette: Palette) -> Iterator[Section]:
    agreement = comparison["agreement"]
    found = [agreement.get("semantic"), agreement.get("panoptic"), *agreement.get("detection", {}).values()]
    legend = class_legend(next((section["per_class"] for section in found if section), {}), palette)
    key = Markup('<i class="key {}"></i>')
    blocks: list[Block] = []
    for path, entries in comparison["disagreement"].items():
        shown = figure_format(path)
        shots = tuple(
            (picture, shown.show(entry["value"], unit=True))
            for picture, entry in zip(pictures.get(path, ()), entries, strict=False)
        )
        if shots:
            kind = path.split(".")[0]
            keys = tuple((f"difference: {name}", key.format(color)) for name, color in KEYS[kind])
            gallery = Gallery(shots, swatches=keys if kind == "depth" else (*legend, *keys))
            blocks += [Prose("", f"By {shown.name}"), gallery]
    lead = "Where to look first: the images on which the two agree least. The figures of all are in images.parquet."
    yield Section("disagreement", "Least agreement", tuple(blocks), lead)


def _metrics(agreement: Tree, palette: Palette) -> Iterator[Section]:
    if agreement.get("semantic"):
        yield from semantic_sections(agreement, palette)
    if agreement.get("panoptic"):
        yield from panoptic_sections(agreement, palette)
    if agreement.get("detection"):
        yield from detection_sections(agreement, palette)
    if agreement.get("depth"):
        yield depth_section(agreement)


def _notes(comparison: Tree) -> list[tuple[str, str]]:
    mapping = comparison["mapping"]
    space = comparison["taxonomy"]
    into = f"B's classes ({mapping['source']}) are mapped into A's ({space})" if mapping else f"both are in {space}"
    found = {
        "Agreement": f"There is no target: what A says stands in for it, and what B says is the prediction; {into}. "
        "Which of the two is right, these figures do not say.",
    }
    return [
        *found.items(),
        *definitions({**comparison["agreement"], "run": {"config": {"score": comparison["score"]}}}),
    ]
