"""Tar shards made by hand, for the tests of the preflight."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from source_helpers import tar_bytes

from pipeline.config import WebdatasetSource

__all__ = ["jpeg", "shards"]


def jpeg(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def shards(folder: Path, contents: list[list[bytes]]) -> WebdatasetSource:
    """One shard, s-000.tar and so on, for each list of images."""
    folder.mkdir(exist_ok=True)
    for number, images in enumerate(contents):
        members = [(f"{index:04}.jpg", data) for index, data in enumerate(images)]
        (folder / f"s-{number:03}.tar").write_bytes(tar_bytes(members))
    return WebdatasetSource(format="webdataset", uri=str(folder))
