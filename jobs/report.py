"""What the scores of a table come to: `maskmill report OUTPUT [--by COLUMN] [--json]`, without running a model."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.common import guarded
from pipeline.configfile import load_overrides
from pipeline.errors import ConfigError, RunError
from pipeline.printable import PrintableConsole, printable
from pipeline.report.gallery import Picture
from pipeline.report.pictures import report_pictures
from pipeline.report.report import PAGE_FILE, REPORT_FILE, ReportOptions, encode, write_page, write_report
from pipeline.report.rows import ScoredTable, open_scored
from pipeline.report.terminal import report_tables
from pipeline.storage import join

__all__ = ["main"]

FOLDER = "_report"
# Into a file or a pipe, nothing is folded.
PIPE_WIDTH = 240


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill report", description="fold the scores of a table into report.json, Parquet tables and one HTML page"
    )
    parser.add_argument("output", help="output.uri of a label run with targets, or of an evaluation")
    parser.add_argument("--model", help="label of one model (default: a report of each)")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="figures by value of a column (shard, ...) or of a field that the source has (city, ...); may be repeated",
    )
    parser.add_argument("--out", help="folder of the report (default: _report in OUTPUT; of several models, one each)")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="replicates of the intervals (default 1000, 0: none)"
    )
    parser.add_argument("--images", type=int, default=8, metavar="K", help="worst and best images (default 8)")
    parser.add_argument("--json", action="store_true", help="print the report itself, and nothing else")
    parser.add_argument("--no-page", action="store_true", help="no HTML page; the source is not read")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="storage.key=value of OUTPUT; source.storage.key=value, source.uri=..., predictions.... for the pictures",
    )
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    for name, least in (("bootstrap", 0), ("images", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} must be {least} or more, got {getattr(arguments, name)}")
    tree = load_overrides(arguments.overrides)
    unknown = sorted(tree.keys() - {"storage", "source", "predictions"})
    if unknown:
        raise ConfigError(f"expected storage.key=value, source.key=value or predictions.key=value, got {unknown[0]!r}")
    storage: dict[str, Any] = tree.get("storage", {})
    options = ReportOptions(by=arguments.by, replicates=arguments.bootstrap, images=arguments.images)
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = PrintableConsole(width=width)
    reports: dict[str, Mapping[str, Any]] = {}
    scored = open_scored(arguments.output, storage, arguments.model)
    for one in scored:
        uri = _folder(arguments, one)
        report = write_report(one, uri, storage, options)
        reports[one.model["label"]] = report
        if not arguments.no_page:
            write_page(report, _pictures(report, one, tree), one, uri, storage)
        if not arguments.json:
            _show(console, report, uri, page=not arguments.no_page)
    if arguments.json:
        print(encode({"models": reports} if len(reports) > 1 else next(iter(reports.values()))), end="")
    return 0


def _folder(arguments: argparse.Namespace, scored: ScoredTable) -> str:
    """--out as it is for one model that was asked for; else a folder for each, where the run has several."""
    label = scored.model["label"]
    folder = str(arguments.out or join(arguments.output, FOLDER))
    if len(scored.run["models"]) == 1 or (arguments.out and arguments.model):
        return folder
    if not re.fullmatch(r"[\w.-]*[\w-][\w.-]*", label):
        raise ConfigError(f"the label {label!r} is no name of a folder; give --model and --out")
    return join(folder, label)


def _pictures(report: Mapping[str, Any], scored: ScoredTable, overrides: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """None where the source or the predictions cannot be read any more: the figures do not need them."""
    try:
        return report_pictures(report, scored, overrides)
    except RunError as error:
        print(printable(f"maskmill: the page has no pictures: {' '.join(str(error).split())}"), file=sys.stderr)
        return {}


def _show(console: PrintableConsole, report: Mapping[str, Any], uri: str, *, page: bool) -> None:
    model, run = report["model"], report["run"]
    console.print(f"{model['label']} {model['version']}, run {run.get('run_id')}: {run.get('state')}")
    for table in report_tables(report):
        console.print()
        console.print(table)
    console.print()
    for what, name in (("report", REPORT_FILE), *([("page", PAGE_FILE)] if page else [])):
        console.print(f"{what}: {join(uri, name)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
