"""run.json: what a run was made of and how it ended, as every job writes and reads it."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import SchemaError, StorageError
from pipeline.storage import join, open_fs, storage_errors, write_file

__all__ = ["RUN_FILE", "SCORES_FOLDER", "code_version", "read_progress", "read_run", "write_progress", "write_run"]

RUN_FILE = "run.json"
# Where `evaluate` puts the scores of a prediction table by default, below it.
SCORES_FOLDER = "_scores"
MAX_RUN_BYTES = 50_000_000


def read_run(uri: str, storage: Mapping[str, Any]) -> dict[str, Any]:
    """The newest run's run.json. Raises StorageError where there is none, SchemaError where it is none."""
    fs, base = open_fs(uri, storage)
    with storage_errors(join(uri, RUN_FILE)):
        try:
            data = fs.cat_file(join(base, RUN_FILE), start=0, end=MAX_RUN_BYTES)
        except FileNotFoundError as error:
            raise StorageError(f"{uri} is no output of a run: its {RUN_FILE} does not exist") from error
    try:
        run: dict[str, Any] = json.loads(data)
        [(model["label"], model["version"]) for model in run["models"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SchemaError(
            f"{join(uri, RUN_FILE)} is no run.json of maskmill: {type(error).__name__}: {error}"
        ) from error
    return run


def write_run(uri: str, storage: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write run.json (the newest run) and _runs/RUN_ID.json (each run). run: with its `run_id`. Raises StorageError."""
    data = json.dumps(run, indent=1).encode()
    fs, base = open_fs(uri, storage)
    with storage_errors(join(uri, RUN_FILE)):
        fs.makedirs(join(base, "_runs"), exist_ok=True)
    for name in (f"_runs/{run['run_id']}.json", RUN_FILE):
        write_file(fs, join(base, name), data, join(uri, RUN_FILE))


def write_progress(uri: str, storage: Mapping[str, Any], run_id: str, progress: Mapping[str, Any]) -> None:
    """Write how far a run is to _runs/RUN_ID.progress.json, while it goes on. Raises StorageError."""
    fs, base = open_fs(uri, storage)
    path = _progress_path(run_id)
    write_file(fs, join(base, path), json.dumps(progress, indent=1).encode(), join(uri, path))


def read_progress(uri: str, storage: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run last said of itself: `observed` of its run.json once it has ended, else its progress file, None where
    there is neither. Raises StorageError."""
    if isinstance(run.get("observed"), dict):
        return dict(run["observed"])
    fs, base = open_fs(uri, storage)
    path = _progress_path(str(run["run_id"]))
    with storage_errors(join(uri, path)):
        try:
            data = fs.cat_file(join(base, path), start=0, end=MAX_RUN_BYTES)
        except FileNotFoundError:
            return None
    try:
        progress = json.loads(data)
    except (ValueError, RecursionError):
        return None  # it may just be written
    return progress if isinstance(progress, dict) else None


def _progress_path(run_id: str) -> str:
    # The name comes from run.json, which others may write: it is no path.
    return f"_runs/{Path(run_id).name}.progress.json"


def code_version() -> dict[str, str]:
    """maskmill's version and commit, and the versions of what computes the labels."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "ray", "numpy", "pillow", "pyarrow")}
    return {"maskmill": pipeline.__version__, "commit": _commit(), "python": platform.python_version(), **versions}


def _commit() -> str:
    folder = Path(pipeline.__file__).parent.parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
