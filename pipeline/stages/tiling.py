"""Oversize images in overlapping tiles, blended with linear ramps, in memory of one band of tiles."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["TilePlan", "blend_bands", "fit_affine", "fit_tile", "plan_tiles", "plan_windows", "shrunk_size"]


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tile origins and sizes along both axes, in pixels. Neighbours share `overlap` pixels or more."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    height: int
    width: int
    overlap: int


def plan_tiles(height: int, width: int, *, tile_pixels: int, multiple: int) -> TilePlan:
    """Cover height x width with square-ish tiles whose sides are a multiple of `multiple`, or the image's whole side.

    A side shorter than the tile is taken whole, and the other side grows instead. Padded to `multiple`, a tile has at
    most `tile_pixels`, or one block of multiple x multiple where that is more. Neighbours share an eighth of a tile's
    shorter side, at least `multiple` pixels and at most half of it.
    """
    rows, columns = -(-height // multiple), -(-width // multiple)
    blocks = max(1, tile_pixels // multiple**2)
    tile_rows = min(rows, math.isqrt(blocks))
    tile_columns = min(columns, blocks // tile_rows)
    tile_rows = min(rows, blocks // tile_columns)
    tile_height, tile_width = min(height, tile_rows * multiple), min(width, tile_columns * multiple)
    cut = [tile for tile, whole in ((tile_height, height), (tile_width, width)) if tile < whole]
    overlap = min([max(multiple, min(tile_height, tile_width) // 8), *(tile // 2 for tile in cut)])
    return TilePlan(
        _starts(height, tile_height, overlap), _starts(width, tile_width, overlap), tile_height, tile_width, overlap
    )


def plan_windows(height: int, width: int, *, size: int, overlap: int) -> TilePlan:
    """Cover height x width with windows of `size` x `size` pixels, or the image's whole side where that is less.

    overlap: at most half of size.
    """
    tile_height, tile_width = min(height, size), min(width, size)
    return TilePlan(
        _starts(height, tile_height, overlap), _starts(width, tile_width, overlap), tile_height, tile_width, overlap
    )


def _starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    if tile >= length:
        return (0,)
    step = tile - overlap
    return (*range(0, length - tile, step), length - tile)


def _ramp(tile: int, overlap: int) -> Tensor:
    index = torch.arange(tile, dtype=torch.float32)
    return torch.minimum(torch.minimum(index + 1, tile - index), torch.tensor(overlap + 1.0)) / (overlap + 1.0)


def blend_bands(plan: TilePlan, width: int, predict_tile: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
    """Blend `predict_tile(row, column) -> values_KHW` (tile-sized) and give finished bands of rows, top to bottom.

    Each pixel is the mean of the tiles over it, weighted by a ramp that falls linearly towards the tile's edges. The
    bands concatenate to the whole image: values_KhW float32, on the tiles' device.
    """
    total: Tensor | None = None
    weight_HW = torch.zeros(plan.height, width)
    ramp_HW = _ramp(plan.height, plan.overlap)[:, None] * _ramp(plan.width, plan.overlap)[None, :]
    for index, row in enumerate(plan.rows):
        for column in plan.columns:
            values_KHW = predict_tile(row, column).float()
            if total is None:
                total = torch.zeros(len(values_KHW), plan.height, width, device=values_KHW.device)
                weight_HW, ramp_HW = weight_HW.to(total.device), ramp_HW.to(total.device)
            total[:, :, column : column + plan.width] += values_KHW * ramp_HW
            weight_HW[:, column : column + plan.width] += ramp_HW
        if total is None:
            return
        last = index == len(plan.rows) - 1
        done = plan.height if last else plan.rows[index + 1] - row
        yield total[:, :done] / weight_HW[:done]
        if not last:
            total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], dim=1)
            weight_HW = torch.cat([weight_HW[done:], torch.zeros_like(weight_HW[:done])])


def shrunk_size(height: int, width: int, *, tile_pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width of a whole image made small enough for what a tile may have: multiples of `multiple`, so that no
    padding is near, of nearly the same shape; a side that is shorter than one block stays as it is."""
    scale = min(1.0, math.sqrt(tile_pixels / (height * width)))
    while True:
        blocks = [max(1, int(side * scale / multiple)) for side in (height, width)]
        if math.prod(blocks) * multiple**2 <= tile_pixels or max(blocks) == 1:
            return min(height, blocks[0] * multiple), min(width, blocks[1] * multiple)
        scale *= 0.95


def fit_tile(tile_1HW: Tensor, whole_1hw: Tensor, place: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A tile's depth, of a scale and shift of its own, with those of what was said of the whole image made small, as
    Miangoleh et al. 2021 (arXiv:2105.14021) fit patches to a base: so neighbours agree, whatever they began with.

    whole_1hw: of all of it. place: row and column of the tile's upper left pixel in the image. size: of the image. Both
    are compared at a quarter of the whole's resolution, of 8 rows and columns at least: of details the whole shows
    less, and a fit to them would make the tile flatter.
    """
    lengths = tile_1HW.shape[1:]
    there = [max(1, round(whole_1hw.shape[axis + 1] * lengths[axis] / size[axis])) for axis in (0, 1)]
    # Where the middles of its pixels are in the whole, whose first and last edges are -1 and 1.
    centres = [
        2
        * ((torch.arange(there[axis], device=tile_1HW.device) + 0.5) * lengths[axis] / there[axis] + place[axis])
        / size[axis]
        - 1
        for axis in (0, 1)
    ]
    grid_1hw2 = torch.stack(torch.meshgrid(centres[1], centres[0], indexing="xy"), -1)[None]
    reference_11hw = functional.grid_sample(whole_1hw[None], grid_1hw2, padding_mode="border", align_corners=False)
    small = [min(side, max(8, side // 4)) for side in there]
    pair = [
        functional.interpolate(values, size=small, mode="bilinear", antialias=True)
        for values in (tile_1HW[None], reference_11hw)
    ]
    mean, scale, target = fit_affine(*pair)
    return (tile_1HW - mean) * scale + target


def fit_affine(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, scale and target of which (values - mean) * scale + target has the least squared difference from
    `reference`, over what is finite in both; a scale of 1 where no positive one helps."""
    finite = values.isfinite() & reference.isfinite()
    values_N, reference_N = values[finite], reference[finite]
    mean, target = values_N.mean(), reference_N.mean()
    scale = ((values_N - mean) * (reference_N - target)).sum() / (values_N - mean).square().sum()
    return mean, torch.where((scale > 0) & scale.isfinite(), scale, 1.0), target
