"""How far a table is: `maskmill status OUTPUT [--json] [storage.key=value ...]`."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from jobs.common import guarded, storage_options
from pipeline.printable import PrintableConsole
from pipeline.progress import counts_table, progress_lines
from pipeline.rows import PREDICTIONS, SCORES
from pipeline.runfile import read_progress, read_run
from pipeline.status import table_counts
from pipeline.table import RowTable
from pipeline.units import UnitLog

__all__ = ["main"]

EXAMPLES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill status", description="expected = ok + failed + pending of a table, and the kinds of failure"
    )
    parser.add_argument("output", help="output.uri of the run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("storage", nargs="*", help="fsspec options of the output, storage.key=value")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _status(arguments.output, storage_options(arguments.storage), arguments.json))


def _status(uri: str, storage: dict[str, Any], as_json: bool) -> int:
    run = read_run(uri, storage)
    table = RowTable.open(uri, storage, schema=SCORES if run.get("job") == "evaluate" else PREDICTIONS)
    versions = {model["label"]: model["version"] for model in run["models"]}
    counts = table_counts(table, UnitLog(uri, storage), versions)
    kinds, examples = _failures(table, versions)
    progress = read_progress(uri, storage, run)
    if as_json:
        figures = {
            "run_id": run.get("run_id"),
            "state": run.get("state"),
            "progress": progress,
            "models": [{**asdict(count), "pending": count.pending} for count in counts],
            "failures": [
                {"model": model, "stage": stage, "type": kind, "rows": rows, "examples": examples[model, stage, kind]}
                for (model, stage, kind), rows in kinds.most_common()
            ],
        }
        print(json.dumps(figures, indent=1))
        return 0
    console = PrintableConsole()
    console.print(f"run {run.get('run_id')}: {run.get('state')}, updated {run.get('updated_at')}")
    console.print(counts_table(counts))
    for line in progress_lines(progress):
        console.print(line)
    if kinds:
        shown = Table(box=None, pad_edge=False)
        for column in ("failed", "model", "stage", "kind", "for example"):
            shown.add_column(column, overflow="fold")
        for (model, stage, kind), rows in kinds.most_common():
            shown.add_row(str(rows), model, stage, kind, examples[model, stage, kind][0])
        console.print()
        console.print(shown)
    return 0


def _failures(
    table: RowTable, versions: dict[str, str]
) -> tuple[Counter[tuple[str, str, str]], dict[tuple[str, str, str], list[str]]]:
    kinds: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], list[str]] = {}
    columns = ["model", "model_version", "image_id", "error_stage", "error_type", "error_message"]
    for batch in table.scan(columns, {"status": "failed"}):
        for row in batch.to_pylist():
            if versions.get(row["model"]) != row["model_version"]:
                continue
            key = (row["model"], row["error_stage"], row["error_type"])
            kinds[key] += 1
            if len(examples.setdefault(key, [])) < EXAMPLES:
                examples[key].append(f"{row['image_id']}: {row['error_message']}")
    return kinds, examples


if __name__ == "__main__":
    sys.exit(main())
