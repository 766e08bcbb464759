"""The cluster: joining it, what fits on it, mapping units over it, and its errors as ours. Imports no model code."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError

from pipeline.config import WorkerResources
from pipeline.errors import ConfigError, RunError, StorageError
from pipeline.sources.base import Unit
from pipeline.units import row_to_unit

__all__ = [
    "ENVIRONMENT",
    "Pool",
    "connect",
    "map_units",
    "plan_pool",
    "quiet_context",
    "ray_errors",
    "start_here",
    "unit_blocks",
]

LOCAL_OBJECT_STORE_BYTES = 1_000_000_000
LOCAL_STARTS = 4
NODE_POLL_S = 0.5
# glibc gives large blocks back to the kernel at every free, and threads' own arenas hold nothing above 64 MB, so
# decoders and CPU models spend half their time in page faults. One arena that keeps what it has: 1.6 times the forward
# passes of unet_small in a thread, half the CPU of decoding a JPEG (docs/decisions/0003-malloc.md).
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
# One environment for all of a run, so that a worker process that has imported torch can be used again.
# How many turns an OpenMP thread waits for others before it sleeps (docs/decisions/0006). By default it is hundreds of
# thousands: with more threads than cores, those that wait take the cores from those that they wait for.
OPENMP = {"GOMP_SPINCOUNT": "3000"}
ENVIRONMENT = {"env_vars": {**MALLOC, **OPENMP}}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The actors of a run: how many, and what Ray reserves for each."""

    workers: int
    gpus: float
    cpus: float
    memory_bytes: int | None


def connect(ray_address: str | None, object_store_bytes: int | None = None) -> None:
    """Join the cluster at `ray_address` or RAY_ADDRESS, else start a local one for this process.

    Raises ConfigError where the cluster cannot be joined.
    """
    if ray.is_initialized():
        return
    address = ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray's C++ side writes to the terminal past every Python logger, even for what is no problem of the user's.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with _stderr_closed():
            if address and address != "local":
                ray.init(address=address, **quiet)
            else:
                start_here(object_store_memory=object_store_bytes or LOCAL_OBJECT_STORE_BYTES, **quiet)
    except Exception as error:  # ray.init raises bare ones too
        raise ConfigError(f"cannot join the Ray cluster at {address or 'this machine'}: {error}") from error


def start_here(**options: Any) -> None:
    """A cluster of this process's own. Ray gives its node 30 seconds to start, which a busy machine may exceed."""
    for left in reversed(range(LOCAL_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Keep the C++ side's start-up lines off the terminal; what goes wrong is raised."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def plan_pool(
    resources: WorkerResources, *, fewest: int | None = None, say: Callable[[str], None] = lambda words: None
) -> Pool:
    """Settle `auto` by what the cluster has, and refuse what no node can hold: Ray would wait for it in silence.

    fewest: workers that must fit now, where the others may come later. say: is told what is waited for, where
    `node_wait_s` allows it. Raises ConfigError.
    """
    gpus_in_all = sum(node.get("GPU", 0.0) for node in _alive())
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if gpus_in_all else 0.0
    need = {"CPU": resources.cpus_per_worker, "GPU": gpus, "memory": float(resources.memory_per_worker_bytes or 0)}
    fitting = _holding(need) or _awaited(need, resources, say)
    if not fitting:
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in _alive())
        waited = f" after {resources.node_wait_s:g} s" if resources.node_wait_s else ""
        raise ConfigError(f"no node can hold a worker of {_amounts(need)} (resources){waited}; the cluster has: {have}")
    workers = resources.workers
    if workers == "auto":
        workers = sum(int(node["GPU"] // gpus) for node in fitting) if gpus else len(fitting)
    needed = fewest or workers
    if gpus and not resources.node_wait_s and needed > sum(int(node["GPU"] // gpus) for node in fitting):
        raise ConfigError(f"expected room for {needed} workers of {gpus:g} GPU each, the cluster has {gpus_in_all:g}")
    return Pool(workers=workers, gpus=gpus, cpus=need["CPU"], memory_bytes=resources.memory_per_worker_bytes)


def _alive() -> list[dict[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _holding(need: Mapping[str, float]) -> list[dict[str, float]]:
    """The nodes that are large enough for one worker."""
    return [node for node in _alive() if all(node.get(name, 0.0) >= amount for name, amount in need.items())]


def _awaited(
    need: Mapping[str, float], resources: WorkerResources, say: Callable[[str], None]
) -> list[dict[str, float]]:
    """The nodes that hold a worker once an autoscaler has brought the first; none where it brings none in time."""
    deadline = time.monotonic() + resources.node_wait_s
    if not resources.node_wait_s:
        return []
    say(f"waiting up to {resources.node_wait_s:g} s for a node that holds a worker of {_amounts(need)}")
    workers = 1 if resources.workers == "auto" else resources.workers
    bundle = {name: amount for name, amount in need.items() if amount}
    request_resources(bundles=[bundle] * workers)
    try:
        while not (found := _holding(need)) and time.monotonic() < deadline:
            time.sleep(NODE_POLL_S)
    finally:
        # From here on the actors themselves are what the autoscaler works for; the wish would outlive the run.
        request_resources(bundles=[])
    return found


def _amounts(need: Mapping[str, float]) -> str:
    memory = f", {need['memory']:.0f} bytes" if need["memory"] else ""
    return f"{need['CPU']:g} CPU, {need['GPU']:g} GPU{memory}"


def map_units(plan: pa.Table, function: Callable[[Unit, int], int]) -> Iterator[tuple[int, int]]:
    """Call `function(unit, index)` for each row of a plan in CPU tasks; gives (index, result) as they end."""

    def call(work: pa.Table) -> pa.Table:
        (row,) = work.to_pylist()
        result = function(row_to_unit(row), row["index"])
        return pa.table({"index": [row["index"]], "result": pa.array([result], pa.int64())})

    quiet_context()
    results = unit_blocks(plan.append_column("index", pa.array(range(len(plan))))).map_batches(
        call, batch_size=None, batch_format="pyarrow", num_cpus=1, runtime_env=ENVIRONMENT
    )
    with ray_errors():
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row["index"], row["result"]


def quiet_context() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each block is one row: a unit on its way out, a result on its way back at the moment it is there.
    context.target_max_block_size = 1
    context.target_min_block_size = 1


def unit_blocks(work: pa.Table) -> Dataset:
    """One block per unit, made as workers ask for them. The fraction of a CPU keeps the stage from being fused."""
    return ray.data.from_arrow(work).map_batches(
        _one_by_one, batch_size=None, batch_format="pyarrow", num_cpus=0.01, compute=TaskPoolStrategy(size=1)
    )


def _one_by_one(work: pa.Table) -> Iterator[pa.Table]:
    for start in range(len(work)):
        yield work.slice(start, 1)


class ray_errors:  # noqa: N801  (used as a context manager, like contextlib's)
    """Bring a worker's own RunError back out of what Ray wraps around it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        seen: set[int] = set()
        cause = error
        while cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            if isinstance(cause, RayTaskError):
                cause = cause.cause
                continue
            if isinstance(cause, RunError):
                raise type(cause)(str(cause)) from error
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            raise StorageError(f"the Ray cluster failed: {error}") from error
