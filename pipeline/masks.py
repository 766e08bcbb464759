"""Codecs of what the table stores: label maps, masks as COCO RLE, panoptic ids and depth, each with its inverse."""

import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.errors import SchemaError

__all__ = [
    "DepthCode",
    "decode_depth",
    "decode_label_map",
    "decode_panoptic_png",
    "decode_rle",
    "encode_depth",
    "encode_label_map",
    "encode_panoptic_png",
    "encode_rle",
    "rle_area",
    "rle_bbox",
]

MapFormat = Literal["png", "zstd"]
DepthCode = Mapping[str, Any]
DEPTH_INVALID = 0
DEPTH_LEVELS = 65535
PANOPTIC_IDS = 2**24

# Sizes are checked here against what the caller expects; Pillow's fixed limit (an error at 179 megapixels) would refuse
# label maps of images that `source.max_pixels` has allowed.
Image.MAX_IMAGE_PIXELS = None


def encode_label_map(label_HW: npt.NDArray[np.unsignedinteger[Any]], form: MapFormat = "png") -> bytes:
    """A label map (uint8 or uint16) as an 8- or 16-bit grayscale PNG, or as zstd of its raw little-endian rows."""
    if label_HW.dtype not in (np.uint8, np.uint16) or label_HW.ndim != 2:
        raise SchemaError(f"expected label_HW of uint8 or uint16, got {label_HW.dtype} {label_HW.shape}")
    return _encode_plane(label_HW, form)


def decode_label_map(data: bytes, form: MapFormat, *, width: int, height: int) -> npt.NDArray[Any]:
    """The inverse of `encode_label_map`: label_HW, uint8 or uint16. Raises SchemaError where size or format differ."""
    if form == "png":
        return _decode_gray_png(data, width, height)
    pixels = width * height
    raw = _unzstd(data, 2 * pixels)
    if len(raw) not in (pixels, 2 * pixels):
        raise SchemaError(f"expected {width}x{height} values of 1 or 2 bytes in zstd, got {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8 if len(raw) == pixels else np.uint16).reshape(height, width)


def _encode_plane(plane_HW: npt.NDArray[Any], form: MapFormat) -> bytes:
    if form == "zstd":
        return bytes(pa.Codec("zstd", 1).compress(np.ascontiguousarray(plane_HW), asbytes=True))
    buffer = io.BytesIO()
    # Level 1 with zlib's run-length strategy: label maps come out smaller than at level 6, in 60 % of the time.
    Image.fromarray(plane_HW).save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def _decode_png(data: bytes, width: int, height: int) -> npt.NDArray[Any]:
    """The values of a PNG as they are, (height, width) or (height, width, channels). Raises SchemaError."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.size != (width, height):
            raise SchemaError(f"expected a PNG of {width}x{height}, got {image.size[0]}x{image.size[1]}")
        return np.asarray(image)
    except SchemaError:
        raise
    except Exception as error:
        raise SchemaError(f"expected a PNG of {width}x{height}, got: {' '.join(str(error).split())}") from error


def _decode_gray_png(data: bytes, width: int, height: int) -> npt.NDArray[Any]:
    values_HW = _decode_png(data, width, height)
    if values_HW.ndim != 2:
        raise SchemaError(f"expected a PNG of one channel, got {values_HW.shape[2]}")
    return values_HW.astype(np.uint16) if values_HW.dtype != np.uint8 else values_HW


def _unzstd(data: bytes, max_bytes: int) -> bytes:
    """At most `max_bytes` of decompressed data, whatever the frame's header claims."""
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            raw: bytes = stream.read(max_bytes + 1)
    except OSError as error:
        raise SchemaError(f"cannot be decompressed: {error}") from error
    return raw


def encode_rle(mask_HW: npt.NDArray[Any]) -> str:
    """A binary mask (bool, or uint8 of 0 and 1) as COCO's compressed run lengths (column-major, pycocotools)."""
    return str(coco_mask.encode(np.asfortranarray(mask_HW, np.uint8))["counts"].decode("ascii"))


def decode_rle(counts: str, *, width: int, height: int) -> npt.NDArray[np.bool_]:
    """The inverse of `encode_rle`: mask_HW. Raises SchemaError where the runs do not fill the mask exactly."""
    runs = _rle_runs(counts)
    if (runs < 0).any() or runs.sum() != width * height:
        raise SchemaError(f"expected run lengths of {width}x{height} pixels, got {runs.sum()} ({counts[:40]!r})")
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts.encode("ascii")})).astype(bool)


