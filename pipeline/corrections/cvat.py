"""`CVAT for images 1.1`: annotations.xml, or the zip that CVAT packs it into, read as a stream.

A document type declaration is refused, and with it every entity and every address that one could name.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO
from xml.parsers import expat

import numpy as np

from pipeline.config_export import ImportConfig
from pipeline.corrections.base import Classes, Corrected, Notes, Shape, box_shape, check_size, polygon_shape
from pipeline.errors import ConfigError, RowError, TargetMismatchError
from pipeline.export.runlengths import decode_runs
from pipeline.masks import encode_rle
from pipeline.storage import read_bytes
from pipeline.taxonomy import Taxonomy

__all__ = ["read_cvat"]

MEMBER = "annotations.xml"
CHUNK_BYTES = 1 << 20
SHAPES = frozenset({"mask", "polygon", "box"})
OTHERS = frozenset({"polyline", "points", "cuboid", "ellipse", "skeleton", "tag"})
# Of an integer in XML; a longer one is no size of an image.
DIGITS = 10

Attributes = Mapping[str, str]


def read_cvat(config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
    """See Reader. Raises ConfigError where the file is no XML of CVAT's, or larger than `max_bytes` when unpacked."""
    classes = Classes(taxonomy)
    for image, shapes in _images(_opened(config), config.uri, config.max_bytes):
        yield _corrected(image, shapes, classes, config.max_pixels, notes)


def _opened(config: ImportConfig) -> BinaryIO:
    data = read_bytes(config.uri, config.storage, max_bytes=config.max_bytes)
    if not data.startswith(b"PK"):
        return io.BytesIO(data)
    try:
        # Only the one member is looked for; no name of the archive is a path, and its size is counted as it unpacks.
        return zipfile.ZipFile(io.BytesIO(data)).open(MEMBER)  # type: ignore[return-value]
    except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"{config.uri} is no zip with {MEMBER}: {error}") from error


def _images(file: BinaryIO, where: str, max_bytes: int) -> Iterator[tuple[Attributes, list[tuple[str, Attributes]]]]:
    """Each `image` with its shapes, in the order of the file."""
    found: list[tuple[Attributes, list[tuple[str, Attributes]]]] = []
    open_image: list[tuple[Attributes, list[tuple[str, Attributes]]]] = []
    roots: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        roots.append(name)
        if roots[0] != "annotations":
            raise ConfigError(f"{where}: expected <annotations> of CVAT, got <{name[:40]}>")
        if name == "image" and len(roots) == 2:
            open_image.append((attributes, []))
        elif open_image and name in SHAPES | OTHERS:
            open_image[-1][1].append((name, attributes))

    def end(name: str) -> None:
        if name == "image" and len(roots) == 2:
            found.append(open_image.pop())
        roots.pop()

    def doctype(*_: Any) -> None:
        raise ConfigError(f"{where}: a document type declaration is not read")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = doctype
    total = 0
    try:
        while data := file.read(CHUNK_BYTES):
            total += len(data)
            if total > max_bytes:
                raise ConfigError(f"{where} is larger than {max_bytes} bytes when unpacked (max_bytes)")
            parser.Parse(data, False)
            yield from found
            found.clear()
        parser.Parse(b"", True)
    except (expat.ExpatError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{where} is not readable XML: {error}") from error
    yield from found


def _corrected(
    image: Attributes, shapes: list[tuple[str, Attributes]], classes: Classes, max_pixels: int, notes: Notes
) -> Corrected:
    name = image.get("name", "")
    try:
        width, height = _whole(image, "width"), _whole(image, "height")
        check_size(width, height, max_pixels)
        found = []
        for kind, attributes in shapes:
            if kind in OTHERS:
                notes.passed_over[f"{kind} of CVAT"] += 1
            else:
                found.append(_shape(kind, attributes, classes, width, height))
    except RowError as error:
        return Corrected(name, error=error)
    return Corrected(name, width=width, height=height, shapes=tuple(found))


def _shape(kind: str, given: Attributes, classes: Classes, width: int, height: int) -> Shape:
    category_id = classes.id_of(given.get("label", ""))
    order = int(given.get("z_order") or 0) if _is_whole(given.get("z_order") or "0") else 0
    size = {"width": width, "height": height, "order": order}
    if kind == "box":
        x, y, right, bottom = (_number(given, name) for name in ("xtl", "ytl", "xbr", "ybr"))
        return box_shape(category_id, (x, y, right - x, bottom - y), **size)
    if kind == "polygon":
        return polygon_shape(category_id, [_points(given.get("points", ""))], **size)
    left, top, wide, high = (_whole(given, name) for name in ("left", "top", "width", "height"))
    if wide < 1 or high < 1 or left < 0 or top < 0 or left + wide > width or top + high > height:
        raise TargetMismatchError(f"expected a mask inside {width}x{height}, got {wide}x{high} at {left}, {top}")
    try:
        runs = np.array(given.get("rle", "").split(","), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise TargetMismatchError(f"expected run lengths, got {given.get('rle', '')[:40]!r}") from error
    mask_HW = np.zeros((height, width), bool)
    mask_HW[top : top + high, left : left + wide] = decode_runs(runs, width=wide, height=high)
    return Shape(category_id, encode_rle(mask_HW), order)


def _points(text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        return np.array([float(value) for point in text.split(";") for value in point.split(",")], np.float64)
    except ValueError as error:
        raise TargetMismatchError(f"expected points as x,y;x,y, got {text[:40]!r}") from error


def _is_whole(text: str) -> bool:
    return text.lstrip("-").isdecimal() and len(text) <= DIGITS


def _whole(given: Attributes, name: str) -> int:
    text = given.get(name, "").strip()
    if not _is_whole(text):
        raise TargetMismatchError(f"expected {name} to be a whole number, got {text[:40]!r}")
    return int(text)


def _number(given: Attributes, name: str) -> float:
    try:
        return float(given.get(name, ""))
    except ValueError as error:
        raise TargetMismatchError(f"expected {name} to be a number, got {given.get(name, '')[:40]!r}") from error
