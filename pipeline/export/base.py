"""What every export format is given, an image at a time, and what it makes of it: files, and lines for the fold.

Axes: H rows, W columns, N points.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, SchemaError
from pipeline.export.outlines import inner, joined, outlines, simplified
from pipeline.masks import decode_depth, decode_label_map, decode_rle, encode_label_map, encode_rle, rle_area, rle_bbox
from pipeline.schema import OK
from pipeline.taxonomy import Taxonomy

__all__ = [
    "Encoded",
    "Folder",
    "Format",
    "Item",
    "Job",
    "Object",
    "Whole",
    "depth_files",
    "dumps",
    "only",
    "pretty",
    "rings_of",
]

METRIC = "metric_m"
DEPTH_LEVELS = 65535


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an export is, the same for all of its pieces. task: of the model; images: whether they are copied.

    pieces: how many there are. root: what stands in front of the names of images that are not copied.
    """

    format: str
    task: str
    taxonomy: Taxonomy
    model: str
    version: str
    pieces: int
    images: bool = False
    root: str = ""
    polygons: bool = False
    tolerance: float = 0.0
    depth_scale: float | None = None

    @property
    def categories(self) -> list[dict[str, Any]]:
        """As COCO lists them."""
        return [
            {
                "id": c.id,
                "name": c.name,
                "supercategory": c.kind,
                "isthing": int(c.kind == "thing"),
                "color": [*c.color],
            }
            for c in self.taxonomy.categories
        ]

    def class_name(self, category_id: int) -> str:
        """Raises SchemaError for an id that the label space does not have."""
        category = self.taxonomy.by_id.get(category_id)
        if category is None:
            raise SchemaError(f"expected an id of {self.taxonomy.name}, got {category_id}")
        return category.name


@dataclass(frozen=True, slots=True)
class Object:
    """One object or segment, or all pixels of a class.

    bbox: x, y, w, h in pixels. rle: COCO's compressed counts, None of a box.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    area: int
    rle: str | None
    score: float | None = None
    id: int = 0


@dataclass(frozen=True)
class Item:
    """One image of the export. number: from 1, unique in it. name: safe and unique, without extension.

    row: the table's. image: encoded bytes where they are copied, with their suffix (".jpg"). A row that failed and is
    in a review pack has neither objects nor maps.
    """

    number: int
    name: str
    image_id: str
    width: int
    height: int
    row: Mapping[str, Any]
    taxonomy: Taxonomy
    task: str
    image: bytes | None = None
    suffix: str = ""
    shown: str = field(default="")

    @property
    def is_empty(self) -> bool:
        """Whether the row failed, which is not the same as having found nothing."""
        return bool(self.row.get("status", OK) != OK)

    @property
    def score(self) -> float | None:
        """The mean largest probability, where the model says it."""
        quality = self.row.get("quality")
        value = quality["mean_max_probability"] if quality else None
        return None if value is None or not np.isfinite(value) else float(value)

    def mask_of(self, item: Object) -> npt.NDArray[np.bool_]:
        """Raises SchemaError for a box without a mask."""
        if item.rle is None:
            raise SchemaError("expected a mask, got a box")
        return decode_rle(item.rle, width=self.width, height=self.height)

    def label_map(self) -> npt.NDArray[Any] | None:
        """Class ids, void where nothing is: the row's label map, else its segments painted, the best ones on top."""
        semantic = self.row.get("semantic")
        if semantic:
            return decode_label_map(semantic["data"], semantic["format"], width=self.width, height=self.height)
        if self.row.get("segments") is None:
            return None
        label_HW = np.full((self.height, self.width), self.taxonomy.void_id, self.taxonomy.dtype)
        for segment in reversed(self.objects()):
            label_HW[self.mask_of(segment)] = segment.category_id
        return label_HW

    def segment_map(self) -> npt.NDArray[np.int32]:
        """Segments by their place in `objects`, from 1, 0 where nothing is; the best ones on top."""
        segment_HW = np.zeros((self.height, self.width), np.int32)
        for place, segment in reversed([*enumerate(self.objects(), 1)]):
            segment_HW[self.mask_of(segment)] = place
        return segment_HW

    def objects(self) -> list[Object]:
        """Instances and segments as the row has them, best first; of a label map one object for each class."""
        segments = self.row.get("segments")
        if segments is not None:
            return [self._stored(segment) for segment in segments]
        label_HW = self.label_map()
        if label_HW is None:
            return []
        found = []
        for category_id in np.unique(label_HW).tolist():
            if category_id in self.taxonomy.by_id:
                rle = encode_rle(label_HW == category_id)
                found.append(self._measured(category_id, rle, None, category_id + 1))
            elif category_id != self.taxonomy.void_id:
                raise SchemaError(f"expected ids of {self.taxonomy.name} or void, got {category_id}")
        return found

    def _stored(self, segment: Mapping[str, Any]) -> Object:
        if segment["category_id"] not in self.taxonomy.by_id:
            raise SchemaError(f"expected an id of {self.taxonomy.name}, got {segment['category_id']}")
        score = None if segment["score"] is None else float(segment["score"])
        if not segment["rle"]:
            x, y, w, h = map(float, segment["bbox"])
            return Object(segment["category_id"], (x, y, w, h), int(segment["area"]), None, score, segment["id"])
        decode_rle(segment["rle"], width=self.width, height=self.height)  # runs that do not fill the image are refused
        return self._measured(segment["category_id"], segment["rle"], score, segment["id"])

    def _measured(self, category_id: int, rle: str, score: float | None, number: int) -> Object:
        size = {"width": self.width, "height": self.height}
        return Object(category_id, rle_bbox(rle, **size), rle_area(rle, **size), rle, score, number)


