"""Why Ray Train starts the workers of a training run again: their own errors with the place, and their deaths."""

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

from ray.train import UserCallback

from pipeline.dataflow.board import Board
from pipeline.errors import RunError

__all__ = ["FailureNotes", "WorkerError", "WorkersFailed", "reasons"]

LISTED_WORKERS = 3
REASON_CHARACTERS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFailed:
    """All workers are started again, from the last checkpoint. reason: which of them failed, and how. raised: what
    their own code raised, where no worker died: a death makes the others raise."""

    reason: str
    raised: frozenset[str]


class WorkerError(Exception):
    """What a worker's own error was, and where. The error itself need not be one that pickles."""

    @classmethod
    def of(cls, error: Exception, when: str) -> Self:
        """It names the innermost frame that is not torch's."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if f"{os.sep}torch" not in frame.filename] or frames
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return cls(f"{type(error).__name__} {when} at {where}: {shorten(str(error), REASON_CHARACTERS)}")


class FailureNotes(UserCallback):  # type: ignore[misc]
    """In Ray Train's controller: pushes a WorkersFailed for every failure."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        failures = worker_exceptions.values()
        died = any(not isinstance(failure, RAISED) for failure in failures)
        raised = frozenset(str(failure) for failure in failures if isinstance(failure, WorkerError) and not died)
        self._board.push(WorkersFailed(reason=reasons(worker_exceptions), raised=raised))


# What a worker raises; all else that Ray Train tells of is its death.
RAISED = (WorkerError, RunError)


def reasons(failures: Mapping[int, Exception]) -> str:
    """Failures by rank in one line."""
    said = []
    for rank, failure in sorted(failures.items())[:LISTED_WORKERS]:
        if isinstance(failure, RAISED):
            said.append(f"worker {rank} failed: {failure}")
        else:
            # Ray Train wraps Ray's own words, which set off the ids of what died with a tab.
            death = str(getattr(failure, "health_check_failure", failure))
            lines = [line.strip() for line in death.splitlines() if not line.startswith("\t")]
            said.append(f"worker {rank} died: {shorten(' '.join(lines), REASON_CHARACTERS)}")
    more = len(failures) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "")
