"""What a training worker spends its time on."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["ACTIVITIES", "Stopwatch", "slowest"]

T = TypeVar("T")

# Waiting for a step's images, learning from them, validating, writing checkpoints.
ACTIVITIES = ("read", "learn", "validate", "save")


class Stopwatch:
    """Seconds by activity, until they are taken."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count what happens within."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] += time.monotonic() - began

    def each(self, activity: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each comes is counted."""
        iterator = iter(items)
        while True:
            with self.during(activity):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Everything since the last time."""
        taken, self._seconds = self._seconds, dict.fromkeys(ACTIVITIES, 0.0)
        return taken


def slowest(workers: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    """Of the worker that waited longest for its images: the others waited for it within their steps."""
    return max(workers, key=lambda seconds: seconds["read"])
