"""Metrics through Ray: every node's agent shows them to Prometheus beside Ray's own (docs/observability.md)."""

import time

import ray
from ray.util.metrics import Counter, Gauge

from pipeline.config import CostConfig
from pipeline.observe.cost import ClusterSize, CostMeter
from pipeline.observe.metrics import METRICS

__all__ = ["RayMetrics", "cluster_size", "cost_meter"]


class RayMetrics:
    """`Metrics` of this process, which has joined a cluster. A metric appears with its first value."""

    def __init__(self) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}

    def add(self, name: str, value: float, **tags: str) -> None:
        """Count `value` more."""
        self._metric(name).inc(value, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """It is `value` now."""
        self._metric(name).set(value, tags=tags)

    def _metric(self, name: str) -> Counter | Gauge:
        if name not in self._metrics:
            metric = METRICS[name]
            kind = Counter if metric.kind == "counter" else Gauge
            self._metrics[name] = kind(name, description=metric.description, tag_keys=metric.tags)
        return self._metrics[name]


def cost_meter(prices: CostConfig | None) -> CostMeter | None:
    """A meter of the cluster that this process has just joined, where there are prices."""
    if prices is None:
        return None
    meter = CostMeter(prices, cluster_size)
    meter.sample(time.monotonic())
    return meter


def cluster_size() -> ClusterSize:
    """What the cluster has at the moment."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterSize(
        nodes=len(nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
    )
