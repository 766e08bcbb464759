"""Daft (https://docs.daft.ai): its own reader and JPEG decoder, the model as a class UDF, its own Parquet writer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.bench.reading import list_shards, read_shard
from pipeline.bench.worker import PEER_ROWS, ROWS, Task, Worker
from pipeline.models.extras import import_extra
from pipeline.stages.prepare import prepare

__all__ = ["run_daft"]


def run_daft(task: Task) -> None:
    """Label the corpus. Raises ConfigError without the extra."""
    config, preprocess = task.config, task.preprocess
    daft = import_extra("daft", "peers")
    kind = daft.DataType

    @daft.func(return_dtype=kind.struct({"key": kind.string(), "image": kind.binary()}), unnest=True)  # type: ignore[untyped-decorator]
    def members(path: str) -> Iterator[dict[str, Any]]:
        for key, data in read_shard(config, path):
            yield {"key": key, "image": data}

    columns = {field.name: kind.from_arrow_type(field.type) for field in PEER_ROWS}

    @daft.cls(max_concurrency=1, use_process=False)
    class Label:
        def __init__(self) -> None:
            self.worker = Worker(config)

        @daft.method.batch(  # type: ignore[untyped-decorator]
            return_dtype=kind.struct(columns), unnest=True, batch_size=task.batch_images
        )
        def __call__(self, keys: Any, images: Any) -> list[dict[str, Any]]:
            decoded = [prepare(image_HWC, preprocess) for image_HWC in images.to_pylist()]
            empty = dict.fromkeys(PEER_ROWS.names)
            return [{**empty, **row} for row in self.worker.label(keys.to_pylist(), decoded)]

    if config.source.format == "parquet":
        frame = daft.read_parquet(f"{config.source.uri}/*.parquet").select("key", "image")
    else:
        paths = daft.from_pydict({"path": list_shards(config)})
        frame = paths.select(members(daft.col("path")))
    frame = frame.with_column("image", daft.col("image").decode_image(mode="RGB"))
    label = Label()
    folder = Path(config.output.uri) / ROWS
    folder.mkdir(parents=True, exist_ok=True)
    frame.select(label(daft.col("key"), daft.col("image"))).write_parquet(str(folder), compression="zstd")
