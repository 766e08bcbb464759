"""Every address goes through here: fsspec file systems, patterns, listings, fingerprints, and Delta's option names."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from fsspec.core import url_to_fs

from pipeline.errors import ConfigError, RunError, StorageError

__all__ = ["Entry", "delta_options", "expand", "join", "list_entries", "open_fs", "read_bytes", "storage_errors"]

MAX_BRACE_EXPANSIONS = 2_000_000
GLOB_CHARACTERS = "*?["


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
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"botocore", "aiohttp", "s3fs", "gcsfs", "azure", "fsspec"}:
            raise StorageError(f"{where}: {type(error).__name__}: {error}") from error
        raise


def open_fs(uri: str, options: Mapping[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path on it. Raises ConfigError for an unknown protocol."""
    try:
        with storage_errors(uri):
            fs, path = url_to_fs(uri, **dict(options or {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot open {uri}: {error}") from error
    return fs, str(path)


def join(root: str, *parts: str) -> str:
    """Join URI or path segments with single slashes."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str, options: Mapping[str, Any] | None = None, *, max_bytes: int) -> bytes:
    """A whole small file, bounded. Raises StorageError where it is missing, refused, or larger than `max_bytes`."""
    fs, path = open_fs(uri, options)
    with storage_errors(uri), fs.open(path, "rb") as file:
        data: bytes = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise StorageError(f"{uri} is larger than the {max_bytes} bytes allowed here")
    return data


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
    except UnbalancedBracesError as error:
        raise ConfigError(f"{uri}: {error}") from error
    return results


def list_entries(
    uri: str, options: Mapping[str, Any] | None = None, *, suffixes: tuple[str, ...]
) -> tuple[fsspec.AbstractFileSystem, str, list[Entry]]:
    """List what a pattern, folder or file names, without opening anything.

    Returns the file system, the root that ids are relative to (the longest folder without a pattern), and the entries
    sorted by path. A folder means everything below it with one of `suffixes` (lower case, with the dot).
    Raises StorageError where the root is missing or refused, ConfigError where nothing matches.
    """
    patterns = expand(uri)
    fs, _ = open_fs(patterns[0], options)
    infos: dict[str, Mapping[str, Any]] = {}
    roots: list[str] = []
    with storage_errors(uri):
        for pattern in patterns:
            path = str(fs._strip_protocol(pattern))
            if any(character in path for character in GLOB_CHARACTERS):
                root = path[: min(path.find(c) for c in GLOB_CHARACTERS if c in path)].rpartition("/")[0]
                found = fs.glob(path, detail=True)
                infos |= {name: info for name, info in found.items() if info["type"] == "file"}
                if not found and not fs.isdir(root):
                    raise FileNotFoundError(root)
            else:
                info = fs.info(path)
                if info["type"] == "directory":
                    root = path
                    found = fs.find(path, detail=True)
                    infos |= {name: i for name, i in found.items() if name.lower().endswith(suffixes)}
                else:
                    root = path.rpartition("/")[0]
                    infos[path] = info
            roots.append(root)
    if not infos:
        raise ConfigError(f"nothing matches {uri} (looked for {' '.join(suffixes)})")
    root = _common_folder(roots)
    entries = [_entry(path, infos[path]) for path in sorted(infos)]
    return fs, root, entries


def _common_folder(paths: list[str]) -> str:
    parts = [path.split("/") for path in paths]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "/".join(shared)


def _entry(path: str, info: Mapping[str, Any]) -> Entry:
    mark = next((str(info[key]) for key in ("ETag", "etag", "md5", "mtime", "LastModified", "created") if info.get(key)), "")
    size = int(info.get("size") or 0)
    return Entry(path, size, hashlib.blake2b(f"{size}-{mark}".encode(), digest_size=8).hexdigest())


def delta_options(options: Mapping[str, Any]) -> dict[str, str]:
    """fsspec's S3 options under the names that Delta's object store reads; others are passed on as they are.

    Handles `key`, `secret`, `token`, `endpoint_url`, `anon` and `client_kwargs: {endpoint_url, region_name}`.
    """
    names = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}  # noqa: S105
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
