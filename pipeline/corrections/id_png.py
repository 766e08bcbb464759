"""Label maps as PNGs, in a folder or a zip: `NAME.png`, or `NAME_gtFine_labelIds.png` and `_instanceIds.png` as the
export `id_png` names them."""

import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config_export import ImportConfig
from pipeline.corrections.base import Corrected, Notes
from pipeline.errors import ConfigError, ImageTooLargeError, RowError, TargetMismatchError, UnreadableError
from pipeline.export.id_png import PER_CLASS, label_ids
from pipeline.sources.objects import Wanted, read_objects
from pipeline.storage import list_entries, read_bytes
from pipeline.targets import read_label_map
from pipeline.taxonomy import Taxonomy

__all__ = ["read_id_png"]

NAME = re.compile(
    r"(?P<name>.+?)(_gt(Fine|Coarse)_(?P<what>labelIds|instanceIds|\w*trainIds|color))?\.png", re.IGNORECASE
)
AT_ONCE = 64


def read_id_png(config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
    """See Reader. kind panoptic and instances take instance ids, semantic takes label ids or maps of plain names."""
    wanted = ("instanceids",) if config.kind in ("panoptic", "instances") else ("labelids", "")
    classes = _classes(taxonomy)
    for path, data in _files(config):
        match = NAME.fullmatch(path.rpartition("/")[2])
        if match is None or (match["what"] or "").lower() not in wanted:
            notes.passed_over["other files"] += 1
            continue
        try:
            if isinstance(data, RowError):
                raise data
            map_HW = read_label_map(data, max_pixels=config.max_pixels)
            yield _corrected(match["name"], map_HW, classes, taxonomy, instances=wanted == ("instanceids",))
        except RowError as error:
            yield Corrected(match["name"], error=error)


def _files(config: ImportConfig) -> Iterator[tuple[str, bytes | RowError]]:
    if config.uri.lower().endswith(".zip"):
        yield from _members(config)
        return
    fs, _, entries = list_entries(config.uri, config.storage, suffixes=(".png",))
    for start in range(0, len(entries), AT_ONCE):
        chunk = entries[start : start + AT_ONCE]
        found = read_objects(
            ([Wanted(fs, entry.path, entry.size_bytes)] for entry in chunk), max_bytes=config.max_bytes
        )
        for entry, (data,) in zip(chunk, found, strict=True):
            yield entry.path, data if data is not None else UnreadableError(f"{entry.path} was not read")


def _members(config: ImportConfig) -> Iterator[tuple[str, bytes | RowError]]:
    """PNGs of an archive. Names are what images are called, never paths."""
    data = read_bytes(config.uri, config.storage, max_bytes=config.max_bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                if not member.filename.lower().endswith(".png"):
                    continue
                with archive.open(member) as file:
                    # As it unpacks, whatever its header says.
                    png = file.read(config.max_bytes + 1)
                if len(png) > config.max_bytes:
                    yield member.filename, ImageTooLargeError(f"more than {config.max_bytes} bytes (max_bytes)")
                else:
                    yield member.filename, png
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{config.uri} is no readable zip: {error}") from error


def _classes(taxonomy: Taxonomy) -> npt.NDArray[np.int64]:
    """Values of the PNGs -> ids of the label space, -1 for others."""
    table = label_ids(taxonomy)
    classes = np.full(1 << 16, -1, np.int64)
    for void in (taxonomy.void_id, int(table[taxonomy.void_id]), *taxonomy.void_ids):
        classes[void] = taxonomy.void_id
    for category_id in taxonomy.ids:
        classes[int(table[category_id])] = category_id
    return classes


def _corrected(
    name: str, map_HW: npt.NDArray[Any], classes: npt.NDArray[np.int64], taxonomy: Taxonomy, *, instances: bool
) -> Corrected:
    height, width = map_HW.shape
    values, place_HW = np.unique(map_HW, return_inverse=True)
    values = values.astype(np.int64)
    found = classes[np.where(values >= PER_CLASS, values // PER_CLASS, values) if instances else values]
    if (found < 0).any():
        raise TargetMismatchError(f"expected ids of {taxonomy.name}, got {values[found < 0][:10].tolist()}")
    place_HW = place_HW.reshape(map_HW.shape)
    if not instances:
        return Corrected(name, width=width, height=height, label_HW=found[place_HW].astype(taxonomy.dtype))
    is_void = found == taxonomy.void_id
    numbers = np.where(is_void, 0, np.arange(1, len(values) + 1))
    segments = {int(n): int(c) for n, c, void in zip(numbers, found, is_void, strict=True) if not void}
    return Corrected(name, width=width, height=height, segment_HW=numbers[place_HW].astype(np.int32), segments=segments)
