"""Bytes to image_HWC, safely: the header is checked before pixels are allocated, and nothing in the file is executed."""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import CorruptImageError, ImageTooLargeError

__all__ = ["DEFAULT_MAX_PIXELS", "FORMATS", "decode_image"]

DEFAULT_MAX_PIXELS = 200_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "MPO")

# Sizes are checked here against the config's own limit, before any pixel is allocated; Pillow's fixed one (which warns
# at 89 and raises at 179 megapixels) would refuse images that a user has allowed.
Image.MAX_IMAGE_PIXELS = None


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"expected at most {max_pixels} pixels (source.max_pixels), got {width}x{height} = {width * height}"
                )
            if image.format == "PNG":
                image.verify()
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            return _to_rgb(image)
    except (CorruptImageError, ImageTooLargeError):
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError(f"not a JPEG, PNG, WebP, TIFF or BMP: starts with {data[:8]!r}") from error
    except MemoryError as error:
        raise ImageTooLargeError("out of memory while decoding") from error
    except Exception as error:
        raise CorruptImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        values_HW = np.asarray(ImageOps.exif_transpose(image))
        if values_HW.size and (values_HW.min() < 0 or values_HW.max() > 65535):
            raise CorruptImageError(f"expected 8- or 16-bit values, got {values_HW.min()} to {values_HW.max()}")
        gray_HW = (values_HW.astype(np.uint16) >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(gray_HW[..., None], (*gray_HW.shape, 3)))
    if image.mode == "F":
        raise CorruptImageError("expected 8- or 16-bit values, got 32-bit float pixels")
    image.load()
    if image.mode != "RGB":
        # Orientation first: converting may drop the EXIF block.
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return np.asarray(ImageOps.exif_transpose(image))
