"""What the pages of differences and of agreement share: who was compared, what was left out, how both came about."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from pipeline.report.cells import Palette, Tree, class_swatch, count_cell, text_cell
from pipeline.report.formats import moment
from pipeline.report.page import MAX_LEGEND
from pipeline.report.section_run import MAX_CONFIG
from pipeline.report.skeleton import Block, Code, Column, Details, Row, Section, Table

__all__ = ["class_legend", "page_name", "problem_section", "run_facts", "setup_section"]

SIDES = ("a", "b")
# What became of an image in a run in which it is not ok.
OUTCOMES = {
    "absent": "no row",
    "failed": "failed",
    "missing_target": "no target",
    "missing_prediction": "no prediction",
}


def page_name(comparison: Tree, between: str) -> str:
    """The labels of both with `between` them, or the one that both have."""
    a, b = (str(comparison[side]["model"]["label"]) for side in SIDES)
    return a if a == b else f"{a} {between} {b}"


def run_facts(comparison: Tree) -> list[tuple[str, str, str]]:
    """(what, of A, of B) for the page's head, of what either has."""
    columns = [_facts(comparison[side]["model"], comparison[side]["run"]) for side in SIDES]
    return [(what, a, columns[1][what]) for what, a in columns[0].items() if a or columns[1][what]]


def _facts(model: Tree, run: Tree) -> dict[str, str]:
    source = (run.get("config") or {}).get("source") or {}
    return {
        "model": str(model["label"]),
        "version": str(model.get("version") or ""),
        "label space": str(model.get("score_taxonomy") or model.get("taxonomy") or ""),
        "data": " ".join(str(source[key]) for key in ("format", "uri") if source.get(key)),
        "run": moment(run["updated_at"]) if run.get("updated_at") else "",
    }


def class_legend(classes: Mapping[str, Tree], palette: Palette) -> tuple[tuple[str, Markup], ...]:
    """(name, swatch) of classes by id, nothing where they are many."""
    if len(classes) > MAX_LEGEND:
        return ()
    drawn = ((str(row["name"]), class_swatch(identifier, palette)) for identifier, row in classes.items())
    return tuple((name, swatch) for name, swatch in drawn if swatch is not None)


def problem_section(problems: Sequence[Tree]) -> Iterator[Section]:
    """problems: of compare.json."""
    rows = []
    for problem in problems:
        ok_in, lacking = str(problem["ok_in"]), str(problem["lacking_in"]).upper()
        outcome = OUTCOMES.get(str(problem["outcome"]), str(problem["outcome"]))
        first = problem["examples"][0]
        cells = (
            text_cell(f"{outcome} in {lacking}"),
            text_cell(ok_in.upper() if ok_in in SIDES else ok_in),
            text_cell(problem["type"]),
            count_cell(problem["count"]),
            text_cell(f"{first['image_id']}: {first['message']}" if first["message"] else first["image_id"]),
        )
        rows.append(Row(cells))
    if rows:
        columns = (
            Column("why", "text"),
            Column("ok in", "text"),
            Column("kind", "text"),
            Column("images"),
            Column("for example", "text"),
        )
        table = Table("Images that are not compared, by kind", columns, tuple(rows))
        lead = (
            "They are in no figure above; problems.parquet lists all of them. One that is ok in neither run is here "
            "once for each."
        )
        yield Section("problems", "Images not compared", (table,), lead)


def setup_section(comparison: Tree) -> Iterator[Section]:
    """What differs between the runs, and the whole of both on demand."""
    rows = tuple(
        Row(tuple(text_cell(entry[key] if entry[key] is not None else "not set") for key in ("name", *SIDES)))
        for entry in comparison["settings"]
    )
    blocks: list[Block] = []
    if rows:
        columns = (Column("setting", "text"), Column("A", "text"), Column("B", "text"))
        blocks.append(Table("Settings that differ", columns, rows, still=True))
    for side in SIDES:
        run: Mapping[str, Any] = comparison[side]["run"]
        shown = {
            key: run[key] for key in ("run_id", "job", "started_at", "updated_at", "config", "code") if run.get(key)
        }
        if shown:
            text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
            blocks.append(Details(f"The run of {side.upper()}", (Code(text[:MAX_CONFIG]),)))
    differ = f"{len(rows)} settings differ" if len(rows) != 1 else "One setting differs"
    lead = f"{differ} between the two runs." if rows else "Config, weights and code of both runs are the same."
    yield Section("setup", "Setup", tuple(blocks), lead)
