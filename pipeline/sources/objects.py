"""Reading many small objects: several at once, in order, with bounded memory, and one bad object costs only itself."""

import hashlib
import json
import posixpath
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.errors import ConfigError, ImageTooLargeError, RowError, StorageError, UnreadableError
from pipeline.storage import Entry, clean, is_http, list_folder, open_fs, storage_errors

__all__ = [
    "ObjectReader",
    "Wanted",
    "below",
    "fingerprint",
    "is_missing",
    "list_objects",
    "open_beside",
    "pack",
    "read_objects",
    "unpack",
]

THREADS = 16
# The object, not the storage: trying again does not help.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
UNKNOWN_SIZE = 1 << 20
BYTES_IN_FLIGHT = 64 << 20
TRIES = 3
RETRY_AFTER_S = 0.05
# After this many failures in a row it is the storage that fails, not the object.
FAULTS_IN_A_ROW = 3
MAX_PAYLOAD = 1 << 30


@dataclass(frozen=True, slots=True)
class Wanted:
    """One object to read. size_bytes: what the listing said, None where it is not known."""

    fs: fsspec.AbstractFileSystem
    path: str
    size_bytes: int | None = None


class _FaultyError(UnreadableError):
    """An object that kept failing in a way that may pass."""


def read_objects(
    groups: Iterable[Sequence[Wanted | None]], *, max_bytes: int
) -> Iterator[list[bytes | RowError | None]]:
    """Each group's bytes in order, None where nothing was wanted; what cannot be read is its RowError.

    A missing object is an UnreadableError with a FileNotFoundError as its cause. Raises StorageError where several
    objects in a row fail in a way that may pass.
    """
    waiting: deque[tuple[list[Future[bytes | RowError] | None], int]] = deque()
    in_flight = 0
    held: list[list[bytes | RowError | None]] = []  # faults wait for a later object to show that the storage is well
    source = iter(groups)
    group = next(source, None)
    with ThreadPoolExecutor(THREADS, "maskmill-read") as pool:
        try:
            while waiting or group is not None:
                while group is not None:
                    weight = sum(_weight(item) for item in group if item is not None)
                    if waiting and (in_flight + weight > BYTES_IN_FLIGHT or len(waiting) >= 2 * THREADS):
                        break
                    futures = [None if item is None else pool.submit(_read, item, max_bytes) for item in group]
                    waiting.append((futures, weight))
                    in_flight += weight
                    group = next(source, None)
                futures, weight = waiting.popleft()
                results = [None if future is None else future.result() for future in futures]
                in_flight -= weight
                held.append(results)
                fault = next((item for item in results if isinstance(item, _FaultyError)), None)
                if fault is None:
                    yield from held
                    held.clear()
                elif len(held) == FAULTS_IN_A_ROW:
                    raise StorageError(str(fault))
            yield from held
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ObjectReader:
    """Objects one at a time."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._faults = 0

    def read(self, wanted: Wanted) -> bytes | RowError:
        """As `read_objects` reads each. Raises StorageError where several in a row fail in a way that may pass."""
        data = _read(wanted, self.max_bytes)
        self._faults = self._faults + 1 if isinstance(data, _FaultyError) else 0
        if self._faults == FAULTS_IN_A_ROW:
            raise StorageError(str(data))
        return data


def is_missing(result: bytes | RowError | None) -> bool:
    """Whether an object was read for and is not there."""
    return isinstance(result, RowError) and isinstance(result.__cause__, FileNotFoundError)


def list_objects(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, Entry] | None:
    """The files below a folder by path, none where it does not exist; None where listing is not for free or refused,
    and the objects are to be asked one by one. Raises StorageError."""
    if is_http(fs):
        return None
    with storage_errors(folder):
        fs.invalidate_cache()
        try:
            return list_folder(fs, folder)
        except PermissionError:
            return None
        except FileNotFoundError:
            return {}


def _weight(wanted: Wanted) -> int:
    return UNKNOWN_SIZE if wanted.size_bytes is None else wanted.size_bytes


def _read(wanted: Wanted, max_bytes: int) -> bytes | RowError:
    for attempt in range(TRIES):
        if attempt:
            time.sleep(RETRY_AFTER_S * attempt)
        try:
            with storage_errors(wanted.path):
                return _read_once(wanted, max_bytes)
        except RowError as error:
            return error
        except StorageError as error:
            if isinstance(error.__cause__, LASTING):
                failed = UnreadableError(clean(str(error)))
                failed.__cause__ = error.__cause__
                return failed
            fault = error
        except ValueError as error:  # a name that no file can have
            return UnreadableError(f"{wanted.path!r}: {error}")
    return _FaultyError(clean(f"{fault} (after {TRIES} attempts)"))


def _read_once(wanted: Wanted, max_bytes: int) -> bytes:
    size = wanted.size_bytes
    if size is None:
        info = wanted.fs.info(wanted.path)
        if info["type"] == "directory":
            raise IsADirectoryError(f"{wanted.path} is a folder")
        size = info.get("size")
    _check(wanted, size or 0, max_bytes)
    if not size:
        with wanted.fs.open(wanted.path, "rb") as file:
            data = b"".join(_chunks(file, max_bytes))
    else:
        # One byte more than listed shows an object that grew; asking with a range saves s3fs a HEAD request.
        data = wanted.fs.cat_file(wanted.path, start=0, end=size + 1)
        if len(data) > size:
            data = wanted.fs.cat_file(wanted.path)
    _check(wanted, len(data), max_bytes)
    return data


def _chunks(file: Any, max_bytes: int) -> Iterator[bytes]:
    total = 0
    while total <= max_bytes and (data := file.read(1 << 20)):
        total += len(data)
        yield data


def _check(wanted: Wanted, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageTooLargeError(f"{clean(wanted.path)} has {size} bytes, at most {max_bytes} are read (max_bytes)")


def below(folder: str, name: str) -> str | None:
    """The path of `name` in `folder`, or None where the name, which came with the data, leads out of it."""
    if not name or "\0" in name or "://" in name or name.startswith(("/", "\\")):
        return None
    clean = posixpath.normpath(name)
    return None if clean in {".", ".."} or clean.startswith("../") else f"{folder.rstrip('/')}/{clean}"


def open_beside(uri: str, source_uri: str, options: Mapping[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open `uri`, with the source's storage options where it is on the same kind of storage."""
    same = uri.partition("://")[0] == source_uri.partition("://")[0] if "://" in uri else "://" not in source_uri
    return open_fs(uri, options if same else {})


def fingerprint(parts: Iterable[str]) -> str:
    """One mark of all `parts` in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def pack(value: Any) -> bytes:
    """A unit's payload: zlib of JSON."""
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode())


def unpack(payload: bytes) -> Any:
    """The inverse of `pack`. Raises ConfigError for bytes that `pack` did not make."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(payload, MAX_PAYLOAD)
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ConfigError(f"this unit was planned by another source or version: {error}") from error
