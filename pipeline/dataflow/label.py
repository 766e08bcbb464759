"""The stages on Ray Data: unit descriptors flow to accelerator actors, rows of committed-to-be files flow back.

`fused` (the default): an actor reads, decodes, predicts, encodes and writes, with two units in work at once; only
descriptors and file names travel. `split`: CPU tasks on any node read and decode, and prepared pixels travel to the
actors, for nodes whose accelerators outrun their own cores.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from pipeline.config import LabelConfig
from pipeline.dataflow.cluster import ENVIRONMENT, Pool, quiet_context, ray_errors, unit_blocks
from pipeline.dataflow.windows import iter_windows, window_to_table
from pipeline.models.load import load_model
from pipeline.models.spec import Preprocess
from pipeline.run import row_to_work
from pipeline.sources.registry import open_source
from pipeline.stages.decode import Decoder
from pipeline.stages.label import Labeller, thread_count
from pipeline.stages.predict import Predict, choose_device
from pipeline.stages.transfer import pack_windows, unpack_window
from pipeline.stages.work import LabelPlan, Window

__all__ = ["label_windows", "resolve_models"]

SPLIT_WINDOW_ROWS = 64


def resolve_models(config: LabelConfig, pool: Pool) -> list[dict[str, Any]]:
    """Load each model once on a worker, run it on a gray image, and describe it: the driver holds no weights.

    Raises what `load_model` and `Predict.check` raise.
    """
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=2, runtime_env=ENVIRONMENT)(describe_models)
    with ray_errors():
        return list(ray.get(task.remote(config)))


def describe_models(config: LabelConfig) -> list[dict[str, Any]]:
    descriptions = []
    for model_config in config.models:
        model = load_model(model_config, seed=config.seed, tile_pixels=config.resources.tile_pixels)
        Predict(model, device=choose_device(), batch_pixels=1, tile_pixels=config.resources.tile_pixels).check()
        descriptions.append({**model.describe(), "preprocess": asdict(model.preprocess), "prompts": model.spec.prompts})
    return descriptions


def label_windows(work: pa.Table, plan: LabelPlan, pool: Pool, models: list[dict[str, Any]]) -> Iterator[Window]:
    """Run the dataflow over the units of `work` (run.WORK) and give each window as its files are written.

    Raises RunError from the workers; an actor, worker or node that dies is replaced and its units run again.
    """
    quiet_context()
    calls = plan.resources.calls_per_worker
    compute = ActorPoolStrategy(
        size=pool.workers,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + 1,
        enable_true_multi_threading=calls > 1,
    )
    environment = {"runtime_env": ENVIRONMENT}
    units = unit_blocks(work)
    if plan.resources.layout == "split":
        readers = plan.resources.readers
        units = units.map_batches(
            _Reader(
                plan,
                [Preprocess(**_tuples(model["preprocess"])) for model in models],
                [model["prompts"] for model in models],
            ),
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
    yield from iter_windows(windows)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class _Worker:
    """One actor: a Labeller behind Ray Data's batches, each of one row."""

    def __init__(self, plan: LabelPlan) -> None:
        self.labeller = Labeller(plan)
        context = ray.get_runtime_context()
        # Ray starts a dead actor again under its id, in a process of its own.
        process = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        self.worker = (context.get_actor_id(), process, context.was_current_actor_reconstructed)

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
                yield window_to_table(replace(window, worker=self.worker))


class _Reader:
    """The split layout's first stage: a unit in, its decoded windows out, each as one row."""

    def __init__(self, plan: LabelPlan, preprocesses: list[Preprocess], prompts: list[bool]) -> None:
        self.plan = plan
        self.preprocesses = preprocesses
        self.prompts = prompts

    def __call__(self, work: pa.Table) -> Iterator[pa.Table]:
        threads = thread_count(self.plan.resources.decode_threads)
        with ThreadPoolExecutor(threads) as pool:
            decoder = Decoder(
                open_source(self.plan.source),
                self.preprocesses,
                max_pixels=self.plan.source.max_pixels,
                pool=pool,
                threads=threads,
                targets=any(self.plan.scorers),
                prompts=self.prompts,
                refine=[model.refine for model in self.plan.models],
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
