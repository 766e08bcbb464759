"""Pieces of an export as tasks of a Ray cluster: each writes its own files, and only its counts come back."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray

from pipeline.dataflow.cluster import ENVIRONMENT, ray_errors

__all__ = ["map_on_cluster"]

# A node may go while it writes: what it left is written again, with the same bytes.
TRIES = 5
# So many tasks wait for each core, so that none waits for the driver.
AHEAD = 2


def map_on_cluster(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int | None = None) -> Iterator[Any]:
    """Results as they come, from tasks of one CPU each. workers: at once, None for as many as the cluster has CPUs.

    Raises RunError as the tasks raised it, StorageError where the cluster fails.
    """
    remote = ray.remote(num_cpus=1, max_retries=TRIES, runtime_env=ENVIRONMENT)(function)
    count = workers or AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(tasks)
    with ray_errors():
        running = [remote.remote(task) for task in islice(waiting, count)]
        while running:
            ended, running = ray.wait(running, num_returns=1)
            for reference in ended:
                yield ray.get(reference)
            running += [remote.remote(task) for task in islice(waiting, len(ended))]
