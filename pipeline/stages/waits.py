"""Why an accelerator paused: what the call that ended the pause had been waiting for in it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import TypeVar

__all__ = ["CAUSES", "Span", "Waits", "idle_by_cause"]

# What a call waits for before it has a batch: a unit to be handed out (or a finished window to be taken), encoded
# bytes, decoded images, rows to be encoded, files to be written. `other` is none of these: the time in which the call
# itself was at work, or had no turn.
CAUSES = ("dispatch", "read", "decode", "encode", "write", "other")
Item = TypeVar("Item")
# cause, start, end; seconds of time.monotonic.
Span = tuple[str, float, float]
# Shorter waits are the cost of asking.
SHORTEST_S = 50e-6


class Waits:
    """What one call has waited for since its last batch. Only the call's own thread uses it."""

    def __init__(self) -> None:
        # Before the call began there was nothing for it to do.
        self._spans: list[Span] = [("dispatch", -inf, time.monotonic())]

    def add(self, cause: str, started: float) -> None:
        """A wait for `cause` from `started` until now."""
        ended = time.monotonic()
        if ended - started >= SHORTEST_S:
            self._spans.append((cause, started, ended))

    def over(self, cause: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, each wait for the next one noted."""
        iterator = iter(items)
        while True:
            started = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.add(cause, started)
            yield item

    def take(self) -> list[Span]:
        """All of them, to go with the batch that they delayed."""
        spans, self._spans = self._spans, []
        return spans


def idle_by_cause(spans: Sequence[Span], idle_from: float, idle_to: float) -> dict[str, float]:
    """Seconds of a pause by cause. spans: do not overlap each other; what they leave of the pause is `other`."""
    seconds: dict[str, float] = {}
    for cause, started, ended in spans:
        overlap = min(ended, idle_to) - max(started, idle_from)
        if overlap > 0:
            seconds[cause] = seconds.get(cause, 0.0) + overlap
    rest = idle_to - idle_from - sum(seconds.values())
    if rest > 0:
        seconds["other"] = rest
    return seconds
