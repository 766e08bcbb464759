"""A preflight's measuring as one task on the cluster, and the cluster's nodes as a preflight counts them."""

from collections.abc import Sequence

import ray

from pipeline.config import LabelConfig
from pipeline.config_train import TrainConfig
from pipeline.dataflow.cluster import ENVIRONMENT, Pool, ray_errors
from pipeline.preflight.measure import Measured, Options, measure
from pipeline.preflight.propose import Node
from pipeline.preflight.sampling import Corpus
from pipeline.sources.base import Unit

__all__ = ["cluster_nodes", "measure_on"]


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(item.get("CPU", 0.0), item.get("GPU", 0.0), item.get("memory")) for item in resources]


def measure_on(
    pool: Pool, config: LabelConfig | TrainConfig, units: Sequence[Unit], corpus: Corpus, options: Options
) -> Measured:
    """`measure` in a task with what one worker of the run is given. Raises RunError."""
    task = ray.remote(
        num_cpus=pool.cpus, num_gpus=pool.gpus, memory=pool.memory_bytes, max_retries=0, runtime_env=ENVIRONMENT
    )(measure)
    with ray_errors():
        result: Measured = ray.get(task.remote(config, units, corpus, options))
    return result
