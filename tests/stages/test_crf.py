"""The dense CRF against mean field by the book, and its lattice against the paper's and the authors' C++."""

import importlib.util
import itertools
import math
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import CrfStage
from pipeline.errors import ConfigError
from pipeline.stages import permutohedral
from pipeline.stages.crf import bilateral_features, crf, gaussian_features, mean_field
from pipeline.stages.permutohedral import Lattice

Floats = npt.NDArray[np.float64]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(height: int, width: int, *, noise: float = 4.0, seed: int = 0) -> Tensor:
    """Smooth patches of colour, with noise: image_CHW uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 4, generator=generator) * 255
    smooth = functional.interpolate(coarse, size=(height, width), mode="nearest")[0]
    return (smooth + noise * torch.randn(3, height, width, generator=generator)).clamp(0, 255).byte()


def noisy_logits(classes: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, classes, height // 4 + 1, width // 4 + 1, generator=generator)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return 2 * smooth + torch.randn(classes, height, width, generator=generator)


# --- mean field


def dense_kernel(feature_ND: Floats) -> Floats:
    """exp(-|f_i - f_j|^2 / 2) for all pairs, with symmetric normalisation."""
    distance_NN = ((feature_ND[:, None] - feature_ND[None]) ** 2).sum(-1)
    kernel_NN = np.exp(-distance_NN / 2)
    norm_N = 1 / np.sqrt(kernel_NN.sum(1))
    return np.asarray(norm_N[:, None] * kernel_NN * norm_N[None])


def by_the_book(logits_KHW: Tensor, image_CHW: Tensor, stage: CrfStage) -> Floats:
    """Algorithm 1 of the paper over all pairs of pixels, in numpy and float64: probability_KHW."""
    classes, height, width = logits_KHW.shape
    unary_KN = -torch.log_softmax(logits_KHW.double(), 0).numpy().reshape(classes, -1)
    place_N2 = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2).astype(np.float64)
    colour_N3 = image_CHW.numpy().reshape(3, -1).T.astype(np.float64)
    kernels = [
        (stage.gaussian_compat, dense_kernel(place_N2 / stage.gaussian_sdims)),
        (
            stage.bilateral_compat,
            dense_kernel(np.concatenate([place_N2 / stage.bilateral_sdims, colour_N3 / stage.bilateral_schan], 1)),
        ),
    ]
    potts_KK = 1 - np.eye(classes)
    probability_KN = np.exp(-unary_KN)
    for _ in range(stage.iterations):
        energy_KN = unary_KN.copy()
        for weight, kernel_NN in kernels:
            energy_KN += potts_KK @ (weight * probability_KN @ kernel_NN)
        probability_KN = np.exp(-(energy_KN - energy_KN.min(0)))
        probability_KN /= probability_KN.sum(0)
    return np.asarray(probability_KN.reshape(classes, height, width))


STAGES = [
    CrfStage(kind="crf"),
    CrfStage(kind="crf", iterations=3, gaussian_sdims=3, bilateral_sdims=20, bilateral_schan=10),
    CrfStage(kind="crf", iterations=5, gaussian_compat=1, bilateral_compat=2, bilateral_sdims=5, bilateral_schan=30),
]


@pytest.mark.parametrize("stage", STAGES)
def test_mean_field_over_all_pairs_is_the_paper_s(stage: CrfStage) -> None:
    logits, image = noisy_logits(4, 14, 18), picture(14, 18)
    features = (
        gaussian_features(14, 18, stage.gaussian_sdims, CPU),
        bilateral_features(image, stage.bilateral_sdims, stage.bilateral_schan),
    )
    kernels = [torch.from_numpy(dense_kernel(feature.double().numpy())).float() for feature in features]
    weights = (stage.gaussian_compat, stage.bilateral_compat)
    log_NK = torch.log_softmax(logits, 0).flatten(1).T
    refined_NK = mean_field(
        log_NK, [(w, k.__matmul__) for w, k in zip(weights, kernels, strict=True)], stage.iterations
    )
    np.testing.assert_allclose(
        refined_NK.exp().T.reshape(logits.shape).numpy(), by_the_book(logits, image, stage), atol=2e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_the_lattice_gives_nearly_the_labels_of_all_pairs(stage: CrfStage) -> None:
    logits, image = noisy_logits(4, 40, 48), picture(40, 48)
    wanted = by_the_book(logits, image, stage)
    found = crf(logits, image, stage).exp().numpy()
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert (found.argmax(0) == wanted.argmax(0)).mean() > 0.97
    assert np.abs(found - wanted).mean() < 0.02
    # Not because nothing happened.
    assert (wanted.argmax(0) != logits.argmax(0).numpy()).mean() > 0.05


def test_labels_follow_the_edges_of_the_image() -> None:
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    image[:, :, 20:] = 200
    logits = torch.zeros(2, 30, 40)
    logits[1, :, 16:] = 1.0  # the border of the classes stands four pixels beside the image's
    logits[0, :, :16] = 1.0
    stage = CrfStage(kind="crf", gaussian_compat=0)
    label_HW = crf(logits, image, stage).argmax(0)
    assert (label_HW[:, :20] == 0).all()
    assert (label_HW[:, 20:] == 1).all()


def test_without_kernels_the_probabilities_stay() -> None:
    logits, image = noisy_logits(3, 9, 7), picture(9, 7)
    stage = CrfStage(kind="crf", gaussian_compat=0, bilateral_compat=0)
    np.testing.assert_allclose(crf(logits, image, stage), torch.log_softmax(logits, 0), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_small_shapes(size: tuple[int, int]) -> None:
    found = crf(noisy_logits(5, *size), picture(*size), CrfStage(kind="crf"))
    assert found.shape == (5, *size)
    np.testing.assert_allclose(found.exp().sum(0), 1, atol=1e-5)


# --- the lattice


def lattice_by_the_book(feature_ND: Floats, value_NK: Floats) -> Floats:
    """Splat, blur and slice point by point, vertices in a dictionary (Adams et al. 2010, sections 3 and 4)."""
    dimensions = feature_ND.shape[1]
    axes = dimensions + 1
    basis = np.zeros((axes, dimensions))
    for column in range(dimensions):
        basis[: column + 1, column] = 1
        basis[column + 1, column] = -(column + 1)
        basis[:, column] *= math.sqrt(2 / 3) * axes / math.sqrt((column + 1) * (column + 2))
    vertices: dict[tuple[int, ...], Floats] = {}
    enclosing = []
    for feature, value in zip(feature_ND, value_NK, strict=True):
        elevated = basis @ feature
        origin = np.rint(elevated / axes) * axes
        excess = round(origin.sum() / axes)
        order = np.argsort(-(elevated - origin), kind="stable")
        # Rounded to a point beside the plane: the coordinates that were rounded most go back.
        if excess > 0:
            origin[order[axes - excess :]] -= axes
        elif excess < 0:
            origin[order[:-excess]] += axes
        order = np.argsort(-(elevated - origin), kind="stable")
        sorted_rest = (elevated - origin)[order] / axes
        weights = [1 - sorted_rest[0] + sorted_rest[-1], *(sorted_rest[:-1] - sorted_rest[1:])[::-1]]
        own = []
        for remainder, weight in enumerate(weights):
            key = origin + remainder
            key[order[axes - remainder :]] -= axes
            vertex = tuple(int(part) for part in key)
            vertices[vertex] = vertices.get(vertex, np.zeros_like(value)) + weight * value
            own.append((vertex, weight))
        enclosing.append(own)
    for axis in range(axes):
        step = np.full(axes, -1)
        step[axis] = dimensions
        blurred = {}
        for vertex, value in vertices.items():
            around = [vertices.get(tuple(int(v) for v in np.add(vertex, sign * step))) for sign in (1, -1)]
            blurred[vertex] = value + 0.5 * sum((other for other in around if other is not None), np.zeros_like(value))
        vertices = blurred
    return np.stack([sum(weight * vertices[vertex] for vertex, weight in own) for own in enclosing])


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_the_lattice_is_the_paper_s(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    feature_ND, value_NK = rng.normal(size=(200, dimensions)) * 2, rng.random((200, 3))
    found = Lattice(torch.from_numpy(feature_ND).float(), normalised=False).filter(torch.from_numpy(value_NK).float())
    np.testing.assert_allclose(found, lattice_by_the_book(feature_ND, value_NK), rtol=2e-4, atol=2e-5)


def test_the_lattice_is_nearly_a_gaussian() -> None:
    rng = np.random.default_rng(0)
    feature_ND, value_NK = rng.normal(size=(3000, 2)), rng.random((3000, 2))
    found = Lattice(torch.from_numpy(feature_ND).float()).filter(torch.from_numpy(value_NK).float()).numpy()
    wanted = dense_kernel(feature_ND) @ value_NK
    assert np.abs(found / wanted - 1).mean() < 0.03


def test_a_lattice_too_fine_for_its_numbers_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    feature_N5, value_NK = bilateral_features(picture(20, 30), 5, 3), torch.rand(600, 4)
    plain = Lattice(feature_N5).filter(value_NK)
    monkeypatch.setattr(permutohedral, "LARGEST_CODE", 1)
    np.testing.assert_allclose(Lattice(feature_N5).filter(value_NK), plain, rtol=1e-5)
    monkeypatch.undo()
    huge = bilateral_features(picture(20, 30), 0.001, 0.0001)  # 2^80 cells: every pixel for itself
    np.testing.assert_allclose(Lattice(huge).filter(value_NK), value_NK, rtol=1e-3)


# --- the authors' C++

needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed (extra crf)"
)


@needs_pydensecrf
@pytest.mark.parametrize(
    ("stage", "size"),
    [*itertools.product(STAGES, [(60, 80)]), (STAGES[0], (31, 47)), (STAGES[0], (1, 64)), (STAGES[0], (240, 320))],
)
def test_it_agrees_with_pydensecrf(stage: CrfStage, size: tuple[int, int]) -> None:
    """Labels of all but one pixel of a thousand, and probabilities within 1e-4 on average: what remains are points on
    the border of two simplices, which the last bit of a float decides."""
    logits, image = noisy_logits(6, *size), picture(*size)
    ours = crf(logits, image, stage).exp()
    theirs = crf(logits, image, stage.model_copy(update={"backend": "pydensecrf"})).exp()
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() >= 0.999
    assert (ours - theirs).abs().mean() < 1e-4
    assert (ours - theirs).abs().max() < 0.1


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ConfigError, match=r"maskmill\[crf\]"):
        crf(noisy_logits(3, 8, 8), picture(8, 8), CrfStage(kind="crf", backend="pydensecrf"))
