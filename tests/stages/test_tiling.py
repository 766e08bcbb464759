"""Tiles cover everything and fit; blending is the weighted mean that a full-size accumulator gives, in one band."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.stages.tiling import TilePlan, blend_bands, plan_tiles

SIDES = st.integers(1, 700) | st.sampled_from([1, 2, 5000, 20_000])
MULTIPLES = st.sampled_from([1, 8, 16, 32, 64])


def padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@given(SIDES, SIDES, st.integers(1, 300_000), MULTIPLES)
def test_tiles_cover_the_image_and_fit(height: int, width: int, tile_pixels: int, multiple: int) -> None:
    plan = plan_tiles(height, width, tile_pixels=tile_pixels, multiple=multiple)
    for starts, tile, whole in ((plan.rows, plan.height, height), (plan.columns, plan.width, width)):
        assert starts[0] == 0
        assert starts[-1] + tile == whole
        assert 1 <= tile <= whole
        assert tile == whole or tile % multiple == 0
        assert all(0 < after - before <= tile - plan.overlap for before, after in pairwise(starts))
        # At most half of a tile is shared, so no image needs more than about twice the tiles that cover it.
        assert len(starts) <= 2 * -(-whole // tile)
    assert padded(plan.height, multiple) * padded(plan.width, multiple) <= max(tile_pixels, multiple**2)


@given(SIDES, SIDES, MULTIPLES)
def test_what_fits_is_one_tile(height: int, width: int, multiple: int) -> None:
    pixels = padded(height, multiple) * padded(width, multiple)
    plan = plan_tiles(height, width, tile_pixels=pixels, multiple=multiple)
    assert (plan.rows, plan.columns, plan.height, plan.width) == ((0,), (0,), height, width)


@pytest.mark.parametrize(
    ("height", "width", "tile_pixels", "multiple", "tile"),
    [
        (1000, 1000, 65_536, 32, (256, 256)),
        (100, 5000, 65_536, 32, (100, 512)),
        (1, 20_000, 65_536, 32, (1, 2048)),
        (20_000, 1, 65_536, 1, (20_000, 1)),
        (200_000, 1, 65_536, 1, (65_536, 1)),
    ],
)
def test_tiles_by_hand(height: int, width: int, tile_pixels: int, multiple: int, tile: tuple[int, int]) -> None:
    plan = plan_tiles(height, width, tile_pixels=tile_pixels, multiple=multiple)
    assert (plan.height, plan.width) == tile


def reference(plan: TilePlan, height: int, width: int, tiles: dict[tuple[int, int], Tensor]) -> Tensor:
    """The same weights, in float64 and with an accumulator for the whole image."""
    channels = len(next(iter(tiles.values())))
    total, weight = torch.zeros(channels, height, width, dtype=torch.float64), torch.zeros(height, width).double()

    def ramp(tile: int) -> Tensor:
        return torch.tensor([min(i + 1, tile - i, plan.overlap + 1) for i in range(tile)], dtype=torch.float64)

    ramp_HW = ramp(plan.height)[:, None] * ramp(plan.width)[None]
    for (row, column), values in tiles.items():
        total[:, row : row + plan.height, column : column + plan.width] += values.double() * ramp_HW
        weight[row : row + plan.height, column : column + plan.width] += ramp_HW
    return total / weight


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 600), st.sampled_from([1, 2, 8]))
@settings(deadline=None, max_examples=60)
def test_bands_are_the_full_accumulator(height: int, width: int, tile_pixels: int, multiple: int) -> None:
    plan = plan_tiles(height, width, tile_pixels=tile_pixels, multiple=multiple)
    generator = torch.Generator().manual_seed(0)
    tiles = {
        (row, column): torch.rand(2, plan.height, plan.width, generator=generator)
        for row in plan.rows
        for column in plan.columns
    }
    bands = list(blend_bands(plan, width, lambda row, column: tiles[row, column]))
    assert all(band.shape[1] <= plan.height and band.dtype == torch.float32 for band in bands)
    result = torch.cat(bands, dim=1)
    assert result.shape == (2, height, width)
    torch.testing.assert_close(result.double(), reference(plan, height, width, tiles), rtol=0, atol=1e-6)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 900), st.sampled_from([1, 4, 8]))
@settings(deadline=None, max_examples=60)
def test_cutting_and_blending_an_image_gives_the_image(height: int, width: int, pixels: int, multiple: int) -> None:
    plan = plan_tiles(height, width, tile_pixels=pixels, multiple=multiple)
    whole = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    cut = lambda row, column: whole[:, row : row + plan.height, column : column + plan.width]  # noqa: E731
    torch.testing.assert_close(torch.cat(list(blend_bands(plan, width, cut)), dim=1), whole, rtol=0, atol=1e-6)
    constant = list(blend_bands(plan, width, lambda *_: torch.full((1, plan.height, plan.width), 7.5)))
    torch.testing.assert_close(torch.cat(constant, dim=1), torch.full((1, height, width), 7.5), rtol=0, atol=5e-6)


def test_tiles_are_asked_for_row_by_row_and_once() -> None:
    plan = plan_tiles(50, 40, tile_pixels=256, multiple=8)
    asked: list[tuple[int, int]] = []

    def tile(row: int, column: int) -> Tensor:
        asked.append((row, column))
        return torch.zeros(1, plan.height, plan.width)

    bands = blend_bands(plan, 40, tile)
    next(bands)
    assert asked == [(0, column) for column in plan.columns]
    list(bands)
    assert asked == [(row, column) for row in plan.rows for column in plan.columns]


def test_one_band_is_held() -> None:
    plan = plan_tiles(4000, 64, tile_pixels=4096, multiple=8)
    largest = 0
    for band in blend_bands(plan, 64, lambda *_: torch.zeros(4, plan.height, plan.width)):
        largest = max(largest, band.untyped_storage().nbytes())
    assert largest <= 4 * plan.height * 64 * 4
