"""The way into tar shards: one unit of any source written as WebDataset tars, images and targets as they are."""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import fsspec

from pipeline.sources.base import Sample, Source, Unit, UnitEnd, read_unit
from pipeline.storage import join, open_fs, storage_errors

__all__ = ["pack_unit"]

TARGET_SUFFIXES = {
    "semantic": ".seg.png",
    "panoptic": ".panoptic.png",
    "segments": ".panoptic.json",
    "instances": ".instances.json",
    "depth": ".depth.png",
    "prompts": ".prompts.json",
}
NPY = b"\x93NUMPY"
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

    The same unit gives byte-equal tars, of which one at a time is held in memory. A sample that cannot be read becomes
    an empty image, which labelling records as a failed row, so that nothing vanishes on the way.
    """
    fs, base = open_fs(uri, storage)
    with storage_errors(uri):
        fs.makedirs(base, exist_ok=True)
    samples = (item for item in read_unit(source, unit, ()) if not isinstance(item, UnitEnd))
    total = part = 0
    while True:
        data, count = _tar(islice(samples, images_per_shard))
        if not count:
            _remove_parts(fs, base, index, part)
            return total
        with storage_errors(uri):
            fs.pipe_file(join(base, f"shard-{index:06d}-{part:03d}.tar"), data)
        total, part = total + count, part + 1


def _remove_parts(fs: fsspec.AbstractFileSystem, base: str, index: int, first: int) -> None:
    """Remove what an earlier run with smaller tars left of this unit, which would be in the folder twice."""
    part = first
    with storage_errors(base):
        while fs.exists(path := join(base, f"shard-{index:06d}-{part:03d}.tar")):
            fs.rm_file(path)
            part += 1


def _tar(samples: Iterator[Sample]) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    keys: set[str] = set()
    count = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            count += 1
            key = _unique(_key(sample.image_id), keys)
            _add(tar, key + _suffix(sample.image), sample.image)
            for kind, data in sorted(sample.targets.items()):
                _add(tar, key + _target_suffix(kind, data), data)
    return buffer.getvalue(), count


def _key(image_id: str) -> str:
    """An image_id as a tar key: no dots (a key ends at the first), no way out of a folder, never empty."""
    stem = re.sub(r"\.(jpe?g|png|webp|tiff?|bmp)$", "", image_id, flags=re.IGNORECASE)
    return re.sub(r"[^\w/#-]+", "_", stem).strip("/") or "_"


def _unique(key: str, taken: set[str]) -> str:
    """`key`, with a number behind it where another image of the tar has it: a.jpg and a.png become a and a_2."""
    name, number = key, 1
    while name in taken:
        number += 1
        name = f"{key}_{number}"
    taken.add(name)
    return name


def _suffix(image: bytes) -> str:
    return next((suffix for signature, suffix in SIGNATURES if image.startswith(signature)), ".jpg")


def _target_suffix(kind: str, data: bytes) -> str:
    return ".depth.npy" if kind == "depth" and data.startswith(NPY) else TARGET_SUFFIXES[kind]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
