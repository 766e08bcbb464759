"""Checkpoints on any storage: a folder of files, then one small manifest that makes them visible.

    checkpoints/step-000000120-1f3a.../model.safetensors, spec.json    the model, as `label` loads it
                                       state.safetensors, state.json   what training goes on from
    checkpoints/step-000000120-1f3a....json                            the manifest: sizes and hashes of the four

A folder without a manifest does not exist: whatever died while it was written, the checkpoint before it is whole.
"""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage import address, join, open_fs, read_file, storage_errors, write_file

__all__ = ["MODEL_FILES", "Checkpoint", "CheckpointStore"]

ResultT = TypeVar("ResultT")

FORMAT = 1
MAX_MANIFEST_BYTES = 1_000_000
MODEL_FILES = ("model.safetensors", "spec.json")
STATE_FILES = ("state.safetensors", "state.json")
PREFIX = "step-"
FIRST_PAUSE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint. name: of its folder. step: optimiser steps done. figure: what tells the best, None where it
    was not validated. files: (bytes, BLAKE2b) by name."""

    name: str
    step: int
    figure: float | None
    files: Mapping[str, tuple[int, str]]


class CheckpointStore:
    """The checkpoints of one run; one process writes. Nothing is cached: another may have written in between.

    keep: how many of the newest are kept. lower_is_better: of `figure`. attempts: tries to read or write a file, after
    pauses of 1, 2, 4, ... seconds. pause: how it waits.
    """

    def __init__(
        self,
        uri: str,
        storage: Mapping[str, Any],
        *,
        keep: int = 2,
        lower_is_better: bool = False,
        attempts: int = 5,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.fs, self.root = open_fs(uri, storage)
        self.path = join(self.root, "checkpoints")
        self._keep = keep
        self._lower = lower_is_better
        self._attempts = attempts
        self._pause = pause

    def uri(self, checkpoint: Checkpoint) -> str:
        """The address of a checkpoint's folder, as a model's `weights` takes it."""
        return address(self.fs, join(self.path, checkpoint.name))

    def save(
        self,
        *,
        step: int,
        model: Mapping[str, Tensor],
        spec: Mapping[str, Any],
        state: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        figure: float | None = None,
    ) -> Checkpoint:
        """Write a checkpoint, then delete those that need not be kept.

        model, spec: model.safetensors and spec.json. state, meta: state.safetensors and state.json. Raises StorageError
        where storage keeps failing; the checkpoints before are whole then.
        """
        name = f"{PREFIX}{step:09d}-{uuid.uuid4().hex[:12]}"
        contents: dict[str, bytes] = {
            "model.safetensors": safetensors.torch.save(dict(model)),
            "spec.json": _json(spec),
            "state.safetensors": safetensors.torch.save(dict(state)),
            "state.json": _json(meta),
        }
        files = {file: (len(data), _digest(data)) for file, data in contents.items()}
        checkpoint = Checkpoint(name=name, step=step, figure=figure, files=files)
        try:
            for file, data in contents.items():
                self._put(join(self.path, name, file), data)
            manifest = {"format": FORMAT, "name": name, "step": step, "figure": figure, "files": files}
            self._put(join(self.path, f"{name}.json"), _json(manifest))
        except StorageError:
            # What could not be written only takes room; where it cannot be deleted either, `clean` does it later.
            with contextlib.suppress(StorageError):
                self._delete(checkpoint.name)
            raise
        with contextlib.suppress(StorageError):  # a checkpoint too many harms nobody
            self._prune()
        return checkpoint

    def list(self) -> list[Checkpoint]:
        """Every checkpoint whose manifest is whole, by step. Raises StorageError."""
        names = self._tried(self._names)
        found = [self._manifest(name) for name in sorted(names) if name.endswith(".json")]
        return sorted((item for item in found if item is not None), key=lambda item: (item.step, item.name))

    def newest(self) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that reads as it was written, with model, state and meta; None where there is none.

        Raises CheckpointError where there are checkpoints and every one of them is damaged, StorageError where storage
        fails (which says nothing about the files).
        """
        damaged = []
        for checkpoint in reversed(self.list()):
            try:
                return checkpoint, *self.read(checkpoint)
            except CheckpointError as error:
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.path} is whole: {'; '.join(damaged)[:500]}")
        return None

    def read(self, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """model, state and meta. Raises CheckpointError for files that are not as they were written."""
        contents = {file: self._get(checkpoint, file) for file in ("model.safetensors", *STATE_FILES)}
        try:
            meta = json.loads(contents["state.json"])
            return (
                safetensors.torch.load(contents["model.safetensors"]),
                safetensors.torch.load(contents["state.safetensors"]),
                meta,
            )
        except (ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.name} is no checkpoint: {error}") from error

    def best(self) -> Checkpoint | None:
        """The validated checkpoint with the best figure, of equal ones the first; None where none was validated."""
        scored = [item for item in self.list() if item.figure is not None]
        sign = 1.0 if self._lower else -1.0
        return min(scored, key=lambda item: (sign * (item.figure or 0.0), item.step), default=None)

    def publish(self, checkpoint: Checkpoint, uri: str, storage: Mapping[str, Any]) -> None:
        """Copy a checkpoint's model to a folder of a name that stays. Raises CheckpointError, StorageError."""
        fs, path = open_fs(uri, storage)
        contents = {file: self._get(checkpoint, file) for file in MODEL_FILES}
        for file, data in contents.items():
            self._put(join(path, file), data, fs=fs)

    def clean(self) -> None:
        """Delete what a killed writer left behind: folders without a manifest. Only the one writer may call it."""
        with storage_errors(self.path):
            if not self.fs.exists(self.path):
                return
            whole = {checkpoint.name for checkpoint in self.list()}
            for path in map(str, self.fs.ls(self.path, detail=False)):
                name = path.rstrip("/").rpartition("/")[2]
                if name.startswith(PREFIX) and name.removesuffix(".json") not in whole:
                    self.fs.rm(path, recursive=True)

    def put(self, name: str, data: bytes) -> str:
        """Write a file beside the checkpoints (figures, what a run that diverged leaves); returns its path."""
        path = join(self.root, name)
        self._put(path, data)
        return path

    def _prune(self) -> None:
        checkpoints = self.list()
        best = self.best()
        kept = {item.name for item in checkpoints[-self._keep :]} | ({best.name} if best else set())
        for checkpoint in checkpoints:
            if checkpoint.name not in kept:
                self._delete(checkpoint.name)

    def _delete(self, name: str) -> None:
        """The manifest first: half a folder must not be visible."""
        with storage_errors(self.path):
            for path in (join(self.path, f"{name}.json"), join(self.path, name)):
                if self.fs.exists(path):
                    self.fs.rm(path, recursive=True)

    def _put(self, path: str, data: bytes, fs: Any = None) -> None:
        fs = fs or self.fs

        def write() -> None:
            with storage_errors(path):
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write_file(fs, path, data, path)

        self._tried(write)

    def _names(self) -> Sequence[str]:
        with storage_errors(self.path):
            self.fs.invalidate_cache()
            return [str(name) for name in self.fs.ls(self.path, detail=False)] if self.fs.exists(self.path) else []

    def _tried(self, action: Callable[[], ResultT]) -> ResultT:
        """What an action gives, once faults that pass have passed. Raises StorageError for others."""
        attempt = 0
        while True:
            try:
                return action()
            except StorageError as error:
                # What is missing, or larger than it may be, will be so again.
                passing = not isinstance(error.__cause__, FileNotFoundError | None)
                attempt += 1
                if not passing or attempt == self._attempts:
                    raise
            self._pause(FIRST_PAUSE_S * 2 ** (attempt - 1))

    def _get(self, checkpoint: Checkpoint, file: str) -> bytes:
        size, digest = checkpoint.files[file]
        where = join(self.path, checkpoint.name, file)
        try:
            data = self._tried(lambda: read_file(self.fs, where, where, max_bytes=size))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) or error.__cause__ is None:
                raise CheckpointError(f"{where} is missing or larger than it was written: {error}") from error
            raise
        if (len(data), _digest(data)) != (size, digest):
            raise CheckpointError(f"{where} is not what was written: expected {size} bytes of hash {digest}")
        return data

    def _manifest(self, path: str) -> Checkpoint | None:
        """None for what is no whole manifest: its writer died over it, or has just deleted it."""
        try:
            data = self._tried(lambda: read_file(self.fs, path, path, max_bytes=MAX_MANIFEST_BYTES))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        try:
            tree = json.loads(data)
            files = {file: (int(tree["files"][file][0]), str(tree["files"][file][1])) for file in FILES}
            figure = None if tree["figure"] is None else float(tree["figure"])
            name = path.rpartition("/")[2].removesuffix(".json")
            return Checkpoint(name=name, step=int(tree["step"]), figure=figure, files=files)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None


FILES: Sequence[str] = (*MODEL_FILES, *STATE_FILES)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
