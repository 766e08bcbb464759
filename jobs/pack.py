"""Pack any source into tar shards: `maskmill pack CONFIG.yaml [dotted.key=value ...]`."""

import sys
import time
from collections.abc import Sequence
from functools import partial

from jobs.common import config_job
from pipeline.config import PackConfig
from pipeline.dataflow import cluster
from pipeline.progress import Reporter, duration
from pipeline.sources.base import Unit
from pipeline.sources.pack import pack_unit
from pipeline.sources.registry import open_source
from pipeline.units import plan_table

__all__ = ["main", "pack"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return config_job("pack", PackConfig, pack, sys.argv[1:] if argv is None else argv)


def pack(config: PackConfig) -> int:
    """Write every unit of the source as tar shards. Running it again writes the same bytes."""
    reporter = Reporter()
    started = time.monotonic()
    plan = plan_table(open_source(config.source).plan())
    cluster.connect(config.ray_address)
    images = units = 0
    for _, count in cluster.map_units(plan, partial(_pack_one, config)):
        images, units = images + count, units + 1
        reporter.update(done=images, total=images, failed=0, limit="write")
    seconds = time.monotonic() - started
    reporter.say(f"packed {images} images of {units} units into {config.output.uri} in {duration(seconds)}")
    return 0


def _pack_one(config: PackConfig, unit: Unit, index: int) -> int:
    return pack_unit(
        open_source(config.source),
        unit,
        index,
        config.output.uri,
        config.output.storage,
        images_per_shard=config.images_per_shard,
    )


if __name__ == "__main__":
    sys.exit(main())
