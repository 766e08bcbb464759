"""The formats that a source may have."""

from collections.abc import Callable
from typing import Any

from pipeline.config import SourceConfig
from pipeline.sources.base import Source
from pipeline.sources.coco import Coco
from pipeline.sources.files import Files
from pipeline.sources.parquet import ParquetFiles
from pipeline.sources.scenes import Scenes
from pipeline.sources.table import TableTargets
from pipeline.sources.webdataset import Webdataset

__all__ = ["SOURCES", "open_source"]

SOURCES: dict[str, Callable[[Any], Source]] = {
    "webdataset": Webdataset,
    "parquet": ParquetFiles,
    "files": Files,
    "coco": Coco,
    "scenes": Scenes,
    "table": TableTargets,
}


def open_source(config: SourceConfig) -> Source:
    """The source that `config` describes. Opens nothing; raises ConfigError where the section cannot work."""
    return SOURCES[config.format](config)
