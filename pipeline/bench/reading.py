"""Reading a corpus as programs without a library for it do: list the files, open one, take its members in turn."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import LabelConfig
from pipeline.errors import ConfigError
from pipeline.storage import open_fs

__all__ = ["list_shards", "read_shard"]

KINDS = {"webdataset": ".tar", "parquet": ".parquet"}


def list_shards(config: LabelConfig) -> list[str]:
    """The corpus's files, in order. Raises ConfigError for a source of another kind."""
    source = config.source
    if source.format not in KINDS:
        raise ConfigError(f"a benchmark reads {' or '.join(KINDS)}, got {source.format}")
    fs, folder = _opened(config)
    return sorted(path for path in fs.ls(folder, detail=False) if path.endswith(KINDS[source.format]))


def _opened(config: LabelConfig) -> tuple[Any, str]:
    fs, folder = open_fs(config.source.uri or "", config.source.storage)
    return fs, folder


def read_shard(config: LabelConfig, path: str) -> Iterator[tuple[str, bytes]]:
    """Key and encoded image of each member."""
    fs, _ = _opened(config)
    with fs.open(path, "rb") as file:
        if config.source.format == "parquet":
            for batch in pq.ParquetFile(file).iter_batches(batch_size=16, columns=["key", "image"]):
                yield from zip(batch.column("key").to_pylist(), batch.column("image").to_pylist(), strict=True)
            return
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    yield PurePosixPath(member.name).stem, content.read()
