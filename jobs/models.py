"""List the registry: `maskmill models`."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jobs.common import guarded
from pipeline.models.registry import MODELS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        print("usage: maskmill models\n\nList the models of the registry, their weights and licences.")
        return 0 if arguments[0] in ("-h", "--help") else 2
    return guarded(_show)


def _show() -> int:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "task", "taxonomy", "weights", "licence", "paper"):
        table.add_column(column, overflow="fold")
    for spec in MODELS.values():
        table.add_row(spec.name, spec.task, spec.taxonomy, ", ".join(("none", *spec.weights)), spec.license, spec.paper)
    console = Console()
    # Into a file or a pipe, nothing is folded.
    console.print(table, width=None if console.is_terminal else 240)
    return 0


if __name__ == "__main__":
    sys.exit(main())
