"""A folder of images with COCO annotation files: the JSON says which images there are and carries their targets.

The annotation files are parsed once, on the driver, element by element; each unit carries the JSON text of its own
images' annotations, so that workers never see the whole.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec

from pipeline.config import CocoSource
from pipeline.errors import ConfigError, RowError, StorageError, UnreadableError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.objects import Wanted, below, fingerprint, open_beside, pack, read_objects, unpack
from pipeline.storage import Entry, address, list_folder, open_fs, relative, storage_errors

__all__ = ["Coco"]

MAX_JSON_BYTES = 2_000_000_000
# A slice ends early where its annotations are longer than this, so that a unit stays small.
MAX_SLICE_CHARACTERS = 4_000_000
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class _Image:
    """What the annotation files say about one image; annotations are JSON text as it stood there."""

    coco_id: str
    instances: str | None = None
    mask: str | None = None
    segments: str | None = None

    @property
    def characters(self) -> int:
        return len(self.instances or "") + len(self.segments or "")


@dataclass(frozen=True)
class Coco:
    """The source of `format: coco`.

    A unit's fingerprint is of its annotations and, where the folders can be listed, of its images and masks. A missing
    image is a failed sample; a missing panoptic PNG is a sample without panoptic target.
    """

    config: CocoSource

    def plan(self) -> Iterator[Unit]:
        """See Source. Raises ConfigError where a JSON file is not what COCO describes."""
        config = self.config
        fs, root = open_fs(config.uri, config.storage)
        images = self._images()
        listed = _listing(fs, root)
        masks: dict[str, Entry] | None = None
        if (folder := self._mask_folder()) is not None:
            masks = _listing(*folder, required=False)
        if listed is not None and not listed:
            raise StorageError(f"{config.uri} does not exist or holds no files")
        left = len(images) if config.limit is None else config.limit
        location = address(fs, root)
        for number, names in enumerate(_slices(images, config.unit_images)):
            if left <= 0:
                return
            rows: list[list[Any]] = []
            marks: list[str] = []
            size_bytes = 0
            for name in names:
                image = images[name]
                entry = _find(listed, root, name)
                mask = _find(masks, folder[1], image.mask) if folder and image.mask else None
                sizes = [entry.size_bytes if entry else None, mask.size_bytes if mask else None]
                rows.append([name, image.coco_id, image.instances, image.mask, image.segments, *sizes])
                marks += [json.dumps(rows[-1][:5]), *(found.fingerprint if found else "" for found in (entry, mask))]
                size_bytes += sizes[0] or 0
            yield Unit(
                shard_id=f"coco#{number}",
                location=location,
                size_bytes=size_bytes,
                fingerprint=fingerprint(marks),
                rows=min(len(rows), left),
                cut=number,
                stop=left if left < len(rows) else None,
                payload=pack(rows),
            )
            left -= len(rows)

    def read(self, unit: Unit, done: Container[int]) -> Iterator[Sample | UnitEnd]:
        fs, _ = open_fs(self.config.uri, self.config.storage)
        root = str(fs._strip_protocol(unit.location))
        folder = self._mask_folder()
        rows = unpack(unit.payload)[: unit.stop]
        wanted = [position for position in range(len(rows)) if position not in done]
        groups = (
            [
                _wanted(fs, root, rows[position][0], rows[position][5]),
                _wanted(*folder, rows[position][3], rows[position][6]) if folder and rows[position][3] else None,
            ]
            for position in wanted
        )
        results = read_objects(groups, max_bytes=self.config.max_bytes)
        for position, (image, mask) in zip(wanted, results, strict=True):
            yield _sample(unit, position, rows[position], image, mask)
        yield UnitEnd(rows=len(rows))

    def _mask_folder(self) -> tuple[fsspec.AbstractFileSystem, str] | None:
        config = self.config
        if config.panoptic is None:
            return None
        uri = config.panoptic_masks or config.panoptic.removesuffix(".json")
        return open_beside(uri, config.uri, config.storage)

    def _images(self) -> dict[str, _Image]:
        images: dict[str, _Image] = {}
        if self.config.instances is not None:
            read = _read_json(self.config, self.config.instances, ("image_id",))
            for name, coco_id, annotations in read:
                images[name] = _Image(coco_id, '{"annotations": [' + ", ".join(text for text, _ in annotations) + "]}")
        if self.config.panoptic is not None:
            uri = self.config.panoptic
            for name, coco_id, annotations in _read_json(self.config, uri, ("image_id", "file_name", "segments_info")):
                image = images.setdefault(name, _Image(coco_id))
                if len(annotations) > 1:
                    raise ConfigError(f"{uri}: expected one annotation for image {name!r}, got {len(annotations)}")
                for _, annotation in annotations:
                    image.mask = str(annotation["file_name"])
                    image.segments = json.dumps({"segments_info": annotation["segments_info"]})
        return dict(sorted(images.items()))
