"""Corrections back as targets: `maskmill import [CONFIG.yaml] format=... uri=... export.uri=... output.uri=...`."""

import sys
from collections.abc import Sequence

from jobs.common import config_job
from pipeline.config_export import ImportConfig
from pipeline.corrections.read import import_corrections
from pipeline.errors import FailureBudgetExceeded
from pipeline.progress import Reporter

__all__ = ["main", "read"]

SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("import", ImportConfig, read, sys.argv[1:] if argv is None else argv)


def read(config: ImportConfig) -> int:
    """Import to the end. Raises RunError, FailureBudgetExceeded where no image could be read."""
    reporter = Reporter("importing")
    told = import_corrections(config, reporter.say)
    reporter.say(f"{told['images']} images with {told['kind']} targets in {config.output.uri}")
    for kind, count in told["passed_over"].items():
        reporter.say(f"  passed over: {count} {kind}")
    for failure in told["failed"][:SHOWN]:
        reporter.say(f"  not read: {failure['image']}: {failure['error_message']}")
    if len(told["failed"]) > SHOWN:
        reporter.say(f"  nor {len(told['failed']) - SHOWN} more; import.json lists all")
    if not told["images"]:
        raise FailureBudgetExceeded(f"no correction could be read; {config.output.uri}/import.json says why")
    columns = " ".join(f"source.target_columns.{name}={name}" for name in told["source"]["target_columns"])
    space = f"{config.output.uri}/taxonomy.yaml"
    reporter.say(
        f"  maskmill evaluate source.format=parquet source.uri={config.output.uri} source.id_column=image_id {columns} "
        f"score.taxonomy={space} predictions.uri=..."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