def _rle_runs(counts: str) -> npt.NDArray[np.int64]:
    """The run lengths of a compressed RLE (maskApi.c, rleFrString). pycocotools checks only that they are not too long,
    and leaves what they do not reach uninitialised."""
    codes = np.frombuffer(counts.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)
    if ((codes < 0) | (codes > 63)).any() or not len(last) or last[-1] != len(codes) - 1:
        raise SchemaError(f"expected run lengths as COCO compresses them, got {counts[:40]!r}")
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > 7:
        raise SchemaError(f"expected run lengths below 2**32, got {counts[:40]!r}")
    shift = 5 * (np.arange(len(codes)) - np.repeat(first, digits))
    runs: npt.NDArray[np.int64] = np.add.reduceat((codes & 31) << shift, first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * digits), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def rle_area(counts: str, *, width: int, height: int) -> int:
    """Pixels of a mask, without decoding it."""
    return int(coco_mask.area({"size": [height, width], "counts": counts.encode("ascii")}))


def rle_bbox(counts: str, *, width: int, height: int) -> tuple[float, float, float, float]:
    """The tight box of a mask as x, y, w, h in pixels, without decoding it."""
    x, y, w, h = coco_mask.toBbox({"size": [height, width], "counts": counts.encode("ascii")})
    return float(x), float(y), float(w), float(h)


def encode_panoptic_png(segment_HW: npt.NDArray[np.integer[Any]]) -> bytes:
    """Segment ids (0 = void, below 2**24) as COCO's panoptic PNG: id = R + 256 G + 65536 B.

    Raises SchemaError for other ids.
    """
    if segment_HW.size and (segment_HW.min() < 0 or segment_HW.max() >= PANOPTIC_IDS):
        raise SchemaError(f"expected ids from 0 to {PANOPTIC_IDS - 1}, got {segment_HW.min()} to {segment_HW.max()}")
    ids_HW = segment_HW.astype(np.uint32)
    channels = np.stack([ids_HW & 255, (ids_HW >> 8) & 255, ids_HW >> 16], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(channels.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_panoptic_png(data: bytes, *, width: int, height: int) -> npt.NDArray[np.int32]:
    """The inverse of `encode_panoptic_png`: segment_HW int32. Raises SchemaError where size or format differ."""
    values_HWC = _decode_png(data, width, height)
    if values_HWC.ndim != 3 or values_HWC.shape[2] not in (3, 4):
        raise SchemaError(f"expected a PNG of red, green and blue, got an array of {values_HWC.shape}")
    channels = values_HWC.astype(np.int32)
    return np.asarray(channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2], np.int32)


def encode_depth(depth_HW: npt.NDArray[np.floating[Any]], kind: str, form: MapFormat = "png") -> dict[str, Any]:
    """Depth in 16 bits: value = code * scale + offset, code 0 = invalid (not finite).

    The codes span this image's own range, so the rounding error is at most (max - min) / 131068.
    Returns the columns of the table's `depth` struct. `kind`: metric_m, relative or inverse_relative.
    """
    valid_HW = np.isfinite(depth_HW)
    low, high = (float(depth_HW[valid_HW].min()), float(depth_HW[valid_HW].max())) if valid_HW.any() else (0.0, 0.0)
    # A constant map is exact: its one code stands for |low|, and the offset for what is left of it.
    scale = (high - low) / (DEPTH_LEVELS - 1) or abs(low) or 1.0
    codes_HW = np.zeros(depth_HW.shape, np.uint16)
    codes_HW[valid_HW] = np.rint((depth_HW[valid_HW].astype(np.float64) - low) / scale).astype(np.uint16) + 1
    data = _encode_plane(codes_HW if form == "png" else _to_planes(codes_HW), form)
    return {"format": form, "data": data, "scale": scale, "offset": low - scale, "kind": kind}


def decode_depth(depth: DepthCode, *, width: int, height: int) -> npt.NDArray[np.float32]:
    """The inverse of `encode_depth` to within its rounding: depth_HW float32, NaN where invalid."""
    if depth["format"] == "png":
        codes_HW = _decode_gray_png(depth["data"], width, height)
    else:
        raw = _unzstd(depth["data"], width * height * 2)
        if len(raw) != width * height * 2:
            raise SchemaError(f"expected {width}x{height} depth codes of 2 bytes in zstd, got {len(raw)} bytes")
        codes_HW = _from_planes(np.frombuffer(raw, np.uint8), width, height)
    depth_HW = (codes_HW * depth["scale"] + depth["offset"]).astype(np.float32)
    depth_HW[codes_HW == DEPTH_INVALID] = np.nan
    return np.asarray(depth_HW, np.float32)


def _to_planes(codes_HW: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """High and low bytes of the differences along a row: smooth depth becomes long runs that zstd likes."""
    difference_HW = np.diff(codes_HW, axis=1, prepend=np.uint16(0))
    return np.stack([difference_HW >> 8, difference_HW & 255]).astype(np.uint8)


def _from_planes(raw: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint16]:
    high_HW, low_HW = raw.reshape(2, height, width).astype(np.uint16)
    return np.asarray(np.cumsum((high_HW << 8) | low_HW, axis=1, dtype=np.uint16), np.uint16)
