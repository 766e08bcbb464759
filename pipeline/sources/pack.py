"""The way into tar shards: one unit of any source written as WebDataset tars, images and targets as they are."""

import io
import re
import tarfile
from collections.abc import Mapping
from typing import Any

from pipeline.sources.base import Sample, Source, Unit, UnitEnd, read_unit
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["pack_unit"]

TARGET_SUFFIXES = {
    "semantic": ".seg.png",
    "panoptic": ".panoptic.png",
    "segments": ".panoptic.json",
    "instances": ".instances.json",
    "depth": ".depth.png",
}
SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"RIFF", ".webp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
    (b"BM", ".bmp"),
)


def pack_unit(
    source: Source, unit: Unit, index: int, uri: str, storage: Mapping[str, Any], *, images_per_shard: int
) -> int:
    """Write one unit as `shard-INDEX-PART.tar` files below `uri`; returns how many samples went in.

    The same unit gives byte-equal tars. A sample that cannot be read becomes an empty image, which labelling records as
    a failed row, so that nothing vanishes on the way.
    """
    samples = [item for item in read_unit(source, unit, ()) if not isinstance(item, UnitEnd)]
    fs, base = open_fs(uri, storage)
    with storage_errors(uri):
        fs.makedirs(base, exist_ok=True)
        for part, start in enumerate(range(0, len(samples), images_per_shard)):
            data = _tar(samples[start : start + images_per_shard])
            fs.pipe_file(join(base, f"shard-{index:06d}-{part:03d}.tar"), data)
    return len(samples)


def _tar(samples: list[Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key = _key(sample.image_id)
            _add(tar, key + _suffix(sample.image), sample.image)
            for kind, data in sorted(sample.targets.items()):
                _add(tar, key + TARGET_SUFFIXES[kind], data)
    return buffer.getvalue()


def _key(image_id: str) -> str:
    """An image_id as a tar key: no dots (a key ends at the first), no way out of a folder."""
    stem = re.sub(r"\.(jpe?g|png|webp|tiff?|bmp)$", "", image_id, flags=re.IGNORECASE)
    return re.sub(r"[^\w/#-]+", "_", stem).strip("/")


def _suffix(image: bytes) -> str:
    return next((suffix for signature, suffix in SIGNATURES if image.startswith(signature)), ".jpg")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
