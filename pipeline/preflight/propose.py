"""From what was measured to pool sizes, a batch budget, the time that the run will take, and what it will cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import LabelConfig
from pipeline.preflight.estimate import Interval
from pipeline.preflight.rehearsal import Rehearsal

__all__ = ["Node", "Projection", "Proposal", "cost_of", "project", "propose"]

POOLED = ("decode", "prepare", "encode", "score")
MOST_DECODE_THREADS = 32
# Of a core: what must be left for Ray's own tasks, which would wait for ever for it.
LEFT_FOR_RAY = 1.0
# Below this share of what the accelerators could do, decoding elsewhere is worth its transfers.
WORTH_SPLITTING = 0.8


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, as Ray counts it. memory_bytes: None where it is unknown."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """`resources` of a config: values by field name, and why, in the same order."""

    values: dict[str, Any]
    reasons: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The run as it would be. rate: images a second of all workers. limit: what more of would make it faster.

    images: left to label. output_bytes: to be written. hours: start-up left out.
    """

    workers: int
    nodes: int
    rate: float
    limit: str
    images: Interval
    hours: Interval
    output_bytes: Interval


def propose(
    config: LabelConfig, nodes: Sequence[Node], measured: Rehearsal, pixels: int | None
) -> tuple[Proposal, list[str]]:
    """What `resources` should say on these nodes, and what speaks against the run there.

    pixels: the best batch budget, None where none was found.
    """
    own = config.resources
    gpus = (1.0 if any(node.gpus for node in nodes) else 0.0) if own.gpus_per_worker == "auto" else own.gpus_per_worker
    fitting = [node for node in nodes if node.gpus >= gpus and node.cpus >= min(own.cpus_per_worker, 1.0)]
    if not fitting:
        return Proposal(values={}, reasons={}), [f"no node has {gpus:g} GPU for a worker"]
    on_node = [max(1, int(node.gpus // gpus)) if gpus else 1 for node in fitting]
    workers = own.workers if isinstance(own.workers, int) else sum(on_node)
    cores = min(node.cpus / count for node, count in zip(fitting, on_node, strict=True))
    values: dict[str, Any] = {"workers": workers}
    reasons = {"workers": "one per GPU" if gpus else "one per node: its forward pass uses all cores"}

    pooled_s = _per_image(measured, POOLED)
    model_s = _per_image(measured, ("predict",))
    if gpus:
        # As many threads as keep up with the accelerator, and one more, for what is uneven.
        wanted = min(MOST_DECODE_THREADS, math.ceil(pooled_s / max(model_s, 1e-9)) + 1)
        threads = max(2, min(wanted, int(cores - LEFT_FOR_RAY / max(on_node))))
        values["decode_threads"] = threads
        reasons["decode_threads"] = (
            f"{pooled_s * 1e3:.1f} ms of a core per image beside {model_s * 1e3:.1f} ms of the GPU, "
            f"{cores:g} cores per worker"
        )
        values["cpus_per_worker"] = float(max(1, min(threads, int(cores - LEFT_FOR_RAY / max(on_node)))))
        reasons["cpus_per_worker"] = "so that Ray puts nothing else on those cores"
        values["gpus_per_worker"] = gpus
        reasons["gpus_per_worker"] = "as the config has it" if own.gpus_per_worker != "auto" else "the models take one"
        spare = sum(node.cpus for node in nodes if not node.gpus)
        if cores / max(pooled_s, 1e-9) < WORTH_SPLITTING / max(model_s, 1e-9) and spare >= 1:
            values["layout"] = "split"
            reasons["layout"] = f"{cores:g} cores cannot decode for one GPU, and {spare:g} cores of other nodes can"
            values["readers"] = max(1, int(spare // threads))
            reasons["readers"] = f"{threads} decoding threads each"
    if "layout" not in values:
        values["layout"] = "fused"
        reasons["layout"] = "the cores beside the models keep up" if gpus else "no accelerator waits for cores"
    if pixels is not None:
        values["batch_pixels"] = pixels
        reasons["batch_pixels"] = "the smallest budget within 3 % of the fastest"
    return Proposal(values=values, reasons=reasons), []


def project(
    proposal: Proposal,
    nodes: Sequence[Node],
    measured: Rehearsal,
    images: Interval,
    measured_cores: int,
) -> Projection:
    """How long the images take with the proposal on these nodes, taken to be as fast as the one that was measured.

    The measured rate counts whole; where a worker's share of cores is another than the rehearsal had
    (`measured_cores`), it is scaled by what limits.
    """
    gpus = proposal.values.get("gpus_per_worker", 0.0)
    here = _limits(measured, bool(gpus), measured_cores, measured_cores)
    # What of the arithmetic the rehearsal reached: calls that wait for each other, files, a machine with other work.
    reached = min(1.0, (measured.images / max(measured.wall_s, 1e-9)) / min(here.values()))
    rate, limit, used = 0.0, "model", 0
    left = int(proposal.values["workers"])
    for node in sorted(nodes, key=lambda node: (node.gpus, node.cpus), reverse=True):
        count = min(left, max(0, int(node.gpus // gpus)) if gpus else 1)
        if not count:
            continue
        limits = _limits(measured, bool(gpus), node.cpus / count, measured_cores)
        if proposal.values.get("layout") == "split" and "cores" in limits:
            spare = sum(other.cpus for other in nodes if not other.gpus) / max(1, int(proposal.values["workers"]))
            limits["cores"] *= (node.cpus / count + spare) / (node.cpus / count)
        limit = min(limits, key=lambda name: limits[name])
        rate += count * reached * limits[limit]
        left, used = left - count, used + 1
    hours = images.scaled(1 / rate / 3600)
    row_bytes = sum(measured.row_bytes.values())
    return Projection(
        workers=int(proposal.values["workers"]),
        nodes=used,
        rate=rate,
        limit=limit,
        images=images,
        hours=hours,
        output_bytes=images.scaled(row_bytes),
    )


def _limits(measured: Rehearsal, accelerator: bool, cores: float, measured_cores: float) -> dict[str, float]:
    """Images a second that each part of one worker allows. On the CPU the model computes on the same cores."""
    pooled_s, model_s = _per_image(measured, POOLED), _per_image(measured, ("predict",))
    if accelerator:
        return {"model": 1 / max(model_s, 1e-9), "cores": cores / max(pooled_s, 1e-9)}
    return {"model": max(1.0, cores) / max(model_s * measured_cores + pooled_s, 1e-9)}


def _per_image(measured: Rehearsal, stages: Sequence[str]) -> float:
    return sum(measured.seconds.get(stage, 0.0) for stage in stages) / max(1, measured.images)


def cost_of(config: LabelConfig, nodes: Sequence[Node], projection: Projection) -> tuple[Interval, str] | None:
    """What the whole cluster costs for so long, and in what currency; None where the config has no prices."""
    prices = getattr(config, "cost", None)
    if prices is None:
        return None
    per_hour = sum(
        prices.per_node_hour + node.gpus * prices.per_gpu_hour + node.cpus * prices.per_cpu_hour for node in nodes
    )
    return projection.hours.scaled(per_hour), str(prices.currency)
