"""A comparison as tables for the terminal: figures and differences, how many images changed, which are left out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.report.compare.cells import CHANGES, run_names, signed, signed_interval
from pipeline.report.formats import count, figure_format, percent
from pipeline.report.terminal import plain_table, report_tables

__all__ = ["compare_tables"]

Tree = Mapping[str, Any]

STYLES = {"better": "green", "worse": "red"}


def compare_tables(comparison: Tree) -> Iterator[Table]:
    """Tables of what compare.json holds, differences or agreement."""
    if "agreement" in comparison:
        yield from report_tables(comparison["agreement"])
        yield from _disagreement(comparison["disagreement"])
        return
    yield _counts(comparison["counts"])
    yield _figures(comparison)
    if comparison["images"]:
        yield _images(comparison["images"])
    if comparison["problems"]:
        yield _problems(comparison["problems"])


def _counts(counts: Tree) -> Table:
    table = plain_table("compared", "ok only in A", "ok only in B", "ok in neither", left=0)
    table.add_row(*(count(counts[name]) for name in ("common", "only_a", "only_b", "neither")))
    return table


def _figures(comparison: Tree) -> Table:
    level = percent(comparison["bootstrap"]["level"], 0)
    name_a, name_b = run_names(comparison)
    table = plain_table("figure", f"A: {name_a}", f"B: {name_b}", "B - A", f"{level} % interval", "B is")
    for path, figure in comparison["figures"].items():
        shown = figure_format(path)
        arrow, word, _ = CHANGES[figure["change"]]
        table.add_row(
            shown.name,
            *(shown.show(figure[side], unit=True) for side in ("a", "b")),
            signed(shown, figure["difference"], unit=True),
            signed_interval(shown, figure["interval"]),
            Text(f"{arrow} {word}".strip(), STYLES.get(word, "")),
        )
    table.columns[-1].justify = "left"
    return table


def _images(images: Tree) -> Table:
    table = plain_table("images by", "better", "worse", "equal", "mean change")
    for path, figure in images.items():
        shown = figure_format(path)
        numbers = (count(figure[name]) for name in ("better", "worse", "equal"))
        table.add_row(shown.name, *numbers, signed(shown, figure["mean_change"], unit=True))
    return table


def _problems(problems: Sequence[Tree]) -> Table:
    table = plain_table("images", "ok in", "not ok in", "outcome", "kind", "for example", left=6)
    table.columns[0].justify = "right"
    for problem in problems:
        first = problem["examples"][0]
        said = f": {first['message']}" if first["message"] else ""
        table.add_row(
            count(problem["count"]),
            str(problem["ok_in"]).upper() if len(problem["ok_in"]) == 1 else problem["ok_in"],
            str(problem["lacking_in"]).upper(),
            problem["outcome"],
            Text(problem["type"]),
            Text(f"{first['image_id']}{said}"),
        )
    return table


def _disagreement(disagreement: Mapping[str, Sequence[Tree]]) -> Iterator[Table]:
    for path, images in disagreement.items():
        shown = figure_format(path)
        table = plain_table("least agreement", shown.name)
        for entry in images:
            table.add_row(Text(entry["image_id"]), shown.show(entry["value"], unit=True))
        if images:
            yield table
