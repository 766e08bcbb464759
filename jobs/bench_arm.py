"""One arm of `maskmill bench`, in a process of its own: python -m jobs.bench_arm ARM TASK.json RESULT.json."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.common import guarded
from pipeline.bench.worker import Task

__all__ = ["main"]

# A task and its result are the bench job's own.
MAX_TASK_BYTES = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arm, given, result = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(arm, Path(given), Path(result)))


def _run(arm: str, given: Path, result: Path) -> int:
    task = Task.from_json(given.read_bytes()[:MAX_TASK_BYTES].decode())
    if arm in ("limit", "decode"):
        from pipeline.bench.limit import decode_limit, model_limit

        rate = model_limit(task) if arm == "limit" else decode_limit(task)
        result.write_text(json.dumps({"images_per_s": rate}))
        return 0
    _peer(arm)(task)
    return 0


def _peer(arm: str) -> Callable[[Task], None]:
    """Imported when asked for: what one peer imports is no part of another's start-up."""
    if arm == "loop":
        from pipeline.bench.peers_loop import run_loop

        return run_loop
    if arm == "ray_data":
        from pipeline.dataflow.bench import run_ray_data

        return run_ray_data
    if arm == "daft":
        from pipeline.bench.peers_daft import run_daft

        return run_daft
    if arm == "transformers":
        from pipeline.bench.peers_transformers import run_transformers

        return run_transformers
    raise ValueError(f"expected an arm of the benchmark, got {arm!r}")


if __name__ == "__main__":
    sys.exit(main())
