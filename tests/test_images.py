"""Decoding: right values in every format and mode, and RowErrors in bounded memory for everything else."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import CorruptImageError, ImageTooLargeError, RowError
from pipeline.images import decode_image

pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
IMAGE_HWC = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
LOSSLESS: dict[str, dict[str, object]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "TIFF packbits": {"compression": "packbits"},
}
LOSSY: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "JPEG progressive": {"quality": 95, "subsampling": 0, "progressive": True},
    "WEBP lossy": {"quality": 95},
    "TIFF jpeg": {"compression": "jpeg", "quality": 95},
}


def encoded(image: Image.Image | npt.NDArray[np.generic], form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, form.partition(" ")[0], **options)
    return buffer.getvalue()


def smooth(height: int = 24, width: int = 40) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5, y * 9, 40 + x + y], axis=-1).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, bits: int, color: int, raw: bytes, *, before: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG by hand: `raw` are its rows with their filter bytes, `before` stands in front of the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(tags: dict[int, tuple[int, ...]], data: bytes, *, order: str = "<") -> bytes:
    """A TIFF by hand: every tag as LONG; tag 273 or 324 (offsets) is filled in."""
    offsets = 273 if 279 in tags else 324
    tags = {**tags, offsets: (0,)}
    start = 8 + 2 + 12 * len(tags) + 4
    spill = sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[offsets] = (start + spill,)
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    extra = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, extra = struct.pack(f"{order}I", start + len(extra)), extra + packed
        out += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    return out + b"\0\0\0\0" + extra + data


def rgb_tags(width: int, height: int, size: int, **more: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    tags = {
        256: (width,),
        257: (height,),
        258: (8, 8, 8),
        259: (1,),
        262: (2,),
        277: (3,),
        278: (height,),
        279: (size,),
    }
    return {**tags, **{int(tag[1:]): values for tag, values in more.items()}}


# --- values


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_give_the_pixels(form: str) -> None:
    image_HWC = decode_image(encoded(IMAGE_HWC, form, **LOSSLESS[form]))
    assert image_HWC.dtype == np.uint8
    assert image_HWC.flags.c_contiguous
    np.testing.assert_array_equal(image_HWC, IMAGE_HWC)


@pytest.mark.parametrize("form", LOSSY)
def test_lossy_formats_give_nearly_the_pixels(form: str) -> None:
    difference = decode_image(encoded(smooth(), form, **LOSSY[form])).astype(int) - smooth()
    assert np.abs(difference).mean() < 2.5
    assert np.abs(difference).max() < 25


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 37), (53, 1)])
def test_thin_images(form: str, height: int, width: int) -> None:
    gray_HWC = np.full((height, width, 3), 128, np.uint8)
    image_HWC = decode_image(encoded(gray_HWC, form))
    assert image_HWC.shape == (height, width, 3)
    assert np.abs(image_HWC.astype(int) - 128).max() <= 2


GRAY_HW = IMAGE_HWC[..., 0]
RGBA_HWC = np.dstack([IMAGE_HWC, GRAY_HW])


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_gray_is_repeated(form: str) -> None:
    np.testing.assert_array_equal(decode_image(encoded(GRAY_HW, form)), np.dstack([GRAY_HW] * 3))


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_dropped(form: str, options: dict[str, object]) -> None:
    np.testing.assert_array_equal(decode_image(encoded(RGBA_HWC, form, **options)), IMAGE_HWC)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_gray_with_alpha(form: str) -> None:
    image = Image.merge("LA", [Image.fromarray(GRAY_HW), Image.fromarray(IMAGE_HWC[..., 1])])
    np.testing.assert_array_equal(decode_image(encoded(image, form)), np.dstack([GRAY_HW] * 3))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_8(form: str) -> None:
    deep_HW = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    np.testing.assert_array_equal(
        decode_image(encoded(deep_HW, form)), np.dstack([(deep_HW >> 8).astype(np.uint8)] * 3)
    )


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4), (4, 2), (0, 1)])
def test_16_bit_png_of_any_channels(color: int, channels: int) -> None:
    deep_HWC = RNG.integers(0, 65536, (5, 7, channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in deep_HWC)
    upper_HWC = (deep_HWC >> 8).astype(np.uint8)
    expected_HWC = upper_HWC[..., :3] if channels > 2 else np.repeat(upper_HWC[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode_image(png(7, 5, 16, color, raw)), expected_HWC)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_rgb_tiff(order: str) -> None:
    deep_HWC = RNG.integers(0, 65536, (5, 7, 3)).astype(f"{order}u2")
    data = deep_HWC.tobytes()
    image_HWC = decode_image(tiff(rgb_tags(7, 5, len(data), t258=(16, 16, 16)), data, order=order))
    np.testing.assert_array_equal(image_HWC, (deep_HWC >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("bits", "raw", "levels"), [(1, b"\0\xa0", [1, 0, 1]), (2, b"\0\x1b", [0, 1, 2]), (4, b"\0\x1f\x80", [1, 15, 8])]
)
def test_png_of_few_bits_is_stretched(bits: int, raw: bytes, levels: list[int]) -> None:
    expected = [level * 255 // (2**bits - 1) for level in levels]
    assert decode_image(png(3, 1, bits, 0, raw))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_1_bit(form: str) -> None:
    mask_HW = IMAGE_HWC[..., 0] > 128
    np.testing.assert_array_equal(decode_image(encoded(mask_HW, form)), np.dstack([mask_HW * np.uint8(255)] * 3))


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_palettes_are_looked_up(form: str, transparency: int | bytes | None) -> None:
    palette = np.array([[255, 0, 0], [0, 200, 7], [9, 8, 250]], np.uint8)
    index_HW = IMAGE_HWC[..., 0] % 3
    image = Image.fromarray(index_HW)
    image.putpalette(palette.tobytes())
    options = {} if transparency is None or form != "PNG" else {"transparency": transparency}
    np.testing.assert_array_equal(decode_image(encoded(image, form, **options)), palette[index_HW])


def test_cmyk_jpeg_has_its_colours() -> None:
    image = Image.fromarray(smooth()).convert("CMYK")
    difference = decode_image(encoded(image, "JPEG", quality=95)).astype(int) - smooth()
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (5, 3), (9, 17)])
def test_interlaced_png(height: int, width: int) -> None:
    image_HWC = IMAGE_HWC[:height, :width]
    # Adam7 (PNG specification 8.2): first row, first column, row step, column step of each pass.
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [image_HWC[row::row_step, column::column_step] for row, column, row_step, column_step in passes]
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    np.testing.assert_array_equal(decode_image(png(width, height, 8, 2, raw, interlaced=True)), image_HWC)


@pytest.mark.parametrize("form", ["WEBP", "TIFF", "PNG"])
def test_the_first_of_many_frames_counts(form: str) -> None:
    frames = [Image.fromarray(frame) for frame in (IMAGE_HWC, 255 - IMAGE_HWC)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data), IMAGE_HWC)


def test_a_stereo_jpeg_gives_its_first_image() -> None:
    frames = [Image.fromarray(frame) for frame in (smooth(), 255 - smooth())]
    buffer = io.BytesIO()
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert np.abs(decode_image(buffer.getvalue()).astype(int) - smooth()).mean() < 3


# What a viewer does to stored rows and columns for each EXIF orientation (Exif 2.32, 4.6.4, tag 0x0112).
ORIENTATIONS: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}


def exif(orientation: int, *more: bytes) -> bytes:
    entries = [struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0), *more]
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + b"\0\0\0\0"


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_is_applied(form: str, orientation: int) -> None:
    lossless = LOSSLESS.get(form, {"quality": 95, "subsampling": 0})
    options = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {**lossless, "exif": exif(orientation)}
    expected_HWC = ORIENTATIONS[orientation](smooth())
    image_HWC = decode_image(encoded(smooth(), form, **options))
    assert image_HWC.shape == expected_HWC.shape
    assert np.abs(image_HWC.astype(int) - expected_HWC).mean() < (3 if form == "JPEG" else 1e-9)


def test_orientation_of_16_bit_gray_and_of_palettes() -> None:
    deep_HW = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    turned_HW = np.rot90((deep_HW >> 8).astype(np.uint8), -1)
    np.testing.assert_array_equal(decode_image(encoded(deep_HW, "PNG", exif=exif(6)))[..., 0], turned_HW)
    image = Image.fromarray(GRAY_HW).convert("P")
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG", exif=exif(6)))[..., 0], np.rot90(GRAY_HW, -1))


@given(st.binary(max_size=64), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_broken_exif_block_does_not_cost_the_image(junk: bytes, oriented: bool) -> None:
    block = exif(6, struct.pack(">HHII", 0x8769, 4, 1, 0xFFFFFFF0)) + junk if oriented else b"Exif\0\0" + junk
    jpeg = encoded(smooth(), "JPEG")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    assert sorted(decode_image(data).shape) == [3, 24, 40]


def test_max_pixels_is_exact() -> None:
    data = encoded(IMAGE_HWC, "PNG")
    assert decode_image(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageTooLargeError, match=r"at most 599 pixels \(source.max_pixels\), got 30x20 = 600"):
        decode_image(data, max_pixels=599)


def test_more_pixels_than_pillow_allows_by_itself() -> None:
    width, height = 20_000, 9_000
    data = png(width, height, 1, 0, bytes(height * (1 + width // 8)))
    with pytest.raises(ImageTooLargeError):
        decode_image(data, max_pixels=width * height - 1)
    assert Image.MAX_IMAGE_PIXELS is None


# --- what is no image, or not a whole one

TEXT = b"<html><body>404 Not Found</body></html>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an encoded image, got 0 bytes"),
        (TEXT, "not a readable JPEG, PNG, WebP, TIFF or BMP: starts with b'<html><b'"),
        (b"GIF89a" + bytes(40), "not a readable JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable JPEG"),
        (encoded(np.zeros((2, 2), np.float32), "TIFF"), "expected 8- or 16-bit values, got 32-bit float"),
        (encoded(np.zeros((2, 2), np.int32), "TIFF"), "expected 8- or 16-bit values, got 32-bit integer"),
        (png(0, 5, 8, 2, b""), "not a readable"),
        (png(4, 4, 8, 2, (b"\7" + bytes(12)) * 4), "cannot be decoded"),
    ],
)
def test_what_is_no_image(data: bytes, message: str) -> None:
    with pytest.raises(CorruptImageError) as caught:
        decode_image(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WHOLE = {form: encoded(IMAGE_HWC, form, **options) for form, options in {**LOSSLESS, **LOSSY}.items()}


@pytest.mark.parametrize("form", WHOLE)
def test_truncation_anywhere_is_found(form: str) -> None:
    data = WHOLE[form]
    # What may be missing from the end without costing a pixel: IEND, the row padding of a BMP, and a TIFF's directory
    # where it stands behind the pixels is not among it.
    spare = {"PNG": 7, "BMP": 2}.get(form, 0)
    for end in {
        *range(0, len(data) - spare, max(1, len(data) // 120)),
        *range(len(data) - spare - 24, len(data) - spare),
    }:
        with pytest.raises(CorruptImageError):
            decode_image(data[:end])


@pytest.mark.parametrize("form", WHOLE)
def test_damage_gives_an_image_or_a_row_error(form: str) -> None:
    data = WHOLE[form]
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), rng.choice([40, 200, len(data)])), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            image_HWC = decode_image(bytes(damaged), max_pixels=1_000_000)
        except RowError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert image_HWC.dtype == np.uint8
            assert image_HWC.ndim == 3
            assert image_HWC.size


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBPVP8", b"II*\0\x08\0\0\0", b"BM"]),
    st.binary(),
)
@settings(max_examples=150, deadline=None)
def test_random_bytes_give_row_errors(start: bytes, rest: bytes) -> None:
    with contextlib.suppress(RowError):
        assert decode_image(start + rest, max_pixels=10_000).shape[2] == 3


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_every_checksum_of_a_png_is_checked(kind: bytes) -> None:
    data = bytearray(WHOLE["PNG"])
    start = data.index(kind)
    (size,) = struct.unpack(">I", data[start - 4 : start])
    data[start + 4 + size] ^= 1
    with pytest.raises(CorruptImageError):
        decode_image(bytes(data))


# --- bombs

ZEROS = zlib.compress(bytes(50_000_000), 9)
PIXEL = b"\0\1\2\3"
TILE = {322: (30_000,), 323: (30_000,), 325: (len(ZEROS),), 258: (8, 8, 8), 259: (8,), 262: (2,), 277: (3,)}
TILED = {256: (10,), 257: (10,), **TILE}
BOMBS: dict[str, tuple[bytes, type[RowError]]] = {
    "png size": (png(60_000, 60_000, 8, 2, bytes(100)), ImageTooLargeError),
    "bmp size": (WHOLE["BMP"][:18] + struct.pack("<ii", 60_000, 60_000) + WHOLE["BMP"][26:], ImageTooLargeError),
    "tiff size": (tiff(rgb_tags(2**31 - 1, 2**31 - 1, 100), bytes(100)), ImageTooLargeError),
    "tiff tile": (tiff(TILED, ZEROS), ImageTooLargeError),
    "tiff tile sizes": (tiff({**TILED, 322: (10**8, 10**8)}, ZEROS), ImageTooLargeError),
    "tiff tile as text": (
        tiff(TILED, ZEROS).replace(struct.pack("<HH", 322, 4), struct.pack("<HH", 322, 2), 1),
        CorruptImageError,
    ),
    "png text": (png(1, 1, 8, 2, PIXEL, before=chunk(b"zTXt", b"k\0\0" + ZEROS)), CorruptImageError),
    "png itext": (png(1, 1, 8, 2, PIXEL, before=chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS)), CorruptImageError),
    "png profile": (png(1, 1, 8, 2, PIXEL, before=chunk(b"iCCP", b"k\0\0" + ZEROS)), CorruptImageError),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory(name: str) -> None:
    data, error = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(error):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_pixels_behind_the_last_row_are_not_unpacked() -> None:
    started = time.perf_counter()
    assert decode_image(png(1, 1, 8, 2, bytes([0, 9, 9, 9]) + bytes(100_000_000))).tolist() == [[[9, 9, 9]]]
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("counts", [(0,), (2**32 - 1,)])
def test_tiff_strips_of_absurd_height(counts: tuple[int, ...]) -> None:
    data = IMAGE_HWC.tobytes()
    try:
        image_HWC = decode_image(tiff(rgb_tags(30, 20, len(data), t278=counts), data))
    except CorruptImageError:
        assert counts == (0,)
    else:
        np.testing.assert_array_equal(image_HWC, IMAGE_HWC)
