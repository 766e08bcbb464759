"""The board between a training run's workers and its driver: events one way, the wish to stop the other.

Events travel as bytes, and nothing that they are made of is imported here: the board's process needs no torch.
"""

from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataflow.cluster import ray_errors

__all__ = ["Board"]


class _Store:
    """The actor."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._stop = False

    def push(self, event: bytes) -> None:
        self._events.append(event)

    def take(self) -> list[bytes]:
        taken, self._events = self._events, []
        return taken

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


class Board:
    """A handle of the board, for whoever is given it. Making one starts the actor."""

    def __init__(self) -> None:
        # On the driver's node, because without the driver nobody needs it, and any other node may go.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_Store).remote()

    def push(self, event: Any, *, wait: bool = False) -> None:
        """Say what has happened. wait: until the driver can take it."""
        pushed = self._actor.push.remote(cloudpickle.dumps(event))
        if wait:
            ray.get(pushed)

    def take(self) -> list[Any]:
        """What has been pushed since, in the order of each who pushed. Raises StorageError where the board is lost."""
        with ray_errors():
            return [cloudpickle.loads(event) for event in ray.get(self._actor.take.remote())]

    def stop(self, *, wait: bool) -> None:
        """Wish that the workers stop. wait: until they can know."""
        wished = self._actor.stop.remote()
        if wait:
            ray.get(wished)

    def stopping(self) -> bool:
        """Whether they are to stop."""
        return bool(ray.get(self._actor.stopping.remote()))
