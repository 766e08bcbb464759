"""Encoded targets to arrays: label maps, panoptic maps, annotations and depth, bounded before anything is allocated.

What is no such target raises TargetMismatchError, what is larger than `max_pixels` ImageTooLargeError.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ImageTooLargeError, SchemaError, TargetMismatchError
from pipeline.masks import decode_label_map, decode_panoptic_png
from pipeline.metrics.depth_align import target_depth

__all__ = [
    "NPY",
    "read_depth",
    "read_instances",
    "read_label_map",
    "read_npy",
    "read_panoptic",
    "read_segments",
    "segments_of",
]

NPY = b"\x93NUMPY"
INT64 = range(-(2**63), 2**63)
# Where a PNG says how many bits its values have, and whether they are gray (https://www.w3.org/TR/png-3/#11IHDR).
PNG_BITS, PNG_COLOR, GRAY = 24, 25, 0


def read_label_map(data: bytes, *, max_pixels: int) -> npt.NDArray[Any]:
    """A label map PNG (gray of up to 16 bits, or palette indices) as label_HW, uint8 or uint16."""
    width, height = _png_size(data, max_pixels)
    try:
        label_HW = decode_label_map(data, "png", width=width, height=height)
    except SchemaError as error:
        raise TargetMismatchError(f"the label map cannot be read: {error}") from error
    bits = data[PNG_BITS]
    if data[PNG_COLOR] == GRAY and bits in (2, 4):
        # Pillow stretches these to 0..255, but they are ids: what a PNG optimiser makes of few classes.
        label_HW = label_HW // np.uint8(255 // (2**bits - 1))
    return label_HW


def read_panoptic(data: bytes, *, max_pixels: int) -> npt.NDArray[np.int32]:
    """A panoptic PNG as segment_HW."""
    width, height = _png_size(data, max_pixels)
    try:
        return decode_panoptic_png(data, width=width, height=height)
    except SchemaError as error:
        raise TargetMismatchError(f"the panoptic map cannot be read: {error}") from error


def read_segments(data: bytes) -> Sequence[Mapping[str, Any]]:
    """`segments_info` of a panoptic annotation, each with a whole number as `id` and `category_id`."""
    return segments_of(_json(data, "segments_info"))


def segments_of(annotation: Any) -> Sequence[Mapping[str, Any]]:
    """As `read_segments`, of an annotation that is parsed already."""
    return _listed(annotation, "segments_info", ("id", "category_id"))


def read_instances(data: bytes) -> tuple[Sequence[Mapping[str, Any]], int, int]:
    """COCO annotations of one image, and its width and height, 0 where the JSON does not say."""
    tree = _json(data, "annotations")
    annotations = _listed(tree, "annotations", ("category_id",))
    width, height = (tree.get(name) if isinstance(tree, dict) else None for name in ("width", "height"))
    if type(width) is not int or type(height) is not int or width <= 0 or height <= 0:
        return annotations, 0, 0
    return annotations, width, height


def _json(data: bytes, key: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TargetMismatchError(f"expected JSON with {key}: {error}") from error


def _listed(tree: Any, key: str, whole: tuple[str, ...]) -> Sequence[Mapping[str, Any]]:
    items = tree.get(key) if isinstance(tree, dict) else tree
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise TargetMismatchError(f"expected JSON with {key}, a list of objects, got {str(tree)[:80]!r}")
    for item in items:
        for name in whole:
            value = item.get(name)
            if type(value) is not int or value not in INT64:
                raise TargetMismatchError(f"expected {name} of {key} to be a whole number, got {str(value)[:80]}")
    return items


def read_depth(data: bytes, *, scale: float, invalid: tuple[float, ...], max_pixels: int) -> npt.NDArray[np.float64]:
    """Depth in metres, (H, W), NaN where unknown: a PNG of steps of `scale`, or an .npy array that holds metres.

    invalid: stored values that mean unknown.
    """
    if data.startswith(NPY):
        return target_depth(read_npy(data, max_pixels=max_pixels), invalid=invalid)
    return target_depth(read_label_map(data, max_pixels=max_pixels), scale=scale, invalid=invalid)


def read_npy(data: bytes, *, max_pixels: int) -> npt.NDArray[np.float64]:
    """An .npy array of numbers, (H, W); outer axes of length 1 are dropped. Nothing is unpickled."""
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(buffer)
        pixels = math.prod(shape)
        if dtype.kind not in "fiu":
            raise ValueError(f"its values are {dtype}")
        if pixels * dtype.itemsize > len(data):
            raise ValueError(f"{dtype} {shape} needs more than its {len(data)} bytes")
        if pixels <= max_pixels:
            buffer.seek(0)
            array: npt.NDArray[Any] = np.load(buffer, allow_pickle=False)
    except Exception as error:  # a header is a Python expression, and may be wrong in any way
        raise TargetMismatchError(f"expected an .npy array of depth: {' '.join(str(error).split())[:300]}") from error
    if pixels > max_pixels:
        raise ImageTooLargeError(f"an array of {shape}, at most {max_pixels} pixels are read (source.max_pixels)")
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise TargetMismatchError(f"expected an .npy array of height x width, got {shape}")
    return array.astype(np.float64)


def _png_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """The size of a PNG that is whole: a bit that fell over would be a pixel of another class."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        width, height = image.size
        image.verify()
        if data[12:16] != b"IHDR":
            raise ValueError("it does not begin with its header")
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
        raise TargetMismatchError(f"expected a PNG, got {len(data)} bytes: {problem}") from error
    if width * height > max_pixels:
        raise ImageTooLargeError(f"a map of {width}x{height}, at most {max_pixels} pixels are read (source.max_pixels)")
    return width, height
