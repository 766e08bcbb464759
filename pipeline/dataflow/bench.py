"""Batch inference as Ray Data's own guide has it (docs.ray.io, "Working with images"): read, map to decoded arrays,
map batches with an actor class, write Parquet."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import ray

from pipeline.bench.reading import list_shards
from pipeline.bench.worker import PEER_ROWS, ROWS, Task, Worker
from pipeline.config import LabelConfig
from pipeline.dataflow.cluster import connect
from pipeline.images import decode_image
from pipeline.models.spec import Preprocess
from pipeline.stages.prepare import prepare

__all__ = ["run_ray_data"]


def _decode(row: dict[str, Any], max_pixels: int, preprocess: Preprocess) -> dict[str, Any]:
    """A row of bytes to a row with an array, resized for the model."""
    data = row["image"] if "image" in row else row["jpg"]
    image_HWC = decode_image(data, max_pixels=max_pixels)
    height, width = image_HWC.shape[:2]
    return {
        "key": row["key"] if "key" in row else row["__key__"],
        "image": prepare(image_HWC, preprocess).image_CHW.numpy(),
        "height": height,
        "width": width,
    }


class _Label:
    """The actor: the model, on batches of arrays."""

    def __init__(self, config: LabelConfig) -> None:
        self.worker = Worker(config)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
        images = [self.worker.prepared(image_CHW, *size) for image_CHW, size in zip(batch["image"], sizes, strict=True)]
        return pa.Table.from_pylist(self.worker.label(batch["key"].tolist(), images), schema=PEER_ROWS)


def run_ray_data(task: Task) -> None:
    """Label the corpus."""
    connect(None)
    config = task.config
    source = config.source
    shards = list_shards(config)
    files = _filesystem(source.storage)
    if source.format == "parquet":
        data = ray.data.read_parquet(shards, filesystem=files, columns=["key", "image"])
    else:
        data = ray.data.read_webdataset(shards, filesystem=files, decoder=_undecoded, file_extensions=["tar"])
    folder = Path(config.output.uri) / ROWS
    decode = {"max_pixels": source.max_pixels, "preprocess": task.preprocess}
    data.map(_decode, fn_kwargs=decode).map_batches(
        _Label,
        fn_constructor_args=(config,),
        batch_size=task.batch_images,
        concurrency=1,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    ).write_parquet(str(folder))


def _undecoded(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value.read() if isinstance(value, io.IOBase) else value for key, value in sample.items()}


def _filesystem(storage: Mapping[str, Any]) -> pafs.FileSystem | None:
    if not storage:
        return None
    scheme, _, host = storage["endpoint_url"].partition("://")
    return pafs.S3FileSystem(
        access_key=storage["key"],
        secret_key=storage["secret"],
        endpoint_override=host,
        scheme=scheme,
        region=storage["client_kwargs"]["region_name"],
    )
