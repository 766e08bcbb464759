"""Loose image files: one unit per slice of the sorted listing; targets are found by path templates.

Slices follow the listing, so a file that is added or removed shifts what later units hold and they count as changed:
a corpus that grows is better packed into shards.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import fsspec

from pipeline.config import FilesSource
from pipeline.errors import ConfigError, RowError
from pipeline.sources.base import Sample, Unit, UnitEnd
from pipeline.sources.objects import Wanted, fingerprint, open_beside, pack, read_objects, unpack
from pipeline.storage import Entry, address, clean, list_entries, open_fs, relative

__all__ = ["IMAGE_SUFFIXES", "Files"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
CAPTURE = re.compile(r"\{([^{}]*)\}")
# What every path has, whatever the template.
ALWAYS = ("dir", "stem", "ext")
KINDS = ("semantic", "panoptic", "segments", "instances", "depth")


@dataclass(frozen=True)
class Files:
    """The source of `format: files`. Raises ConfigError for templates that cannot work."""

    config: FilesSource

    def __post_init__(self) -> None:
        pattern = _pattern(self.config.images)
        known = {*(pattern.groupindex if pattern else ()), *ALWAYS}
        for kind, template in self.config.targets.items():
            if kind not in KINDS:
                raise ConfigError(f"source.targets: unknown kind {kind!r}; known: {', '.join(KINDS)}")
            unknown = [name for name in CAPTURE.findall(template) if name not in known]
            if unknown or "{" in CAPTURE.sub("", template):
                what = f"captures {{{unknown[0]}}}" if unknown else "has an unbalanced brace"
                raise ConfigError(
                    f"source.targets.{kind}: {template!r} {what}; known captures: {', '.join(sorted(known))}"
                )

    def plan(self) -> Iterator[Unit]:
        config = self.config
        ending = (config.images or "").rpartition("}")[2].rpartition(".")[2].lower()
        suffixes = IMAGE_SUFFIXES if not ending else (*IMAGE_SUFFIXES, f".{ending}")
        fs, root, entries = list_entries(config.uri, config.storage, suffixes=suffixes)
        location = address(fs, root)
        images = _matching(entries, root, config.images)
        left = len(images) if config.limit is None else config.limit
        for number, first in enumerate(range(0, len(images), config.unit_images)):
            if left <= 0:
                return
            part = images[first : first + config.unit_images]
            yield Unit(
                shard_id=f"files#{number}",
                location=location,
                size_bytes=sum(entry.size_bytes for entry in part),
                fingerprint=fingerprint(f"{_below(root, entry)} {entry.fingerprint}" for entry in part),
                rows=min(len(part), left),
                cut=number,
                stop=left if left < len(part) else None,
                payload=pack([[_below(root, entry), entry.size_bytes] for entry in part]),
            )
            left -= len(part)

    def read(self, unit: Unit, done: Container[int]) -> Iterator[Sample | UnitEnd]:
        config = self.config
        fs, _ = open_fs(config.uri, config.storage)
        root = str(fs._strip_protocol(unit.location)).rstrip("/")
        pattern = _pattern(config.images)
        rows = unpack(unit.payload)[: unit.stop]
        targets = {kind: _Target(template, fs, root, config) for kind, template in config.targets.items()}
        wanted = [position for position in range(len(rows)) if position not in done]
        captures = {position: _captures(pattern, rows[position][0]) for position in wanted}
        groups = (
            [
                Wanted(fs, f"{root}/{rows[position][0]}", rows[position][1]),
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
                elif isinstance(value, RowError) and not isinstance(value.__cause__, FileNotFoundError):
                    error = error or value
            yield Sample(
                image_id=clean(rows[position][0]),
                shard_id=unit.shard_id,
                position=position,
                image=b"" if error or not isinstance(image, bytes) else image,
                targets={} if error else values,
                fields={name: clean(captures[position][name]) for name in (pattern.groupindex if pattern else ())},
                error=error,
            )
        yield UnitEnd(rows=len(rows))


def _below(root: str, entry: Entry) -> str:
    """The path as it is, for opening it; `relative` gives the text for ids."""
    return entry.path.removeprefix(root).lstrip("/")


def _matching(entries: list[Entry], root: str, template: str | None) -> list[Entry]:
    pattern = _pattern(template)
    if pattern is None:
        return entries
    images = [entry for entry in entries if pattern.fullmatch(_below(root, entry))]
    if not images:
        raise ConfigError(
            f"source.images: none of {len(entries)} files matches {template!r}; one of them is "
            f"{relative(root, entries[0].path)!r}"
        )
    return images


def _pattern(template: str | None) -> re.Pattern[str] | None:
    """The expression of a path template; a capture is one part of a path, and the same text wherever it is repeated."""
    if template is None:
        return None
    if "{" in (rest := CAPTURE.sub("", template)) or "}" in rest:
        raise ConfigError(f"source.images: {template!r} has an unbalanced brace")
    text = ""
    seen: set[str] = set()
    for index, part in enumerate(CAPTURE.split(template)):
        if index % 2 == 0:
            text += re.escape(part)
        elif part in seen:
            text += f"(?P={part})"
        elif part.isidentifier() and part.isascii():
            seen.add(part)
            text += f"(?P<{part}>[^/]+)"
        else:
            raise ConfigError(f"source.images: {{{part}}} in {template!r} is no name of a capture")
    return re.compile(text)


def _captures(pattern: re.Pattern[str] | None, path: str) -> dict[str, str]:
    folder, _, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    captures = {"dir": folder, "stem": stem if dot else base, "ext": extension if dot else ""}
    match = pattern.fullmatch(path) if pattern else None
    return captures | (match.groupdict() if match else {})


class _Target:
    """Where one kind of target lies for given captures. The template is the user's own and may leave the root."""

    def __init__(self, template: str, fs: fsspec.AbstractFileSystem, root: str, config: FilesSource) -> None:
        if "://" in template or template.startswith("/"):
            self.fs, self.template = open_beside(template, config.uri, config.storage)
        else:
            while template.startswith("../"):
                template, root = template[3:], root.rpartition("/")[0]
            self.fs, self.template = fs, f"{root}/{template}"

    def wanted(self, captures: Mapping[str, str]) -> Wanted | None:
        # A key of object storage may hold "..", which must not lead elsewhere; a path of a file system cannot.
        if any(".." in value.split("/") for value in captures.values()):
            return None
        path = CAPTURE.sub(lambda match: captures[match[1]], self.template)
        return Wanted(self.fs, _clean(path))


def _clean(path: str) -> str:
    """Without empty parts and with `name/..` taken out, as the user's template may have them; `//` of URIs stays."""
    head, mark, rest = path.rpartition("://")
    parts: list[str] = []
    for part in rest.split("/"):
        if part == ".." and parts and parts[-1] not in {"", ".."}:
            parts.pop()
        elif part not in {"", "."} or not parts:
            parts.append(part)
    return head + mark + "/".join(parts)
