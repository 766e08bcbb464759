"""Training's images through Ray Data: read and prepared anywhere in the cluster, for workers whose accelerators outrun
their own cores.

Each worker runs a dataset of its own share, with the order kept: Ray Data's own split among workers keeps none, and
drops rows to make shares equal. One actor reads the groups of the epoch, tasks decode and augment, rows of a few images
flow from one to the other and to the worker, as far ahead as Ray Data's memory limits let them.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, TaskPoolStrategy

from pipeline.dataflow.cluster import ENVIRONMENT, quiet_context, ray_errors, unit_blocks
from pipeline.stages.stream import read_ahead
from pipeline.training.reader import GroupReader, Share, steps_of
from pipeline.training.samples import Item, Preparation, StepItems
from pipeline.training.transfer import items_to_table, samples_to_table, table_to_items, table_to_samples

__all__ = ["PREPARE_CPUS", "READ_CPUS", "ClusterReader"]

# Reading waits for storage, most of the time.
READ_CPUS = 0.25
PREPARE_CPUS = 1.0
# Images that travel together: enough to be worth a task's 8 ms, few enough that the first batch is soon there.
CHUNK_IMAGES = 16
BLOCKS_AHEAD = 2


class ClusterReader:
    """A StepReader on Ray Data. readers: tasks that prepare at once, None: as many as `cpus` hold. cpus: of the
    cluster, that this worker's reading may take."""

    def __init__(self, reader: GroupReader, preparation: Preparation, *, readers: int | None, cpus: float) -> None:
        self.reader = reader
        self.preparation = preparation
        self.readers = readers
        self.cpus = cpus

    def steps(self, share: Share) -> Iterator[StepItems]:
        """The dataset runs while the generator does. Raises RunError from its tasks."""
        with ray_errors():
            yield from steps_of(share, self._items(share))

    def _items(self, share: Share) -> Iterator[Item]:
        quiet_context()
        options = DataContext.get_current().execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources.for_limits(cpu=self.cpus)
        tasks = TaskPoolStrategy() if self.readers is None else TaskPoolStrategy(size=self.readers)
        common: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "runtime_env": ENVIRONMENT}
        items = (
            unit_blocks(pa.table({"group": [*share.groups]}))
            .map_batches(
                _ReadGroups,
                fn_constructor_args=(self.reader, share),
                compute=ActorPoolStrategy(size=1),
                num_cpus=READ_CPUS,
                **common,
            )
            .map_batches(_Prepare(self.preparation, share.epoch), compute=tasks, num_cpus=PREPARE_CPUS, **common)
        )
        blocks = items.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=BLOCKS_AHEAD)
        for block in read_ahead(blocks, count=BLOCKS_AHEAD, weight=len, limit=2 * BLOCKS_AHEAD * CHUNK_IMAGES):
            yield from table_to_items(block)


class _ReadGroups:
    def __init__(self, reader: GroupReader, share: Share) -> None:
        self.reader = reader
        self.share = share

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        for number in groups["group"].to_pylist():
            samples = self.reader.read(self.share, number)
            for start in range(0, len(samples), CHUNK_IMAGES):
                yield samples_to_table(samples[start : start + CHUNK_IMAGES])


class _Prepare:
    """A plain object, not a class to be built: its tasks have no state."""

    def __init__(self, preparation: Preparation, epoch: int) -> None:
        self.preparation = preparation
        self.epoch = epoch

    def __call__(self, samples: pa.Table) -> pa.Table:
        return items_to_table(self.preparation.item(sample, self.epoch) for sample in table_to_samples(samples))
