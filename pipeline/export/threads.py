"""Pieces in threads of this process, for a machine without a cluster: codecs and storage leave Python's lock alone."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

__all__ = ["map_in_threads"]


def map_in_threads(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int | None = None) -> Iterator[Any]:
    """Results as they come; tasks are made as threads ask for them. workers: None for one a core. The first error is
    raised when the pieces that have begun have ended."""
    count = workers or os.cpu_count() or 1
    waiting = iter(tasks)
    with ThreadPoolExecutor(count, "maskmill-piece") as pool:
        running: set[Future[Any]] = {pool.submit(function, task) for task in islice(waiting, count)}
        try:
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
                running |= {pool.submit(function, task) for task in islice(waiting, len(ended))}
        finally:
            for future in running:
                future.cancel()
