"""Additions to a Delta log that cost what they add, however much the table holds.

deltalake 1.6 makes its picture of the whole table anew with each commit, twice, at 20 microseconds for every file that
the table has: a million files would cost 40 s a commit. What the protocol asks for is one object that must not have
been there before, `_delta_log/N.json` (Delta protocol, "Delta Log Entries" and "Action Reconciliation"), so additions
are written as just that. Everything else, removals above all, goes through deltalake.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import fsspec
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from fsspec.implementations.local import LocalFileSystem

import pipeline
from pipeline.errors import StorageError
from pipeline.storage import join, storage_errors

__all__ = ["MARK", "Addition", "append", "can_append"]

MARK = "maskmill.commit"
ATTEMPTS = 7
PAUSE_S = 0.25
# These know how to write an object only where there is none.
EXCLUSIVE = ("file", "local", "s3", "s3a")

Addition = Mapping[str, Any]


def can_append(fs: fsspec.AbstractFileSystem, table: DeltaTable) -> bool:
    """Does the storage keep a second writer out, and does the table ask for nothing that `append` does not do?"""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    versions = table.protocol()
    return any(name in EXCLUSIVE for name in protocols) and versions.min_writer_version <= 2


def append(
    fs: fsspec.AbstractFileSystem,
    base: str,
    after: int,
    app_id: str,
    app_version: int,
    writer: str,
    files: Sequence[Addition],
) -> int:
    """Commit `files` and the application's transaction as the first version behind `after`. Returns that version.

    base: the table's folder on `fs`. after: the newest version that this writer knows; versions that it has written
    itself since (a commit that was interrupted when it had landed), and those of other applications, are looked at and
    passed. writer: what tells this process from every other. files: path, size, partitionValues, modificationTime,
    stats of each. Raises CommitFailedError where another writer of the same application has been there, or one that
    changes the table's columns; StorageError where storage fails on and on.
    """
    mark = f"{writer}-{app_version}"
    now = int(time.time() * 1000)
    actions: list[Mapping[str, Any]] = [
        {
            "commitInfo": {
                "timestamp": now,
                "operation": "WRITE",
                "operationParameters": {"mode": "Append"},
                "engineInfo": f"maskmill:{pipeline.__version__}",
                MARK: mark,
            }
        },
        {"txn": {"appId": app_id, "version": app_version, "lastUpdated": now}},
    ]
    # The protocol's paths are URIs.
    actions += [{"add": {**file, "path": quote(file["path"], safe="/=:"), "dataChange": True}} for file in files]
    data = "".join(f"{json.dumps(action, separators=(',', ':'))}\n" for action in actions).encode()
    version, faults = after + 1, 0
    while True:
        path = join(base, "_delta_log", f"{version:020}.json")
        try:
            with storage_errors(path):
                if _put_new(fs, path, data):
                    return version
                written = [json.loads(line) for line in fs.cat_file(path).splitlines() if line.strip()]
        except StorageError:
            # Whether it was written or not: the next attempt finds either no object or this one's mark.
            faults += 1
            if faults == ATTEMPTS or isinstance(fs, LocalFileSystem):
                raise
            time.sleep(PAUSE_S * 2**faults)
            continue
        marks = [str(action.get("commitInfo", {}).get(MARK, "")) for action in written]
        if mark in marks:
            return version
        own = any(other.startswith(f"{writer}-") for other in marks)
        for action in () if own else written:
            if action.get("txn", {}).get("appId") == app_id or "metaData" in action or "protocol" in action:
                raise CommitFailedError(f"version {version} was written by another {app_id} or changes the table")
        version += 1


def _put_new(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a whole object where there is none. Returns False where there is one."""
    try:
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data, mode="create")
            return True
        part = join(path.rpartition("/")[0], f"_commit_{uuid.uuid4().hex}.json.tmp")
        try:
            fs.pipe_file(part, data)
            os.link(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
    except FileExistsError:
        return False
    return True