@dataclass
class Encoded:
    """One image in a format. files: by path below the export's folder. lines: JSON for the fold, by stream, in order.

    record: a row, for formats that are tables.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def line(self, stream: str, value: Any) -> None:
        """A JSON value for the fold."""
        self.lines.append((stream, dumps(value)))


class Folder(Protocol):
    """Where files of the export go. A name is a path below its folder, made of names that `Namer` gave."""

    def file(self, name: str, data: bytes) -> None:
        """A small file: whole or not at all."""
        ...

    def spool(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file of any size, written to as the block goes on; it is in the export when the block has ended well."""
        ...


class Whole(Folder, Protocol):
    """Where the fold reads what the pieces left for it."""

    def lines(self, stream: str) -> Iterator[str]:
        """The lines of all pieces in their order, one at a time."""
        ...


class Format:
    """A format: what one image is in it, and what is written of the whole. Instances hold nothing.

    tasks: of models whose rows it carries. needs_images: whether its readers want the images beside the labels.
    """

    tasks: frozenset[str] = frozenset()
    needs_images: bool = False

    def check(self, job: Job) -> None:
        """Raises ConfigError where the format cannot carry what is asked for; nothing is written before."""
        if job.task not in self.tasks:
            carried = ", ".join(sorted(self.tasks))
            raise ConfigError(f"format {job.format} carries {carried}; the rows of {job.model} are {job.task}")

    def encode(self, job: Job, item: Item) -> Encoded:
        """One image; the same item gives the same bytes. Raises SchemaError where the row is not what it promises."""
        raise NotImplementedError

    @contextlib.contextmanager
    def sink(self, job: Job, index: int, out: Folder) -> Iterator[Callable[[Encoded], None]]:
        """Where the images of piece `index` go, one after the other: by default each into files of its own."""

        def write(encoded: Encoded) -> None:
            for name, data in encoded.files.items():
                out.file(name, data)

        yield write

    def fold(self, job: Job, out: Whole) -> None:
        """Write what belongs to the whole export, line by line."""


def rings_of(
    mask_HW: npt.NDArray[np.bool_], *, tolerance: float, single: bool, on_pixels: bool = False
) -> list[npt.NDArray[np.int32]]:
    """A mask's outlines, each (N, 2) of x, y: one for each part, or one in all where `single` is set or it has holes,
    which lists of rings cannot say. on_pixels: along the mask's outermost pixels, not along their edges (`inner`)."""
    found = outlines(mask_HW)
    if on_pixels:
        found = [(inner(ring, mask_HW), is_hole) for ring, is_hole in found]
    rings = [(simplified(ring, tolerance), is_hole) for ring, is_hole in found]
    if not rings:
        return []
    if single or any(is_hole for _, is_hole in rings):
        return [joined(rings)]
    return [ring for ring, _ in rings]


def depth_files(item: Item, job: Job) -> tuple[bytes, dict[str, Any]]:
    """Depth as a 16-bit PNG (0: unknown) and what its steps mean: value = step * scale + offset.

    Raises SchemaError where the row has no depth, or none in metres and `depth_scale` asks for them.
    """
    depth = item.row.get("depth")
    if not depth:
        raise SchemaError("expected depth, the row has none")
    if job.depth_scale is None:
        meaning = {"scale": depth["scale"], "offset": depth["offset"], "kind": depth["kind"], "invalid": 0}
        codes_HW = _codes(depth, item)
        return encode_label_map(codes_HW), meaning
    if depth["kind"] != METRIC:
        raise SchemaError(f"depth_scale is for depth in metres, this is {depth['kind']}")
    depth_HW = decode_depth(depth, width=item.width, height=item.height).astype(np.float64)
    steps_HW = np.rint(depth_HW / job.depth_scale)
    # What is too far for 16 bits is unknown rather than wrong.
    known_HW = np.isfinite(steps_HW) & (steps_HW >= 1) & (steps_HW <= DEPTH_LEVELS)
    codes_HW = np.where(known_HW, steps_HW, 0).astype(np.uint16)
    return encode_label_map(codes_HW), {"scale": job.depth_scale, "offset": 0.0, "kind": METRIC, "invalid": 0}


def _codes(depth: Mapping[str, Any], item: Item) -> npt.NDArray[np.uint16]:
    """The stored codes themselves: undoing their meaning would round."""
    plain = {**depth, "scale": 1.0, "offset": 0.0}
    codes_HW = decode_depth(plain, width=item.width, height=item.height)
    return np.nan_to_num(codes_HW, nan=0.0).astype(np.uint16)


def dumps(value: Any) -> str:
    """JSON without spaces; letters of other scripts stay, what is no UTF-8 is written as escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


def pretty(value: Any) -> bytes:
    """A small JSON file."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def only(objects: Sequence[Object]) -> list[Object]:
    """Those that have pixels: no format has a place for an empty mask."""
    return [item for item in objects if item.rle is None or item.area > 0]
