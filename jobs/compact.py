"""Make few large files of many small ones: `maskmill compact OUTPUT [options] [storage.key=value ...]`."""

import argparse
import sys
from collections.abc import Sequence

from jobs.common import guarded, storage_options
from pipeline.compaction import FILE_BYTES, KEEP_HOURS, THREADS, compact
from pipeline.errors import ConfigError
from pipeline.rows import PREDICTIONS, SCORES
from pipeline.runfile import read_run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill compact",
        description="few large files of many small ones, with the same rows; what is small goes first, and a call that "
        "was cut goes on where it was",
    )
    parser.add_argument("output", help="output.uri of the run")
    parser.add_argument("--file-mb", type=int, default=FILE_BYTES >> 20, help="size of the new files (%(default)s)")
    parser.add_argument(
        "--keep-hours",
        type=int,
        default=KEEP_HOURS,
        help="hours for which the old files stay, for readers that began before (%(default)s); the next run or call "
        "after that deletes them",
    )
    parser.add_argument("--threads", type=int, default=THREADS, help="files written at once (%(default)s)")
    parser.add_argument(
        "--take-over", action="store_true", help="go on although run.json says that a run is at work: it is stopped"
    )
    parser.add_argument("storage", nargs="*", help="fsspec options of the output, storage.key=value")
    return guarded(lambda: _compact(parser.parse_args(argv)))


def _compact(arguments: argparse.Namespace) -> int:
    for name in ("file_mb", "threads"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(arguments, name)}")
    if arguments.keep_hours < 0:
        raise ConfigError(f"--keep-hours must be 0 or more, got {arguments.keep_hours}")
    storage = storage_options(arguments.storage)
    run = read_run(arguments.output, storage)
    if run.get("state") == "running" and not arguments.take_over:
        raise ConfigError(
            f"run {run['run_id']} is at work on {arguments.output}, or died there: compaction would stop it with exit "
            "code 4 at its next commit; wait for its end, or say --take-over"
        )
    result = compact(
        arguments.output,
        storage,
        schema=SCORES if run.get("job") == "evaluate" else PREDICTIONS,
        file_bytes=arguments.file_mb << 20,
        keep_hours=arguments.keep_hours,
        threads=arguments.threads,
    )
    print(
        f"{result['files_before']} files are {result['files_after']} now, {result['rewritten'] / 1e6:.0f} MB written; "
        f"{result['removed']} files deleted, replaced ones stay for {arguments.keep_hours} hours"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
