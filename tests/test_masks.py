"""Codecs of the table: exact round trips, agreement with pycocotools, and bounded work on what does not fit."""

import io
import tracemalloc
import zlib
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.errors import SchemaError
from pipeline.masks import (
    MapFormat,
    decode_depth,
    decode_label_map,
    decode_panoptic_png,
    decode_rle,
    encode_depth,
    encode_label_map,
    encode_panoptic_png,
    encode_rle,
    rle_area,
    rle_bbox,
)

FORMS: tuple[MapFormat, ...] = get_args(MapFormat)
SIZES = [(1, 1), (1, 33), (33, 1), (7, 5), (40, 64)]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)


def png(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


# --- label maps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_label_maps_round_trip(form: MapFormat, dtype: type, height: int, width: int) -> None:
    top = np.iinfo(dtype).max
    label_HW = np.random.default_rng(0).integers(0, top + 1, (height, width)).astype(dtype)
    label_HW.flat[0] = top
    result_HW = decode_label_map(encode_label_map(label_HW, form), form, width=width, height=height)
    assert result_HW.dtype == dtype
    np.testing.assert_array_equal(result_HW, label_HW)


@given(hnp.arrays(st.sampled_from([np.dtype("u1"), np.dtype("u2")]), SHAPES), st.sampled_from(FORMS), st.booleans())
@settings(deadline=None)
def test_any_label_map_round_trips(label_HW: npt.NDArray[Any], form: MapFormat, turned: bool) -> None:
    label_HW = label_HW.T if turned else label_HW  # not contiguous
    height, width = label_HW.shape
    result_HW = decode_label_map(encode_label_map(label_HW, form), form, width=width, height=height)
    assert result_HW.dtype == label_HW.dtype
    np.testing.assert_array_equal(result_HW, label_HW)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, bool, np.int8])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(SchemaError, match="expected label_HW of uint8 or uint16, got"):
        encode_label_map(np.zeros((2, 2), dtype))  # type: ignore[type-var]


@pytest.mark.parametrize("shape", [(4,), (2, 2, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="got uint8"):
        encode_label_map(np.zeros(shape, np.uint8))


LABEL_HW = np.arange(35, dtype=np.uint8).reshape(5, 7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "height"), [(5, 7), (7, 6), (8, 5), (7, 11), (1, 1)])
def test_another_size_is_refused(form: MapFormat, width: int, height: int) -> None:
    data = encode_label_map(LABEL_HW, form)
    if form == "zstd" and width * height == LABEL_HW.size:
        pytest.skip("raw rows do not know their width")
    with pytest.raises(SchemaError, match=rf"expected .*{width}x{height}"):
        decode_label_map(data, form, width=width, height=height)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_and_foreign_data_are_schema_errors(form: MapFormat) -> None:
    data = encode_label_map(np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8), form)
    for wrong in (
        b"",
        b"hello",
        data[: len(data) // 2],
        data[:20],
        encode_label_map(LABEL_HW, "png" if form == "zstd" else "zstd"),
    ):
        with pytest.raises(SchemaError) as caught:
            decode_label_map(wrong, form, width=40, height=40)
        assert "\n" not in str(caught.value)


def test_a_png_of_three_channels_is_no_label_map() -> None:
    with pytest.raises(SchemaError, match="expected a PNG of one channel, got 3"):
        decode_label_map(png(np.zeros((5, 7, 3), np.uint8)), "png", width=7, height=5)


@pytest.mark.parametrize("frames", [1, 40])
def test_a_zstd_bomb_is_bounded(frames: int) -> None:
    # One frame that says its size and inflates to 200 MB, and many of them in a row: 8 GB from 250 kB.
    data = zstd(bytes(200_000_000)) * frames
    assert len(data) < 1_000_000
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        with pytest.raises(SchemaError, match="expected 64x64 values of 1 or 2 bytes in zstd"):
            decode_label_map(data, "zstd", width=64, height=64)
        with pytest.raises(SchemaError, match="expected 64x64 depth codes"):
            decode_depth({"format": "zstd", "data": data, "scale": 1.0, "offset": 0.0}, width=64, height=64)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert pool.bytes_allocated() <= before


def test_a_png_bomb_is_refused_by_its_header() -> None:
    label_HW = np.zeros((1, 1), np.uint8)
    data = bytearray(png(label_HW))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    for decode in (
        lambda: decode_label_map(bytes(data), "png", width=1, height=1),
        lambda: decode_panoptic_png(bytes(data), width=1, height=1),
        lambda: decode_depth({"format": "png", "data": bytes(data), "scale": 1.0, "offset": 0.0}, width=1, height=1),
    ):
        with pytest.raises(SchemaError, match="expected a PNG of 1x1, got 60000x60000"):
            decode()


def test_maps_over_the_limit_of_pillow_decode() -> None:
    assert Image.MAX_IMAGE_PIXELS is None


# --- run lengths


@given(hnp.arrays(bool, SHAPES))
@settings(deadline=None)
def test_run_lengths_are_those_of_pycocotools(mask_HW: npt.NDArray[np.bool_]) -> None:
    height, width = mask_HW.shape
    counts = encode_rle(mask_HW)
    theirs = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    assert counts == theirs["counts"].decode()
    assert counts == encode_rle(mask_HW.astype(np.uint8)) == encode_rle(np.asfortranarray(mask_HW))
    np.testing.assert_array_equal(decode_rle(counts, width=width, height=height), mask_HW)
    assert rle_area(counts, width=width, height=height) == mask_HW.sum() == coco_mask.area(theirs)
    rows, columns = np.nonzero(mask_HW)
    box = (0, 0, 0, 0)
    if len(rows):
        box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert rle_bbox(counts, width=width, height=height) == pytest.approx(box)


def test_long_runs() -> None:
    mask_HW = np.zeros((3000, 2000), bool)
    mask_HW[:, 700:1500] = True
    counts = encode_rle(mask_HW)
    assert len(counts) < 20
    np.testing.assert_array_equal(decode_rle(counts, width=2000, height=3000), mask_HW)


@pytest.mark.parametrize(
    "counts", ["", "0", "1", "08", "0:", "00000000", "oooo", "PPPPPP1", "zzzz", "é", "P", "0`````````0", "9 9"]
)
def test_run_lengths_that_do_not_fill_the_mask_are_refused(counts: str) -> None:
    with pytest.raises(SchemaError, match="expected run lengths"):
        decode_rle(counts, width=3, height=3)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_text_is_a_mask_or_a_schema_error(counts: str) -> None:
    try:
        mask_HW = decode_rle(counts, width=3, height=2)
    except SchemaError:
        return
    np.testing.assert_array_equal(decode_rle(encode_rle(mask_HW), width=3, height=2), mask_HW)


# --- panoptic


@given(hnp.arrays(np.int32, SHAPES, elements=st.integers(0, 2**24 - 1)))
@settings(deadline=None)
def test_panoptic_round_trips(segment_HW: npt.NDArray[np.int32]) -> None:
    height, width = segment_HW.shape
    result_HW = decode_panoptic_png(encode_panoptic_png(segment_HW), width=width, height=height)
    assert result_HW.dtype == np.int32
    np.testing.assert_array_equal(result_HW, segment_HW)


def test_panoptic_channels_are_those_of_coco() -> None:
    data = encode_panoptic_png(np.array([[0, 1, 256, 65536, 2**24 - 1]]))
    assert np.asarray(Image.open(io.BytesIO(data))).tolist() == [
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [255] * 3]
    ]


