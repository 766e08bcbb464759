"""What a run costs: the prices of the config times what the cluster had, for as long as it had it."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config import CostConfig

__all__ = ["Bill", "ClusterSize", "CostMeter", "money"]

HOUR_S = 3600.0
# A node that joins is noticed after so long at most.
SAMPLE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSize:
    """What is paid for, used or idle: nodes that are alive, and their GPUs and CPUs in all."""

    nodes: int
    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """In `currency`: per_hour as the cluster is now, so_far, per_1000_images and to_go of what this run did and has
    left; None before its first image."""

    currency: str
    per_hour: float
    so_far: float
    per_1000_images: float | None
    to_go: float | None

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "currency": self.currency,
            "per_hour": self.per_hour,
            "so_far": self.so_far,
            "per_1000_images": self.per_1000_images,
            "to_go": self.to_go,
        }

    def short(self) -> str:
        """For a progress line."""
        to_go = "" if self.to_go is None else f" + {money(self.to_go)} to go"
        return f"{money(self.so_far)} {self.currency}{to_go}"

    def sentence(self) -> str:
        """For a summary."""
        each = "" if self.per_1000_images is None else f", {money(self.per_1000_images)} per 1000 images"
        to_go = f", {money(self.to_go)} to go" if self.to_go else ""
        return f"cost: {money(self.so_far)} {self.currency} so far{each}{to_go}"


class CostMeter:
    """Adds up prices over time. Times are of one clock that does not go back (time.monotonic), in seconds."""

    def __init__(self, prices: CostConfig, size: Callable[[], ClusterSize]) -> None:
        """size: of the cluster at the moment it is called."""
        self.prices = prices
        self._size = size
        self._rates: list[tuple[float, float]] = []  # since when, currency per hour
        self._sampled = -math.inf

    def sample(self, now_s: float) -> None:
        """Look at the cluster, if that was some time ago. What it has then is paid for until the next look."""
        if now_s - self._sampled < SAMPLE_EVERY_S:
            return
        self._sampled = now_s
        size = self._size()
        per_hour = (
            self.prices.per_node_hour * size.nodes
            + self.prices.per_gpu_hour * size.gpus
            + self.prices.per_cpu_hour * size.cpus
        )
        if not self._rates or self._rates[-1][1] != per_hour:
            self._rates.append((now_s, per_hour))

    def between(self, from_s: float, to_s: float) -> float:
        """The cost of a span of time; what was before the first sample costs nothing."""
        return sum(
            rate * max(0.0, min(end, to_s) - max(since, from_s)) / HOUR_S
            for (since, rate), (end, _) in itertools.pairwise([*self._rates, (math.inf, 0.0)])
        )

    def so_far(self, now_s: float) -> float:
        """The cost of all time up to now."""
        return self.between(-math.inf, now_s)

    def bill(self, now_s: float, *, images: int, left: int, working_since_s: float | None) -> Bill:
        """images: that this run has done, `left`: that it has left. working_since_s: when the first was begun: starting
        up is paid for, but it does not make the rest dearer."""
        so_far = self.so_far(now_s)
        to_go = None
        if images and working_since_s is not None:
            to_go = left * self.between(working_since_s, now_s) / images
        return Bill(
            currency=self.prices.currency,
            per_hour=self._rates[-1][1] if self._rates else 0.0,
            so_far=so_far,
            per_1000_images=1000 * so_far / images if images else None,
            to_go=to_go,
        )


def money(amount: float) -> str:
    """An amount with cents, or with three digits where it is smaller than one."""
    decimals = 2 if amount >= 1 or amount <= 0 else 2 - math.floor(math.log10(amount))
    return f"{amount:.{min(decimals, 12)}f}"
