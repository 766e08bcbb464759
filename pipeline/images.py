"""Bytes to image_HWC, safely: the header is checked before pixels are allocated, and nothing in a file is executed."""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import CorruptImageError, ImageTooLargeError

__all__ = ["DEFAULT_MAX_PIXELS", "FORMATS", "decode_image"]

DEFAULT_MAX_PIXELS = 200_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
ORIENTATION_TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TILE_WIDTH_TAG, TILE_HEIGHT_TAG = 322, 323

# Sizes are checked here against the config's own limit, before any pixel is allocated; Pillow's fixed one (which warns
# at 89 and raises at 179 megapixels) would refuse images that a user has allowed.
Image.MAX_IMAGE_PIXELS = None
# For the whole process, because `warnings.catch_warnings` does not work in several threads at once.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode one JPEG, PNG, WebP, TIFF or BMP to image_HWC: uint8 RGB, EXIF orientation applied.

    Grayscale is repeated over the channels, palettes are looked up, CMYK is converted, alpha is dropped, 16 bits are
    cut to their upper 8. Of an animation or a multi-page file the first frame counts. Every CRC of a PNG is checked.

    Raises CorruptImageError (empty, not an image, truncated, bad checksum, a float or 32-bit image) and
    ImageTooLargeError (more than `max_pixels`).
    """
    if not data:
        raise CorruptImageError("expected an encoded image, got 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, "", max_pixels)
        if image.format == "TIFF":
            # A tile is decoded whole, however little of it lies in the image.
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags.get(TILE_WIDTH_TAG, 0), tags.get(TILE_HEIGHT_TAG, 0)
            if not isinstance(width, int) or not isinstance(height, int):
                raise CorruptImageError(f"expected a TIFF with numbers as tile size, got {width!r:.40}, {height!r:.40}")
            _check_size(width, height, " in a tile", max_pixels)
        if image.format == "PNG":
            image.verify()
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        return _to_rgb(image)
    except (CorruptImageError, ImageTooLargeError):
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError(f"not a readable JPEG, PNG, WebP, TIFF or BMP: starts with {data[:8]!r}") from error
    except MemoryError as error:
        raise ImageTooLargeError("out of memory while decoding") from error
    except Exception as error:
        raise CorruptImageError(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_size(width: int, height: int, where: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"expected at most {max_pixels} pixels{where} (source.max_pixels), got {width}x{height} = {width * height}"
        )


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode in ("F", "I"):
        kind = "float" if image.mode == "F" else "integer"
        raise CorruptImageError(f"expected 8- or 16-bit values, got 32-bit {kind} pixels")
    image.load()
    # Orientation first: converting may drop the EXIF block.
    upright = _upright(image)
    if upright.mode.startswith("I;16"):
        gray_HW = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(gray_HW[..., None], (*gray_HW.shape, 3)))
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """`ImageOps.exif_transpose` without its copies, and without failing on tags that it would only write back."""
    try:
        method = TRANSPOSE.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001  (the pixels of an image are whole, whatever its EXIF block holds)
        return image
    return image if method is None else image.transpose(method)
