"""Calls of deltalake: what they raise as ours, and again where storage failed for a moment."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from pipeline.errors import RunError, StorageError

__all__ = ["TAKEN_OVER", "delta_errors", "is_table", "patiently"]

log = logging.getLogger(__name__)

TAKEN_OVER = "another run has taken over this table, so this one stops"
PAUSES_S = (0.5, 2.0, 8.0)
# What the object store's client gives up on at once (a body that is cut off) or after its own tries.
PASSING = re.compile(
    r"response body|timed? ?out|connection|reset by peer|Service Unavailable|SlowDown|reduce your request"
    r"|internal ?error|LogSegment|\b50[0234]\b",
    re.IGNORECASE,
)
T = TypeVar("T")


class delta_errors:  # noqa: N801  (used as a context manager, like contextlib's)
    """Raise what deltalake raises as a StorageError that says where."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, RunError):
            return
        if isinstance(error, CommitFailedError):
            raise StorageError(f"{self.where}: {TAKEN_OVER}") from error
        if isinstance(error, DeltaError | OSError):
            raise StorageError(f"{self.where}: {_tidy(str(error))}") from error


def _tidy(text: str) -> str:
    """The object store's words without terminal colours, and its XML answer down to code and message."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", plain) for tag in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    return " ".join(plain.split())[:400]


def patiently(where: str, call: Callable[[], T]) -> T:
    """`call`, which reads or may be done twice, and once more after each of PAUSES_S while storage fails as it does in
    passing: a listing that is cut off in its middle must not end a run of days. Raises StorageError."""
    for pause_s in PAUSES_S:
        try:
            with delta_errors(where):
                return call()
        except StorageError as error:
            if isinstance(error.__cause__, CommitFailedError) or not PASSING.search(str(error)):
                raise
            log.info("again in %g s: %s", pause_s, error)
            time.sleep(pause_s)
    with delta_errors(where):
        return call()


def is_table(uri: str, options: Mapping[str, str]) -> bool:
    """Is there a Delta table? Not deltalake's `is_deltatable`: where a listing is cut off, it never comes back (1.6.6).

    options: of storage, as deltalake takes them. Raises StorageError.
    """

    def look() -> bool:
        try:
            DeltaTable(uri, storage_options=dict(options))
        except TableNotFoundError:
            return False
        return True

    return patiently(uri, look)
