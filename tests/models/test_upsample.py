"""The ways to enlarge maps, against interpolation written as a sum over hats, and against hand-made maps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.zoo.upsample import Enlarge, Upsample, Upsampling, bilinear_kernel, from_grid


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def hats(count: int, first: float, stride: float, at: Tensor) -> Tensor:
    """(pixels, count): what each of `count` values at first, first + stride, ... gives to each place in `at`."""
    places = first + stride * torch.arange(count, dtype=torch.float64)
    return (1 - (at[:, None] - places).abs() / stride).clamp(min=0)


def spread(values_BCHW: Tensor, first: float, stride: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear interpolation that fades out behind the outermost values."""
    vertical, horizontal = (
        hats(size, first, stride, at) for size, at in zip(values_BCHW.shape[-2:], (rows, columns), strict=True)
    )
    return torch.einsum("yh,bchw,xw->bcyx", vertical, values_BCHW.double(), horizontal).float()


def test_the_kernel_of_two() -> None:
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
    assert torch.equal(bilinear_kernel(2), taps[:, None] * taps)
    # Wherever they fall, the taps that meet in a pixel add up to 1.
    assert torch.equal(bilinear_kernel(8).unflatten(0, (2, 8)).sum(0).unflatten(1, (2, 8)).sum(1), torch.ones(8, 8))


def test_nails_and_copies() -> None:
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    nails = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])
    copies = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert torch.equal(Upsample(1, "bed_of_nails")(values)[0, 0], nails)
    assert torch.equal(Upsample(1, "nearest")(values)[0, 0], copies)


def test_values_go_back_to_their_maxima() -> None:
    image = torch.tensor([[[[1.0, 9, 2, 3], [4, 5, 8, 6], [7, 0, 1, 2], [3, 5, 4, 3]]]])
    pooled, indices = functional.max_pool2d(image, 2, return_indices=True)
    expected = torch.where(torch.isin(image, pooled) & (image >= 4), image, 0)
    expected[0, 0, 3, 1] = 0  # 5 is no maximum of its square, though another 5 might be
    expected[0, 0, 1, :2] = 0
    assert torch.equal(Upsample(1, "max_unpool")(pooled, indices), expected)
    with pytest.raises(ValueError, match="needs the indices"):
        Upsample(1, "max_unpool")(pooled)


@pytest.mark.parametrize("kind", ["transposed", "bilinear"])
def test_twice_as_large_is_bilinear(kind: Upsampling) -> None:
    values = torch.randn(2, 3, 4, 5)
    with torch.inference_mode():
        found = Upsample(3, kind)(values)
    rows, columns = (torch.arange(2 * size, dtype=torch.float64) for size in (4, 5))
    expected = spread(values, 0.5, 2, rows, columns)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


@pytest.mark.parametrize("factor", [2, 8, 16, 32])
@pytest.mark.parametrize("learned", [True, False])
@torch.inference_mode()
def test_a_transposed_convolution_begins_as_interpolation(factor: int, learned: bool) -> None:
    values = torch.randn(2, 3, 3, 4)
    found = Enlarge(3, factor, learned=learned)(values)
    rows, columns = (torch.arange(factor * (size + 1), dtype=torch.float64) for size in (3, 4))
    torch.testing.assert_close(found, spread(values, factor - 0.5, factor, rows, columns))


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
@torch.inference_mode()
def test_the_others_lie_in_the_same_place(kind: Upsampling) -> None:
    values = torch.randn(2, 3, 3, 4)
    found, expected = Enlarge(3, 8, kind)(values), Enlarge(3, 8)(values)
    assert found.shape == expected.shape == (2, 3, 32, 40)
    if kind == "bilinear":
        torch.testing.assert_close(found[..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8])
        torch.testing.assert_close(found[..., 0, 0], values[..., 0, 0])
    else:
        copies = values.repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert torch.equal(found[..., 4:-4, 4:-4], copies)


@pytest.mark.parametrize(("height", "width"), [(17, 25), (16, 20), (24, 32), (1, 3)])
def test_a_grid_from_the_first_pixel_on(height: int, width: int) -> None:
    values = torch.randn(1, 2, 3, 4)
    found = from_grid(values, 8, height, width)
    assert found.shape == (1, 2, height, width)
    rows, columns = torch.arange(height).clamp(max=16).double(), torch.arange(width).clamp(max=24).double()
    torch.testing.assert_close(found, spread(values, 0, 8, rows, columns))


def test_only_a_learned_one_learns() -> None:
    assert [name for name, _ in Enlarge(3, 2, learned=True).named_parameters()] == ["weight"]
    fixed = Enlarge(3, 32)
    assert [*fixed.parameters()] == []
    assert fixed.state_dict() == {}


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="one of nearest, bilinear, bed_of_nails, max_unpool, transposed, got 'cubic'"):
        Upsample(3, "cubic")  # type: ignore[arg-type]
    for kind in ("bed_of_nails", "max_unpool"):
        with pytest.raises(ValueError, match=f"one of transposed, bilinear, nearest, got '{kind}'"):
            Enlarge(3, 2, kind)  # type: ignore[arg-type]
