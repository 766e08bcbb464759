"""One run of one arm: a command in a process of its own, and the moments at which it left something behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

import pipeline
from pipeline.bench.figures import OURS, Run
from pipeline.bench.outputs import our_times, peer_times
from pipeline.bench.worker import Task
from pipeline.errors import MaskmillError
from pipeline.printable import printable
from pipeline.redaction import redact_text

__all__ = ["launch"]

# What other programs would do beside their work.
QUIET = {
    "RAY_worker_niceness": "0",  # Ray's workers give way to other processes by default; the others do not
    "DAFT_PROGRESS_BAR": "0",
    "DAFT_ANALYTICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def launch(arm: str, task: Task, folder: Path, environment: Mapping[str, str], limit_s: float) -> Run:
    """Run an arm on an empty folder, which keeps what it wrote. environment: what a worker of a run has, for all alike.

    limit_s: after which it is ended. A run that fails is a Run with its problem.
    """
    folder.mkdir(parents=True)
    given, result, log = folder / "task.json", folder / "result.json", folder / "log.txt"
    if arm == OURS:
        given.with_suffix(".yaml").write_text(yaml.safe_dump(task.config.model_dump(mode="json")))
        command = [sys.executable, "-m", "jobs.label", str(given.with_suffix(".yaml"))]
    else:
        given.write_text(task.to_json())
        command = [sys.executable, "-m", "jobs.bench_arm", arm, str(given), str(result)]
    for path in (given, given.with_suffix(".yaml")):
        if path.exists():
            path.chmod(0o600)  # storage options may hold credentials
    root = str(Path(pipeline.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, **environment, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    variables.pop("RAY_ADDRESS", None)  # the machine that is measured is this one
    with log.open("wb") as words:
        started_at, started = time.time(), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Run(arm=arm, problem=f"no end within {limit_s:g} s")
        finally:
            wall_s = time.perf_counter() - started
            _end(process)
    if code:
        return Run(arm=arm, problem=f"exit {code}: {_last_words(log)}")
    try:
        if arm == OURS:
            written = our_times(Path(task.config.output.uri))
        elif result.exists():
            return Run(arm=arm, images_per_s=float(json.loads(result.read_text())["images_per_s"]))
        else:
            written = peer_times(Path(task.config.output.uri))
    except (MaskmillError, OSError, ValueError, KeyError) as error:
        return Run(arm=arm, problem=f"{type(error).__name__}: {error}")
    return Run(arm=arm, wall_s=wall_s, first_row_s=written.first_at - started_at, images_per_s=written.images_per_s)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """It and what it started, in its session; nothing where it has ended by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace")[-20_000:].splitlines() if line.strip()]
    return printable(redact_text(lines[-1][:300])) if lines else "it said nothing"
