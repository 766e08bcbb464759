"""Files of weights that lie elsewhere: a copy on this machine, fetched once, whole, and anew where the file changed."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from fsspec.callbacks import Callback

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage import MARKS, is_http, open_fs, storage_errors

__all__ = [
    "OFFLINE",
    "cache_folder",
    "check_sha256",
    "local_file",
    "no_network",
    "offline",
    "reason",
    "unpinned",
    "unreachable",
]

log = logging.getLogger(__name__)

PIN = "#sha256="
READ_BYTES = 1 << 20
PART = ".part-"
# Of the second name too, huggingface_hub's own, so that one switch serves all.
OFFLINE = ("MASKMILL_OFFLINE", "HF_HUB_OFFLINE")
# Where there is no other machine to be reached: nothing to keep a copy of.
HERE = {"file", "local", "memory"}
# A large file takes longer than aiohttp's five minutes; a connection that says nothing for one is dead.
HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
# By name, because each comes from a client that need not be installed.
UNREACHABLE = {
    "ClientConnectorError", "ConnectError", "ConnectTimeout", "ConnectTimeoutError", "EndpointConnectionError",
    "OfflineModeIsEnabled", "gaierror",
}  # fmt: skip


def offline() -> bool:
    """Whether MASKMILL_OFFLINE or HF_HUB_OFFLINE says that nothing may be fetched."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


def cache_folder() -> Path:
    """Where copies of weights are kept: below MASKMILL_CACHE, by default ~/.cache/maskmill."""
    return Path(os.environ.get("MASKMILL_CACHE") or Path.home() / ".cache" / "maskmill") / "weights"


def unpinned(weights: str) -> tuple[str, str]:
    """An address without its `#sha256=...`, and those 64 digits, "" where it has none. Raises CheckpointError."""
    address, pin, digits = weights.partition(PIN)
    if pin and not re.fullmatch("[0-9a-f]{64}", digits.lower()):
        raise CheckpointError(f"weights {weights!r}: expected 64 hex digits after {PIN}, got {len(digits)} characters")
    return address, digits.lower()


def no_network(what: str, place: Path | str, why: str) -> CheckpointError:
    """The error for weights that are on another machine only. place: where a copy would be looked for."""
    return CheckpointError(
        f"{what} cannot be fetched: {why}; it is not at {place} either: copy it there from a machine that has "
        "network, or give the path of a copy as weights"
    )


def unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no way to the other machine."""
    seen: set[int] = set()  # a chain may come back to itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ConnectionError) or {kind.__name__ for kind in type(error).__mro__} & UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_sha256(path: Path | str, sha256: str, where: str) -> None:
    """Raise CheckpointError where a file's content is not the one that its address asks for ("": any is)."""
    if sha256 and (found := _sha256(path)) != sha256:
        raise CheckpointError(f"{where} is not the file that was asked for: expected sha256 {sha256}, got {found}")


@contextlib.contextmanager
def local_file(uri: str, storage: Mapping[str, Any], *, max_bytes: int, sha256: str = "") -> Iterator[str]:
    """The path on this machine of a file with the content of `uri`, as long as the context lasts.

    A file elsewhere is kept in `cache_folder`, one version of each address: it is fetched once for all processes of
    this machine, and anew where its size, etag or time of change say so. With `sha256` the copy is known to be right,
    and nobody is asked. A copy laid there by hand (see `no_network`) serves where there is no network. Where the folder
    cannot be written, or the server tells nothing that changes with the content, the file is fetched each time.

    Raises CheckpointError for a wrong size or sum (what was fetched is removed) and without network, StorageError where
    storage fails, with FileNotFoundError as its cause where the file does not exist.
    """
    if uri.startswith(("http://", "https://")):
        storage = {**storage, "client_kwargs": {"timeout": HTTP_TIMEOUT, **(storage.get("client_kwargs") or {})}}
    fs, path = open_fs(uri, storage)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & {"file", "local"}:
        with storage_errors(uri):
            _check_size(os.stat(path).st_size, max_bytes, uri)
            check_sha256(path, sha256, uri)
        yield path
        return
    folder = None if protocols & HERE or "::" in uri else _folder(uri, storage)
    if folder is not None:
        yield str(_Copy(fs, path, uri, folder, max_bytes, sha256).get())
        return
    with tempfile.TemporaryDirectory() as temporary, storage_errors(uri):
        local = Path(temporary) / "weights"
        info = _info(fs, path)
        _check_size(info.get("size"), max_bytes, uri)
        _download(fs, path, uri, local, info.get("size"), max_bytes)
        check_sha256(local, sha256, uri)
        yield str(local)


def _folder(uri: str, storage: Mapping[str, Any]) -> Path | None:
    """The folder of the copies of one address, None where it cannot be made."""
    client = dict(storage.get("client_kwargs") or {})
    key = json.dumps([uri, storage.get("endpoint_url") or client.get("endpoint_url")])
    folder = cache_folder() / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if offline():
            raise no_network(uri, folder, f"{OFFLINE[0]} or {OFFLINE[1]} is set") from error
        log.warning("weights are fetched each time, %s cannot be written: %s", folder, reason(error))
        return None
    return folder


