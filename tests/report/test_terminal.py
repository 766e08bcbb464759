"""The tables that the terminal shows: what is in them, and what is left out."""

import io
from pathlib import Path
from typing import Any

from report_helpers import depth_score, failed, mixed_rows, row, write_table
from rich.console import Console

from pipeline.report.report import ReportOptions, write_report
from pipeline.report.rows import open_scored
from pipeline.report.terminal import CLASS_FIGURES, FIGURES, MAX_ROWS, report_tables


def shown(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300, markup=False)
    for table in report_tables(report):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return write_report(
        open_scored(write_table(folder, rows), {})[0], f"{folder}/_report", {}, ReportOptions(**options)
    )


def cells(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(first))


def test_every_kind_of_table(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, [*mixed_rows(1, 30), failed("z/[bold]/1", "OddError")], by=["city", "shard"], replicates=50
    )
    text = shown(report)
    assert cells(text, "images") == ["images", "ok", "failed", "missing_target", "missing_prediction"]
    low, high = (f"{100 * value:.1f}" for value in report["intervals"]["semantic.mIoU"])
    assert cells(text, "mIoU ")[:3] == ["mIoU", f"{100 * report['semantic']['mIoU']:.1f}", "%"]
    assert cells(text, "mIoU ")[3:] == [low, "to", high]
    assert cells(text, "class 2")[2] == f"{100 * report['semantic']['per_class']['2']['IoU']:.1f}"
    assert cells(text, "aachen")[1] == str(report["slices"][0]["values"][1]["counts"]["ok"])
    assert cells(text, "city")[:3] == ["city", "ok", "images"]
    assert cells(text, "shard ")[:3] == ["shard", "ok", "images"]
    assert "OddError" in text
    assert "z/[bold]/1: bad z/[bold]/1" in text


def test_every_figure_of_a_report_is_shown(tmp_path: Path) -> None:
    report = report_of(tmp_path, mixed_rows(1, 30), replicates=20)
    paths = {*FIGURES, *CLASS_FIGURES}

    def leaves(tree: Any, path: str) -> set[str]:
        if not isinstance(tree, dict):
            return {path}
        skipped = {"per_pixel", "histogram", "delta_curve", "pr_curve", "scores", "confusion", "per_class"}
        return {leaf for name, value in tree.items() if name not in skipped for leaf in leaves(value, f"{path}.{name}")}

    found: set[str] = set()
    for name in ("semantic", "boundary", "panoptic", "boundary_panoptic", "detection", "depth"):
        found |= leaves(report[name], name)
    counted = {path for path in found if path.rpartition(".")[2] in ("n", "n_present", "n_without_evidence")}
    counted |= {f"depth.{name}" for name in report["depth"] if "images" in name or "pixels" in name}
    assert found - counted - paths == {"boundary.mIoU_present"}


def test_long_tables_are_cut(tmp_path: Path) -> None:
    report = report_of(tmp_path, [row(f"a/{n}", depth_score(n)) for n in range(MAX_ROWS + 3)], by=["position"])
    text = shown(report)
    assert "3 further values in report.json" in text
    assert "class " not in text
    assert "problem" not in text
