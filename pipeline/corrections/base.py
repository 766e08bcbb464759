"""What every reader of corrections gives: one image after the other, its shapes as run lengths, or its map.

Files of corrections come from other people's tools: sizes are checked before anything is allocated, and no name in them
becomes a path.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from pipeline.config_export import ImportConfig
from pipeline.errors import ImageTooLargeError, RowError, TargetMismatchError
from pipeline.masks import decode_rle, encode_rle
from pipeline.taxonomy import Taxonomy

__all__ = ["Classes", "Corrected", "Notes", "Reader", "Shape", "box_shape", "check_size", "painted", "polygon_shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One object: its class, COCO's compressed counts, and what lies on top of what (higher is nearer)."""

    category_id: int
    rle: str
    order: int = 0


@dataclass(frozen=True)
class Corrected:
    """One image as the tool gave it back. file_name: what the tool calls it. image_id: where the tool kept it.

    width, height: pixels, 0 where the tool does not say. Of shapes, label_HW, or segment_HW (ids, 0 = none) with
    category ids by segment id, what the format has. error: why the image could not be read.
    """

    file_name: str
    image_id: str | None = None
    width: int = 0
    height: int = 0
    shapes: tuple[Shape, ...] = ()
    label_HW: npt.NDArray[Any] | None = None
    segment_HW: npt.NDArray[np.int32] | None = None
    segments: dict[int, int] = field(default_factory=dict)
    error: RowError | None = None


@dataclass
class Notes:
    """What a reader passed over, by kind, for the summary."""

    passed_over: Counter[str] = field(default_factory=Counter)


class Reader(Protocol):
    """Reads one format. Instances hold no open files."""

    def __call__(self, config: ImportConfig, taxonomy: Taxonomy, notes: Notes) -> Iterator[Corrected]:
        """Stream the images. Raises ConfigError where the file is not of the format, StorageError."""
        ...


class Classes:
    """Names of a tool's classes as ids of the label space."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._taxonomy = taxonomy
        self._ids = {_plain(category.name): category.id for category in taxonomy.categories}

    def id_of(self, name: str) -> int:
        """Raises TargetMismatchError for a name that the label space does not have."""
        found = self._ids.get(_plain(name))
        if found is None:
            raise TargetMismatchError(f"expected a class of {self._taxonomy.name}, got {name[:80]!r}")
        return found


def _plain(name: str) -> str:
    return name.strip().casefold()


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises TargetMismatchError for a size that no image has, ImageTooLargeError for one over the limit."""
    if width < 1 or height < 1:
        raise TargetMismatchError(f"expected the size of an image, got {width}x{height}")
    if width * height > max_pixels:
        raise ImageTooLargeError(f"a mask of {width}x{height}, at most {max_pixels} pixels are read (max_pixels)")


def polygon_shape(
    category_id: int, rings: Sequence[npt.NDArray[np.float64]], *, width: int, height: int, order: int
) -> Shape:
    """Rings of x, y in pixels, as COCO fills them. Raises TargetMismatchError for fewer than three points."""
    flat = [ring.ravel() for ring in rings]
    if not flat or any(len(ring) < 6 or len(ring) % 2 or not np.isfinite(ring).all() for ring in flat):
        raise TargetMismatchError("expected polygons of three points or more, each of two numbers")
    # Beyond the image there is nothing to fill; what is far off would cost the filler its time.
    bounds = np.array([width, height], np.float64)
    kept = [np.clip(ring.reshape(-1, 2), -bounds, 2 * bounds).ravel().tolist() for ring in flat]
    rle = coco_mask.merge(coco_mask.frPyObjects(kept, height, width))
    return Shape(category_id, str(rle["counts"].decode("ascii")), order)


def box_shape(
    category_id: int, box: tuple[float, float, float, float], *, width: int, height: int, order: int
) -> Shape:
    """A box (x, y, w, h in pixels) as the mask of all its pixels."""
    mask_HW = np.zeros((height, width), bool)
    x, y, w, h = box
    if not np.isfinite(box).all() or w <= 0 or h <= 0:
        raise TargetMismatchError(f"expected a box of x, y, w, h in pixels, got {box}")
    left, top, right, bottom = (round(value) for value in (x, y, x + w, y + h))
    mask_HW[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return Shape(category_id, encode_rle(mask_HW), order)


def painted(corrected: Corrected, values: Sequence[int], *, start: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A map with each shape's value where it is on top, `start` elsewhere."""
    map_HW = np.full((corrected.height, corrected.width), start, dtype)
    order = sorted(range(len(values)), key=lambda place: corrected.shapes[place].order)
    for place in order:
        mask_HW = decode_rle(corrected.shapes[place].rle, width=corrected.width, height=corrected.height)
        map_HW[mask_HW] = values[place]
    return map_HW
