"""Scoring on Ray Data: unit descriptors flow to CPU tasks on any node, rows of committed-to-be files flow back."""

from collections.abc import Iterator

import pyarrow as pa
from ray.data import TaskPoolStrategy

from pipeline.dataflow.cluster import ENVIRONMENT, quiet_context, unit_blocks
from pipeline.dataflow.windows import iter_windows, window_to_table
from pipeline.run import row_to_work
from pipeline.stages.evaluate import EvaluatePlan, Evaluator
from pipeline.stages.work import Window

__all__ = ["evaluate_windows"]


def evaluate_windows(work: pa.Table, plan: EvaluatePlan, workers: int | None) -> Iterator[Window]:
    """Run the dataflow over the units of `work` (run.WORK) and give each window as its files are written.

    workers: tasks at once, None: as many as the cluster has cores. Raises RunError from the workers; a worker or node
    that dies is replaced and its units run again.
    """
    quiet_context()

    def call(units: pa.Table) -> Iterator[pa.Table]:
        evaluator = Evaluator(plan)
        for row in units.to_pylist():
            for window in evaluator.evaluate(row_to_work(row, len(plan.labels))):
                yield window_to_table(window)

    windows = unit_blocks(work).map_batches(
        call,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        compute=TaskPoolStrategy(size=workers),
        runtime_env=ENVIRONMENT,
    )
    yield from iter_windows(windows)
