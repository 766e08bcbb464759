"""A folder of images with COCO annotation files: the JSON says which images there are and carries their targets.

The annotation files are parsed once, on the driver, element by element; each unit carries the JSON text of its own
images' annotations, so that workers never see the whole.
"""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.config import CocoSource
from pipeline.errors import ConfigError, RowError, StorageError, UnreadableError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.coco_json import read_coco
from pipeline.sources.objects import Wanted, below, fingerprint, open_beside, pack, read_objects, unpack
from pipeline.storage import Entry, address, clean, is_http, list_folder, open_fs, read_file, storage_errors

__all__ = ["Coco"]

MAX_JSON_BYTES = 2_000_000_000
# A slice ends early where its annotations are longer than this, so that a unit stays small.
MAX_SLICE_CHARACTERS = 4_000_000
PANOPTIC: Mapping[str, type] = {"file_name": str, "segments_info": list}


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
        folder = self._mask_folder()
        masks = _listing(*folder) if folder else None
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
        """What the files say about each image, by file name in sorted order."""
        config = self.config
        images: dict[str, _Image] = {}
        for uri, needed in ((config.instances, {"category_id": int}), (config.panoptic, PANOPTIC)):
            if uri is None:
                continue
            fs, path = open_beside(uri, config.uri, config.storage)
            data = read_file(fs, path, uri, max_bytes=MAX_JSON_BYTES)
            for name, coco_id, annotations in read_coco(data, uri, needed):
                image = images.setdefault(name, _Image(coco_id))
                if needed is not PANOPTIC:
                    image.instances = '{"annotations": [' + ", ".join(annotations) + "]}"
                elif len(annotations) > 1:
                    raise ConfigError(f"{uri}: expected one annotation for image {name!r}, got {len(annotations)}")
                elif annotations:
                    annotation = json.loads(annotations[0])
                    image.mask = annotation["file_name"]
                    image.segments = json.dumps({"segments_info": annotation["segments_info"]})
        if not images:
            raise ConfigError(f"{config.instances or config.panoptic} names no images")
        return dict(sorted(images.items()))


def _slices(images: Mapping[str, _Image], unit_images: int) -> Iterator[list[str]]:
    """Names in slices of `unit_images`, fewer where the annotations are long. Depends on the JSON alone."""
    names: list[str] = []
    characters = 0
    for name, image in images.items():
        if names and (len(names) == unit_images or characters + image.characters > MAX_SLICE_CHARACTERS):
            yield names
            names, characters = [], 0
        names.append(name)
        characters += image.characters
    yield names


def _listing(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, Entry] | None:
    """The files below a folder, or None where listing is not for free or refused; the objects are asked one by one."""
    if is_http(fs):
        return None
    with storage_errors(root):
        fs.invalidate_cache()
        try:
            return list_folder(fs, root)
        except PermissionError:
            return None
        except FileNotFoundError:
            return {}


def _find(listed: Mapping[str, Entry] | None, root: str, name: str) -> Entry | None:
    path = below(root, name) if listed else None
    return listed.get(path) if listed and path else None


def _wanted(fs: fsspec.AbstractFileSystem, root: str, name: str, size_bytes: int | None) -> Wanted | None:
    path = below(root, name)
    return Wanted(fs, path, size_bytes) if path else None


def _sample(
    unit: Unit, position: int, row: list[Any], image: bytes | RowError | None, mask: bytes | RowError | None
) -> Sample:
    name, coco_id, instances, mask_name, segments = row[:5]
    error = image if isinstance(image, RowError) else None
    targets: dict[str, bytes] = {}
    if image is None:
        error = UnreadableError(f"the file name {name!r} leads out of the folder")
    if instances is not None:
        targets["instances"] = instances.encode()
    if isinstance(mask, bytes):
        targets |= {"panoptic": mask, "segments": segments.encode()}
    elif isinstance(mask, RowError) and not isinstance(mask.__cause__, FileNotFoundError):
        error = error or mask
    elif mask is None and mask_name is not None:
        error = error or UnreadableError(f"the panoptic file name {mask_name!r} leads out of the folder")
    return Sample(
        image_id=clean(name),
        shard_id=unit.shard_id,
        position=position,
        image=image if error is None and isinstance(image, bytes) else b"",
        targets={} if error else targets,
        fields={"coco_id": coco_id},
        error=error,
    )