class _Copy:
    """The copies of one address: MARK-NAME as fetched, NAME as laid there by hand."""

    def __init__(
        self, fs: fsspec.AbstractFileSystem, path: str, uri: str, folder: Path, max_bytes: int, sha256: str
    ) -> None:
        self.fs, self.path, self.uri, self.folder = fs, path, uri, folder
        self.max_bytes, self.sha256 = max_bytes, sha256
        last = (path.partition("?")[0] if is_http(fs) else path).rstrip("/").rpartition("/")[2]
        self.name = re.sub(r"[^\w.-]", "_", last)[-100:]
        self.by_hand = folder / self.name

    def get(self) -> Path:
        if self.sha256:
            right = next((copy for copy in self._copies() if _sha256(copy) == self.sha256), None)
            if right:
                return right
        if offline():
            return self._without_network(f"{OFFLINE[0]} or {OFFLINE[1]} is set")
        with storage_errors(self.uri):
            try:
                info = _info(self.fs, self.path)
            except Exception as error:
                if unreachable(error):
                    return self._without_network(reason(error), error)
                raise
            _check_size(info.get("size"), self.max_bytes, self.uri)
            mark = next((str(info[key]) for key in MARKS if info.get(key)), "")
            version = hashlib.blake2b(f"{info.get('size')}-{mark}".encode(), digest_size=8).hexdigest()
            copy = self.folder / f"{version}-{self.name}"
            with _locked(self.folder):
                # Asked under the lock: another process may have fetched it by now.
                if not mark or self.sha256 or not copy.is_file():
                    self._fetch(copy, info.get("size"))
        return copy

    def _fetch(self, copy: Path, size: int | None) -> None:
        for left in self.folder.glob(f"{PART}*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        part = self.folder / f"{PART}{os.getpid()}"
        try:
            try:
                _download(self.fs, self.path, self.uri, part, size, self.max_bytes)
            except Exception as error:
                if unreachable(error):
                    raise no_network(self.uri, self.by_hand, reason(error)) from error
                raise
            check_sha256(part, self.sha256, self.uri)
            os.replace(part, copy)
        finally:
            part.unlink(missing_ok=True)
        for older in self._fetched():
            if older != copy:
                older.unlink(missing_ok=True)

    def _fetched(self) -> list[Path]:
        return [
            path for path in self.folder.glob("*") if re.fullmatch("[0-9a-f]{16}-" + re.escape(self.name), path.name)
        ]

    def _copies(self) -> list[Path]:
        """The copy laid by hand, then the fetched ones, the newest first."""
        fetched = sorted(self._fetched(), key=lambda path: path.stat().st_mtime, reverse=True)
        return [*([self.by_hand] if self.by_hand.is_file() else []), *fetched]

    def _without_network(self, why: str, error: Exception | None = None) -> Path:
        """The newest copy there is. Raises CheckpointError."""
        copies = self._copies()
        if not copies:
            raise no_network(self.uri, self.by_hand, why) from error
        if self.sha256:
            check_sha256(copies[0], self.sha256, f"{self.uri} (its copy {copies[0]})")
        _check_size(copies[0].stat().st_size, self.max_bytes, str(copies[0]))
        log.warning("%s: %s; using the copy %s", self.uri, why, copies[0])
        return copies[0]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; where the file system has no locks, all of them."""
    with (folder / ".lock").open("wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _info(fs: fsspec.AbstractFileSystem, path: str) -> Mapping[str, Any]:
    """What the file system says now. Raises what it raises, FileNotFoundError only for what does not exist."""
    fs.invalidate_cache()  # instances are shared and remember listings
    try:
        info: Mapping[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        # Over HTTP every failure is called that: a refusal, or no way to the server, is something else.
        cause = error.__cause__ if is_http(fs) else None
        if cause is None or getattr(cause, "status", 0) in (404, 410):
            raise
        raise cause from None
    return info


def _check_size(size: int | None, max_bytes: int, where: str) -> None:
    if size is not None and size > max_bytes:
        raise CheckpointError(f"{where} has {size} bytes, expected at most {max_bytes}")


class _Bound(Callback):  # type: ignore[misc]
    """Ends a download that becomes larger than it may."""

    def __init__(self, max_bytes: int, where: str) -> None:
        super().__init__()
        self._max_bytes, self._where = max_bytes, where

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        _check_size(self.value, self._max_bytes, self._where)


def _download(
    fs: fsspec.AbstractFileSystem, path: str, uri: str, local: Path, size: int | None, max_bytes: int
) -> None:
    """Raises StorageError where less or more came than was announced."""
    fs.get_file(path, str(local), callback=_Bound(max_bytes, uri))
    came = local.stat().st_size
    if size is not None and came != size:
        raise StorageError(f"{uri}: expected {size} bytes, got {came}")


def _sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
