"""U-Net's weight map equals the formula with distances found by looking at every pair of pixels."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.training.losses.weight_map import boundary_weight_map

LAW = settings(deadline=None, max_examples=60)
Array = np.ndarray[Any, Any]


def brute_force(instance_HW: Array, class_weight_HW: Array, w0: float, sigma: float) -> Array:
    weight_HW = class_weight_HW.astype(np.float64).copy()
    cells = [np.argwhere(instance_HW == cell) for cell in np.unique(instance_HW) if cell != 0]
    for place in np.argwhere(instance_HW == 0):
        distances = sorted(min(math.dist(place, other) for other in cell) for cell in cells)
        if len(distances) >= 2:
            weight_HW[tuple(place)] += w0 * math.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return weight_HW


MAPS = arrays.arrays(
    st.sampled_from([np.uint8, np.int32]),
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14),
    elements=st.sampled_from([0, 1, 2, 3, 7]),
    fill=st.just(0),
)


@LAW
@given(MAPS, st.sampled_from([(10.0, 5.0), (3.0, 1.0), (10.0, 0.4), (1e-8, 5.0)]), st.integers(0, 100))
def test_it_is_the_formula(instance_HW: Array, parameters: tuple[float, float], seed: int) -> None:
    w0, sigma = parameters
    class_weight_HW = np.random.default_rng(seed).random(instance_HW.shape)
    weight_HW = boundary_weight_map(instance_HW, class_weight_HW, w0=w0, sigma=sigma)
    assert weight_HW.dtype == np.float32
    np.testing.assert_allclose(weight_HW, brute_force(instance_HW, class_weight_HW, w0, sigma), rtol=2e-6, atol=2e-7)


def test_cells_of_any_size_and_shape() -> None:
    """Discs, a ring around one of them, one cell in two parts: where nearest cells are not nearest boxes."""
    y, x = np.mgrid[:44, :56]
    instance_HW = np.zeros((44, 56), np.int32)
    radius = np.hypot(y - 15, x - 17)
    instance_HW[radius < 4] = 5
    instance_HW[(radius > 7) & (radius < 11)] = 9
    instance_HW[np.hypot(y - 30, x - 38) < 9] = 70_000
    instance_HW[:3, 50:] = 3
    instance_HW[40:, :4] = 3
    ones_HW = np.ones(instance_HW.shape)
    np.testing.assert_allclose(
        boundary_weight_map(instance_HW), brute_force(instance_HW, ones_HW, 10, 5), rtol=2e-6, atol=2e-7
    )


def test_the_gap_between_two_cells_counts_most() -> None:
    instance_HW = np.zeros((9, 30), np.int32)
    instance_HW[:, :9], instance_HW[:, 10:20] = 1, 2
    weight_HW = boundary_weight_map(instance_HW)
    assert weight_HW[4, 9] == pytest.approx(1 + 10 * math.exp(-(2**2) / 50))  # a gap of one pixel: d1 = d2 = 1
    assert weight_HW[4, 22] == pytest.approx(1 + 10 * math.exp(-((3 + 14) ** 2) / 50))
    assert (weight_HW[:, :9] == 1).all()
    assert weight_HW.max() == weight_HW[4, 9]


@pytest.mark.parametrize("cells", [0, 1])
def test_fewer_than_two_cells_have_no_border(cells: int) -> None:
    instance_HW = np.zeros((6, 7), np.uint8)
    instance_HW[:2, :2] = cells
    class_weight_HW = np.arange(42.0).reshape(6, 7)
    np.testing.assert_array_equal(boundary_weight_map(instance_HW, class_weight_HW), class_weight_HW)


def test_a_map_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"instance_HW of two axes, got \(1, 2, 3\)"):
        boundary_weight_map(np.zeros((1, 2, 3), np.int32))
