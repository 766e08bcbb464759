"""Jobs as they are, but for the cluster: their stages run in this process, a unit at a time.

What Ray does with the same stages is tested in tests/ray.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from jobs import evaluate, label
from pipeline.config import LabelConfig
from pipeline.dataflow import cluster
from pipeline.dataflow.label import describe_models
from pipeline.observe.metrics import NoMetrics
from pipeline.run import row_to_work
from pipeline.sources.base import Unit
from pipeline.stages.evaluate import EvaluatePlan, Evaluator
from pipeline.stages.label import Labeller
from pipeline.stages.work import LabelPlan, Window
from pipeline.units import row_to_unit


def label_windows(work: pa.Table, plan: LabelPlan, *_: Any) -> Iterator[Window]:
    labeller = Labeller(plan)
    for row in work.to_pylist():
        yield from labeller.label(row_to_work(row, len(plan.models)))


def evaluate_windows(work: pa.Table, plan: EvaluatePlan, *_: Any) -> Iterator[Window]:
    for row in work.to_pylist():
        yield from Evaluator(plan).evaluate(row_to_work(row, len(plan.labels)))


def map_units(plan: pa.Table, function: Callable[[Unit, int], int]) -> Iterator[tuple[int, int]]:
    for index, row in enumerate(plan.to_pylist()):
        yield index, function(row_to_unit(row), index)


def resolve_models(config: LabelConfig, *_: Any) -> list[dict[str, Any]]:
    return describe_models(config)


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "connect", lambda *_: None)
        pool = cluster.Pool(workers=1, gpus=0, cpus=1, memory_bytes=None)
        patch.setattr(cluster, "map_units", map_units)
        patch.setattr(cluster, "plan_pool", lambda *_, **__: pool)
        patch.setattr(label, "resolve_models", resolve_models)
        patch.setattr(label, "label_windows", label_windows)
        patch.setattr(label, "RayMetrics", NoMetrics)
        patch.setattr(evaluate, "evaluate_windows", evaluate_windows)
        yield
