"""Encoded targets: what every form decodes to, and that nothing that is none gets further than its error."""

import io
import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline.errors import ImageTooLargeError, RowError, TargetMismatchError
from pipeline.masks import encode_label_map, encode_panoptic_png
from pipeline.targets import read_depth, read_instances, read_label_map, read_npy, read_panoptic, read_segments

MANY = 10_000


def png(array: Any, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(array))
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def raw_png(rows: list[bytes], width: int, *, bits: int, color: int, palette: bytes = b"", level: int = 6) -> bytes:
    """A PNG written by hand: of few bits, which Pillow does not write as gray."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), level)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **options)
    return buffer.getvalue()


def npy_header(text: str, body: bytes = b"") -> bytes:
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


LABELS = arrays.arrays(
    st.sampled_from([np.uint8, np.uint16]), arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), fill=st.nothing()
)


@given(LABELS)
def test_label_maps_come_back(label_HW: np.ndarray) -> None:
    np.testing.assert_array_equal(read_label_map(encode_label_map(label_HW), max_pixels=100), label_HW)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("color", [0, 3])
def test_label_maps_of_few_bits_are_ids(bits: int, color: int) -> None:
    """Optimisers write few classes that way; Pillow would make shades of them."""
    ids = [number % 2**bits for number in (0, 1, 2, 3, 7, 1, 0, 3)]
    packed = int("".join(f"{number:0{bits}b}" for number in ids), 2).to_bytes(bits, "big")
    data = raw_png([packed] * 2, 8, bits=bits, color=color, palette=bytes(3 * 2**bits) if color else b"")
    label_HW = read_label_map(data, max_pixels=100)
    assert label_HW.dtype in (np.uint8, np.uint16)
    np.testing.assert_array_equal(label_HW, [ids, ids])


def test_a_palette_is_not_looked_up() -> None:
    image = Image.fromarray(np.array([[0, 1, 15]], np.uint8), "L").convert("L")
    image.putpalette(bytes(range(200, 248)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(read_label_map(buffer.getvalue(), max_pixels=100), [[0, 1, 15]])


@given(arrays.arrays(np.int32, (2, 3), elements=st.integers(0, 2**24 - 1)))
def test_panoptic_maps_come_back(segment_HW: np.ndarray) -> None:
    data = encode_panoptic_png(segment_HW)
    np.testing.assert_array_equal(read_panoptic(data, max_pixels=6), segment_HW)
    rgba = png(Image.open(io.BytesIO(data)), "RGBA")
    np.testing.assert_array_equal(read_panoptic(rgba, max_pixels=6), segment_HW)


@pytest.mark.parametrize("read", [read_label_map, read_panoptic])
def test_a_png_that_claims_to_be_large_is_not_unpacked(read: Any) -> None:
    data = raw_png([b"\0" * 9000] * 3000, 9000, bits=8, color=0)
    tracemalloc.start()
    with pytest.raises(ImageTooLargeError, match="a map of 9000x3000, at most 26999999 pixels"):
        read(data, max_pixels=9000 * 3000 - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (read_label_map, png(np.zeros((2, 2, 3), np.uint8))),
        (read_label_map, png(np.zeros((2, 2), np.uint8), "LA")),
        (read_panoptic, png(np.zeros((2, 2), np.uint8))),
        (read_panoptic, png(np.zeros((2, 2), np.uint16))),
    ],
)
def test_a_png_of_another_kind(read: Any, data: bytes) -> None:
    with pytest.raises(TargetMismatchError, match="cannot be read"):
        read(data, max_pixels=100)


@given(st.binary(max_size=300), st.integers(0, 60), st.sampled_from([read_label_map, read_panoptic]))
@example(b"", 0, read_label_map)
def test_bytes_that_are_no_png_or_a_broken_one(noise: bytes, at: int, read: Any) -> None:
    good = encode_panoptic_png(np.arange(20).reshape(4, 5))
    for data in (noise, good[:at] + noise, good[: at + 8] + noise[:1] + good[at + 9 :]):
        try:
            map_HW = read(data, max_pixels=100)
        except RowError:
            continue
        np.testing.assert_array_equal(map_HW, np.arange(20).reshape(4, 5))  # then nothing was broken


def test_one_bit_that_fell_over_is_seen() -> None:
    """In pixels that are stored rather than packed, where a decoder may not notice."""
    data = raw_png([bytes(range(20))], 20, bits=8, color=0, level=0)
    np.testing.assert_array_equal(read_label_map(data, max_pixels=20), [[*range(20)]])
    at = data.index(bytes(range(5, 10)))
    with pytest.raises(TargetMismatchError, match="checksum"):
        read_label_map(data[:at] + b"\x07" + data[at + 1 :], max_pixels=20)


def test_segments() -> None:
    segments = [{"id": 5, "category_id": 1, "area": 3, "iscrowd": 0}]
    assert read_segments(json.dumps({"segments_info": segments, "x": 1}).encode()) == segments
    assert read_segments(json.dumps(segments).encode()) == segments
    assert read_segments(b"[]") == []


@pytest.mark.parametrize("tree", [{}, {"segments_info": {}}, [1], {"segments_info": [[]]}, 7, "x", None, [{"id": 1}],
                                  [{"id": 1.0, "category_id": 1}], [{"id": True, "category_id": 1}],
                                  [{"id": 1, "category_id": 2**63}], [{"id": 1, "category_id": float("inf")}],
                                  [{"id": None, "category_id": 1}]])  # fmt: skip
def test_what_are_no_segments(tree: Any) -> None:
    with pytest.raises(TargetMismatchError, match="segments_info"):
        read_segments(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"width": 5, "height": 4}, (5, 4)),
        ({}, (0, 0)),
        ({"width": 5}, (0, 0)),
        *(({"width": 5, "height": height}, (0, 0)) for height in (0, -4, "4", True, 4.5, None)),
    ],
)
def test_instances_and_the_size_of_their_image(size: dict[str, Any], expected: tuple[int, int]) -> None:
    annotations = [{"category_id": 3, "bbox": [0, 0, 1, 1]}]
    assert read_instances(json.dumps({"annotations": annotations, **size}).encode()) == (annotations, *expected)
    assert read_instances(json.dumps(annotations).encode()) == (annotations, 0, 0)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[{}]", b'[{"category_id": "1"}]', b"nan",
                                  b'{"annotations": null}', b'[{"category_id": ' + b"9" * 5000 + b"}]"])  # fmt: skip
def test_what_are_no_instances(data: bytes) -> None:
    with pytest.raises(TargetMismatchError):
        read_instances(data)


@given(
    st.one_of(st.binary(max_size=100), st.text(max_size=100).map(str.encode)),
    st.sampled_from([read_segments, read_instances]),
)
def test_bytes_that_are_no_json(data: bytes, read: Any) -> None:
    try:
        read(data)
    except RowError:
        return
    assert json.loads(data) is not None


def test_depth_of_steps_and_of_metres() -> None:
    codes_HW = np.array([[0, 1000], [65535, 500]], np.uint16)
    options: dict[str, Any] = {"scale": 0.001, "max_pixels": 4}
    np.testing.assert_array_equal(
        read_depth(png(codes_HW), invalid=(0, 65535), **options), [[np.nan, 1], [np.nan, 0.5]]
    )
    np.testing.assert_array_equal(read_depth(png(codes_HW), invalid=(), **options), [[0, 1], [65.535, 0.5]])
    metres_HW = np.array([[0, 1.5], [np.inf, -1]], np.float32)
    np.testing.assert_array_equal(
        read_depth(npy(metres_HW), invalid=(0, -1), **options), [[np.nan, 1.5], [np.inf, np.nan]]
    )


@given(
    arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.uint8, np.uint16, np.int32, ">f4", ">i2"]),
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    ),
    st.sampled_from(["C", "F"]),
    st.sampled_from([(), (None,), (None, None)]),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_npy_comes_back(values_HW: np.ndarray, order: Any, outer: Any, last: bool, version: tuple[int, int]) -> None:
    array = np.asarray(values_HW, order=order)[outer]
    data = npy(array[..., None] if last else array, version=version)
    found_HW = read_npy(data, max_pixels=36)
    assert found_HW.dtype == np.float64
    np.testing.assert_array_equal(found_HW, values_HW.astype(np.float64))


class Planted:
    """What runs where somebody unpickles it."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", TargetMismatchError, "expected an .npy array"),
        (b"\x93NUMPY", TargetMismatchError, "expected an .npy array"),
        (b"\x93NUMPY\x09\x00", TargetMismatchError, "expected an .npy array"),
        (npy(np.array([[Planted()]], object), allow_pickle=True), TargetMismatchError, "its values are object"),
        (npy(np.zeros((2, 2), [("a", "f4")])), TargetMismatchError, "its values are"),
        (npy(np.zeros((2, 2), complex)), TargetMismatchError, "its values are complex"),
        (npy(np.zeros((2, 2), bool)), TargetMismatchError, "its values are bool"),
        (npy(np.array([["1"]])), TargetMismatchError, "its values are <U1"),
        (npy(np.zeros(4)), TargetMismatchError, r"height x width, got \(4,\)"),
        (npy(np.zeros((2, 2, 3))), TargetMismatchError, r"height x width, got \(2, 2, 3\)"),
        (npy(np.float64(1)), TargetMismatchError, r"height x width, got \(\)"),
        (npy(np.zeros((101, 100), np.uint8)), ImageTooLargeError, r"an array of \(101, 100\), at most 10000 pixels"),
        (npy_header(HEADER.format("'<f8'", "(100, 100)"), bytes(80)), TargetMismatchError, "needs more than its"),
        (npy_header(HEADER.format("'<f8'", "(10**9, 10**9)")), TargetMismatchError, "expected an .npy array"),
        (npy_header(HEADER.format("'<f8'", "(1000000000, 1000000000)")), TargetMismatchError, "needs more than its"),
        (npy_header(HEADER.format("'<f8'", "(-1, 2)"), bytes(80)), TargetMismatchError, "expected an .npy array"),
        (npy_header(HEADER.format("'|V0'", "(1000000, 1000000)")), TargetMismatchError, "its values are"),
        (npy_header(HEADER.format("__import__('os')", "(2, 2)")), TargetMismatchError, "expected an .npy array"),
        (npy_header("-" * 9000 + "1"), TargetMismatchError, "expected an .npy array"),
        (npy_header("(" * 300), TargetMismatchError, "expected an .npy array"),
        (npy_header("x" * 60_000), TargetMismatchError, "expected an .npy array"),
    ],
)
def test_what_is_no_npy_of_depth(data: bytes, kind: type[RowError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_npy(data, max_pixels=MANY)


@given(st.binary(max_size=200), st.integers(0, 140))
def test_bytes_that_are_no_npy_or_a_broken_one(noise: bytes, at: int) -> None:
    good = npy(np.arange(6.0).reshape(2, 3))
    for data in (b"\x93NUMPY" + noise, good[:at] + noise, good[: at + 8] + noise[:1] + good[at + 9 :]):
        try:
            assert read_npy(data, max_pixels=MANY).ndim == 2
        except RowError:
            continue
