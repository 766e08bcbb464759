"""Every address goes through here: fsspec file systems, patterns, listings, fingerprints, and Delta's option names."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, RunError, StorageError
from pipeline.redaction import remember, unsigned

__all__ = [
    "Entry",
    "address",
    "clean",
    "delta_options",
    "expand",
    "is_http",
    "join",
    "list_entries",
    "list_folder",
    "open_fs",
    "read_bytes",
    "read_file",
    "relative",
    "storage_errors",
    "write_file",
]

MAX_BRACE_EXPANSIONS = 2_000_000
GLOB_CHARACTERS = "*?["
# File systems that are programs of their own: Jinja templates that say where bytes come from.
TEMPLATED = ("reference",)
READ_BYTES = 16 << 20
PART_SUFFIX = ".part"
LISTING_THREADS = 32
# From here on one listing of the folder is cheaper than asking for each named object.
NAMED_BEFORE_LISTING = 32
CLIENT_PACKAGES = {
    "adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "http", "requests", "s3fs",
    "urllib3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: its path on the file system, its size in bytes, and what changes when its content does."""

    path: str
    size_bytes: int
    fingerprint: str


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Raise what file systems raise (OSError and the clients' own) as a StorageError that says where."""
    try:
        yield
    except RunError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{where} does not exist") from error
    except PermissionError as error:
        raise StorageError(f"no permission for {where}: {error}") from error
    except OSError as error:
        raise StorageError(f"{where}: {type(error).__name__}: {error}") from error
    except ImportError as error:
        raise ConfigError(f"{where}: the file system needs a package that is not installed: {error}") from error
    except asyncio.IncompleteReadError as error:
        raise StorageError(f"{where}: the connection ended early: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in CLIENT_PACKAGES:
            raise StorageError(f"{where}: {type(error).__name__}: {error}") from error
        raise


def open_fs(uri: str, options: Mapping[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path on it. Raises ConfigError for an unknown protocol.

    From here on no message of this process repeats the credentials in `options`.
    """
    remember(options or {})
    for protocol in TEMPLATED:
        # Also in front of another address, as in reference::https://host/file.json.
        if any(part.partition("://")[0].lower() == protocol for part in uri.split("::")):
            raise ConfigError(f"{uri}: {protocol} is not read: such files are templates that name any other address")
    try:
        with storage_errors(uri):
            fs, path = url_to_fs(uri, **dict(options or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot open {uri}: {error}") from error
    return fs, str(path)


def address(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """`path` with its protocol, as `open_fs` takes it. Raises ConfigError for a name that is no UTF-8."""
    whole = str(fs.unstrip_protocol(path))
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the name {path!r} is not UTF-8; rename it") from error
    return whole


def clean(text: str) -> str:
    """Text that any table can hold: what a file system or a file gave as text but is no UTF-8 is written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def relative(root: str, path: str) -> str:
    """`path` below the folder `root`, for ids: see `clean`, and without what signs an HTTP address."""
    return unsigned(clean(path.removeprefix(root).lstrip("/")))


def join(root: str, *parts: str) -> str:
    """Join URI or path segments with single slashes."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str, options: Mapping[str, Any] | None = None, *, max_bytes: int) -> bytes:
    """A whole small file, bounded. Raises StorageError where it is missing, refused, or larger than `max_bytes`."""
    return read_file(*open_fs(uri, options), uri, max_bytes=max_bytes)


def read_file(fs: fsspec.AbstractFileSystem, path: str, where: str, *, max_bytes: int) -> bytes:
    """`read_bytes` on a file system that is already open."""
    parts: list[bytes] = []
    size = 0
    with storage_errors(where), fs.open(path, "rb") as file:
        while data := bytes(file.read(READ_BYTES)):  # a stream may give less than it is asked for
            parts.append(data)
            size += len(data)
            if size > max_bytes:
                raise StorageError(f"{where} is larger than the {max_bytes} bytes allowed here")
    return b"".join(parts)


def write_file(fs: fsspec.AbstractFileSystem, path: str, data: bytes, where: str) -> None:
    """A whole file: whoever reads, and whatever fails, there is the one before or this one, never a part.

    where: what errors say. Raises StorageError.
    """
    with storage_errors(where):
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data)  # object storage shows an object when it has all of it
            return
        part = f"{path}{PART_SUFFIX}"
        try:
            fs.pipe_file(part, data)
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):  # on a full disk it would take what room is left
                os.remove(part)
            raise


def expand(uri: str) -> list[str]:
    """Brace patterns (`{000..127}`, `{train,val}`) written out; a glob stays as it is.

    Raises ConfigError for unbalanced braces or more than 2,000,000 results.
    """
    results: list[str] = []
    try:
        for result in braceexpand(uri, escape=False):
            results.append(result)
            if len(results) > MAX_BRACE_EXPANSIONS:
                raise ConfigError(f"{uri} expands to more than {MAX_BRACE_EXPANSIONS} addresses")
    except ValueError as error:  # UnbalancedBracesError, which its type stubs lack
        raise ConfigError(f"{uri}: {error}") from error
    return results


def list_entries(
    uri: str, options: Mapping[str, Any] | None = None, *, suffixes: tuple[str, ...]
) -> tuple[fsspec.AbstractFileSystem, str, list[Entry]]:
    """List what a pattern, folder or file names, without opening anything.

    Returns the file system, the root that ids are relative to (the longest folder without a pattern), and the entries
    sorted by path. A folder means everything below it with one of `suffixes` (lower case, with the dot), hidden files
    and folders (a leading dot) left out; of what a glob matches, the suffix decides too; a name written out is taken
    as it is. Raises StorageError where the root is missing or refused, ConfigError where nothing matches.
    """
    patterns = expand(uri)
    fs, _ = open_fs(patterns[0], options)
    with storage_errors(uri):
        fs.invalidate_cache()  # instances are shared and remember listings; a resumed run must see what is there now
        entries: dict[str, Entry] = {}
        roots: set[str] = set()
        names: list[str] = []
        for pattern in patterns:
            path = str(fs._strip_protocol(pattern) if "::" not in pattern else open_fs(pattern, options)[1])
            magic = [path.find(character) for character in _glob_characters(fs) if character in path]
            if not magic:
                names.append(path)
                continue
            root = path[: min(magic)].rpartition("/")[0]
            found = fs.glob(path, detail=True)
            if not found and not fs.isdir(root):
                raise FileNotFoundError(root)
            entries |= _entries(fs, found, suffixes)
            roots.add(root)
        for path, info in _infos(fs, names):
            if info["type"] == "directory" or (is_http(fs) and _is_listing(fs, path, suffixes)):
                roots.add(path.rstrip("/"))
                entries |= list_folder(fs, path, suffixes)
            else:
                roots.add(path.rpartition("/")[0])
                entries[path] = _entry(path, info)
    if not entries:
        raise ConfigError(f"nothing matches {uri} (looked for {' '.join(suffixes)})")
    return fs, _common_folder(sorted(roots)), [entries[path] for path in sorted(entries)]


def list_folder(fs: fsspec.AbstractFileSystem, path: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, Entry]:
    """The files below a folder by path, hidden ones left out. Raises what the file system raises."""
    root = path.rstrip("/")
    found = fs.find(path, detail=True)
    visible = {name: info for name, info in found.items() if "/." not in name[len(root) :]}
    return _entries(fs, visible, suffixes)


def _entries(
    fs: fsspec.AbstractFileSystem, infos: Mapping[str, Mapping[str, Any]], suffixes: tuple[str, ...]
) -> dict[str, Entry]:
    return {
        path: _entry(path, info)
        for path, info in infos.items()
        if info["type"] == "file" and _bare(fs, path).endswith(suffixes)
    }


def _bare(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The name in lower case, without the query that an HTTP address may have."""
    return (path.partition("?")[0] if is_http(fs) else path).lower()


def _infos(fs: fsspec.AbstractFileSystem, paths: list[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """What the file system says about each named path, with few round trips where they share a folder."""
    known: dict[str, Mapping[str, Any]] = {}
    folders: dict[str, int] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    for folder, count in folders.items():
        if count >= NAMED_BEFORE_LISTING and not is_http(fs):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # objects may be readable, but not listable
                known |= {str(info["name"]): info for info in fs.ls(folder, detail=True)}
    with ThreadPoolExecutor(min(LISTING_THREADS, max(1, len(paths)))) as pool:
        yield from zip(paths, pool.map(lambda path: known.get(path) or fs.info(path), paths), strict=True)


def is_http(fs: fsspec.AbstractFileSystem) -> bool:
    return "http" in fs.protocol


def _is_listing(fs: fsspec.AbstractFileSystem, path: str, suffixes: tuple[str, ...]) -> bool:
    """Over HTTP every address is a file; one without a known suffix that links to addresses below it is a folder."""
    return not _bare(fs, path).endswith(suffixes) and bool(fs.isdir(path))


def _glob_characters(fs: fsspec.AbstractFileSystem) -> str:
    return "*[" if is_http(fs) else GLOB_CHARACTERS  # there, ? begins a query: signed addresses have one


def _common_folder(paths: list[str]) -> str:
    parts = [path.split("/") for path in paths]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "/".join(shared)


MARKS = ("ETag", "etag", "md5", "md5Hash", "Content-MD5", "mtime", "LastModified", "last_modified", "Last-Modified",
         "updated", "modificationTime", "created")  # fmt: skip


def _entry(path: str, info: Mapping[str, Any]) -> Entry:
    mark = next((str(info[key]) for key in MARKS if info.get(key)), "")
    size = int(info.get("size") or 0)
    return Entry(path, size, hashlib.blake2b(f"{size}-{mark}".encode(), digest_size=8).hexdigest())


def delta_options(options: Mapping[str, Any]) -> dict[str, str]:
    """fsspec's S3 options under the names that Delta's object store reads; others are passed on as they are.

    Handles `key`, `secret`, `token`, `endpoint_url`, `anon` and `client_kwargs: {endpoint_url, region_name}`.
    """
    names = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}
    client = dict(options.get("client_kwargs") or {})
    endpoint = client.get("endpoint_url") or options.get("endpoint_url")
    result = {names[key]: str(value) for key, value in options.items() if key in names and value is not None}
    result |= {key: str(value) for key, value in options.items() if key.isupper()}
    if client.get("region_name"):
        result["AWS_REGION"] = str(client["region_name"])
    if endpoint:
        result["AWS_ENDPOINT_URL"] = str(endpoint)
        result.setdefault("AWS_REGION", "us-east-1")
        if str(endpoint).startswith("http://"):
            result["AWS_ALLOW_HTTP"] = "true"
    if options.get("anon"):
        result["AWS_SKIP_SIGNATURE"] = "true"
    return result
