"""The stages on Ray Data: unit descriptors flow to accelerator actors, rows of committed-to-be files flow back.

`fused` (the default): an actor reads, decodes, predicts, encodes and writes, with two units in work at once; only
descriptors and file names travel. `split`: CPU tasks on any node read and decode, and prepared pixels travel to the
actors, for nodes whose accelerators outrun their own cores.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError

from pipeline.config import LabelConfig, Resources
from pipeline.errors import ConfigError, RunError, StorageError
from pipeline.models.load import load_model
from pipeline.models.spec import Preprocess
from pipeline.run import row_to_work
from pipeline.sources.base import Unit
from pipeline.sources.registry import open_source
from pipeline.stages.decode import Decoder
from pipeline.stages.label import Labeller, thread_count
from pipeline.stages.predict import Predict, choose_device
from pipeline.stages.transfer import pack_windows, unpack_window
from pipeline.stages.work import LabelPlan, Window
from pipeline.table import FileRecord
from pipeline.units import row_to_unit

__all__ = ["Pool", "connect", "label_windows", "map_units", "plan_pool", "resolve_models"]

log = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 1_000_000_000
SPLIT_WINDOW_ROWS = 64
# glibc gives large blocks back to the kernel at every free, and threads' own arenas hold nothing above 64 MB, so
# decoders and CPU models spend half their time in page faults. One arena that keeps what it has: 1.6 times the forward
# passes of unet_small in a thread, half the CPU of decoding a JPEG (docs/decisions/0003-malloc.md).
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}

WINDOWS = pa.schema(
    [
        ("index", pa.int64()),
        (
            "files",
            pa.list_(
                pa.struct(
                    [
                        ("path", pa.string()),
                        ("size_bytes", pa.int64()),
                        ("model", pa.string()),
                        ("model_version", pa.string()),
                        ("shard_id", pa.string()),
                        ("rows", pa.int64()),
                        ("failed", pa.int64()),
                        ("positions", pa.large_binary()),
                        ("stats", pa.string()),
                    ]
                )
            ),
        ),
        ("rows", pa.int64()),
        ("images", pa.int64()),
        ("wall_s", pa.float64()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
    ]
)


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
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=object_store_bytes or LOCAL_OBJECT_STORE_BYTES,
                    **quiet,
                )
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot join the Ray cluster at {address or 'this machine'}: {error}") from error


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


def plan_pool(resources: Resources) -> Pool:
    """Settle `auto` by what the cluster has, and refuse what no node can hold: Ray would wait for it in silence.

    Raises ConfigError.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_in_all = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if gpus_in_all else 0.0
    cpus, memory = resources.cpus_per_worker, resources.memory_per_worker_bytes
    fitting = [
        node
        for node in nodes
        if node.get("GPU", 0.0) >= gpus and node.get("CPU", 0.0) >= cpus and node.get("memory", 0.0) >= (memory or 0)
    ]
    if not fitting:
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ConfigError(
            f"no node can hold a worker of {cpus:g} CPU, {gpus:g} GPU"
            f"{f', {memory} bytes' if memory else ''} (resources); the cluster has: {have}"
        )
    workers = resources.workers
    if workers == "auto":
        workers = sum(int(node["GPU"] // gpus) for node in fitting) if gpus else len(fitting)
    elif gpus and workers > sum(int(node["GPU"] // gpus) for node in fitting):
        raise ConfigError(f"resources.workers is {workers} with {gpus:g} GPU each, the cluster has {gpus_in_all:g} GPU")
    return Pool(workers=workers, gpus=gpus, cpus=cpus, memory_bytes=memory)


def resolve_models(config: LabelConfig, pool: Pool) -> list[dict[str, Any]]:
    """Load each model once on a worker, run it on a gray image, and describe it: the driver holds no weights.

    Raises what `load_model` and `Predict.check` raise.
    """
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=2)(_describe_models)
    with _ray_errors():
        return list(ray.get(task.remote(config)))


def _describe_models(config: LabelConfig) -> list[dict[str, Any]]:
    descriptions = []
    for model_config in config.models:
        model = load_model(model_config, seed=config.seed, tile_pixels=config.resources.tile_pixels)
        Predict(model, device=choose_device(), batch_pixels=1, tile_pixels=config.resources.tile_pixels).check()
        descriptions.append({**model.describe(), "preprocess": asdict(model.preprocess)})
    return descriptions


def label_windows(work: pa.Table, plan: LabelPlan, pool: Pool, models: list[dict[str, Any]]) -> Iterator[Window]:
    """Run the dataflow over the units of `work` (run.WORK) and give each window as its files are written.

    Raises RunError from the workers; an actor, worker or node that dies is replaced and its units run again.
    """
    _quiet_context()
    calls = plan.resources.calls_per_worker
    compute = ActorPoolStrategy(
        size=pool.workers,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + 1,
        enable_true_multi_threading=calls > 1,
    )
    environment = {"runtime_env": {"env_vars": MALLOC}}
    units = _units(work)
    if plan.resources.layout == "split":
        readers = plan.resources.readers
        units = units.map_batches(
            _Reader(plan, [Preprocess(**_tuples(model["preprocess"])) for model in models]),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.9,  # a task stage with other resources than the actors' is not fused into them
            compute=TaskPoolStrategy(size=readers) if isinstance(readers, int) else TaskPoolStrategy(),
            **environment,
        )
    windows: Dataset = units.map_batches(
        _Worker,
        fn_constructor_args=(plan,),
        batch_size=None,
        batch_format="pyarrow",
        compute=compute,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        memory=pool.memory_bytes,
        **environment,
    )
    with _ray_errors():
        for batch in windows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield _to_window(row)


def map_units(plan: pa.Table, function: Callable[[Unit, int], int]) -> Iterator[tuple[int, int]]:
    """Call `function(unit, index)` for each row of a plan in CPU tasks; gives (index, result) as they end."""

    def call(work: pa.Table) -> pa.Table:
        (row,) = work.to_pylist()
        result = function(row_to_unit(row), row["index"])
        return pa.table({"index": [row["index"]], "result": pa.array([result], pa.int64())})

    _quiet_context()
    results = _units(plan.append_column("index", pa.array(range(len(plan))))).map_batches(
        call, batch_size=None, batch_format="pyarrow", num_cpus=1, runtime_env={"env_vars": MALLOC}
    )
    with _ray_errors():
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row["index"], row["result"]


def _quiet_context() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each block is one row: a unit on its way out, a result on its way back at the moment it is there.
    context.target_max_block_size = 1
    context.target_min_block_size = 1


def _units(work: pa.Table) -> Dataset:
    """One block per unit, made as workers ask for them. The fraction of a CPU keeps the stage from being fused."""
    return ray.data.from_arrow(work).map_batches(
        _one_by_one, batch_size=None, batch_format="pyarrow", num_cpus=0.01, compute=TaskPoolStrategy(size=1)
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _one_by_one(work: pa.Table) -> Iterator[pa.Table]:
    for start in range(len(work)):
        yield work.slice(start, 1)


class _Worker:
    """One actor: a Labeller behind Ray Data's batches, each of one row."""

    def __init__(self, plan: LabelPlan) -> None:
        self.labeller = Labeller(plan)

    def __call__(self, work: pa.Table) -> Iterator[pa.Table]:
        for row in work.to_pylist():
            item = row_to_work(row, len(self.labeller.models))
            if "window" not in row:
                windows = self.labeller.label(item)
            elif row["end"] is not None:
                windows = iter([Window(index=item.index, rows=row["end"])])
            else:
                preprocesses = tuple(model.preprocess for model in self.labeller.models)
                windows = self.labeller.label_decoded(item, unpack_window(row["window"], preprocesses))
            for window in windows:
                yield _from_window(window)


class _Reader:
    """The split layout's first stage: a unit in, its decoded windows out, each as one row."""

    def __init__(self, plan: LabelPlan, preprocesses: list[Preprocess]) -> None:
        self.plan = plan
        self.preprocesses = preprocesses

    def __call__(self, work: pa.Table) -> Iterator[pa.Table]:
        threads = thread_count(self.plan.resources.decode_threads)
        with ThreadPoolExecutor(threads) as pool:
            decoder = Decoder(
                open_source(self.plan.source),
                self.preprocesses,
                max_pixels=self.plan.source.max_pixels,
                pool=pool,
                threads=threads,
            )
            for place, row in enumerate(work.to_pylist()):
                item = row_to_work(row, len(self.preprocesses))
                stream = decoder.stream(item.unit, item.done)
                for window, rows in pack_windows(stream, min(self.plan.output.rows_per_file, SPLIT_WINDOW_ROWS)):
                    yield (
                        work.slice(place, 1)
                        .append_column("window", pa.array([window], pa.large_binary()))
                        .append_column("end", pa.array([rows], pa.int64()))
                    )


def _from_window(window: Window) -> pa.Table:
    row = {
        "index": window.index,
        "files": [asdict(file) for file in window.files],
        "rows": window.rows,
        "images": window.images,
        "wall_s": window.wall_s,
        "seconds": list(window.seconds.items()),
    }
    return pa.Table.from_pylist([row], schema=WINDOWS)


def _to_window(row: Mapping[str, Any]) -> Window:
    return Window(
        index=row["index"],
        files=tuple(FileRecord(**file) for file in row["files"]),
        rows=row["rows"],
        images=row["images"],
        wall_s=row["wall_s"],
        seconds=dict(row["seconds"]),
    )


class _ray_errors:  # noqa: N801  (used as a context manager, like contextlib's)
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
