"""Tar shards in the WebDataset layout: one unit per shard, members with the same key are one sample.

A member's key is its path up to the first dot of its base name, what follows decides its role:

    0001.jpg (.jpeg .png .webp .tif .tiff .bmp)                   the image
    0001.seg.png  .panoptic.png  .depth.png or .depth.npy         targets
    0001.panoptic.json or .json  0001.instances.json              targets (segments, instances)
    0001.prompts.json                                             prompts of promptable models

Others are ignored, and so are names without a dot and hidden ones (`._0001.jpg`). Where a key has no such image, a
longer extension serves (`0001.color.jpg`). Names are ids only; nothing is ever written to or read from them.
"""

import contextlib
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import WebdatasetSource
from pipeline.errors import CorruptImageError, ImageTooLargeError, RowError, StorageError, UnreadableError
from pipeline.sources.base import READ_ATTEMPTS, RETRY_PAUSE_S, Sample, Unit, UnitEnd, unreadable
from pipeline.sources.tarstream import Member, TarCutError, TarStream
from pipeline.storage import address, list_entries, open_fs, relative, storage_errors

__all__ = ["Webdataset"]

SUFFIXES = (".tar", ".tar.gz", ".tgz")
# One request of object storage; a shard is read as a sequence of these.
BLOCK_BYTES = 4 << 20
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp"})
TARGETS = {
    "seg.png": "semantic",
    "panoptic.png": "panoptic",
    "panoptic.json": "segments",
    "json": "segments",
    "instances.json": "instances",
    "depth.png": "depth",
    "depth.npy": "depth",
    "prompts.json": "prompts",
}
# Where a key has another member of the same kind, that one counts.
SECOND = frozenset({"json", "depth.npy"})


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member name, None where it has none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else None


class _Everything:
    """All positions. known: how many have been asked for."""

    known = 0

    def __contains__(self, position: object) -> bool:
        if isinstance(position, int):
            self.known = max(self.known, position + 1)
        return True


@dataclass
class _Group:
    """The members of one key as they come. name: the key, made unique. wanted: whether their bytes are kept.

    with_images: whether images count at all, or targets alone.
    """

    key: str
    name: str
    position: int
    wanted: bool
    with_images: bool
    error: RowError | None = None
    images: list[bytes] = field(default_factory=list)
    substitutes: list[bytes] = field(default_factory=list)
    targets: dict[str, bytes] = field(default_factory=dict)
    link: str = ""

    @property
    def is_sample(self) -> bool:
        """Whether it stands as a sample even if the archive ends here."""
        return bool(self.images or self.substitutes or self.error)

    def take(self, extension: str, member: Member, stream: TarStream, max_bytes: int) -> None:
        """Add one member. Raises TarCutError, with the group as it was, where the member is not whole."""
        kind = TARGETS.get(extension)
        if kind is None and extension.rpartition(".")[2] not in IMAGES:
            return
        if member.kind == "link":
            self.link = self.link if kind else member.name
            return
        counts = kind is not None or self.with_images
        if counts and member.size_bytes > max_bytes:
            stream.skip()
            message = f"{member.name} has {member.size_bytes} bytes, at most {max_bytes} are read (source.max_bytes)"
            self.error = self.error or ImageTooLargeError(message)
            return
        if counts and self.wanted and self.error is None:
            data = stream.body()
        else:
            stream.skip()
            data = b""
        if kind is None:
            (self.images if extension in IMAGES else self.substitutes).append(data)
        elif extension not in SECOND or kind not in self.targets:
            self.targets[kind] = data

    def sample(self, unit: Unit) -> Sample:
        images = self.images or self.substitutes
        error = self.error
        if error is None and not images and (self.with_images or not self.targets):
            hint = f" ({self.link} is a link)" if self.link else ""
            error = UnreadableError(f"{self.key}: sample has no image member{hint}")
        elif error is None and len(images) > 1 and self.with_images:
            error = CorruptImageError(f"{self.key}: expected one image member, got {len(images)}")
        return Sample(
            image_id=f"{unit.shard_id}/{self.name}",
            shard_id=unit.shard_id,
            position=self.position,
            image=images[0] if self.with_images and error is None else b"",
            targets={} if error else self.targets,
            error=error,
        )


@dataclass(frozen=True)
class Webdataset:
    """The source of `format: webdataset`.

    `limit` is for trials: planning it opens shards in order and counts their samples.
    """

    config: WebdatasetSource

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        fs, root, entries = list_entries(self.config.uri, self.config.storage, suffixes=SUFFIXES)
        left = self.config.limit
        for entry in entries:
            unit = Unit(
                shard_id=relative(root, entry.path),
                location=address(fs, entry.path),
                size_bytes=entry.size_bytes,
                fingerprint=entry.fingerprint,
            )
            if left is not None:
                rows = self._count(unit, left)
                unit = replace(unit, rows=rows, stop=left if rows == left else None)
                left -= rows
            yield unit
            if left == 0:
                return

    def _count(self, unit: Unit, most: int) -> int:
        """Rows of a shard, at most `most`. Where storage keeps failing the rest counts as one, as for `read_unit`."""
        everything = _Everything()
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))
            with contextlib.suppress(StorageError):
                for item in self.read(replace(unit, stop=most), everything):
                    if isinstance(item, UnitEnd):
                        return item.rows
        return min(most, max(1, everything.known))

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        fs, _ = open_fs(self.config.uri, self.config.storage)
        with storage_errors(unit.location):
            file = fs.open(str(fs._strip_protocol(unit.location)), "rb", block_size=BLOCK_BYTES)
        with contextlib.closing(file):
            yield from self._samples(unit, done, file, images)

    def _samples(self, unit: Unit, done: Container[int], file: Any, images: bool) -> Iterator[Sample | UnitEnd]:
        group: _Group | None = None
        seen: set[str] = set()
        position = 0
        cut = ""
        try:
            stream = TarStream(file, unit.location, unit.size_bytes)
            while (member := stream.next()) is not None:
                parts = split_name(member.name)
                if parts is None or member.kind == "other":
                    continue
                key, extension = parts
                if group is None or key != group.key:
                    if group is not None:
                        if group.wanted:
                            yield group.sample(unit)
                        position += 1
                        group = None
                    if unit.stop is not None and position >= unit.stop:
                        yield UnitEnd(rows=position)
                        return
                    group = _open(key, position, position not in done, images, seen)
                group.take(extension, member, stream, self.config.max_bytes)
        except TarCutError as error:
            cut = str(error)
        if group is not None and (group.is_sample or not cut):
            if group.wanted:
                yield group.sample(unit)
            position += 1
        if cut and (unit.stop is None or position < unit.stop):
            for item in unreadable(unit, position, cut):
                if isinstance(item, UnitEnd) or position not in done:
                    yield item
        else:
            yield UnitEnd(rows=position)


def _open(key: str, position: int, wanted: bool, images: bool, seen: set[str]) -> _Group:
    error = None
    name = key
    if key in seen:
        name = f"{key}#{position}"
        error = CorruptImageError(f"{key} occurred before in this shard; the members of a sample must be consecutive")
    seen.add(name)
    return _Group(key, name, position, wanted, images, error)
