"""A folder of images with COCO annotation files: the JSON says which images there are and carries their targets.

The annotation files are parsed once, on the driver, element by element; each unit carries the JSON text of its own
images' annotations, so that workers never see the whole.
"""

import colorsys
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import fsspec

from pipeline.config import CocoSource, SourceConfig
from pipeline.errors import ConfigError, RowError, StorageError, UnreadableError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.coco_json import CocoImage, read_categories, read_coco
from pipeline.sources.objects import (
    Wanted,
    below,
    fingerprint,
    is_missing,
    list_objects,
    open_beside,
    pack,
    read_objects,
    unpack,
)
from pipeline.storage import Entry, address, clean, open_fs, read_file
from pipeline.taxonomy import Taxonomy, build_taxonomy

__all__ = ["Coco", "categories_of", "image_ids", "mask_folder"]

MAX_JSON_BYTES = 2_000_000_000
# A slice ends early where its annotations are longer than this, so that a unit stays small.
MAX_SLICE_CHARACTERS = 4_000_000
# Of a whole turn.
GOLDEN_ANGLE = (5**0.5 - 1) / 2
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

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        """See Source. Raises ConfigError where a JSON file is not what COCO describes."""
        config = self.config
        fs, root = self._image_folder() if images else self._open_beside(self._files[0])
        known = self._images()
        listed = list_objects(fs, root) if images else None
        folder = self._masks()
        masks = list_objects(*folder) if folder else None
        if listed is not None and not listed:
            raise StorageError(f"{config.uri} does not exist or holds no files")
        left = len(known) if config.limit is None else config.limit
        location = address(fs, root)
        for number, names in enumerate(_slices(known, config.unit_images)):
            if left <= 0:
                return
            rows: list[list[Any]] = []
            marks: list[str] = []
            size_bytes = 0
            for name in names:
                image = known[name]
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

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        folder = None
        if images:
            fs, _ = self._image_folder()
            folder = fs, str(fs._strip_protocol(unit.location))
        masks = self._masks()
        rows = unpack(unit.payload)[: unit.stop]
        wanted = [position for position in range(len(rows)) if position not in done]
        groups = (
            [
                _wanted(*folder, rows[position][0], rows[position][5]) if folder else None,
                _wanted(*masks, rows[position][3], rows[position][6]) if masks and rows[position][3] else None,
            ]
            for position in wanted
        )
        results = read_objects(groups, max_bytes=self.config.max_bytes)
        for position, (image, mask) in zip(wanted, results, strict=True):
            sample = _sample(unit, position, rows[position], image if images else b"", mask)
            yield replace(sample, targets=_with_prompts(sample.targets)) if self.config.prompts else sample
        yield UnitEnd(rows=len(rows))

    def _image_folder(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self.config.uri is None:
            raise ConfigError(
                "source.uri must be given: the folder of the images (format coco has targets alone without it)"
            )
        return open_fs(self.config.uri, self.config.storage)

    def _masks(self) -> tuple[fsspec.AbstractFileSystem, str] | None:
        panoptic = self.config.panoptic
        return None if panoptic is None else self._open_beside(self.config.panoptic_masks or mask_folder(panoptic))

    def _open_beside(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
        return open_beside(uri, self.config.uri or self._files[0], self.config.storage)

    @property
    def _files(self) -> list[str]:
        return [uri for uri in (self.config.instances, self.config.panoptic) if uri is not None]

    def categories(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The URI of each annotation file with each category that it describes."""
        for uri in self._files:
            data = read_file(*self._open_beside(uri), uri, max_bytes=MAX_JSON_BYTES)
            yield from ((uri, category) for category in read_categories(data, uri))

    def _images(self) -> dict[str, _Image]:
        """What the files say about each image, by file name in sorted order."""
        config = self.config
        images: dict[str, _Image] = {}
        names: dict[str, str] = {}
        for uri, needed in ((config.instances, {"category_id": int}), (config.panoptic, PANOPTIC)):
            if uri is None:
                continue
            data = read_file(*self._open_beside(uri), uri, max_bytes=MAX_JSON_BYTES)
            for entry in read_coco(data, uri, needed):
                image = images.setdefault(entry.file_name, _Image(entry.id))
                if image.coco_id != entry.id or names.setdefault(entry.id, entry.file_name) != entry.file_name:
                    raise ConfigError(f"{uri}: image {entry.id}, {entry.file_name!r}, is another in {config.instances}")
                if needed is not PANOPTIC:
                    image.instances = _instances(entry)
                elif len(entry.annotations) > 1:
                    count = len(entry.annotations)
                    raise ConfigError(f"{uri}: expected one annotation for image {entry.file_name!r}, got {count}")
                elif entry.annotations:
                    annotation = json.loads(entry.annotations[0])
                    image.mask = annotation["file_name"]
                    image.segments = json.dumps({"segments_info": annotation["segments_info"]})
        if not images:
            raise ConfigError(f"{self._files[0]} names no images")
        return dict(sorted(images.items()))


def categories_of(config: SourceConfig) -> Taxonomy | None:
    """The label space that COCO files describe themselves; None for other sources and for files without categories.

    Of two files the panoptic one says what is stuff; instances are things. Colours are the file's, else hues a golden
    angle apart. Raises ConfigError where the files give one id two names, StorageError.
    """
    if not isinstance(config, CocoSource):
        return None
    found: dict[int, Mapping[str, Any]] = {}
    for uri, category in Coco(config).categories():
        before = found.setdefault(category["id"], category)
        if before["name"] != category["name"]:
            names = f"{category['name']!r}, but {before['name']!r} in {config.instances}"
            raise ConfigError(f"{uri}: category {category['id']} is {names}")
        found[category["id"]] = category
    if not found:
        return None
    files = " and ".join(uri.rpartition("/")[2] for uri in (config.instances, config.panoptic) if uri)
    tree = {
        "name": "coco",
        "source": f"categories of {files}",
        "categories": [
            {
                "id": number,
                "name": category["name"],
                "kind": "thing" if category.get("isthing", 1) else "stuff",
                "color": category.get("color") or _color(number),
            }
            for number, category in sorted(found.items())
        ],
    }
    return build_taxonomy(tree, files)


def _color(number: int) -> list[int]:
    """A colour unlike those of the numbers around it, as in coco80.yaml: hues apart, changing in strength too."""
    hue = number * GOLDEN_ANGLE % 1
    rgb = colorsys.hsv_to_rgb(hue, 0.55 + 0.1125 * (2 * number % 5), 1 - 0.4 * ((number - 1) % 4) / 3)
    return [round(255 * value) for value in rgb]


def image_ids(payload: bytes) -> list[str]:
    """The COCO ids of a unit's images, from the payload that `Coco.plan` gave it."""
    return [row[1] for row in unpack(payload)]


def mask_folder(panoptic: str) -> str:
    """Where the PNGs of a panoptic JSON lie by COCO's habit: in a folder of its name."""
    return panoptic.removesuffix(".json")


def _instances(image: CocoImage) -> str:
    size = f', "width": {image.width}, "height": {image.height}' if image.width else ""
    return '{"annotations": [' + ", ".join(image.annotations) + f"]{size}}}"


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


def _find(listed: Mapping[str, Entry] | None, root: str, name: str) -> Entry | None:
    path = below(root, name) if listed else None
    return listed.get(path) if listed and path else None


def _wanted(fs: fsspec.AbstractFileSystem, root: str, name: str, size_bytes: int | None) -> Wanted | None:
    path = below(root, name)
    return Wanted(fs, path, size_bytes) if path else None


def _with_prompts(targets: Mapping[str, bytes]) -> dict[str, bytes]:
    """With the boxes of the annotations that are no crowds as prompts: x1, y1, x2, y2. What is no box stays as it is,
    for the reader of prompts to complain of on that row."""
    if "instances" not in targets:
        return dict(targets)
    annotations = json.loads(targets["instances"])["annotations"]
    corners = []
    for annotation in annotations:
        box = annotation.get("bbox")
        if not box or annotation.get("iscrowd"):
            continue
        try:
            x, y, w, h = map(float, box)
        except (TypeError, ValueError, OverflowError):
            corners.append(box)
        else:
            corners += [[x, y, x + w, y + h]] if w > 0 and h > 0 else []
    return {**targets, "prompts": json.dumps({"boxes": corners}).encode()}


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
    elif isinstance(mask, RowError) and not is_missing(mask):
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
