"""Loose image files: one unit per slice of the sorted listing; targets are found by path templates.

Slices follow the listing, so a file that is added or removed shifts what later units hold and they count as changed:
a corpus that grows is better packed into shards.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import fsspec

from pipeline.config import FilesSource
from pipeline.errors import ConfigError, RowError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.objects import Wanted, fingerprint, is_missing, open_beside, pack, read_objects, unpack
from pipeline.sources.templates import (
    ALWAYS,
    Template,
    check_template,
    is_absolute,
    path_captures,
    path_pattern,
)
from pipeline.storage import Entry, address, clean, list_entries, open_fs, relative

__all__ = ["IMAGE_SUFFIXES", "Files", "known_captures"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
KINDS = ("semantic", "panoptic", "segments", "instances", "depth", "prompts")
SEEN_BY_MODELS = {"prompts"}


@dataclass(frozen=True)
class Files:
    """The source of `format: files`. Raises ConfigError for templates that cannot work."""

    config: FilesSource

    def __post_init__(self) -> None:
        known = known_captures(self.config)
        for kind, template in self.config.targets.items():
            if kind not in KINDS:
                raise ConfigError(f"source.targets: unknown kind {kind!r}; known: {', '.join(KINDS)}")
            check_template(template, known, f"source.targets.{kind}")

    def plan(self, *, images: bool = True) -> Iterator[Unit]:
        """See Source. A unit's fingerprint is of its images and their prompts, without images of all targets too, where
        their folders can be listed."""
        config = self.config
        ending = (config.images or "").rpartition("}")[2].rpartition(".")[2].lower()
        suffixes = IMAGE_SUFFIXES if not ending else (*IMAGE_SUFFIXES, f".{ending}")
        fs, root, entries = list_entries(config.uri, config.storage, suffixes=suffixes)
        location = address(fs, root)
        found = self._without_targets(fs, root, _matching(entries, root, config.images))
        marks = [f"{_below(root, entry)} {entry.fingerprint}" for entry in found]
        kinds = SEEN_BY_MODELS if images else set(config.targets)
        marks = [*map(" ".join, zip(marks, *self._target_marks(fs, root, found, kinds), strict=True))]
        left = len(found) if config.limit is None else config.limit
        for number, first in enumerate(range(0, len(found), config.unit_images)):
            if left <= 0:
                return
            part = found[first : first + config.unit_images]
            yield Unit(
                shard_id=f"files#{number}",
                location=location,
                size_bytes=sum(entry.size_bytes for entry in part),
                fingerprint=fingerprint(marks[first : first + config.unit_images]),
                rows=min(len(part), left),
                cut=number,
                stop=left if left < len(part) else None,
                payload=pack([[_below(root, entry), entry.size_bytes] for entry in part]),
            )
            left -= len(part)

    def _without_targets(self, fs: fsspec.AbstractFileSystem, root: str, found: list[Entry]) -> list[Entry]:
        """A file that is the target of another is no image: `{split}/{id}.png` matches CamVid's `trainannot/` too."""
        pattern = path_pattern(self.config.images, "source.images")
        targets: set[str] = set()
        for template in self._targets(fs, root).values():
            if template.fs == fs:
                for entry in found:
                    wanted = template.wanted(path_captures(pattern, _below(root, entry)))
                    if wanted is not None and wanted.path != entry.path:
                        targets.add(wanted.path)
        return [entry for entry in found if entry.path not in targets]

    def _target_marks(
        self, fs: fsspec.AbstractFileSystem, root: str, images: list[Entry], kinds: set[str]
    ) -> Iterator[list[str]]:
        """By kind of target, the fingerprint of each image's own; empty where there is none to be seen."""
        pattern = path_pattern(self.config.images, "source.images")
        for kind, template in self._targets(fs, root).items():
            if kind not in kinds:
                continue
            listed = template.listing() or {}
            wanted = (template.wanted(path_captures(pattern, _below(root, entry))) for entry in images)
            entries = (listed.get(item.path) if item else None for item in wanted)
            yield [entry.fingerprint if entry else "" for entry in entries]

    def _targets(self, fs: fsspec.AbstractFileSystem, root: str) -> dict[str, Template]:
        config = self.config
        return {
            kind: Template(*open_beside(template, config.uri, config.storage))
            if is_absolute(template)
            else Template.below(fs, root, template)
            for kind, template in config.targets.items()
        }

    def read(self, unit: Unit, done: Container[int], *, images: bool = True) -> Iterator[Sample | UnitEnd]:
        config = self.config
        fs, _ = open_fs(config.uri, config.storage)
        root = str(fs._strip_protocol(unit.location)).rstrip("/")
        pattern = path_pattern(config.images, "source.images")
        rows = unpack(unit.payload)[: unit.stop]
        targets = self._targets(fs, root)
        wanted = [position for position in range(len(rows)) if position not in done]
        captures = {position: path_captures(pattern, rows[position][0]) for position in wanted}
        groups = (
            [
                Wanted(fs, f"{root}/{rows[position][0]}", rows[position][1]) if images else None,
                *(target.wanted(captures[position]) for target in targets.values()),
            ]
            for position in wanted
        )
        results = read_objects(groups, max_bytes=config.max_bytes)
        for position, (image, *found) in zip(wanted, results, strict=True):
            error = image if isinstance(image, RowError) else None
            values: dict[str, bytes] = {}
            for kind, value in zip(targets, found, strict=True):
                if isinstance(value, bytes):
                    values[kind] = value
                elif isinstance(value, RowError) and not is_missing(value):
                    error = error or value
            yield Sample(
                image_id=clean(rows[position][0]),
                shard_id=unit.shard_id,
                position=position,
                image=b"" if error or not isinstance(image, bytes) else image,
                targets={} if error else values,
                fields={name: clean(captures[position][name]) for name in (pattern.names if pattern else ())},
                error=error,
            )
        yield UnitEnd(rows=len(rows))


def known_captures(config: FilesSource) -> set[str]:
    """The names that a template beside this source may use. Raises ConfigError."""
    pattern = path_pattern(config.images, "source.images")
    return {*(pattern.names if pattern else ()), *ALWAYS}


def _below(root: str, entry: Entry) -> str:
    """The path as it is, for opening it; `relative` gives the text for ids."""
    return entry.path.removeprefix(root).lstrip("/")


def _matching(entries: list[Entry], root: str, template: str | None) -> list[Entry]:
    pattern = path_pattern(template, "source.images")
    if pattern is None:
        return entries
    images = [entry for entry in entries if pattern.captures(_below(root, entry)) is not None]
    if not images:
        raise ConfigError(
            f"source.images: none of {len(entries)} files matches {template!r}; one of them is "
            f"{relative(root, entries[0].path)!r}"
        )
    return images
