"""Masks in the run lengths of labelling tools, each coding with its inverse.

CVAT: the pixels of a mask's box row by row, lengths of runs that begin with background (the `mask` element of
https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/). Label Studio: a bit stream of runs of bytes after
rle-pack (https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack), over the RGBA values of all pixels.
"""

import numpy as np
import numpy.typing as npt

from pipeline.errors import TargetMismatchError

__all__ = ["decode_brush", "decode_runs", "encode_brush", "encode_runs"]

Mask = npt.NDArray[np.bool_]
CHANNELS = 4
WORD_BITS = 8
# Bits of a run's length, by the two bits in front of it: the sizes that Label Studio's own writer has.
SIZES = (3, 4, 8, 16)
HEADER_BITS = 32 + 5 + 4 * 4
LONGEST = 1 << 16


def _runs(flat: Mask) -> tuple[npt.NDArray[np.int64], bool]:
    """Lengths of the runs of a flat mask and whether the first is foreground."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.diff(np.concatenate([[0], edges, [flat.size]])), bool(flat[0])


def encode_runs(mask_HW: Mask) -> list[int]:
    """A mask, which is the crop of a box, as CVAT's run lengths."""
    lengths, first = _runs(mask_HW.ravel())
    return [0, *lengths.tolist()] if first else lengths.tolist()


def decode_runs(runs: npt.NDArray[np.int64], *, width: int, height: int) -> Mask:
    """The inverse of `encode_runs`: mask_HW. Raises TargetMismatchError where the runs do not fill the box."""
    if (runs < 0).any() or int(runs.sum()) != width * height:
        raise TargetMismatchError(f"expected run lengths of {width}x{height} pixels, got {runs.sum()}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def encode_brush(mask_HW: Mask) -> list[int]:
    """A mask of the whole image as Label Studio's `rle`: bytes 0 to 255."""
    lengths, first = _runs(mask_HW.ravel())
    lengths = lengths * CHANNELS
    is_on = (np.arange(len(lengths)) % 2 == 0) == first
    pieces = -(-lengths // LONGEST)
    values = np.repeat(is_on, pieces)
    counts = np.full(len(values), LONGEST, np.int64)
    ends = np.cumsum(pieces) - 1
    counts[ends] = lengths - (pieces - 1) * LONGEST
    sizes = np.searchsorted(np.array([1 << size for size in SIZES]), counts)
    bits_of = np.array(SIZES)[sizes]
    # Of each run: 1, the size's two bits, its length less one, and the byte.
    width = 1 + 2 + bits_of + WORD_BITS
    offsets = HEADER_BITS + np.concatenate([[0], np.cumsum(width)])
    bits = np.zeros(-(-int(offsets[-1]) // 8) * 8, np.uint8)
    _put(bits, np.array([0]), np.array([mask_HW.size * CHANNELS]), np.array([32]))
    _put(bits, np.array([32]), np.array([WORD_BITS - 1]), np.array([5]))
    for index, size in enumerate(SIZES):
        _put(bits, np.array([37 + 4 * index]), np.array([size - 1]), np.array([4]))
    at = offsets[:-1]
    bits[at] = 1
    _put(bits, at + 1, sizes, np.full(len(at), 2))
    _put(bits, at + 3, counts - 1, bits_of)
    _put(bits, at + 3 + bits_of, np.where(values, 255, 0), np.full(len(at), WORD_BITS))
    result: list[int] = np.packbits(bits).tolist()
    return result


def _put(
    bits: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
) -> None:
    """Write each value at its offset, most significant bit first."""
    for step in range(int(widths.max(initial=0))):
        wanted = widths > step
        bits[offsets[wanted] + step] = (values[wanted] >> (widths[wanted] - 1 - step)) & 1


def decode_brush(data: npt.NDArray[np.uint8], *, width: int, height: int) -> Mask:
    """The inverse of `encode_brush`, of any writer's stream: a pixel is on where its alpha is not 0.

    Raises TargetMismatchError for a stream that is cut or does not fill the image.
    """
    bits = np.unpackbits(data)
    total = width * height * CHANNELS

    def take(at: int, count: int) -> int:
        if at + count > len(bits):
            raise TargetMismatchError(f"expected {total} values of an image of {width}x{height}, the stream ends early")
        return int.from_bytes(np.packbits(np.concatenate([PAD[: -count % 8], bits[at : at + count]])).tobytes(), "big")

    if take(0, 32) != total:
        raise TargetMismatchError(f"expected {total} values of an image of {width}x{height}, got {take(0, 32)}")
    word = take(32, 5) + 1
    if word != WORD_BITS:
        raise TargetMismatchError(f"expected values of {WORD_BITS} bits, got {word}")
    sizes = [take(37 + 4 * index, 4) + 1 for index in range(4)]
    values = np.empty(total, np.uint8)
    at, done = HEADER_BITS, 0
    while done < total:
        is_run, size = take(at, 1), sizes[take(at + 1, 2)]
        length = take(at + 3, size) + 1
        at += 3 + size
        if done + length > total:
            raise TargetMismatchError(f"expected {total} values of an image of {width}x{height}, got more")
        if is_run:
            values[done : done + length] = take(at, WORD_BITS)
            at += WORD_BITS
        else:
            take(at, length * WORD_BITS)
            values[done : done + length] = np.packbits(bits[at : at + length * WORD_BITS])
            at += length * WORD_BITS
        done += length
    return np.asarray(values.reshape(height, width, CHANNELS)[..., CHANNELS - 1] > 0)


PAD = np.zeros(8, np.uint8)
