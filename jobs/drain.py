"""Stop a cluster's jobs before the cluster goes: `maskmill drain --address http://HEAD:8265`."""

import argparse
import os
import sys
from collections.abc import Sequence

from jobs.common import guarded
from pipeline.dataflow import submission
from pipeline.dataflow.drain import drain
from pipeline.errors import EXIT_UNEXPECTED, ConfigError
from pipeline.redaction import redact_text

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 where all jobs ended in time, else 1."""
    parser = argparse.ArgumentParser(
        "maskmill drain",
        description="ask all jobs of a cluster to stop and wait until they have: each commits what it has, or writes a "
        "checkpoint; the head's pod runs this before it ends",
    )
    parser.add_argument(
        "--address", help="the cluster's job server, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS)"
    )
    parser.add_argument("--timeout-s", type=float, default=90.0, help="seconds to wait (default: 90)")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _drain(arguments))


def _drain(arguments: argparse.Namespace) -> int:
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError("--address must be the cluster's job server, as in http://HEAD:8265")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, flush=True)

    left = drain(submission.connect(address), arguments.timeout_s, say)
    if left:
        print(f"maskmill: still running after {arguments.timeout_s:g} s: {', '.join(left)}", file=sys.stderr)
        return EXIT_UNEXPECTED
    if not said:
        print(f"no job is at work at {redact_text(address)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