@pytest.mark.parametrize("wrong", [-1, 2**24, 2**31 - 1])
def test_ids_outside_of_24_bits_are_refused(wrong: int) -> None:
    with pytest.raises(SchemaError, match=f"expected ids from 0 to 16777215, got .*{wrong}"):
        encode_panoptic_png(np.array([[5, wrong]]))


def test_panoptic_files_of_another_form_are_refused() -> None:
    for data in (b"", png(np.zeros((2, 3), np.uint8)), png(np.zeros((3, 2, 3), np.uint8))):
        with pytest.raises(SchemaError):
            decode_panoptic_png(data, width=3, height=2)


def test_alpha_of_a_panoptic_file_is_ignored() -> None:
    values = np.full((1, 1, 4), (7, 1, 0, 0), np.uint8)
    assert decode_panoptic_png(png(values), width=1, height=1).tolist() == [[263]]


# --- depth

FLOATS = (
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(0, 100, width=32)
    | st.sampled_from([np.nan, np.inf, -np.inf])
)


def both(depth_HW: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Encoded and decoded in both formats, which must agree."""
    height, width = depth_HW.shape
    codes = [encode_depth(depth_HW, "metric_m", form) for form in FORMS]
    results = [decode_depth(code, width=width, height=height) for code in codes]
    np.testing.assert_array_equal(results[0], results[1])
    assert {(c["scale"], c["offset"], c["kind"]) for c in codes} == {
        (codes[0]["scale"], codes[0]["offset"], "metric_m")
    }
    return results[0]


@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
@settings(deadline=None)
def test_depth_is_right_to_its_rounding(depth_HW: npt.NDArray[np.float32]) -> None:
    result_HW = both(depth_HW)
    valid_HW = np.isfinite(depth_HW)
    np.testing.assert_array_equal(np.isfinite(result_HW), valid_HW)
    assert np.isnan(result_HW[~valid_HW]).all()
    if valid_HW.any():
        exact = depth_HW[valid_HW].astype(np.float64)
        # The docstring's bound, and half a step of the float32 that the result is given in.
        bound = (exact.max() - exact.min()) / 131068 * (1 + 1e-9) + np.spacing(np.float32(np.abs(exact).max()))
        assert np.abs(result_HW[valid_HW] - exact).max() <= bound


@pytest.mark.parametrize("value", [0.0, 7.25, -3.5, 1e-30, 3e38])
def test_constant_depth_is_exact(value: float) -> None:
    depth_HW = np.full((3, 4), value, np.float32)
    np.testing.assert_array_equal(both(depth_HW), depth_HW)


def test_depth_without_a_valid_pixel() -> None:
    assert np.isnan(both(np.full((2, 3), np.nan, np.float32))).all()
    assert np.isnan(both(np.array([[np.inf, -np.inf]], np.float32))).all()


def test_depth_uses_every_code_and_keeps_its_ends() -> None:
    depth_HW = np.linspace(0.5, 80, 65535, dtype=np.float64).reshape(5, -1)
    result_HW = both(depth_HW)
    assert len(np.unique(result_HW)) == 65535
    assert (result_HW.min(), result_HW.max()) == (0.5, 80)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_depth_of_other_floats(dtype: type) -> None:
    depth_HW = np.array([[0, 1, 2], [65504, np.nan, 3]], dtype)
    np.testing.assert_allclose(both(depth_HW), depth_HW, atol=0.51)


@pytest.mark.parametrize("form", FORMS)
def test_depth_of_another_size_is_refused(form: MapFormat) -> None:
    code = encode_depth(np.zeros((4, 6), np.float32), "relative", form)
    with pytest.raises(SchemaError, match=r"expected .*5x4"):
        decode_depth(code, width=5, height=4)
