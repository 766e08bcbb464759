"""May this process list, write, read and delete below an address, and can Delta commit there? Tried, then tidied up."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from fsspec.implementations.local import LocalFileSystem

from pipeline.deltacalls import delta_errors
from pipeline.errors import MaskmillError
from pipeline.preflight.finding import Findings
from pipeline.schema import UNITS
from pipeline.storage import delta_options, join, open_fs, storage_errors, write_file

__all__ = ["PREFIX", "check_space", "probe_output"]

# Delta, Spark and the table's own vacuum leave alone what begins with an underscore.
PREFIX = "_preflight-"
CONTENT = b"maskmill preflight: this may be deleted\n"
# What a file system wants for itself, and what a projection may be wrong by.
SPARE = 1.1
S3_ACTIONS = {"list": "s3:ListBucket", "write": "s3:PutObject", "read": "s3:GetObject", "delete": "s3:DeleteObject"}


def probe_output(uri: str, storage: Mapping[str, Any], *, delta: bool, where: str = "output.uri") -> Findings:
    """Put a folder of a new name below `uri`, use it, take it away. delta: whether the run commits to a Delta table.

    Nothing that was there is read or changed. Folders that had to be made on a local disk are removed too. Raises
    ConfigError where the address names no file system.
    """
    found = Findings()
    fs, base = open_fs(uri, storage)
    local = isinstance(fs, LocalFileSystem)
    made = _missing_folders(Path(base)) if local else []
    name = f"{PREFIX}{uuid.uuid4().hex}"
    folder, path = join(base, name), join(base, name, "probe")

    @contextlib.contextmanager
    def step(action: str, address: str) -> Iterator[None]:
        try:
            with storage_errors(address):
                yield
        except MaskmillError as error:
            found.problem(where, f"cannot {action}: {error}", _remedy(uri, action, local))

    try:
        with step("list", uri):
            fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):  # it is made by the run
                fs.ls(base, detail=False)
        written = False
        with step("write", join(uri, name)):
            fs.makedirs(folder, exist_ok=True)
            write_file(fs, path, CONTENT, join(uri, name, "probe"))
            written = True
        if written:
            with step("read", join(uri, name)):
                got = fs.cat_file(path)
                if got != CONTENT:
                    text = f"{join(uri, name)}: expected the {len(CONTENT)} bytes written, got {len(got)} others"
                    found.problem(where, text, "use storage that gives back what was written")
        if written and delta:
            with step("commit", join(uri, name, "commit")), delta_errors(join(uri, name, "commit")):
                DeltaTable.create(
                    join(uri, name, "commit").removeprefix("file://"),
                    schema=UNITS,
                    storage_options=delta_options(storage),
                )
    finally:
        with step("delete", join(uri, name)):
            _remove(fs, folder)
        for new in reversed(made):
            with contextlib.suppress(OSError):
                new.rmdir()
    return found


def _remove(fs: Any, folder: str) -> None:
    """Take a folder away and look whether it is gone. Raises what the file system raises."""
    fs.invalidate_cache()
    try:
        paths = fs.find(folder)
    except FileNotFoundError:
        paths = []
    except OSError:
        # Where listing is forbidden, what was put there still goes.
        paths = [f"{folder}/probe", f"{folder}/commit/_delta_log/{0:020}.json"]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(folder, ignore_errors=True)
    fs.invalidate_cache()
    left = [path for path in paths if fs.exists(path)]
    if left:
        raise PermissionError(f"{len(left)} probe objects could not be deleted, for example {left[0]}")


def _missing_folders(path: Path) -> list[Path]:
    """Folders on the way to `path` that are not there, the outermost first."""
    return [folder for folder in reversed((path, *path.parents)) if not folder.exists()]


def _remedy(uri: str, action: str, local: bool) -> str:
    if local:
        return f"give this user the right to {action} there and room to do it, or choose another output.uri"
    if action == "commit":
        return "give region, endpoint and credentials in output.storage or the environment: Delta reads them too"
    if uri.startswith("s3://"):
        return f"allow {S3_ACTIONS[action]} below {uri}, or give other credentials (environment or output.storage)"
    return f"allow these credentials to {action} below {uri}, or give others (environment or output.storage)"


def check_space(uri: str, storage: Mapping[str, Any], needed_bytes: float | None) -> tuple[Findings, int | None]:
    """Is there room for what the run will write? Also the free bytes, None where nothing tells (object stores)."""
    found = Findings()
    fs, base = open_fs(uri, storage)
    if not isinstance(fs, LocalFileSystem):
        found.notes.append(f"free space below {uri}: unknown, an object store does not say its quota")
        return found, None
    there = next(folder for folder in (Path(base), *Path(base).parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed_bytes is not None and needed_bytes * SPARE > free:
        found.problem(
            "output.uri",
            f"expected room for {needed_bytes / 1e9:.3g} GB and a tenth more at {uri}, got {free / 1e9:.3g} GB free",
            "free space there, choose another output.uri, or output.format=zstd for smaller label maps",
        )
    return found, free
