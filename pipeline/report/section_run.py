"""The page's sections on the run: images without figures, how long what took, and what exactly was run."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from pipeline.report.cells import Tree, count_cell, text_cell
from pipeline.report.charts import stack
from pipeline.report.formats import count, duration, is_number, moment, number, percent, size
from pipeline.report.skeleton import (
    Block,
    Chart,
    Charts,
    Code,
    Column,
    Details,
    Facts,
    Prose,
    Row,
    Section,
    Table,
)

__all__ = ["OUTCOMES", "problem_sections", "run_sections"]

# How an image counts: what it is called, and its colour.
OUTCOMES = {
    "ok": ("with figures", "accent"),
    "failed": ("failed", "fp"),
    "missing_target": ("without a target", "fn"),
    "missing_prediction": ("without a prediction", "rest"),
}
STAGES = ("accent", "a2", "a3", "a4", "a5", "a6", "a7")
MAX_CONFIG = 100_000


def problem_sections(report: Tree) -> Iterator[Section]:
    problems: Sequence[Tree] = report.get("problems") or []
    rows = []
    blocks: list[Block] = []
    for problem in problems:
        outcome = str(problem.get("outcome", "failed"))
        rows.append(
            Row(
                (
                    text_cell(problem.get("type") or outcome),
                    text_cell(OUTCOMES.get(outcome, (outcome,))[0]),
                    text_cell(problem.get("stage") or ""),
                    count_cell(problem.get("count")),
                )
            )
        )
        examples = [
            Row((text_cell(example.get("image_id")), text_cell(example.get("message") or "")))
            for example in problem.get("examples") or []
        ]
        if examples:
            summary = f"{problem.get('type') or outcome}: {len(examples)} of {count(problem.get('count'))} images"
            table = Table(summary, (Column("image", "text"), Column("message", "text")), tuple(examples), still=True)
            blocks.append(Details(summary, (table,)))
    if rows:
        columns = (Column("kind", "text"), Column("outcome", "text"), Column("stage", "text"), Column("images"))
        yield Section(
            "problems",
            "Images without figures",
            (Table("Images without figures by kind", columns, tuple(rows)), *blocks),
            "They are in no figure above, and each is a row of the table with its error.",
        )


def run_sections(report: Tree) -> Iterator[Section]:
    run, model = report.get("run") or {}, report.get("model") or {}
    seconds = {
        str(name): float(value) for name, value in (run.get("seconds") or {}).items() if is_number(value) and value
    }
    blocks: list[Block] = []
    label_s, images = run.get("label_s"), run.get("images")
    if seconds:
        kinds = [(name, value, STAGES[at % len(STAGES)]) for at, (name, value) in enumerate(seconds.items())]
        total = sum(seconds.values())
        keys = tuple((f"{name} {percent(value / total, 0)} %", kind) for name, value, kind in kinds)
        title = f"Thread time by stage, {duration(total)} in all"
        blocks.append(Charts((Chart(title, stack(kinds, title), keys=keys),), wide=True))
    source = run.get("source") or {}
    groups: dict[str, dict[str, Any]] = {
        "": {
            "images in this run": count(images) if images else "",
            "time": duration(label_s) if label_s else "",
            "throughput": f"{number(images / label_s)} images/s" if images and label_s else "",
        },
        "Job": {
            "run": run.get("run_id"),
            "job": run.get("job"),
            "state": run.get("state"),
            "started": moment(run["started_at"]) if run.get("started_at") else "",
            "last written": moment(run["updated_at"]) if run.get("updated_at") else "",
        },
        "Model": {
            "version": model.get("version"),
            "label space": model.get("taxonomy"),
            "license": model.get("license"),
            "parameters": count(model.get("parameters")) if model.get("parameters") else "",
        },
        "Source": {
            "units": count(source["units"]) if source.get("units") else "",
            "size": size(source["size_bytes"]) if source.get("size_bytes") else "",
            "fingerprint": source.get("fingerprint"),
        },
        "Code": dict(run.get("code") or {}),
    }
    for heading, facts in groups.items():
        pairs = tuple((str(name), str(value)) for name, value in facts.items() if value)
        if pairs:
            blocks += [*([Prose("", heading)] if heading else []), Facts(pairs)]
    blocks += _mapping(model.get("mapping"))
    if run.get("config"):
        text = yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True)
        blocks.append(Details("Configuration", (Code(text[:MAX_CONFIG]),)))
    yield Section("run", "Run", tuple(blocks))


def _mapping(mapping: Tree | None) -> Iterator[Block]:
    """How the model's classes became the targets'."""
    if not mapping:
        return
    rows = [Row((text_cell(name), text_cell(into))) for name, into in (mapping.get("mapped") or {}).items()]
    rows += [
        Row((text_cell(name), text_cell(mapping.get("unmapped_become", "void"))), dim=True)
        for name in mapping.get("unmapped") or []
    ]
    source, target = mapping.get("source"), mapping.get("target")
    columns = (Column(f"class of {source}", "text"), Column(f"counts as, in {target}", "text"))
    summary = f"Label spaces: {source} as {target}"
    unused = ", ".join(map(str, mapping.get("unused") or []))
    note = [Prose(f"Nothing counts as: {unused}.")] if unused else []
    yield Details(summary, (Table(summary, columns, tuple(rows)), *note))
