"""The folder of an export: files that are whole or not there, and what pieces leave for the fold."""

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from pipeline.storage import join, open_fs, storage_errors, write_file

__all__ = ["STATE", "OutputFolder"]

# Everything here is the export's own and no part of the format.
STATE = "_export"
PIECES = f"{STATE}/pieces"
WRITES_AT_ONCE = 8
SPOOL_BYTES = 8 << 20


class OutputFolder:
    """See base.Folder and base.Whole. Use as a context manager: writing on object storage goes on beside the work."""

    def __init__(self, uri: str, storage: Mapping[str, Any], pieces: int = 0) -> None:
        self.uri = uri
        self.pieces = pieces
        self.fs, self.base = open_fs(uri, storage)
        self._is_local = isinstance(self.fs, LocalFileSystem)
        self._folders: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._writes: deque[Future[None]] = deque()

    def __enter__(self) -> "OutputFolder":
        if not self._is_local:
            self._pool = ThreadPoolExecutor(WRITES_AT_ONCE, "maskmill-export")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def flush(self) -> None:
        """Wait until all files are there. Raises StorageError."""
        while self._writes:
            self._writes.popleft().result()

    def file(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if self._pool is None:
            write_file(self.fs, path, data, join(self.uri, name))
            return
        self._writes.append(self._pool.submit(write_file, self.fs, path, data, join(self.uri, name)))
        while len(self._writes) > 2 * WRITES_AT_ONCE:
            self._writes.popleft().result()

    @contextlib.contextmanager
    def spool(self, name: str) -> Iterator[BinaryIO]:
        """See base.Folder. It grows on this machine's disk: an object that is cut would look like a whole one."""
        path = self._path(name)
        folder = os.path.dirname(path) if self._is_local else None
        with storage_errors(join(self.uri, name)):
            descriptor, part = tempfile.mkstemp(prefix=".maskmill-", suffix=".part", dir=folder)
        try:
            with storage_errors(join(self.uri, name)):
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                if self._is_local:
                    os.chmod(part, 0o666 & ~_umask())
                    os.replace(part, path)
                else:
                    self.fs.put_file(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)

    def lines(self, stream: str) -> Iterator[str]:
        """See base.Whole."""
        for index in range(self.pieces):
            name = piece_name(index, f"{stream}.jsonl")
            path = join(self.base, name)
            with storage_errors(join(self.uri, name)):
                if not self.fs.exists(path):
                    continue
                with self.fs.open(path, "rb") as file:
                    for line in file:
                        yield line.decode().removesuffix("\n")

    def exists(self, name: str) -> bool:
        with storage_errors(join(self.uri, name)):
            return bool(self.fs.exists(join(self.base, name)))

    def is_empty(self) -> bool:
        """Whether there is nothing but what the system puts into folders."""
        with storage_errors(self.uri):
            self.fs.invalidate_cache()
            if not self.fs.exists(self.base):
                return True
            return not [
                path for path in self.fs.ls(self.base, detail=False) if path.rstrip("/") != self.base.rstrip("/")
            ]

    def listed(self, folder: str) -> set[str]:
        """Names of the files in a folder of the export, none where it is not there."""
        path = join(self.base, folder)
        with storage_errors(join(self.uri, folder)):
            self.fs.invalidate_cache()
            if not self.fs.exists(path):
                return set()
            return {str(name).rpartition("/")[2] for name in self.fs.ls(path, detail=False)}

    def remove(self, folder: str) -> None:
        """Remove a folder of the export with what is in it."""
        path = join(self.base, folder)
        with storage_errors(join(self.uri, folder)):
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)

    def _path(self, name: str) -> str:
        path = join(self.base, name)
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            with storage_errors(join(self.uri, name)):
                self.fs.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        return path


class Lines:
    """The lines of a piece, kept on disk until the piece is whole."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}

    def add(self, stream: str, text: str) -> None:
        if stream not in self._files:
            self._files[stream] = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115  (closed by `store`)
        self._files[stream].write(f"{text}\n".encode())

    def store(self, folder: OutputFolder, index: int) -> None:
        for stream, lines in self._files.items():
            lines.seek(0)
            with folder.spool(piece_name(index, f"{stream}.jsonl")) as file:
                shutil.copyfileobj(lines, file)
            lines.close()


def piece_name(index: int, what: str) -> str:
    """What piece `index` leaves for the fold."""
    return f"{PIECES}/{index:06d}.{what}"


def _umask() -> int:
    """There is no asking for it without setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
