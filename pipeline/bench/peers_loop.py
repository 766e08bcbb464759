"""A plain PyTorch loop: a DataLoader whose worker processes read and decode, the model and the rest in this process."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.bench.reading import list_shards, read_shard
from pipeline.bench.worker import Task, Worker, write_rows
from pipeline.config import LabelConfig
from pipeline.images import decode_image
from pipeline.models.spec import Preprocess
from pipeline.preflight.memory import core_count
from pipeline.stages.prepare import Prepared, prepare

__all__ = ["run_loop"]


class _Images(IterableDataset[tuple[str, Prepared]]):
    """The corpus's images, decoded; each worker process has every n-th shard."""

    def __init__(self, config: LabelConfig, preprocess: Preprocess) -> None:
        self.config = config
        self.preprocess = preprocess

    def __iter__(self) -> Iterator[tuple[str, Prepared]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        for shard in list_shards(self.config)[first::step]:
            for key, data in read_shard(self.config, shard):
                yield key, prepare(decode_image(data, max_pixels=self.config.source.max_pixels), self.preprocess)


def run_loop(task: Task, *, processes: int | None = None) -> None:
    """Label the corpus. processes: that decode, one for each core by default."""
    config = task.config
    worker = Worker(config)
    loader: DataLoader[Any] = DataLoader(
        _Images(config, task.preprocess),
        batch_size=task.batch_images,
        num_workers=core_count() if processes is None else processes,
        collate_fn=list,
        # What has started threads must not fork, and S3 clients have.
        multiprocessing_context="forkserver" if processes != 0 and config.source.storage else None,
    )
    rows: list[dict[str, Any]] = []
    written = 0
    for batch in loader:
        keys, prepared = zip(*batch, strict=True)
        rows += worker.label(keys, prepared)
        if len(rows) >= config.output.rows_per_file:
            write_rows(config, written, rows)
            rows, written = [], written + 1
    if rows:
        write_rows(config, written, rows)
