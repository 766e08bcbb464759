"""The network over a pyramid: bands that add up to the image, one set of weights for all, features side by side."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.models.zoo.multiscale import MultiscaleCNN, gaussian_pyramid, laplacian_pyramid, locally_normalised


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(num_classes: int = 4, **options: Any) -> MultiscaleCNN:
    torch.manual_seed(0)
    return MultiscaleCNN(num_classes, **{"width": 2, "hidden": 6, **options}).eval()


def test_parameters_as_in_the_paper() -> None:
    """16, 64 and 256 filters of 7x7 for all scales together, 768 features, 1024 hidden units."""
    module = MultiscaleCNN(8)
    features = 49 * 3 * 16 + 16 + 49 * 16 * 64 + 64 + 49 * 64 * 256 + 256
    assert sum(p.numel() for p in module.features.parameters()) == features
    assert sum(p.numel() for p in module.parameters()) == features + 768 * 1024 + 1024 + 1024 * 8 + 8
    linear = MultiscaleCNN(8, hidden=0)
    assert sum(p.numel() for p in linear.parameters()) == features + 768 * 8 + 8


def test_bands_add_up_to_the_image() -> None:
    image = torch.randn(2, 3, 32, 48)
    bands = laplacian_pyramid(image)
    assert [tuple(band.shape[-2:]) for band in bands] == [(32, 48), (16, 24), (8, 12)]
    total = bands[-1]
    for band in bands[-2::-1]:
        total = band + functional.interpolate(total, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(total, image)


def test_levels_are_blurred_by_hand() -> None:
    image = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    framed = np.pad(image, 2, mode="edge")
    taps = np.array([1, 4, 6, 4, 1]) / 16
    blurred = np.array(
        [[taps @ framed[row : row + 5, column : column + 5] @ taps for column in range(12)] for row in range(8)]
    )
    halved = blurred.reshape(4, 2, 6, 2).mean((1, 3))
    found = gaussian_pyramid(torch.from_numpy(image)[None, None])[1][0, 0]
    np.testing.assert_allclose(found.numpy(), halved, rtol=1e-5, atol=1e-6)
    # A plain image stays plain, and has nothing in its bands but the last.
    plain = laplacian_pyramid(torch.full((1, 3, 16, 16), 2.0))
    assert [round(band.abs().max().item(), 5) for band in plain] == [0, 0, 2]


def test_local_normalisation_by_hand() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=(9, 11))
    expected = np.empty_like(values)
    for row in range(9):
        for column in range(11):
            part = values[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            expected[row, column] = (values[row, column] - part.mean()) / part.std()
    found = locally_normalised(torch.from_numpy(values).float()[None, None], 5)[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert not locally_normalised(torch.full((1, 1, 9, 9), 3.0), 5).any()


@pytest.mark.parametrize(("pyramid", "window"), [("laplacian", 15), ("gaussian", 0)])
@torch.inference_mode()
def test_features_of_three_scales_together(pyramid: Any, window: int) -> None:
    module = build(pyramid=pyramid, window=window)
    image = torch.randn(2, 3, 32, 48)
    bands = laplacian_pyramid(image) if pyramid == "laplacian" else gaussian_pyramid(image)
    parts = []
    for scale, band in enumerate(bands):
        given = locally_normalised(band, window) if window else band
        features = module.features(given)
        assert features.shape == (2, 32, 32 // 2**scale // 4, 48 // 2**scale // 4)
        parts.append(
            features if scale == 0 else functional.interpolate(features, scale_factor=2**scale, mode="bilinear")
        )
    found = module.pyramid_features(image)
    torch.testing.assert_close(found, torch.cat(parts, 1))
    logits = module(image)
    assert logits.shape == (2, 4, 32, 48)
    torch.testing.assert_close(
        logits, functional.interpolate(module.classifier(found), scale_factor=4, mode="bilinear")
    )


def test_every_parameter_learns() -> None:
    module = build().train()
    functional.cross_entropy(module(torch.randn(2, 3, 32, 32)), torch.randint(4, (2, 32, 32))).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="pyramid must be one of laplacian, gaussian, got 'steerable'"):
        build(pyramid="steerable")
    with pytest.raises(ValueError, match="hidden must be 0 or more, window 0 or odd, got 6, 4"):
        build(window=4)
    with pytest.raises(ValueError, match="multiples of 16, got 24 x 32"):
        build()(torch.randn(1, 3, 24, 32))
