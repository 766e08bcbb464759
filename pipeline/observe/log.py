"""The structured log: one JSON object a line, each with time, level, event and run_id, and never a credential."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from pipeline.errors import ConfigError
from pipeline.redaction import redact_text

__all__ = ["EventLog", "open_log"]

Level = Literal["info", "warning", "error"]


class EventLog:
    """Appends events. One that goes nowhere where it is made without a file."""

    def __init__(self, file: TextIO | None = None, *, run_id: str = "") -> None:
        self.run_id = run_id
        self._file = file
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether anybody reads it."""
        return self._file is not None

    def write(self, event: str, level: Level = "info", /, **fields: Any) -> None:
        """One line; fields that are None are left out. A line that cannot be written (a full disk) ends the log, with a
        word on standard error, and not the run."""
        if self._file is None:
            return
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "event": event,
            "run_id": self.run_id,
            **{name: value for name, value in fields.items() if value is not None},
        }
        line = json.dumps(_redacted(record), ensure_ascii=False, default=str) + "\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except (OSError, ValueError) as error:
                self._file = None
                logging.getLogger(__name__).warning("the log ends here: %s", error)


def open_log(path: str | None) -> EventLog:
    """The log of `log.path`: a file to append to, `-` for standard output, None for none. Raises ConfigError."""
    if path is None:
        return EventLog()
    if path == "-":
        return EventLog(sys.stdout)
    try:
        return EventLog(open(path, "a", encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(f"log.path {path} cannot be appended to: {error.strerror or error}") from error


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value
