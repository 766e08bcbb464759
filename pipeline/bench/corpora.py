"""Corpora of generated photographs, the same for one seed on every machine: tars, Parquet, a mixture of sizes."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.sources.scenes import render_scene

__all__ = ["Corpus", "CorpusKind", "corpus_kinds", "make_corpus"]

# s3: the tars of `tar`, on a server with a delay before each answer.
CorpusKind = Literal["tar", "mixed", "parquet", "s3"]
COCO_SIZE = (640, 480)
# Widths and heights in the order in which they come, again and again: mostly small ones, as photographs on the web are,
# and one of 4K in sixteen.
MIXED_SIZES = (
    (640, 480), (500, 375), (480, 640), (1024, 768), (640, 427), (1280, 720), (640, 480), (800, 600),
    (640, 480), (375, 500), (1920, 1080), (640, 480), (1024, 683), (640, 640), (612, 612), (3840, 2160),
)  # fmt: skip
# Larger scenes are enlarged: what they cost to decode is what counts, and drawing them takes seconds each.
DRAWN_WIDTH = 1280
QUALITY = 90
# Deviation of a sensor's noise, in levels: generated scenes are smooth, and their files a third of a photograph's.
GRAIN = 5.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """kind, images, folder: where it lies. source: as a config has it."""

    kind: CorpusKind
    images: int
    folder: Path
    source: dict[str, Any]


def corpus_kinds() -> tuple[str, ...]:
    return get_args(CorpusKind)


def make_corpus(kind: CorpusKind, folder: Path, *, images: int, shards: int, seed: int) -> Corpus:
    """Make a corpus below `folder`, unless it is there already. shards: files of about the same number of images."""
    stored = "tar" if kind == "s3" else kind
    place = folder / f"{stored}-{images}x{shards}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    shards = min(shards, images)
    for shard in range(shards):
        suffix = "parquet" if stored == "parquet" else "tar"
        path = place / f"shard-{shard:03d}.{suffix}"
        if not path.exists():
            part = path.with_suffix(".part")
            members = _members(stored, range(shard * images // shards, (shard + 1) * images // shards), seed)
            (_write_parquet if suffix == "parquet" else _write_tar)(part, members)
            part.rename(path)
    source: dict[str, Any] = {"format": "webdataset", "uri": str(place)}
    if stored == "parquet":
        source = {"format": "parquet", "uri": str(place), "image_column": "image", "id_column": "key"}
    return Corpus(kind=kind, images=images, folder=place, source=source)


def _members(kind: str, numbers: range, seed: int) -> Iterator[tuple[str, bytes]]:
    for number in numbers:
        size = MIXED_SIZES[number % len(MIXED_SIZES)] if kind == "mixed" else COCO_SIZE
        yield f"{number:06d}", jpeg(number, *size, seed=seed)


def jpeg(number: int, width: int, height: int, *, seed: int) -> bytes:
    """A scene as JPEG."""
    scale = min(1.0, DRAWN_WIDTH / width)
    scene = render_scene(number, seed=seed, width=round(width * scale), height=round(height * scale))
    image = Image.fromarray(scene.image_HWC)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    draw = np.random.default_rng([seed, number])
    grain_HWC = draw.normal(0.0, GRAIN, (height, width, 3))
    image_HWC = np.clip(np.asarray(image) + grain_HWC, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, data in members:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _write_parquet(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    keys, images = zip(*members, strict=True)
    table = pa.table({"key": pa.array(keys, pa.string()), "image": pa.array(images, pa.binary())})
    pq.write_table(table, path, compression="none")
